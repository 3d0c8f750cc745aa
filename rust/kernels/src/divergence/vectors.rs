//! Vectors of 16 floats in single or in double precision, so that a divergence is written once for both.

use half::bf16;

use crate::isa::Isa;
use crate::math::{exp_lanes, log_lanes, tanh_lanes};
use crate::vector::{Kernel, LANES, Simd, dispatch};

/// What logits come in, and the precision in which they are computed with.
pub(super) trait Number: Copy + Send + Sync {
    type Wide: Wide;
    fn widen(x: &[Self; LANES]) -> [Self::Wide; LANES];
    /// Rounded to nearest even.
    fn narrow(x: [Self::Wide; LANES]) -> [Self; LANES];
    const ZERO: Self;
}

/// Single or double precision.
pub(super) trait Wide: Number<Wide = Self> {
    const NEG_INFINITY: Self;
    fn of(x: f64) -> Self;
    fn perform<T: Task<Self>>(isa: Isa, task: T) -> T::Output;
}

/// An algorithm over either precision. `run` must be `#[inline(always)]`, see [`Kernel`].
pub(super) trait Task<W> {
    type Output;
    fn run<V: Vectors<Wide = W>>(self, v: V) -> Self::Output;
}

/// Operations on [`LANES`] numbers, with the meaning of those of [`Simd`].
pub(super) trait Vectors: Copy {
    type Wide: Wide;
    type F: Copy;
    type M: Copy;
    /// Further below zero than any difference of logits that matters, and finite when it is added to one.
    const LOWEST: f64;
    /// The smallest probability whose logarithm is taken.
    const TINY: f64;

    fn splat(self, x: f64) -> Self::F;
    fn load(self, x: &[Self::Wide; LANES]) -> Self::F;
    fn store(self, x: Self::F, out: &mut [Self::Wide; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, x: Self::F) -> Self::F;
    fn less(self, a: Self::F, b: Self::F) -> Self::M;
    fn select(self, mask: Self::M, yes: Self::F, no: Self::F) -> Self::F;
    fn bits(self, mask: Self::M) -> u16;
    fn exp(self, x: Self::F) -> Self::F;
    fn log(self, x: Self::F) -> Self::F;
    fn tanh(self, x: Self::F) -> Self::F;
    fn sum(self, x: Self::F) -> f64;
    fn maximum(self, x: Self::F) -> f64;
}

#[derive(Clone, Copy)]
pub(super) struct Single<S>(S);

impl<S: Simd> Vectors for Single<S> {
    type Wide = f32;
    type F = S::F;
    type M = S::M;
    const LOWEST: f64 = -1e38;
    const TINY: f64 = 1e-37;

