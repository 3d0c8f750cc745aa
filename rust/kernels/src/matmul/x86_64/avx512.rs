//! AVX-512 with VNNI: `vpdpbusd` multiplies 64 unsigned codes with 64 signed activations and adds fours into 16 × i32.
//!
//! `vpdpbusd` does not saturate; the ranges of the sums stand in `matmul::block`. A block has at most 24 sums, so that
//! codes, an activation and a mask find room in the 32 registers.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::format::layout::{Codes, Records, Trailer};
use crate::format::{FloatType, SuperBlock};
use crate::matmul::block::{self, Bytes, Four, Lookup, Operands, Place, Six, Source, Two};
use crate::matmul::lanes::Lanes;
use crate::matmul::panel::Level;
use crate::matmul::x86_64::{intrinsics, memory, shells};

/// Proof that the CPU has AVX-512 F, BW, DQ, VL and VNNI, and VBMI where `VBMI`.
#[derive(Clone, Copy)]
pub(in crate::matmul) struct Avx512<const VBMI: bool>(());

impl<const VBMI: bool> Avx512<VBMI> {
    /// # Safety
    /// The CPU has the features.
    #[inline(always)]
    unsafe fn new() -> Self {
        Avx512(())
    }
}

/// 2-bit codes of the digits 0 to 3 of every byte below 243.
const DIGITS: [u8; 256] = {
    let (mut table, mut byte) = ([0; 256], 0);
    while byte < 256 {
        table[byte] = ((byte % 3) | ((byte / 3 % 3) << 2) | ((byte / 9 % 3) << 4) | ((byte / 27 % 3) << 6)) as u8;
        byte += 1;
    }
    table
};

impl<const VBMI: bool> Lanes for Avx512<VBMI> {
    const ROWS: usize = 16;
    const REGISTERS: usize = 32;
    type I = __m512i;
    type F = __m512;

    intrinsics! {
        zero() -> __m512i { _mm512_setzero_si512() }
        splat(x: i32) -> __m512i { _mm512_set1_epi32(x) }
        bytes(x: u8) -> __m512i { _mm512_set1_epi8(x.cast_signed()) }
        and(a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
        or(a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
        shift_right(x: __m512i, by: usize) -> __m512i { match by {
            2 => _mm512_srli_epi16::<2>(x),
            4 => _mm512_srli_epi16::<4>(x),
            6 => _mm512_srli_epi16::<6>(x),
            _ => x,
        } }
        shift_left(x: __m512i, by: usize) -> __m512i { match by {
            2 => _mm512_slli_epi16::<2>(x),
            4 => _mm512_slli_epi16::<4>(x),
            6 => _mm512_slli_epi16::<6>(x),
            _ => x,
        } }
        lookup(table: __m512i, codes: __m512i) -> __m512i { _mm512_shuffle_epi8(table, codes) }
        table(table: &[u8; 16]) -> __m512i { _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())) }
        base_three(x: __m512i) -> (__m512i, __m512i) {{
            let packed = if VBMI {
                let at = |i: usize| _mm512_loadu_si512(DIGITS.as_ptr().add(64 * i).cast());
                let low = _mm512_permutex2var_epi8(at(0), x, at(1));
                let high = _mm512_permutex2var_epi8(at(2), x, at(3));
                _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high)
            } else {
                let byte = _mm512_set1_epi16(255);
                let pack = |x: __m512i| {
                    let (mut rest, mut packed) = (x, _mm512_setzero_si512());
                    for digit in 0..4 {
                        // x · 171 >> 9 is x / 3 for bytes.
                        let third = _mm512_srli_epi16::<9>(_mm512_mullo_epi16(rest, _mm512_set1_epi16(171)));
                        let twice = _mm512_add_epi16(third, _mm512_add_epi16(third, third));
                        let value = _mm512_sub_epi16(rest, twice);
                        packed = _mm512_or_si512(packed, _mm512_sll_epi16(value, _mm_cvtsi32_si128(2 * digit)));
                        rest = third;
                    }
                    packed
                };
                let even = pack(_mm512_and_si512(x, byte));
                let odd = pack(_mm512_srli_epi16::<8>(x));
                _mm512_or_si512(even, _mm512_slli_epi16::<8>(odd))
            };
            let one = _mm512_set1_epi8(1);
            let first = _mm512_cmpge_epu8_mask(x, _mm512_set1_epi8(81));
            let second = _mm512_cmpge_epu8_mask(x, _mm512_set1_epi8(162u8.cast_signed()));
            let last = _mm512_maskz_mov_epi8(first, one);
            (packed, _mm512_mask_add_epi8(last, second, last, one))
        }}
        add(a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        mul(a: __m512i, b: __m512i) -> __m512i { _mm512_mullo_epi32(a, b) }
        times_128(x: __m512i) -> __m512i { _mm512_slli_epi32::<7>(x) }
        float(x: __m512i) -> __m512 { _mm512_cvtepi32_ps(x) }
        splat_float(x: f32) -> __m512 { _mm512_set1_ps(x) }
        mul_float(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        mul_add(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        neg_mul_add(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fnmadd_ps(a, b, c) }
        prefetch(at: *const u8) -> () { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        dot(acc: __m512i, codes: __m512i, x: __m512i) -> __m512i { _mm512_dpbusd_epi32(acc, codes, x) }
    }

    memory! {
        load(at: *const u8) -> __m512i { _mm512_loadu_si512(at.cast()) }
        store(x: __m512i, at: *mut u8) -> () { _mm512_storeu_si512(at.cast(), x) }
        quad(at: *const u8) -> __m512i { _mm512_set1_epi32(at.cast::<i32>().read_unaligned()) }
        widen_unsigned(at: *const u8) -> __m512i { _mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast())) }
        widen_signed(at: *const u8) -> __m512i { _mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast())) }
        load_float(at: *const f32) -> __m512 { _mm512_loadu_ps(at) }
        store_float(x: __m512, at: *mut f32) -> () { _mm512_storeu_ps(at, x) }
        load_scales(at: *const u8, kind: FloatType) -> __m512 { match kind {
            FloatType::F32 => _mm512_loadu_ps(at.cast()),
            FloatType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
            FloatType::Bf16 => {
                let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
            }
        } }
    }
}

