//! Quantisation by groups without calibration: rounding to nearest, and for 4 bits a search for the scale that rounds best.
//!
//! symmetric: `s = absmax / (2^(b-1) - 1)`, `q = clamp(rne(w / s), -2^(b-1), 2^(b-1) - 1)`; zero point:
//! `s = (max(w, 0) - min(w, 0)) / (2^b - 1)`, `z = rne(-min / s)`; minimum: `s = (max - min) / (2^b - 1)`. Scale and
//! minimum are rounded to their stored type before the codes are computed from them.
//!
//! With 4 bits, clipping the extremes often costs less than the coarser steps that they demand. So the range is shrunk
//! step by step, and the grid with the least Σ err² stays: symmetric scales by ratios from 1 to 0.6, with the sign that
//! puts the extreme on the side of the extra code; both ends of a zero-point range by the same ratios; a range with a
//! minimum first at the upper end, then at the lower, by up to 0.3 each. Plain rounding comes first, and 7/8 of it is among
//! the ratios: weights that lie on a grid of the same form come back as they are. Eight bits gain nothing from this.

use super::pack::pack_rows;
use super::{Bits, FloatType, Format, Offset, PackError, PackedMatrix, Precision, lookup, ternary};
use crate::isa::Isa;
use crate::vector::{Kernel, LANES, Simd, dispatch};

/// Ratios below 1 and the distance between them; the tenth is 7/8, where the extreme meets the extra code.
const RATIOS: (u32, f32) = (32, 1.0 / 80.0);
/// Cuts at each end of a range with a minimum, and the distance between them.
const CUTS: (u32, f32) = (20, 0.015);
/// Adding and subtracting 1.5 · 2²³ rounds what is smaller than 2²² to an integer, half to even.
const ROUND: f32 = 12_582_912.0;

impl PackedMatrix {
    /// Quantises rows of floats to an integer, ternary or table `format`. `row(n, weights)` fills `weights: (k,)` of row
    /// `n`.
    ///
    /// A weight that is not finite is an error, and so is a range that the type of the scales can't hold.
    pub fn quantize<E: Send>(
        n: usize,
        k: usize,
        format: Format,
        precision: Precision,
        row: impl Fn(usize, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, PackError<E>> {
        if matches!(format, Format::Float(_) | Format::Super(_)) {
            return Err(PackError::NotInteger { got: format });
        }
        pack_rows(n, k, format, precision, |n, codes| {
            let mut weights = vec![0.0; k];
            row(n, &mut weights).map_err(PackError::Source)?;
            if let Some(column) = weights.iter().position(|weight| !weight.is_finite()) {
                return Err(PackError::Weight { row: n, column, got: weights[column] });
            }
            let (scales, offsets) = (&mut codes.scales, &mut codes.offsets);
            let codes = &mut codes.codes;
            match format {
                Format::Integer { bits, group, offset, scale: kind } => {
                    dispatch(
                        Isa::active(),
                        Row { bits, group, offset, kind, weights: &weights, codes, scales, offsets },
                    );
                }
                Format::Ternary { group, scale, .. } => {
                    ternary::row(&weights, group.unwrap_or(k), scale, codes, scales);
                }
                Format::Lookup { table, group, scale } => lookup::row(&weights, table, group, scale, codes, scales),
                Format::Float(_) | Format::Super(_) => unreachable!("refused above"),
            }
            Ok(())
        })
    }
}

/// One row on its way from weights to codes.
struct Row<'a> {
    bits: Bits,
    group: usize,
    offset: Offset,
    kind: FloatType,
    /// `(k,)`.
    weights: &'a [f32],
    /// `(k,)`.
    codes: &'a mut [u8],
    /// `(groups,)`.
    scales: &'a mut [f32],
    /// `(groups,)`; empty when symmetric.
    offsets: &'a mut [f32],
}

/// What the codes of a group mean: `w = scale · (code - zero) + base`.
#[derive(Clone, Copy, Debug)]
struct Grid {
    scale: f32,
    zero: f32,
    base: f32,
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let groups = self.weights.chunks(self.group).zip(self.codes.chunks_mut(self.group));
        for (g, (weights, codes)) in groups.enumerate() {
            let grid = choose(simd, self.bits, self.offset, self.kind, weights);
            encode(grid, f32::from(self.bits.maximum()), weights, codes);
            self.scales[g] = grid.scale;
            if let Some(stored) = self.offsets.get_mut(g) {
                *stored = if self.offset == Offset::ZeroPoint { grid.zero } else { grid.base };
            }
        }
    }
}

