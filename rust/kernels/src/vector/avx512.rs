//! AVX-512 F, BW, DQ and VL: one `zmm` register is a vector.

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;

use half::{bf16, f16};

use super::scalar::ROOT_HALF;
use super::{Arithmetic, Kernel, LANES, Simd};

/// Proof that the CPU has AVX-512 F, BW, DQ, VL and everything of the AVX2 level.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The CPU has the features named above.
    #[inline(always)]
    pub(super) unsafe fn new() -> Avx512 {
        Avx512(())
    }
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

impl Arithmetic for Avx512 {
    type F = __m512;
    type M = __mmask16;

    intrinsics! {
        splat(x: f32) -> __m512 { _mm512_set1_ps(x) }
        add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        sub(a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        div(a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        mul_add(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        neg_mul_add(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fnmadd_ps(a, b, c) }
        min(a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        max(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        abs(x: __m512) -> __m512 { _mm512_abs_ps(x) }
        copy_sign(x: __m512, sign: __m512) -> __m512 {{
            let magnitude = _mm512_set1_epi32(i32::MAX);
            // Ternary logic 0xca is `magnitude ? x : sign`, bit by bit.
            _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xca>(
                magnitude, _mm512_castps_si512(x), _mm512_castps_si512(sign),
            ))
        }}
        less(a: __m512, b: __m512) -> __mmask16 { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
        select(mask: __mmask16, yes: __m512, no: __m512) -> __m512 { _mm512_mask_blend_ps(mask, no, yes) }
        scale_exponent(x: __m512, n: __m512) -> __m512 { _mm512_scalef_ps(x, n) }
        split_exponent(x: __m512) -> (__m512, __m512) {{
            let bits = _mm512_castps_si512(x);
            let n = _mm512_srai_epi32::<23>(_mm512_sub_epi32(bits, _mm512_set1_epi32(ROOT_HALF as i32)));
            let m = _mm512_sub_epi32(bits, _mm512_slli_epi32::<23>(n));
            (_mm512_castsi512_ps(m), _mm512_cvtepi32_ps(n))
        }}
    }
}

impl Simd for Avx512 {
    const BLOCKS: &[usize] = &[1, 2, 3, 4, 6, 7, 8, 12];
    const VECTORS: usize = 2;

    intrinsics! {
        load(x: &[f32; LANES]) -> __m512 { _mm512_loadu_ps(x.as_ptr()) }
        load_f16(x: &[f16; LANES]) -> __m512 { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
        load_bf16(x: &[bf16; LANES]) -> __m512 {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()))))
        }
        store(x: __m512, out: &mut [f32; LANES]) -> () { _mm512_storeu_ps(out.as_mut_ptr(), x) }
        store_f16(x: __m512, out: &mut [f16; LANES]) -> () {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))
        }
        sum(x: __m512) -> f32 {{
            let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }}
        maximum(x: __m512) -> f32 {{
            let x = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }}
        of_u32(x: &[u32; LANES]) -> __m512 { _mm512_cvtepu32_ps(_mm512_loadu_si512(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn bits(self, mask: __mmask16) -> u16 {
        mask
    }
    #[inline(always)]
    fn mask(self, bits: u16) -> __mmask16 {
        bits
    }

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves the features.
        unsafe { super::run_avx512(kernel) }
    }
}
