//! exp, log and tanh in f32, sine and cosine rounded from f64: our own polynomials, the same bits on every level.
//!
//! Minimax coefficients (Remez, relative error): exp 3e-9, log 8e-10, sine 4e-18, cosine 8e-17. Measured error of the
//! f32 functions: at most 1 unit in the last place for exp and log, 3 for tanh.

// Coefficients are given to the digits that the fit produced.
#![allow(clippy::excessive_precision, clippy::unreadable_literal)]

use crate::vector::{Arithmetic, Scalar};

/// `ln 2` to 9 bits, so that its product with an exponent is exact, and the rest.
const LN2_HIGH: f32 = 0.693359375;
const LN2_LOW: f32 = -0.00021219444;
/// Adding and subtracting it rounds to an integer, to nearest even.
const ROUND: f32 = 12582912.0;

/// `e^x`: 0 and infinity beyond the range, subnormals exact to the last place, NaN for NaN.
///
/// ```
/// assert_eq!(farthing_kernels::math::exp(0.0), 1.0);
/// ```
pub fn exp(x: f32) -> f32 {
    exp_lanes(Scalar::<1>, [x])[0]
}

/// Natural logarithm: -infinity at zero, NaN below it.
pub fn log(x: f32) -> f32 {
    log_lanes(Scalar::<1>, [x])[0]
}

/// Hyperbolic tangent, exact to the last places near zero as well.
pub fn tanh(x: f32) -> f32 {
    tanh_lanes(Scalar::<1>, [x])[0]
}

/// `x = n·ln 2 + r`, `|r| ≤ ln 2 / 2`: returns `(n, r, e^r - 1 - r)`.
#[inline(always)]
fn reduced_exp<A: Arithmetic>(a: A, x: A::F) -> (A::F, A::F, A::F) {
    let round = a.splat(ROUND);
    let n = a.sub(a.mul_add(x, a.splat(std::f32::consts::LOG2_E), round), round);
    let r = a.neg_mul_add(n, a.splat(LN2_HIGH), x);
    let r = a.neg_mul_add(n, a.splat(LN2_LOW), r);
    let p = a.splat(0.001381431639892029);
    let p = a.mul_add(p, r, a.splat(0.008368850984248201));
    let p = a.mul_add(p, r, a.splat(0.04166840114218825));
    let p = a.mul_add(p, r, a.splat(0.16666519525275655));
    let p = a.mul_add(p, r, a.splat(0.4999999337301053));
    (n, r, a.mul(p, a.mul(r, r)))
}

#[inline(always)]
pub(crate) fn exp_lanes<A: Arithmetic>(a: A, x: A::F) -> A::F {
    // Below -104 the result rounds to 0, above 89 to infinity; NaN passes.
    let x = a.min(a.splat(89.0), a.max(a.splat(-104.0), x));
    let (n, r, rest) = reduced_exp(a, x);
    a.scale_exponent(a.add(a.splat(1.0), a.add(r, rest)), n)
}

/// `log(m·2^n)` for `m = 1 + f`, `f` in `[√½ - 1, √2 - 1]`.
#[inline(always)]
pub(crate) fn log_of_parts<A: Arithmetic>(a: A, f: A::F, n: A::F) -> A::F {
    let p = a.splat(0.06746562733399607);
    let p = a.mul_add(p, f, a.splat(-0.11675988331268011));
    let p = a.mul_add(p, f, a.splat(0.11888376324466177));
    let p = a.mul_add(p, f, a.splat(-0.12405554571250652));
    let p = a.mul_add(p, f, a.splat(0.14219521544177438));
    let p = a.mul_add(p, f, a.splat(-0.16667996378815592));
    let p = a.mul_add(p, f, a.splat(0.20002120018863287));
    let p = a.mul_add(p, f, a.splat(-0.2500000961230561));
    let p = a.mul_add(p, f, a.splat(0.3333331258738826));
    let square = a.mul(f, f);
    let rest = a.mul_add(a.mul(p, f), square, a.mul(n, a.splat(LN2_LOW)));
    let rest = a.neg_mul_add(a.splat(0.5), square, rest);
    a.mul_add(n, a.splat(LN2_HIGH), a.add(f, rest))
}

