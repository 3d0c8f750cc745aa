//! The portable level: the meaning of every operation of the others.

use half::{bf16, f16};

use super::{Arithmetic, Kernel, LANES, Simd};

/// `N` lanes in plain Rust; `N = 1` serves single numbers.
#[derive(Clone, Copy)]
pub(crate) struct Scalar<const N: usize>;

#[inline(always)]
fn map<const N: usize>(x: [f32; N], f: impl Fn(f32) -> f32) -> [f32; N] {
    std::array::from_fn(|i| f(x[i]))
}

#[inline(always)]
fn zip<const N: usize>(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl<const N: usize> Arithmetic for Scalar<N> {
    type F = [f32; N];
    type M = [bool; N];

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; N] {
        [x; N]
    }
    #[inline(always)]
    fn add(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| (-a[i]).mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn min(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, x: [f32; N]) -> [f32; N] {
        map(x, f32::abs)
    }
    #[inline(always)]
    fn copy_sign(self, x: [f32; N], sign: [f32; N]) -> [f32; N] {
        zip(x, sign, f32::copysign)
    }
    #[inline(always)]
    fn less(self, a: [f32; N], b: [f32; N]) -> [bool; N] {
        std::array::from_fn(|i| a[i] < b[i])
    }
    #[inline(always)]
    fn select(self, mask: [bool; N], yes: [f32; N], no: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| if mask[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn scale_exponent(self, x: [f32; N], n: [f32; N]) -> [f32; N] {
        // Two factors keep each power of two normal; the first product is exact.
        zip(x, n, |x, n| {
            let n = n as i32;
            let (first, second) = (n >> 1, n - (n >> 1));
            x * f32::from_bits(((first + 127) << 23) as u32) * f32::from_bits(((second + 127) << 23) as u32)
        })
    }
    #[inline(always)]
    fn split_exponent(self, x: [f32; N]) -> ([f32; N], [f32; N]) {
        let exponent = |x: f32| (x.to_bits().wrapping_sub(ROOT_HALF) as i32) >> 23;
        let m = map(x, |x| f32::from_bits(x.to_bits().wrapping_sub((exponent(x) << 23) as u32)));
        (m, map(x, |x| exponent(x) as f32))
    }
}

/// Bits of `√½`.
pub(super) const ROOT_HALF: u32 = 0x3f35_04f3;

#[inline(always)]
fn tree(mut x: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    for distance in [8, 4, 2, 1] {
        for i in 0..distance {
            x[i] = f(x[i], x[i + distance]);
        }
    }
    x[0]
}

impl Simd for Scalar<LANES> {
    const BLOCKS: &[usize] = &[1, 4];
    const VECTORS: usize = 1;

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> [f32; LANES] {
        *x
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| x[i].to_f32())
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| x[i].to_f32())
    }
    #[inline(always)]
    fn store(self, x: [f32; LANES], out: &mut [f32; LANES]) {
        *out = x;
    }
    #[inline(always)]
    fn store_f16(self, x: [f32; LANES], out: &mut [f16; LANES]) {
        *out = std::array::from_fn(|i| f16::from_f32(x[i]));
    }
    #[inline(always)]
    fn sum(self, x: [f32; LANES]) -> f32 {
        tree(x, |a, b| a + b)
    }
    #[inline(always)]
    fn maximum(self, x: [f32; LANES]) -> f32 {
        tree(x, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn bits(self, mask: [bool; LANES]) -> u16 {
        mask.iter().enumerate().fold(0, |bits, (i, &set)| bits | (u16::from(set) << i))
    }
    #[inline(always)]
    fn mask(self, bits: u16) -> [bool; LANES] {
        std::array::from_fn(|i| bits >> i & 1 == 1)
    }
    #[inline(always)]
    fn of_u32(self, x: &[u32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| x[i] as f32)
    }

    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
}
