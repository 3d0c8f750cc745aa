//! The short causal convolution along a sequence, a filter of its own for each channel, as Mamba (arXiv 2312.00752) has
//! before its state and LFM2 has as a layer.

use std::ops::Range;

use super::states::Shared;
use super::{PARALLEL, Segment, States};
use crate::activation::silu;
use crate::isa::Isa;
use crate::pool::{Disjoint, Pool, share};
use crate::selftest::float_level;
use crate::vector::{Kernel, LANES, Simd, dispatch};

/// A filter of `taps` weights for each channel. Its state is the last `taps - 1` inputs: `(taps - 1, channels)`.
///
/// `out[t, c] = bias[c] + Σ_j weight[c, j] · x[t - taps + 1 + j, c]`, `j` ascending, inputs before the sequence being zero;
/// then `SiLU`, if asked for.
///
/// ```
/// use farthing_kernels::{pool::Pool, recurrent::{Convolution, Segment, States}};
/// let difference = Convolution::new(&[-1.0, 1.0], None, 1, false);
/// let mut states = States::new(1, difference.state_floats())?;
/// let segment = |rows| [Segment { first_row: 0, rows, slot: 0 }];
/// let (pool, mut out) = (Pool::new(1), [0.0; 2]);
/// difference.run(&pool, &[3.0, 5.0], &segment(2), &mut states, &mut out);
/// assert_eq!(out, [3.0, 2.0]);
/// difference.run(&pool, &[9.0], &segment(1), &mut states, &mut out[..1]);
/// assert_eq!(out[0], 4.0);
/// # Ok::<(), farthing_kernels::memory::OutOfMemory>(())
/// ```
#[derive(Clone, Debug)]
pub struct Convolution {
    /// `(taps, channels)`.
    weight: Vec<f32>,
    /// `(channels,)`.
    bias: Vec<f32>,
    silu: bool,
}

impl Convolution {
    /// A filter from `weight: (channels, taps)` and `bias: (channels,)`, zero if not given.
    ///
    /// # Panics
    /// When there are no channels, no taps, or lengths don't fit.
    pub fn new(weight: &[f32], bias: Option<&[f32]>, channels: usize, silu: bool) -> Convolution {
        assert!(!weight.is_empty() && weight.len().is_multiple_of(channels), "{} weights", weight.len());
        let taps = weight.len() / channels;
        let bias = bias.map_or_else(|| vec![0.0; channels], <[f32]>::to_vec);
        assert_eq!(bias.len(), channels, "a bias for each channel");
        let transposed = (0..weight.len()).map(|i| weight[i % channels * taps + i / channels]).collect();
        Convolution { weight: transposed, bias, silu }
    }

    fn channels(&self) -> usize {
        self.bias.len()
    }

    fn taps(&self) -> usize {
        self.weight.len() / self.bias.len()
    }

    /// Floats of a sequence's state.
    pub fn state_floats(&self) -> usize {
        (self.taps() - 1) * self.channels()
    }

    /// Filters the rows of each segment behind its state, which moves on. `x, out: (t, channels)`; the state is at the
    /// beginning of its slot. Rows outside the segments are left alone.
    ///
    /// # Panics
    /// When lengths don't fit, or segments overlap or share a state.
    pub fn run(&self, pool: &Pool, x: &[f32], segments: &[Segment], states: &mut States, out: &mut [f32]) {
        self.run_with(float_level(), pool, x, segments, states, out);
    }

    /// [`Convolution::run`] on a given level.
    #[doc(hidden)]
    pub fn run_with(
        &self,
        isa: Isa,
        pool: &Pool,
        x: &[f32],
        segments: &[Segment],
        states: &mut States,
        out: &mut [f32],
    ) {
        let channels = self.channels();
        assert!(x.len() == out.len() && x.len().is_multiple_of(channels), "rows of {channels}: {}", x.len());
        let states = states.share(segments, 0..self.state_floats(), x.len() / channels);
        let (small, out) = (x.len() < PARALLEL, Disjoint::new(out));
        let vectors = channels.div_ceil(LANES);
        let filter = |index: usize, parts: usize| {
            let part = share(vectors, index, parts);
            let part = part.start * LANES..(part.end * LANES).min(channels);
            if !part.is_empty() {
                dispatch(isa, Filter { convolution: self, x, segments, states: states.clone(), out, part });
            }
        };
        if small { filter(0, 1) } else { pool.run(|index| filter(index, pool.threads())) }
    }
}

/// The channels `part` of every segment.
struct Filter<'a> {
    convolution: &'a Convolution,
    x: &'a [f32],
    segments: &'a [Segment],
    states: Shared<'a>,
    out: Disjoint<'a, f32>,
    part: Range<usize>,
}