shells! {
    /// The kernels of AVX-512 VNNI.
    Avx512Vnni, Avx512<false>, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", 6, [4; 6], [4, 4, 4, 2, 2, 2], unpack from usize::MAX,
    (1, 1)(1, 2)(1, 3)(1, 4)(1, 5)(1, 6)(2, 1)(2, 2)(2, 3)(2, 4)(2, 5)(2, 6)
    (3, 1)(3, 2)(3, 3)(3, 4)(3, 5)(3, 6)(4, 1)(4, 2)(4, 3)(4, 4)(4, 5)(4, 6),
    base three (1, 1)(1, 2)(2, 1)(2, 2)(3, 1)(3, 2)(4, 1)(4, 2)
}

/// The kernels of AVX-512 VNNI, with table look-ups of VBMI for base 3.
pub(in crate::matmul) struct Avx512Vbmi;

impl Avx512Vbmi {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    unsafe fn base_three<const V: usize, const M: usize>(o: &Operands<'_>, place: &Place) {
        // SAFETY: this function's own features; the rest is the caller's promise.
        unsafe { block::base_three::<_, V, M>(Avx512::<true>::new(), o, place) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    unsafe fn base_three_to_two(records: &Records, panel: *const u8, out: *mut u8, ahead: usize) {
        // SAFETY: as above.
        unsafe { block::unpack_base_three(Avx512::<true>::new(), records, panel, out, ahead) }
    }
}

impl Level for Avx512Vbmi {
    const ROWS: usize = Avx512Vnni::ROWS;
    const MOST_TOKENS: usize = Avx512Vnni::MOST_TOKENS;
    const VECTORS: &[usize] = Avx512Vnni::VECTORS;
    const HELD: &[usize] = Avx512Vnni::HELD;
    const UNPACK_FROM: usize = Avx512Vnni::UNPACK_FROM;

    unsafe fn block(o: &Operands<'_>, place: &Place, vectors: usize, tokens: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match (o.records.codes, vectors, tokens) {
                (Codes::BaseThree, 1, 1) => Self::base_three::<1, 1>(o, place),
                (Codes::BaseThree, 2, 1) => Self::base_three::<2, 1>(o, place),
                (Codes::BaseThree, 3, 1) => Self::base_three::<3, 1>(o, place),
                (Codes::BaseThree, 4, 1) => Self::base_three::<4, 1>(o, place),
                (Codes::BaseThree, 1, 2) => Self::base_three::<1, 2>(o, place),
                (Codes::BaseThree, 2, 2) => Self::base_three::<2, 2>(o, place),
                (Codes::BaseThree, 3, 2) => Self::base_three::<3, 2>(o, place),
                (Codes::BaseThree, 4, 2) => Self::base_three::<4, 2>(o, place),
                _ => Avx512Vnni::block(o, place, vectors, tokens),
            }
        }
    }

    unsafe fn unpack(o: &Operands<'_>, groups: Range<usize>, out: *mut u8, ahead: usize) {
        // SAFETY: the caller's promise.
        unsafe { <Avx512Vnni as Level>::unpack(o, groups, out, ahead) }
    }

    unsafe fn unpack_base_three(records: &Records, panel: *const u8, out: *mut u8, ahead: usize) {
        // SAFETY: the caller's promise.
        unsafe { Self::base_three_to_two(records, panel, out, ahead) }
    }
}