/// The grid of one group. Loops, not closures: what is inlined into the shell of an instruction set must be all of it.
#[inline(always)]
fn choose<S: Simd>(simd: S, bits: Bits, offset: Offset, kind: FloatType, weights: &[f32]) -> Grid {
    let top = f32::from(bits.maximum());
    let low = weights.iter().copied().fold(f32::INFINITY, f32::min);
    let high = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let four = bits == Bits::Four;
    let (ratios, cuts) = if four { (RATIOS.0, CUTS.0) } else { (0, 0) };
    match offset {
        Offset::Symmetric => {
            // Codes reach one step further down than up.
            let extreme = if four && high > -low { -high } else { low.abs().max(high.abs()) };
            let bias = f32::from(bits.bias());
            let grid = |ratio: f32| Grid { scale: kind.round(extreme / (bias - 1.0) * ratio), zero: bias, base: 0.0 };
            let mut search = Search::new(simd, weights, low, high, top, grid(1.0));
            for step in 1..=ratios {
                search.consider(simd, grid(1.0 - step as f32 * RATIOS.1));
            }
            search.best
        }
        Offset::ZeroPoint => {
            let (low, high) = (low.min(0.0), high.max(0.0));
            let grid = |ratio: f32| {
                let scale = kind.round((high - low) * ratio / top);
                let zero = if scale > 0.0 { (-low * ratio / scale).round_ties_even().clamp(0.0, top) } else { 0.0 };
                Grid { scale, zero, base: 0.0 }
            };
            let mut search = Search::new(simd, weights, low, high, top, grid(1.0));
            for step in 1..=ratios {
                search.consider(simd, grid(1.0 - step as f32 * RATIOS.1));
            }
            search.best
        }
        Offset::Minimum => {
            let range = high - low;
            let grid = |cut_low: f32, cut_high: f32| Grid {
                scale: kind.round(range * (1.0 - cut_low - cut_high) / top),
                zero: 0.0,
                base: kind.round(low + range * cut_low),
            };
            let mut search = Search::new(simd, weights, low, high, top, grid(0.0, 0.0));
            let mut cut_high = 0.0;
            for step in 1..=cuts {
                let cut = step as f32 * CUTS.1;
                if search.consider(simd, grid(0.0, cut)) {
                    cut_high = cut;
                }
            }
            for step in 1..=cuts {
                search.consider(simd, grid(step as f32 * CUTS.1, cut_high));
            }
            search.best
        }
    }
}

/// The best grid so far for the weights of one group.
struct Search<'a> {
    weights: &'a [f32],
    /// The least and the greatest weight.
    low: f32,
    high: f32,
    /// The greatest code.
    top: f32,
    best: Grid,
    error: f32,
}

impl<'a> Search<'a> {
    #[inline(always)]
    fn new<S: Simd>(simd: S, weights: &'a [f32], low: f32, high: f32, top: f32, first: Grid) -> Self {
        Search { weights, low, high, top, best: first, error: squared_error(simd, weights, top, first) }
    }

