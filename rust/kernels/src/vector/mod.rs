//! Sixteen lanes of f32, written once over [`Simd`] and instantiated for each instruction set.
//!
//! A level is a token whose existence proves that the CPU can run it, so its methods are safe. An algorithm is a
//! [`Kernel`]: its body is generic and inlined into one `#[target_feature]` shell per level (memchr's arrangement).
//! Every method means exactly what its scalar form computes, so all levels give the same bits; NaNs may differ in sign
//! and payload.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

use half::{bf16, f16};

use crate::isa::Isa;
pub(crate) use scalar::Scalar;

/// Lanes of a [`Simd`] vector on every level: the "16 interleaved partial sums" of a row sum.
pub(crate) const LANES: usize = 16;

/// Lane-wise f32 arithmetic, each operation rounded once, to nearest even.
pub(crate) trait Arithmetic: Copy {
    /// Floats.
    type F: Copy;
    /// One truth value a lane.
    type M: Copy;

    fn splat(self, x: f32) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a·b + c`, fused.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `c - a·b`, fused.
    fn neg_mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a < b ? a : b`; a NaN on either side gives `b`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a > b ? a : b`; a NaN on either side gives `b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, x: Self::F) -> Self::F;
    /// The magnitude of `x` with the sign bit of `sign`.
    fn copy_sign(self, x: Self::F, sign: Self::F) -> Self::F;
    /// `a < b`; false for NaN.
    fn less(self, a: Self::F, b: Self::F) -> Self::M;
    fn select(self, mask: Self::M, yes: Self::F, no: Self::F) -> Self::F;
    /// `x·2^n` rounded once, for `x` in `[0.5, 2]` (or NaN) and integral `n` in `[-152, 130]`.
    fn scale_exponent(self, x: Self::F, n: Self::F) -> Self::F;
    /// `(m, n)` with `x = m·2^n` and `m` in `[√½, √2)`, for positive normal `x`.
    fn split_exponent(self, x: Self::F) -> (Self::F, Self::F);
}

/// [`Arithmetic`] on [`LANES`] lanes that come from and go to memory.
pub(crate) trait Simd: Arithmetic {
    /// Rows that an attention block may have, ascending: with [`Simd::VECTORS`] accumulators each they fit the registers.
    const BLOCKS: &[usize];
    /// See [`Simd::BLOCKS`].
    const VECTORS: usize;

    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn load_f16(self, x: &[f16; LANES]) -> Self::F;
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::F;
    fn store(self, x: Self::F, out: &mut [f32; LANES]);
    /// Rounds to nearest even.
    fn store_f16(self, x: Self::F, out: &mut [f16; LANES]);
    /// The fixed tree: lane i += lane i+8, then += i+4, += i+2, += i+1.
    fn sum(self, x: Self::F) -> f32;
    /// The greatest lane, by the same tree of [`Arithmetic::max`].
    fn maximum(self, x: Self::F) -> f32;
    /// Bit i is lane i.
    fn bits(self, mask: Self::M) -> u16;
    fn mask(self, bits: u16) -> Self::M;
    /// Correctly rounded from unsigned integers.
    fn of_u32(self, x: &[u32; LANES]) -> Self::F;

    /// Runs `kernel` in a function of its own, which has all registers to itself.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    /// Up to [`LANES`] floats; the other lanes are zero.
    #[inline(always)]
    fn load_part(self, x: &[f32]) -> Self::F {
        let mut whole = [0.0; LANES];
        whole[..x.len()].copy_from_slice(x);
        self.load(&whole)
    }

    /// The first `out.len()` (at most [`LANES`]) lanes.
    #[inline(always)]
    fn store_part(self, x: Self::F, out: &mut [f32]) {
        let mut whole = [0.0; LANES];
        self.store(x, &mut whole);
        out.copy_from_slice(&whole[..out.len()]);
    }
}

/// An algorithm over any [`Simd`] level. `run` must be `#[inline(always)]`, or it compiles without the level's features.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` on `isa`; panics when this CPU lacks it.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    assert!(isa <= best(), "{} is not available on this CPU", isa.name());
    match isa {
        Isa::Scalar => kernel.run(Scalar::<LANES>),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the assertion above: this CPU runs the level, whose features are these.
        Isa::Avx2 | Isa::AvxVnni => unsafe { run_avx2(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Vnni | Isa::Avx512Vbmi => unsafe { run_avx512(kernel) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("asserted above"),
    }
}

/// The best level of this CPU, detected once; each level includes those below it.
fn best() -> Isa {
    static BEST: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
    *BEST.get_or_init(Isa::detect)
}

#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function's own features.
    kernel.run(unsafe { avx2::Avx2::new() })
}

#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function's own features.
    kernel.run(unsafe { avx512::Avx512::new() })
}
