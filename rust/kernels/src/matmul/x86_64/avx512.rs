//! AVX-512 with VNNI: `vpdpbusd` multiplies 64 unsigned codes with 64 signed activations and adds fours into 16 × i32.
//!
//! `vpdpbusd` does not saturate; the ranges of the sums stand in `matmul::block`. A block has at most 24 sums, so that
//! codes, an activation and a mask find room in the 32 registers.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::format::layout::{Codes, Records, Trailer};
use crate::format::{FloatType, Precision, SuperBlock};
use crate::matmul::block::{self, Bytes, Four, Lookup, Operands, Place, Six, Source, Two};
use crate::matmul::input::{Group, Shape, Sink, levels};
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

/// Groups whose divisions share vectors.
const BATCH: usize = 16;
/// How far ahead activations are fetched.
const PAGE: usize = 4096;

#[repr(align(64))]
struct Batch<T>([T; BATCH]);

/// Quantises one row `x` by groups.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::matmul) fn quantize(x: &[f32], shape: Shape, mut sink: Sink<'_>) {
    let sign = _mm512_set1_epi32(i32::MAX);
    for (batch, x) in x.chunks(BATCH * shape.group).enumerate() {
        let mut absmax = Batch([0; BATCH]);
        for (absmax, x) in absmax.0.iter_mut().zip(x.chunks(shape.group)) {
            let mut max = _mm512_setzero_si512();
            for x in x.chunks(16) {
                _mm_prefetch::<_MM_HINT_T0>(x.as_ptr().cast::<i8>().wrapping_add(PAGE));
                max = _mm512_max_epi32(max, _mm512_and_si512(_mm512_castps_si512(load(x)), sign));
            }
            *absmax = _mm512_reduce_max_epi32(max);
        }
        let (factors, steps) = factors_of(&absmax, shape.precision);
        for (i, x) in x.chunks(shape.group).enumerate() {
            let g = batch * BATCH + i;
            let sum = quantize_group(x, factors.0[i], shape, g, &mut sink);
            sink.group(g, Group::new(steps.0[i], sum));
        }
    }
}

/// Rounds group `g` to codes, stores them and returns their sum.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn quantize_group(x: &[f32], factor: f32, shape: Shape, g: usize, sink: &mut Sink<'_>) -> i32 {
    let supers = sink.sub(g).is_some();
    let (plane, two) = (g * shape.group * shape.planes(), shape.planes() == 2);
    let second = plane + shape.plane(g);
    let mut sums = _mm512_setzero_si512();
    let mut parts = [[0; 16]; 2];
    for (v, x) in x.chunks(16).enumerate() {
        // A factor of 0 keeps Inf and NaN out: they would not become 0 by themselves. The default rounding is half to even.
        let xq = if factor == 0.0 {
            _mm512_setzero_si512()
        } else {
            _mm512_cvtps_epi32(_mm512_mul_ps(load(x), _mm512_set1_ps(factor)))
        };
        sums = _mm512_add_epi32(sums, xq);
        let (high, low) = (_mm512_srai_epi32::<7>(xq), _mm512_and_si512(xq, _mm512_set1_epi32(127)));
        sink.store(plane, 16 * v, &bytes(if two { high } else { xq }));
        if two {
            sink.store(second, 16 * v, &bytes(low));
        }
        if supers {
            parts[0][v] = _mm512_reduce_add_epi32(if two { high } else { xq });
            parts[1][v] = _mm512_reduce_add_epi32(low);
        }
    }
    if let Some(sub) = sink.sub(g) {
        (0..shape.planes()).for_each(|plane| sub.set(plane, &parts[plane]));
    }
    for first in (x.len().next_multiple_of(16)..shape.plane(g)).step_by(16) {
        sink.store(plane, first, &[0; 16]);
        if two {
            sink.store(second, first, &[0; 16]);
        }
    }
    _mm512_reduce_add_epi32(sums)
}

/// The low bytes of 16 lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn bytes(x: __m512i) -> [u8; 16] {
    let mut bytes = [0; 16];
    // SAFETY: there are 16 bytes.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(x)) };
    bytes
}

/// Up to 16 floats, then zeros.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(x: &[f32]) -> __m512 {
    let mask = if x.len() == 16 { u16::MAX } else { (1 << x.len()) - 1 };
    // SAFETY: the mask covers the elements of the slice.
    unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) }
}

/// `input::factors` of 16 groups.
#[inline]
#[target_feature(enable = "avx512f")]
fn factors_of(absmax: &Batch<i32>, precision: Precision) -> (Batch<f32>, Batch<f32>) {
    let levels = _mm512_set1_ps(levels(precision));
    let infinity = _mm512_set1_epi32(f32::INFINITY.to_bits() as i32);
    // SAFETY: the arrays have 16 elements and are aligned.
    unsafe {
        let bits = _mm512_load_si512(absmax.0.as_ptr().cast());
        let absmax = _mm512_castsi512_ps(bits);
        let inverse = _mm512_div_ps(levels, absmax);
        let finite = _mm512_cmplt_epi32_mask(bits, infinity);
        let usable = finite & _mm512_cmplt_epi32_mask(_mm512_castps_si512(inverse), infinity);
        let scale = _mm512_maskz_div_ps(usable, absmax, levels);
        let scale = _mm512_mask_blend_ps(finite, _mm512_set1_ps(f32::NAN), scale);
        let (mut factors, mut scales) = (Batch([0.0; BATCH]), Batch([0.0; BATCH]));
        _mm512_store_ps(factors.0.as_mut_ptr(), _mm512_maskz_mov_ps(usable, inverse));
        _mm512_store_ps(scales.0.as_mut_ptr(), scale);
        (factors, scales)
    }
}