#[inline(always)]
pub(crate) fn log_lanes<A: Arithmetic>(a: A, x: A::F) -> A::F {
    let subnormal = a.less(x, a.splat(f32::MIN_POSITIVE));
    let (m, n) = a.split_exponent(a.select(subnormal, a.mul(x, a.splat(16777216.0)), x));
    let n = a.sub(n, a.select(subnormal, a.splat(24.0), a.splat(0.0)));
    let y = log_of_parts(a, a.sub(m, a.splat(1.0)), n);
    // Only finite positive numbers have a split; the others in order: 0, negative, infinity and NaN.
    let positive = a.less(a.splat(0.0), x);
    let finite = a.less(x, a.splat(f32::INFINITY));
    let not_positive = a.select(a.less(x, a.splat(0.0)), a.splat(f32::NAN), a.splat(f32::NEG_INFINITY));
    a.select(finite, a.select(positive, y, not_positive), x)
}

/// `log(1 + e^x)`, exact to the last places where it is tiny as well.
#[inline(always)]
pub(crate) fn softplus_lanes<A: Arithmetic>(a: A, x: A::F) -> A::F {
    let one = a.splat(1.0);
    let y = exp_lanes(a, a.sub(a.splat(0.0), a.abs(x)));
    // log u is that of the rounded sum; the derivative gives back what rounding lost.
    let u = a.add(one, y);
    let rest = a.div(a.sub(y, a.sub(u, one)), u);
    a.add(a.max(a.splat(0.0), x), a.add(log_lanes(a, u), rest))
}

#[inline(always)]
pub(crate) fn tanh_lanes<A: Arithmetic>(a: A, x: A::F) -> A::F {
    // tanh|x| = e / (e + 2), e = exp(2|x|) - 1; from 10 on it rounds to 1. NaN passes.
    let y = a.min(a.splat(10.0), a.abs(x));
    let (n, r, rest) = reduced_exp(a, a.add(y, y));
    let power = a.scale_exponent(a.splat(1.0), n);
    let e = a.mul_add(power, a.add(r, rest), a.sub(power, a.splat(1.0)));
    a.copy_sign(a.div(e, a.add(e, a.splat(2.0))), x)
}