impl Kernel for Filter<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Convolution { weight, bias, silu } = self.convolution;
        let (channels, past) = (self.convolution.channels(), self.convolution.taps() - 1);
        let columns = |row: usize| row * channels + self.part.start..row * channels + self.part.end;
        for segment in self.segments.iter().filter(|segment| segment.rows > 0) {
            // SAFETY: the channels of this share alone, in the slot of this segment alone; a row meets itself nowhere.
            let remembered = |row: usize| unsafe { self.states.slice(segment.slot, columns(row)) };
            for row in 0..segment.rows {
                // SAFETY: the channels of this share alone, in rows of this segment alone.
                let out = unsafe { self.out.slice(columns(segment.first_row + row)) };
                out.copy_from_slice(&bias[self.part.clone()]);
                for (tap, weight) in weight.chunks_exact(channels).enumerate() {
                    let x = match (row + tap).checked_sub(past) {
                        Some(row) => &self.x[columns(segment.first_row + row)],
                        None => &*remembered(row + tap),
                    };
                    accumulate(simd, &weight[self.part.clone()], x, out);
                }
                if *silu {
                    activate(simd, out);
                }
            }
            for row in 0..past {
                match (row + segment.rows).checked_sub(past) {
                    Some(from) => remembered(row).copy_from_slice(&self.x[columns(segment.first_row + from)]),
                    None => remembered(row).copy_from_slice(remembered(row + segment.rows)),
                }
            }
        }
    }
}

/// `out += weight · x`.
#[inline(always)]
fn accumulate<S: Simd>(simd: S, weight: &[f32], x: &[f32], out: &mut [f32]) {
    let ((weight, weight_tail), (x, x_tail)) = (weight.as_chunks::<LANES>(), x.as_chunks::<LANES>());
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for ((weight, x), out) in weight.iter().zip(x).zip(out) {
        simd.store(simd.mul_add(simd.load(weight), simd.load(x), simd.load(out)), out);
    }
    if !out_tail.is_empty() {
        let sum = simd.mul_add(simd.load_part(weight_tail), simd.load_part(x_tail), simd.load_part(out_tail));
        simd.store_part(sum, out_tail);
    }
}

#[inline(always)]
fn activate<S: Simd>(simd: S, x: &mut [f32]) {
    let (x, tail) = x.as_chunks_mut::<LANES>();
    for x in x {
        simd.store(silu(simd, simd.load(x)), x);
    }
    if !tail.is_empty() {
        simd.store_part(silu(simd, simd.load_part(tail)), tail);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::uniforms;

    /// One sequence, one channel after the other, in f64.
    fn plain(weight: &[f32], bias: Option<&[f32]>, channels: usize, silu: bool, x: &[f32]) -> Vec<f64> {
        let taps = weight.len() / channels;
        let value = |i: usize| {
            let (row, c) = (i / channels, i % channels);
            let input =
                |tap: usize| (row + tap + 1).checked_sub(taps).map_or(0.0, |row| f64::from(x[row * channels + c]));
            let sum: f64 = (0..taps).map(|tap| f64::from(weight[c * taps + tap]) * input(tap)).sum();
            let y = sum + bias.map_or(0.0, |bias| f64::from(bias[c]));
            if silu { y / (1.0 + (-y).exp()) } else { y }
        };
        (0..x.len()).map(value).collect()
    }

    #[test]
    fn levels_chunks_and_company_give_the_bits_of_the_formula() {
        for (channels, taps, rows, silu) in [(1, 1, 3, false), (7, 3, 9, true), (16, 4, 1, false), (611, 4, 40, true)] {
            let (weight, bias) = (uniforms(1, channels * taps), uniforms(2, channels));
            let bias = (channels != 16).then_some(&bias[..]);
            let convolution = Convolution::new(&weight, bias, channels, silu);
            let x = uniforms(3, rows * channels);
            let exact = plain(&weight, bias, channels, silu, &x);
            let mut expected = Vec::new();
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                for (threads, chunk) in [(1, rows), (2, rows), (1, 1), (2, 2), (1, 7)] {
                    let pool = Pool::new(threads);
                    let mut states = States::new(3, convolution.state_floats()).unwrap();
                    let mut out = Vec::new();
                    for piece in x.chunks(chunk * channels) {
                        // Another sequence stands before ours, with rows of its own.
                        let other = uniforms(4, 2 * channels);
                        let both = [&other[..], piece].concat();
                        let segments = [
                            Segment { first_row: 0, rows: 2, slot: 0 },
                            Segment { first_row: 2, rows: piece.len() / channels, slot: 2 },
                        ];
                        let mut filtered = vec![0.0; both.len()];
                        convolution.run_with(isa, &pool, &both, &segments, &mut states, &mut filtered);
                        out.extend_from_slice(&filtered[2 * channels..]);
                    }
                    for (got, exact) in out.iter().zip(&exact) {
                        assert!((f64::from(*got) - exact).abs() < 1e-5, "{channels} {taps}: {got} {exact}");
                    }
                    let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
                    if expected.is_empty() {
                        expected.clone_from(&bits);
                    }
                    assert_eq!(bits, expected, "{} {threads} {chunk}", isa.name());
                    assert!(states.slot(1).iter().all(|&x| x == 0.0));
                }
            }
        }
    }
}
