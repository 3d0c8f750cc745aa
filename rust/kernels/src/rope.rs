//! Rotary position embedding (Su et al. 2021) in the half-split form: pairs `(i, i + rotary/2)` of each head.
//!
//! The angle is `f32(position) · inverse_frequency` rounded to f32, as transformers computes it; its sine and cosine are
//! taken in f64 and rounded once.

use crate::isa::Isa;
use crate::math::sin_cos;
use crate::selftest::float_level;
use crate::vector::{Kernel, LANES, Simd, dispatch};

/// Sines and cosines of the positions seen so far; grows on demand.
#[derive(Clone, Debug)]
pub struct RopeTable {
    inverse_frequencies: Vec<f32>,
    scale: f32,
    /// (positions, half) cosines, already times `scale`.
    cosines: Vec<f32>,
    /// (positions, half) sines, already times `scale`.
    sines: Vec<f32>,
}

impl RopeTable {
    /// An empty table; `inverse_frequencies`: (rotary/2,), `scale` multiplies sines and cosines (`YaRN`'s attention
    /// factor, else 1).
    pub fn new(inverse_frequencies: Vec<f32>, scale: f32) -> RopeTable {
        RopeTable { inverse_frequencies, scale, cosines: Vec::new(), sines: Vec::new() }
    }

    /// Dimensions of a head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        2 * self.inverse_frequencies.len()
    }

    /// Makes the table hold at least positions `0..positions`.
    pub fn ensure(&mut self, positions: usize) {
        let half = self.inverse_frequencies.len();
        let have = self.cosines.len().checked_div(half).unwrap_or(positions);
        if positions > have {
            // At least doubled, so that a growing sequence pays once for each position.
            let grown = positions.max(2 * have).max(256);
            self.cosines.resize(grown * half, 0.0);
            self.sines.resize(grown * half, 0.0);
            let (cosines, sines) = (&mut self.cosines[have * half..], &mut self.sines[have * half..]);
            let first = have;
            // Not the level of the self-tests, which grow tables themselves.
            dispatch(
                Isa::active(),
                Fill { inverse_frequencies: &self.inverse_frequencies, scale: self.scale, first, cosines, sines },
            );
        }
    }
}

struct Fill<'a> {
    inverse_frequencies: &'a [f32],
    scale: f32,
    first: usize,
    cosines: &'a mut [f32],
    sines: &'a mut [f32],
}

impl Kernel for Fill<'_> {
    type Output = ();

    // Plain Rust: the level only makes `mul_add` an instruction.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let half = self.inverse_frequencies.len();
        let rows = self.cosines.chunks_exact_mut(half).zip(self.sines.chunks_exact_mut(half));
        for (position, (cosines, sines)) in (self.first..).zip(rows) {
            for ((&frequency, cosine), sine) in self.inverse_frequencies.iter().zip(cosines).zip(sines) {
                let (s, c) = sin_cos(f64::from(position as f32 * frequency));
                *cosine = c as f32 * self.scale;
                *sine = s as f32 * self.scale;
            }
        }
    }
}

/// Rotates the first [`RopeTable::rotary_dim`] dimensions of each head in place:
/// `a, b = a·cos - b·sin, b·cos + a·sin` for the pairs `(i, i + rotary/2)`.
///
/// `x`: (t, stride), of whose rows the first `heads · head_dim` floats are heads; `positions`: (t,).
///
/// # Panics
/// When a position lies beyond the table (see [`RopeTable::ensure`]) or the shapes don't fit.
pub fn rotate(table: &RopeTable, x: &mut [f32], stride: usize, heads: usize, head_dim: usize, positions: &[u32]) {
    rotate_with(float_level(), table, x, stride, heads, head_dim, positions);
}

/// [`rotate`] on a given level.
#[doc(hidden)]
pub fn rotate_with(
    isa: Isa,
    table: &RopeTable,
    x: &mut [f32],
    stride: usize,
    heads: usize,
    head_dim: usize,
    positions: &[u32],
) {
    assert!(table.rotary_dim() <= head_dim, "rotate: {} rotary of {head_dim} dimensions", table.rotary_dim());
    assert!(heads * head_dim <= stride, "rotate: {heads} heads of {head_dim} in rows of {stride}");
    if positions.is_empty() || heads == 0 || table.rotary_dim() == 0 {
        return;
    }
    assert!(
        x.len() >= (positions.len() - 1) * stride + heads * head_dim,
        "rotate: {} floats for {} rows of {stride}",
        x.len(),
        positions.len()
    );
    dispatch(isa, Rotate { table, x, stride, heads, head_dim, positions });
}