/// `(sin x, cos x)` for `|x| ≤ 2^30`, in double precision to about 1e-16: rounded to f32 it is nearly always correctly rounded.
#[inline(always)]
pub fn sin_cos(x: f64) -> (f64, f64) {
    const ROUND: f64 = 6755399441055744.0;
    // π/2 in two parts; n·(π/2) loses less than 2^-75 for these arguments.
    let turned = x.mul_add(std::f64::consts::FRAC_2_PI, ROUND);
    let n = turned - ROUND;
    let r = (-n).mul_add(std::f64::consts::FRAC_PI_2, x);
    let r = (-n).mul_add(6.123233995736766e-17, r);
    let y = r * r;
    let s = 1.5896795700994227e-10f64;
    let s = s.mul_add(y, -2.5050758116228944e-08);
    let s = s.mul_add(y, 2.7557313691925208e-06);
    let s = s.mul_add(y, -0.00019841269829807832);
    let s = s.mul_add(y, 0.008333333333322413);
    let s = s.mul_add(y, -0.16666666666666632);
    let sine = (s * y).mul_add(r, r);
    let c = 2.064769264519095e-09f64;
    let c = c.mul_add(y, -2.755556643762008e-07);
    let c = c.mul_add(y, 2.4801580967906016e-05);
    let c = c.mul_add(y, -0.001388888887826591);
    let c = c.mul_add(y, 0.041666666666602195);
    let cosine = (c * y).mul_add(y, (-0.5f64).mul_add(y, 1.0));
    // The low bits of `turned` are the quadrant.
    let quadrant = turned.to_bits();
    let (sine, cosine) = if quadrant & 1 == 0 { (sine, cosine) } else { (cosine, -sine) };
    if quadrant & 2 == 0 { (sine, cosine) } else { (-sine, -cosine) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::vector::{Kernel, LANES, Simd, dispatch};

    /// Distance from `exact` in units of the last place of its f32 rounding.
    fn ulps(got: f32, exact: f64) -> f64 {
        let rounded = exact as f32;
        let exponent = i32::from((rounded.to_bits() >> 23 & 255) as u8).max(1) - 127 - 23;
        (f64::from(got) - exact).abs() / 2f64.powi(exponent)
    }

    /// A spread of bit patterns: every `step`-th float, both signs, with the special ones.
    fn floats(step: usize) -> impl Iterator<Item = f32> {
        let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MIN_POSITIVE, 1e-45, f32::MAX, 1.0];
        special.into_iter().chain((0..=u32::MAX).step_by(step).map(f32::from_bits))
    }

    #[test]
    fn exp_is_within_an_ulp() {
        let mut worst = 0f64;
        for x in floats(9973).filter(|x| *x > -104.0 && *x < 88.7228) {
            worst = worst.max(ulps(exp(x), f64::from(x).exp()));
        }
        for i in -104_000..88_700 {
            let x = i as f32 * 1e-3;
            worst = worst.max(ulps(exp(x), f64::from(x).exp()));
        }
        assert!(worst < 1.0, "{worst}");
        assert_eq!([exp(0.0), exp(-0.0), exp(f32::NEG_INFINITY), exp(f32::INFINITY)], [1.0, 1.0, 0.0, f32::INFINITY]);
        assert_eq!([exp(-104.0), exp(-1e30), exp(88.73), exp(1e30)], [0.0, 0.0, f32::INFINITY, f32::INFINITY]);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(88.72283).is_finite() && exp(-103.9) > 0.0);
    }

    #[test]
    fn log_is_within_an_ulp() {
        let mut worst = 0f64;
        for x in floats(9973).filter(|x| *x > 0.0 && *x < f32::INFINITY) {
            worst = worst.max(ulps(log(x), f64::from(x).ln()));
        }
        for i in 1..300_000 {
            let x = i as f32 * 1e-5;
            worst = worst.max(ulps(log(x), f64::from(x).ln()));
        }
        assert!(worst < 1.0, "{worst}");
        assert_eq!(
            [log(0.0), log(-0.0), log(1.0), log(f32::INFINITY)],
            [f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0, f32::INFINITY]
        );
        assert!(log(-1.0).is_nan() && log(f32::NEG_INFINITY).is_nan() && log(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_within_three_ulps() {
        let mut worst = 0f64;
        for x in floats(9973).filter(|x| x.is_finite()) {
            worst = worst.max(ulps(tanh(x), f64::from(x).tanh()));
        }
        assert!(worst < 3.0, "{worst}");
        assert_eq!([tanh(f32::INFINITY), tanh(f32::NEG_INFINITY), tanh(20.0)], [1.0, -1.0, 1.0]);
        assert_eq!(tanh(-0.0).to_bits(), (-0.0f32).to_bits());
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn sine_and_cosine_round_correctly() {
        for i in 0..200_000u32 {
            let x = f64::from((i as f32 * 0.731).powf(1.2));
            let (sine, cosine) = sin_cos(x);
            assert!((sine - x.sin()).abs() < 4e-16 && (cosine - x.cos()).abs() < 4e-16, "{x}: {sine} {cosine}");
        }
        assert_eq!(sin_cos(0.0), (0.0, 1.0));
    }

    struct Apply<'a>(&'a [f32]);
    impl Kernel for Apply<'_> {
        type Output = Vec<[f32; LANES]>;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Vec<[f32; LANES]> {
            let mut all = Vec::new();
            for x in self.0.as_chunks().0 {
                let x = simd.load(x);
                for y in [exp_lanes(simd, x), log_lanes(simd, x), tanh_lanes(simd, x)] {
                    let mut out = [0.0; LANES];
                    simd.store(y, &mut out);
                    all.push(out);
                }
            }
            all
        }
    }

    #[test]
    fn levels_agree_bit_for_bit() {
        let x: Vec<f32> = floats(99_991).chain((-1100..1100).map(|i| i as f32 * 0.1)).collect();
        let key = |x: f32| if x.is_nan() { u32::MAX } else { x.to_bits() };
        let expected = dispatch(Isa::Scalar, Apply(&x));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for (got, want) in dispatch(isa, Apply(&x)).iter().zip(&expected) {
                assert_eq!(got.map(key), want.map(key), "{}", isa.name());
            }
        }
        for (x, rows) in x.iter().step_by(LANES).zip(expected.chunks(3)) {
            let single = [exp(*x), log(*x), tanh(*x)];
            assert_eq!(single.map(key), [rows[0][0], rows[1][0], rows[2][0]].map(key));
        }
    }
}