    /// Takes `grid` if it rounds the weights better; says whether it did.
    #[inline(always)]
    fn consider<S: Simd>(&mut self, simd: S, grid: Grid) -> bool {
        let (from, to) = (grid.base - grid.zero * grid.scale, grid.base + (self.top - grid.zero) * grid.scale);
        let (below, above) = ((from.min(to) - self.low).max(0.0), (self.high - from.max(to)).max(0.0));
        // The clipped extremes alone may be too much; that is most of the candidates.
        if below * below + above * above >= self.error {
            return false;
        }
        let error = squared_error(simd, self.weights, self.top, grid);
        let better = error < self.error;
        if better {
            (self.best, self.error) = (grid, error);
        }
        better
    }
}

/// Σ (w - ŵ)² over a group.
#[inline(always)]
fn squared_error<S: Simd>(simd: S, weights: &[f32], top: f32, grid: Grid) -> f32 {
    let inverse = 1.0 / grid.scale;
    let mut sum = simd.splat(0.0);
    let (whole, rest) = weights.as_chunks::<LANES>();
    for weights in whole {
        let error = errors(simd, simd.load(weights), top, grid, inverse);
        sum = simd.mul_add(error, error, sum);
    }
    if !rest.is_empty() {
        let there = simd.mask((1 << rest.len()) - 1);
        let error = errors(simd, simd.load_part(rest), top, grid, inverse);
        let error = simd.select(there, error, simd.splat(0.0));
        sum = simd.mul_add(error, error, sum);
    }
    simd.sum(sum)
}

/// w - ŵ of each lane.
#[inline(always)]
fn errors<S: Simd>(simd: S, weights: S::F, top: f32, grid: Grid, inverse: f32) -> S::F {
    let w = simd.sub(weights, simd.splat(grid.base));
    let round = simd.splat(ROUND);
    let q = simd.sub(simd.add(simd.mul(w, simd.splat(inverse)), round), round);
    let q = simd.min(simd.max(q, simd.splat(-grid.zero)), simd.splat(top - grid.zero));
    simd.neg_mul_add(q, simd.splat(grid.scale), w)
}

/// `code = clamp(rne((w - base) / scale) + zero)`.
#[inline(always)]
fn encode(grid: Grid, top: f32, weights: &[f32], codes: &mut [u8]) {
    for (code, &weight) in codes.iter_mut().zip(weights) {
        // A scale that rounds to zero leaves every weight at the code of zero.
        let steps = if grid.scale == 0.0 { 0.0 } else { ((weight - grid.base) / grid.scale).round_ties_even() };
        *code = (steps + grid.zero).clamp(0.0, top) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_finds_the_same_codes() {
        let mut state = 1u32;
        let weights: Vec<f32> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let (sign, mantissa) = ((state >> 8) as f32 / (1 << 23) as f32 - 1.0, state % 7);
            sign * (1.0 + mantissa as f32).powi(3)
        })
        .take(64 * 40 + 27)
        .collect();
        for offset in [Offset::Symmetric, Offset::ZeroPoint, Offset::Minimum] {
            for (group, kind) in [(16, FloatType::F32), (64, FloatType::F16), (128, FloatType::Bf16)] {
                let groups = weights.len().div_ceil(group);
                let all = Isa::ALL.into_iter().filter(|isa| isa.available()).map(|isa| {
                    let (mut codes, mut scales) = (vec![0; weights.len()], vec![0.0; groups]);
                    let mut offsets = vec![0.0; if offset == Offset::Symmetric { 0 } else { groups }];
                    let (weights, codes_of) = (&weights[..], &mut codes[..]);
                    let (scales_of, offsets_of) = (&mut scales[..], &mut offsets[..]);
                    let row = Row {
                        bits: Bits::Four,
                        group,
                        offset,
                        kind,
                        weights,
                        codes: codes_of,
                        scales: scales_of,
                        offsets: offsets_of,
                    };
                    dispatch(isa, row);
                    (codes, scales, offsets)
                });
                let all: Vec<_> = all.collect();
                assert!(all.iter().all(|found| *found == all[0]), "{offset:?} g{group}");
            }
        }
    }
}
