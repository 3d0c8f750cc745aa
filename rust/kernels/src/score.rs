//! Scores of a row: softmax, sigmoid and the root of softplus, and shares of their sum.
//!
//! Sums along a row are 16 interleaved partial sums and one fixed tree, so that a row has the same bits on every level.

use crate::isa::Isa;
use crate::math::{exp_lanes, softplus_lanes};
use crate::selftest::float_level;
use crate::vector::{Kernel, LANES, Simd, dispatch};

/// What makes scores of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Score {
    /// `x` itself.
    Identity,
    /// `e^x / Σ e^x` over the row.
    Softmax,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `√log(1 + e^x)`.
    SqrtSoftplus,
}

impl Score {
    /// Every score.
    pub const ALL: [Score; 4] = [Score::Identity, Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus];

    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Score::Identity => "identity",
            Score::Softmax => "softmax",
            Score::Sigmoid => "sigmoid",
            Score::SqrtSoftplus => "sqrtsoftplus",
        }
    }
}

/// Replaces each row of `x`: (rows, `width`) by its scores; a NaN stays one, and makes its row NaN under softmax.
///
/// ```
/// use farthing_kernels::score::{Score, score};
/// let mut x = [0.0, 0.0, 100.0, f32::NEG_INFINITY];
/// score(Score::Softmax, &mut x, 2);
/// assert_eq!(x, [0.5, 0.5, 1.0, 0.0]);
/// ```
///
/// # Panics
/// When `x` is no whole number of rows.
pub fn score(score: Score, x: &mut [f32], width: usize) {
    score_with(float_level(), score, x, width);
}

/// [`score`] on a given level.
#[doc(hidden)]
pub fn score_with(isa: Isa, score: Score, x: &mut [f32], width: usize) {
    if x.is_empty() || score == Score::Identity {
        return;
    }
    assert!(x.len().is_multiple_of(width), "score: {} numbers in rows of {width}", x.len());
    dispatch(isa, Scores { score, x, width });
}

/// Divides each row of `x`: (rows, `width`) by its sum plus `epsilon`.
///
/// # Panics
/// When `x` is no whole number of rows.
pub fn renormalize(x: &mut [f32], width: usize, epsilon: f32) {
    renormalize_with(float_level(), x, width, epsilon);
}

/// [`renormalize`] on a given level.
#[doc(hidden)]
pub fn renormalize_with(isa: Isa, x: &mut [f32], width: usize, epsilon: f32) {
    if x.is_empty() {
        return;
    }
    assert!(x.len().is_multiple_of(width), "renormalize: {} numbers in rows of {width}", x.len());
    dispatch(isa, Renormalize { x, width, epsilon });
}

struct Scores<'a> {
    score: Score,
    x: &'a mut [f32],
    width: usize,
}

impl Kernel for Scores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if self.score == Score::Softmax {
            for row in self.x.chunks_exact_mut(self.width) {
                softmax(simd, row);
            }
            return;
        }
        let (whole, tail) = self.x.as_chunks_mut::<LANES>();
        for x in whole {
            simd.store(one(simd, self.score, simd.load(x)), x);
        }
        let last = one(simd, self.score, simd.load_part(tail));
        simd.store_part(last, tail);
        if self.score == Score::SqrtSoftplus {
            // Correctly rounded everywhere, so it needs no method of its own.
            for x in self.x {
                *x = x.sqrt();
            }
        }
    }
}

/// The score of each lane, but for the root of [`Score::SqrtSoftplus`].
#[inline(always)]
fn one<S: Simd>(simd: S, score: Score, x: S::F) -> S::F {
    match score {
        Score::Identity | Score::Softmax => x,
        Score::Sigmoid => {
            let one = simd.splat(1.0);
            simd.div(one, simd.add(one, exp_lanes(simd, simd.sub(simd.splat(0.0), x))))
        }
        Score::SqrtSoftplus => softplus_lanes(simd, x),
    }
}

