//! AVX2, FMA and F16C: two `ymm` registers are a vector, lanes 0..8 in the first.

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;

use half::{bf16, f16};

use super::scalar::ROOT_HALF;
use super::{Arithmetic, Kernel, LANES, Simd};

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The CPU has the features named above.
    #[inline(always)]
    pub(super) unsafe fn new() -> Avx2 {
        Avx2(())
    }
}

/// Methods that do the same with both halves.
macro_rules! halves {
    ($($name:ident($($arg:ident),*) $body:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: Pair),*) -> Pair {
            // SAFETY: the token proves the features.
            let low = unsafe { $(let $arg = $arg.0;)* $body };
            // SAFETY: as above.
            let high = unsafe { $(let $arg = $arg.1;)* $body };
            Pair(low, high)
        }
    )*};
}

/// Sixteen lanes.
#[derive(Clone, Copy)]
pub(crate) struct Pair(__m256, __m256);

impl Arithmetic for Avx2 {
    type F = Pair;
    type M = Pair;

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        // SAFETY: the token proves the features.
        let x = unsafe { _mm256_set1_ps(x) };
        Pair(x, x)
    }

    halves! {
        add(a, b) _mm256_add_ps(a, b);
        sub(a, b) _mm256_sub_ps(a, b);
        mul(a, b) _mm256_mul_ps(a, b);
        div(a, b) _mm256_div_ps(a, b);
        mul_add(a, b, c) _mm256_fmadd_ps(a, b, c);
        neg_mul_add(a, b, c) _mm256_fnmadd_ps(a, b, c);
        min(a, b) _mm256_min_ps(a, b);
        max(a, b) _mm256_max_ps(a, b);
        abs(x) _mm256_andnot_ps(_mm256_set1_ps(-0.0), x);
        copy_sign(x, sign) _mm256_or_ps(
            _mm256_andnot_ps(_mm256_set1_ps(-0.0), x),
            _mm256_and_ps(_mm256_set1_ps(-0.0), sign)
        );
        less(a, b) _mm256_cmp_ps::<_CMP_LT_OQ>(a, b);
        select(mask, yes, no) _mm256_blendv_ps(no, yes, mask);
        scale_exponent(x, n) {
            let n = _mm256_cvtps_epi32(n);
            let bias = _mm256_set1_epi32(127);
            let first = _mm256_srai_epi32::<1>(n);
            let second = _mm256_sub_epi32(n, first);
            let first = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(first, bias)));
            let second = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(second, bias)));
            _mm256_mul_ps(_mm256_mul_ps(x, first), second)
        };
    }

    #[inline(always)]
    fn split_exponent(self, x: Pair) -> (Pair, Pair) {
        // SAFETY: the token proves the features.
        let (low, high) = unsafe { (split(x.0), split(x.1)) };
        (Pair(low.0, high.0), Pair(low.1, high.1))
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn split(x: __m256) -> (__m256, __m256) {
    let bits = _mm256_castps_si256(x);
    let n = _mm256_srai_epi32::<23>(_mm256_sub_epi32(bits, _mm256_set1_epi32(ROOT_HALF as i32)));
    let m = _mm256_sub_epi32(bits, _mm256_slli_epi32::<23>(n));
    (_mm256_castsi256_ps(m), _mm256_cvtepi32_ps(n))
}

/// Lanes whose bit is set in the low eight of `bits`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn lanes_of(bits: u16) -> __m256 {
    let lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    let chosen = _mm256_and_si256(_mm256_set1_epi32(i32::from(bits)), lane);
    _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, lane))
}

/// Two exact halves; the one rounding is that of their sum.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unsigned(x: __m256i) -> __m256 {
    let low = _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)));
    let high = _mm256_cvtepi32_ps(_mm256_srli_epi32::<16>(x));
    _mm256_fmadd_ps(high, _mm256_set1_ps(65536.0), low)
}

/// Methods that are one expression of intrinsics.
macro_rules! intrinsics {
    ($($name:ident($($arg:ident: $type:ty),*) -> $out:ty { $body:expr })*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $type),*) -> $out {
            // SAFETY: the token proves the features; memory operands are references to whole vectors.
            unsafe { $body }
        }
    )*};
}

impl Simd for Avx2 {
    const BLOCKS: &[usize] = &[1, 2, 3, 4, 6];
    const VECTORS: usize = 1;

    intrinsics! {
        load(x: &[f32; LANES]) -> Pair { Pair(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x[8..].as_ptr())) }
        load_f16(x: &[f16; LANES]) -> Pair { Pair(
            _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(x[8..].as_ptr().cast())),
        ) }
        load_bf16(x: &[bf16; LANES]) -> Pair {{
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(x[8..].as_ptr().cast()));
            Pair(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }}
        store(x: Pair, out: &mut [f32; LANES]) -> () {{
            _mm256_storeu_ps(out.as_mut_ptr(), x.0);
            _mm256_storeu_ps(out[8..].as_mut_ptr(), x.1);
        }}
        store_f16(x: Pair, out: &mut [f16; LANES]) -> () {{
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x.0));
            _mm_storeu_si128(out[8..].as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x.1));
        }}
        sum(x: Pair) -> f32 {{
            let x = _mm256_add_ps(x.0, x.1);
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }}
        maximum(x: Pair) -> f32 {{
            let x = _mm256_max_ps(x.0, x.1);
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }}
        bits(mask: Pair) -> u16 {
            (_mm256_movemask_ps(mask.0) | (_mm256_movemask_ps(mask.1) << 8)) as u16
        }
        mask(bits: u16) -> Pair { Pair(lanes_of(bits), lanes_of(bits >> 8)) }
        of_u32(x: &[u32; LANES]) -> Pair { Pair(
            unsigned(_mm256_loadu_si256(x.as_ptr().cast())),
            unsigned(_mm256_loadu_si256(x[8..].as_ptr().cast())),
        ) }
    }

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves the features.
        unsafe { super::run_avx2(kernel) }
    }
}