    #[inline(always)]
    fn splat(self, x: f64) -> S::F {
        self.0.splat(x as f32)
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> S::F {
        self.0.load(x)
    }
    #[inline(always)]
    fn store(self, x: S::F, out: &mut [f32; LANES]) {
        self.0.store(x, out);
    }
    #[inline(always)]
    fn add(self, a: S::F, b: S::F) -> S::F {
        self.0.add(a, b)
    }
    #[inline(always)]
    fn sub(self, a: S::F, b: S::F) -> S::F {
        self.0.sub(a, b)
    }
    #[inline(always)]
    fn mul(self, a: S::F, b: S::F) -> S::F {
        self.0.mul(a, b)
    }
    #[inline(always)]
    fn mul_add(self, a: S::F, b: S::F, c: S::F) -> S::F {
        self.0.mul_add(a, b, c)
    }
    #[inline(always)]
    fn max(self, a: S::F, b: S::F) -> S::F {
        self.0.max(a, b)
    }
    #[inline(always)]
    fn abs(self, x: S::F) -> S::F {
        self.0.abs(x)
    }
    #[inline(always)]
    fn less(self, a: S::F, b: S::F) -> S::M {
        self.0.less(a, b)
    }
    #[inline(always)]
    fn select(self, mask: S::M, yes: S::F, no: S::F) -> S::F {
        self.0.select(mask, yes, no)
    }
    #[inline(always)]
    fn bits(self, mask: S::M) -> u16 {
        self.0.bits(mask)
    }
    #[inline(always)]
    fn exp(self, x: S::F) -> S::F {
        exp_lanes(self.0, x)
    }
    #[inline(always)]
    fn log(self, x: S::F) -> S::F {
        log_lanes(self.0, x)
    }
    #[inline(always)]
    fn tanh(self, x: S::F) -> S::F {
        tanh_lanes(self.0, x)
    }
    #[inline(always)]
    fn sum(self, x: S::F) -> f64 {
        f64::from(self.0.sum(x))
    }
    #[inline(always)]
    fn maximum(self, x: S::F) -> f64 {
        f64::from(self.0.maximum(x))
    }
}

/// Double precision, for references: plain Rust, exp, log and tanh of the platform.
#[derive(Clone, Copy)]
pub(super) struct Double;

#[inline(always)]
fn zip(a: [f64; LANES], b: [f64; LANES], f: impl Fn(f64, f64) -> f64) -> [f64; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

fn tree(mut x: [f64; LANES], f: impl Fn(f64, f64) -> f64) -> f64 {
    for distance in [8, 4, 2, 1] {
        for i in 0..distance {
            x[i] = f(x[i], x[i + distance]);
        }
    }
    x[0]
}

impl Vectors for Double {
    type Wide = f64;
    type F = [f64; LANES];
    type M = [bool; LANES];
    const LOWEST: f64 = -1e300;
    const TINY: f64 = 1e-300;

    fn splat(self, x: f64) -> [f64; LANES] {
        [x; LANES]
    }
    fn load(self, x: &[f64; LANES]) -> [f64; LANES] {
        *x
    }
    fn store(self, x: [f64; LANES], out: &mut [f64; LANES]) {
        *out = x;
    }
    fn add(self, a: [f64; LANES], b: [f64; LANES]) -> [f64; LANES] {
        zip(a, b, |a, b| a + b)
    }
    fn sub(self, a: [f64; LANES], b: [f64; LANES]) -> [f64; LANES] {
        zip(a, b, |a, b| a - b)
    }
    fn mul(self, a: [f64; LANES], b: [f64; LANES]) -> [f64; LANES] {
        zip(a, b, |a, b| a * b)
    }
    fn mul_add(self, a: [f64; LANES], b: [f64; LANES], c: [f64; LANES]) -> [f64; LANES] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    fn max(self, a: [f64; LANES], b: [f64; LANES]) -> [f64; LANES] {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    fn abs(self, x: [f64; LANES]) -> [f64; LANES] {
        x.map(f64::abs)
    }
    fn less(self, a: [f64; LANES], b: [f64; LANES]) -> [bool; LANES] {
        std::array::from_fn(|i| a[i] < b[i])
    }
    fn select(self, mask: [bool; LANES], yes: [f64; LANES], no: [f64; LANES]) -> [f64; LANES] {
        std::array::from_fn(|i| if mask[i] { yes[i] } else { no[i] })
    }
    fn bits(self, mask: [bool; LANES]) -> u16 {
        mask.iter().enumerate().fold(0, |bits, (i, &set)| bits | (u16::from(set) << i))
    }
    fn exp(self, x: [f64; LANES]) -> [f64; LANES] {
        x.map(f64::exp)
    }
    fn log(self, x: [f64; LANES]) -> [f64; LANES] {
        x.map(f64::ln)
    }
    fn tanh(self, x: [f64; LANES]) -> [f64; LANES] {
        x.map(f64::tanh)
    }
    fn sum(self, x: [f64; LANES]) -> f64 {
        tree(x, |a, b| a + b)
    }
    fn maximum(self, x: [f64; LANES]) -> f64 {
        tree(x, |a, b| if a > b { a } else { b })
    }
}

struct OnSimd<T>(T);

impl<T: Task<f32>> Kernel for OnSimd<T> {
    type Output = T::Output;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> T::Output {
        self.0.run(Single(simd))
    }
}

impl Number for f32 {
    type Wide = f32;
    const ZERO: f32 = 0.0;
    #[inline(always)]
    fn widen(x: &[f32; LANES]) -> [f32; LANES] {
        *x
    }
    #[inline(always)]
    fn narrow(x: [f32; LANES]) -> [f32; LANES] {
        x
    }
}

impl Number for f64 {
    type Wide = f64;
    const ZERO: f64 = 0.0;
    fn widen(x: &[f64; LANES]) -> [f64; LANES] {
        *x
    }
    fn narrow(x: [f64; LANES]) -> [f64; LANES] {
        x
    }
}

impl Number for bf16 {
    type Wide = f32;
    const ZERO: bf16 = bf16::ZERO;
    #[inline(always)]
    fn widen(x: &[bf16; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| f32::from_bits(u32::from(x[i].to_bits()) << 16))
    }
    #[inline(always)]
    fn narrow(x: [f32; LANES]) -> [bf16; LANES] {
        // Without a branch, so that it becomes vector code.
        std::array::from_fn(|i| {
            let bits = x[i].to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            bf16::from_bits(if x[i].is_nan() { bits >> 16 | 0x40 } else { rounded } as u16)
        })
    }
}

impl Wide for f32 {
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;
    fn of(x: f64) -> f32 {
        x as f32
    }
    fn perform<T: Task<f32>>(isa: Isa, task: T) -> T::Output {
        dispatch(isa, OnSimd(task))
    }
}

impl Wide for f64 {
    const NEG_INFINITY: f64 = f64::NEG_INFINITY;
    fn of(x: f64) -> f64 {
        x
    }
    fn perform<T: Task<f64>>(_: Isa, task: T) -> T::Output {
        task.run(Double)
    }
}