#[inline(always)]
fn softmax<S: Simd>(simd: S, row: &mut [f32]) {
    let (whole, tail) = row.as_chunks_mut::<LANES>();
    // What fills up the last vector adds nothing to the sum.
    let mut last = [f32::NEG_INFINITY; LANES];
    last[..tail.len()].copy_from_slice(tail);
    let mut greatest = simd.load(&last);
    for x in &*whole {
        greatest = simd.max(greatest, simd.load(x));
    }
    let greatest = simd.splat(simd.maximum(greatest));
    let mut sums = simd.splat(0.0);
    for x in &mut *whole {
        let y = exp_lanes(simd, simd.sub(simd.load(x), greatest));
        sums = simd.add(sums, y);
        simd.store(y, x);
    }
    let y = exp_lanes(simd, simd.sub(simd.load(&last), greatest));
    let sum = simd.splat(simd.sum(simd.add(sums, y)));
    for x in whole {
        simd.store(simd.div(simd.load(x), sum), x);
    }
    simd.store_part(simd.div(y, sum), tail);
}

struct Renormalize<'a> {
    x: &'a mut [f32],
    width: usize,
    epsilon: f32,
}

impl Kernel for Renormalize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for row in self.x.chunks_exact_mut(self.width) {
            let (whole, tail) = row.as_chunks_mut::<LANES>();
            let last = simd.load_part(tail);
            let mut sums = simd.splat(0.0);
            for x in &*whole {
                sums = simd.add(sums, simd.load(x));
            }
            let divisor = simd.splat(simd.sum(simd.add(sums, last)) + self.epsilon);
            for x in whole {
                simd.store(simd.div(simd.load(x), divisor), x);
            }
            simd.store_part(simd.div(last, divisor), tail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::uniforms;

    fn exact(score: Score, row: &[f32]) -> Vec<f64> {
        let x = row.iter().map(|&x| f64::from(x));
        match score {
            Score::Identity => x.collect(),
            Score::Softmax => {
                let greatest = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                let powers: Vec<f64> = x.map(|x| (x - f64::from(greatest)).exp()).collect();
                powers.iter().map(|p| p / powers.iter().sum::<f64>()).collect()
            }
            Score::Sigmoid => x.map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            Score::SqrtSoftplus => x.map(|x| (x.max(0.0) + (-x.abs()).exp().ln_1p()).sqrt()).collect(),
        }
    }

    #[test]
    fn scores_match_their_formulas_on_every_level() {
        for kind in Score::ALL {
            for width in [1, 2, 15, 16, 17, 60, 128, 513] {
                let x: Vec<f32> = uniforms(width as u64, 3 * width).iter().map(|x| 40.0 * x - 20.0).collect();
                let mut scalar = x.clone();
                score_with(Isa::Scalar, kind, &mut scalar, width);
                // Softmax rounds the distance from the greatest, here up to 40, before it takes the power.
                let tolerance = if kind == Score::Softmax { 4e-6 } else { 4e-7 };
                for (row, got) in x.chunks(width).zip(scalar.chunks(width)) {
                    for (exact, &got) in exact(kind, row).into_iter().zip(got) {
                        assert!((f64::from(got) - exact).abs() <= tolerance * exact.abs(), "{kind:?} {got} {exact}");
                    }
                }
                let mut shares = scalar.clone();
                renormalize_with(Isa::Scalar, &mut shares, width, 1e-20);
                for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                    let mut got = x.clone();
                    score_with(isa, kind, &mut got, width);
                    assert_eq!(got, scalar, "{kind:?} {} {width}", isa.name());
                    renormalize_with(isa, &mut got, width, 1e-20);
                    assert_eq!(got, shares, "{} {width}", isa.name());
                }
            }
        }
    }

    #[test]
    fn extremes_stay_in_range() {
        for kind in [Score::Sigmoid, Score::SqrtSoftplus] {
            let mut x = [f32::NEG_INFINITY, -1e30, -104.0, 0.0, 100.0, 1e30, f32::INFINITY, f32::NAN];
            score(kind, &mut x, 8);
            assert!(x[..7].is_sorted() && x[0] == 0.0 && x[7].is_nan(), "{kind:?} {x:?}");
        }
        let mut x = [1000.0, -1000.0, f32::NEG_INFINITY, 1000.0, f32::NAN, 1.0];
        score(Score::Softmax, &mut x[..4], 4);
        assert_eq!(x[..4], [0.5, 0.0, 0.0, 0.5]);
        score(Score::Softmax, &mut x[4..], 2);
        assert!(x[4].is_nan() && x[5].is_nan());
        score(Score::Softmax, &mut [], 4);
        renormalize(&mut [], 4, 0.0);
    }
}
