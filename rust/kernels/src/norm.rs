//! Root-mean-square normalisation (Zhang & Sennrich 2019) and the residual sum.
//!
//! The sum of squares of a row is 16 interleaved partial sums, fused, and one fixed tree.

use crate::isa::Isa;
use crate::selftest::float_level;
use crate::vector::{Kernel, LANES, Simd, dispatch};

/// `out = x / sqrt(mean(x²) + eps) · weight` for each row; `x`, `out`: (rows, h), `weight`: (h,).
///
/// Also normalises heads: with `weight` of length `head_dim` each head is a row.
///
/// # Panics
/// When `x` is no whole number of rows or `out` is of another length.
///
/// ```
/// let mut out = [0.0; 2];
/// farthing_kernels::norm::rms_norm(&[3.0, 4.0], &[1.0, 2.0], 0.0, &mut out);
/// assert!((out[0] - 0.848_528).abs() < 1e-6 && (out[1] - 2.262_742).abs() < 1e-6);
/// ```
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    rms_norm_with(float_level(), x, weight, eps, out);
}

/// [`rms_norm`] on a given level.
#[doc(hidden)]
pub fn rms_norm_with(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "rms_norm: x and out differ in length");
    assert!(
        x.is_empty() || x.len().is_multiple_of(weight.len()),
        "rms_norm: {} is no multiple of {}",
        x.len(),
        weight.len()
    );
    if !x.is_empty() {
        dispatch(isa, RmsNorm { x, weight, eps, out });
    }
}

/// [`rms_norm`] where `x` is also the output.
pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    rms_norm_in_place_with(float_level(), x, weight, eps);
}

/// [`rms_norm_in_place`] on a given level.
#[doc(hidden)]
pub fn rms_norm_in_place_with(isa: Isa, x: &mut [f32], weight: &[f32], eps: f32) {
    assert!(
        x.is_empty() || x.len().is_multiple_of(weight.len()),
        "rms_norm: {} is no multiple of {}",
        x.len(),
        weight.len()
    );
    if !x.is_empty() {
        dispatch(isa, RmsNormInPlace { x, weight, eps });
    }
}

/// `y += x`, element by element.
///
/// # Panics
/// When the lengths differ.
pub fn add(y: &mut [f32], x: &[f32]) {
    add_with(float_level(), y, x);
}

/// [`add`] on a given level.
#[doc(hidden)]
pub fn add_with(isa: Isa, y: &mut [f32], x: &[f32]) {
    assert_eq!(x.len(), y.len(), "add: x and y differ in length");
    dispatch(isa, Add { y, x });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let h = self.weight.len();
        let (weight, weight_tail) = self.weight.as_chunks::<LANES>();
        for (x, out) in self.x.chunks_exact(h).zip(self.out.chunks_exact_mut(h)) {
            let inverse = simd.splat(inverse_rms(simd, x, self.eps));
            let (x, x_tail) = x.as_chunks::<LANES>();
            let (out, out_tail) = out.as_chunks_mut::<LANES>();
            for ((x, weight), out) in x.iter().zip(weight).zip(out) {
                simd.store(simd.mul(simd.mul(simd.load(x), inverse), simd.load(weight)), out);
            }
            let scaled = simd.mul(simd.load_part(x_tail), inverse);
            simd.store_part(simd.mul(scaled, simd.load_part(weight_tail)), out_tail);
        }
    }
}

struct RmsNormInPlace<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Kernel for RmsNormInPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (weight, weight_tail) = self.weight.as_chunks::<LANES>();
        for x in self.x.chunks_exact_mut(self.weight.len()) {
            let inverse = simd.splat(inverse_rms(simd, x, self.eps));
            let (x, x_tail) = x.as_chunks_mut::<LANES>();
            for (x, weight) in x.iter_mut().zip(weight) {
                simd.store(simd.mul(simd.mul(simd.load(x), inverse), simd.load(weight)), x);
            }
            let scaled = simd.mul(simd.load_part(x_tail), inverse);
            simd.store_part(simd.mul(scaled, simd.load_part(weight_tail)), x_tail);
        }
    }
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
fn inverse_rms<S: Simd>(simd: S, x: &[f32], eps: f32) -> f32 {
    let (whole, tail) = x.as_chunks::<LANES>();
    let mut sums = simd.splat(0.0);
    for x in whole {
        let x = simd.load(x);
        sums = simd.mul_add(x, x, sums);
    }
    let last = simd.load_part(tail);
    let sum = simd.sum(simd.mul_add(last, last, sums));
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

struct Add<'a> {
    y: &'a mut [f32],
    x: &'a [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (y, y_tail) = self.y.as_chunks_mut::<LANES>();
        let (x, x_tail) = self.x.as_chunks::<LANES>();
        for (y, x) in y.iter_mut().zip(x) {
            simd.store(simd.add(simd.load(y), simd.load(x)), y);
        }
        for (y, x) in y_tail.iter_mut().zip(x_tail) {
            *y += x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::uniforms;

    #[test]
    fn levels_agree_and_match_the_formula() {
        for (h, rows) in [(1, 3), (7, 2), (16, 1), (31, 2), (64, 9), (576, 3), (1537, 1)] {
            let x = uniforms(h as u64, h * rows);
            let weight = uniforms(2, h);
            let mut scalar = vec![0.0; h * rows];
            rms_norm_with(Isa::Scalar, &x, &weight, 1e-5, &mut scalar);
            for (row, out) in x.chunks(h).zip(scalar.chunks(h)) {
                let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / h as f64;
                for ((&x, &w), &out) in row.iter().zip(&weight).zip(out) {
                    let exact = f64::from(x) / (mean + 1e-5).sqrt() * f64::from(w);
                    assert!((f64::from(out) - exact).abs() <= 1e-6 * exact.abs().max(1e-3));
                }
            }
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                let mut out = vec![0.0; h * rows];
                rms_norm_with(isa, &x, &weight, 1e-5, &mut out);
                assert_eq!(out, scalar);
                let mut in_place = x.clone();
                rms_norm_in_place_with(isa, &mut in_place, &weight, 1e-5);
                assert_eq!(in_place, scalar);
                let mut sum = x.clone();
                add_with(isa, &mut sum, &out);
                assert!(sum.iter().zip(&x).zip(&out).all(|((sum, x), y)| *sum == x + y));
            }
        }
    }

    #[test]
    fn no_rows_are_fine() {
        rms_norm(&[], &[1.0], 1e-6, &mut []);
        rms_norm_in_place(&mut [], &[], 1e-6);
        add(&mut [], &[]);
    }
}