struct Rotate<'a> {
    table: &'a RopeTable,
    x: &'a mut [f32],
    stride: usize,
    heads: usize,
    head_dim: usize,
    positions: &'a [u32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let half = self.table.inverse_frequencies.len();
        for (row, &position) in self.x.chunks_mut(self.stride).zip(self.positions) {
            let at = position as usize * half..(position as usize + 1) * half;
            let (cosines, cosines_tail) = self.table.cosines[at.clone()].as_chunks::<LANES>();
            let (sines, sines_tail) = self.table.sines[at].as_chunks::<LANES>();
            for head in row.chunks_exact_mut(self.head_dim).take(self.heads) {
                let (a, b) = head[..2 * half].split_at_mut(half);
                let (a, a_tail) = a.as_chunks_mut::<LANES>();
                let (b, b_tail) = b.as_chunks_mut::<LANES>();
                for (((a, b), cosine), sine) in a.iter_mut().zip(b).zip(cosines).zip(sines) {
                    let pair = (simd.load(a), simd.load(b));
                    let pair = turned(simd, pair, simd.load(cosine), simd.load(sine));
                    simd.store(pair.0, a);
                    simd.store(pair.1, b);
                }
                if !a_tail.is_empty() {
                    let pair = (simd.load_part(a_tail), simd.load_part(b_tail));
                    let pair = turned(simd, pair, simd.load_part(cosines_tail), simd.load_part(sines_tail));
                    simd.store_part(pair.0, a_tail);
                    simd.store_part(pair.1, b_tail);
                }
            }
        }
    }
}

#[inline(always)]
fn turned<S: Simd>(simd: S, (a, b): (S::F, S::F), cosine: S::F, sine: S::F) -> (S::F, S::F) {
    (simd.neg_mul_add(b, sine, simd.mul(a, cosine)), simd.mul_add(a, sine, simd.mul(b, cosine)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::uniforms;

    fn frequencies(half: usize) -> Vec<f32> {
        (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect()
    }

    #[test]
    fn rotation_matches_the_formula_on_every_level() {
        let cases = [(8, 8, 1, 8), (64, 64, 9, 600), (32, 12, 3, 100), (64, 62, 2, 128), (256, 256, 4, 1024)];
        for (head_dim, rotary, heads, stride) in cases {
            let half = rotary / 2;
            let mut table = RopeTable::new(frequencies(half), 1.25);
            table.ensure(9000);
            let positions = [0, 1, 8999, 17];
            let x = uniforms(3, positions.len() * stride);
            let mut scalar = x.clone();
            rotate_with(Isa::Scalar, &table, &mut scalar, stride, heads, head_dim, &positions);
            for (t, &position) in positions.iter().enumerate() {
                for i in 0..stride {
                    let at = t * stride + i;
                    let dim = i % head_dim;
                    let expected = if i >= heads * head_dim || dim >= rotary {
                        f64::from(x[at])
                    } else {
                        let angle = f64::from(position as f32 * frequencies(half)[dim % half]);
                        let (sine, cosine) = (angle.sin() * 1.25, angle.cos() * 1.25);
                        if dim < half {
                            f64::from(x[at]) * cosine - f64::from(x[at + half]) * sine
                        } else {
                            f64::from(x[at]) * cosine + f64::from(x[at - half]) * sine
                        }
                    };
                    assert!((f64::from(scalar[at]) - expected).abs() < 5e-7, "{head_dim} {rotary} {t} {i}");
                }
            }
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                let mut got = x.clone();
                rotate_with(isa, &table, &mut got, stride, heads, head_dim, &positions);
                assert_eq!(got, scalar);
            }
        }
    }

    #[test]
    fn the_table_is_correctly_rounded_and_growth_changes_nothing() {
        let mut grown = RopeTable::new(frequencies(32), 1.0);
        (1..40).for_each(|i| grown.ensure(i * 100));
        let mut at_once = RopeTable::new(frequencies(32), 1.0);
        at_once.ensure(4000);
        let common = 3900 * 32;
        assert_eq!(grown.cosines[..common], at_once.cosines[..common]);
        assert_eq!(grown.sines[..common], at_once.sines[..common]);
        let mut wrong = 0;
        for (i, (&cosine, &sine)) in at_once.cosines.iter().zip(&at_once.sines).enumerate() {
            let angle = f64::from((i / 32) as f32 * frequencies(32)[i % 32]);
            wrong += usize::from(cosine != angle.cos() as f32) + usize::from(sine != angle.sin() as f32);
        }
        assert!(wrong < 5, "{wrong}");
    }

    #[test]
    #[should_panic(expected = "range")]
    fn a_position_beyond_the_table_panics() {
        let mut table = RopeTable::new(frequencies(4), 1.0);
        table.ensure(10);
        rotate(&table, &mut [0.0; 8], 8, 1, 8, &[4000]);
    }

    #[test]
    fn nothing_to_rotate_is_fine() {
        let mut table = RopeTable::new(Vec::new(), 1.0);
        table.ensure(10);
        let mut x = [1.0; 8];
        rotate(&table, &mut x, 8, 1, 8, &[3]);
        rotate(&RopeTable::new(frequencies(4), 1.0), &mut [], 8, 1, 8, &[]);
        assert_eq!(x, [1.0; 8]);
    }
}
