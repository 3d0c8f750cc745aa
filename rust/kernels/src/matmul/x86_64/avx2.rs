//! 256-bit vectors: AVX2 with FMA and F16C, and AVX-VNNI, which adds `vpdpbusd`.
//!
//! Without VNNI `vpmaddubsw` multiplies bytes and adds pairs in i16, which `vpaddw` sums over as many quads as fit (see
//! `matmul::block`) before one `vpmaddwd` widens them.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::format::layout::{Codes, Records, Trailer};
use crate::format::{FloatType, SuperBlock};
use crate::matmul::block::{self, Bytes, Four, Lookup, Operands, Place, Six, Source, Two};
use crate::matmul::input::{Group, Shape, Sink, factors};
use crate::matmul::lanes::Lanes;
use crate::matmul::panel::Level;
use crate::matmul::x86_64::{intrinsics, memory, shells};

/// Proof that the CPU has AVX2, FMA and F16C, and AVX-VNNI where `VNNI`.
#[derive(Clone, Copy)]
pub(in crate::matmul) struct Vectors<const VNNI: bool>(());

impl<const VNNI: bool> Vectors<VNNI> {
    /// # Safety
    /// The CPU has the features.
    #[inline(always)]
    unsafe fn new() -> Self {
        Vectors(())
    }
}

impl<const VNNI: bool> Lanes for Vectors<VNNI> {
    const ROWS: usize = 8;
    const REGISTERS: usize = 16;
    const PAIRS: Option<usize> = if VNNI { None } else { Some(i16::MAX as usize) };
    type I = __m256i;
    type F = __m256;

    intrinsics! {
        zero() -> __m256i { _mm256_setzero_si256() }
        splat(x: i32) -> __m256i { _mm256_set1_epi32(x) }
        bytes(x: u8) -> __m256i { _mm256_set1_epi8(x.cast_signed()) }
        and(a: __m256i, b: __m256i) -> __m256i { _mm256_and_si256(a, b) }
        or(a: __m256i, b: __m256i) -> __m256i { _mm256_or_si256(a, b) }
        shift_right(x: __m256i, by: usize) -> __m256i { match by {
            2 => _mm256_srli_epi16::<2>(x),
            4 => _mm256_srli_epi16::<4>(x),
            6 => _mm256_srli_epi16::<6>(x),
            _ => x,
        } }
        shift_left(x: __m256i, by: usize) -> __m256i { match by {
            2 => _mm256_slli_epi16::<2>(x),
            4 => _mm256_slli_epi16::<4>(x),
            6 => _mm256_slli_epi16::<6>(x),
            _ => x,
        } }
        lookup(table: __m256i, codes: __m256i) -> __m256i { _mm256_shuffle_epi8(table, codes) }
        table(table: &[u8; 16]) -> __m256i { _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())) }
        base_three(x: __m256i) -> (__m256i, __m256i) {{
            let pack = |x: __m256i| {
                let (mut rest, mut packed) = (x, _mm256_setzero_si256());
                for digit in 0..4 {
                    // x · 171 >> 9 is x / 3 for bytes.
                    let third = _mm256_srli_epi16::<9>(_mm256_mullo_epi16(rest, _mm256_set1_epi16(171)));
                    let twice = _mm256_add_epi16(third, _mm256_add_epi16(third, third));
                    let value = _mm256_sub_epi16(rest, twice);
                    packed = _mm256_or_si256(packed, _mm256_sll_epi16(value, _mm_cvtsi32_si128(2 * digit)));
                    rest = third;
                }
                (packed, rest)
            };
            let (even, even_last) = pack(_mm256_and_si256(x, _mm256_set1_epi16(255)));
            let (odd, odd_last) = pack(_mm256_srli_epi16::<8>(x));
            let both = |even: __m256i, odd: __m256i| _mm256_or_si256(even, _mm256_slli_epi16::<8>(odd));
            (both(even, odd), both(even_last, odd_last))
        }}
        add(a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi32(a, b) }
        mul(a: __m256i, b: __m256i) -> __m256i { _mm256_mullo_epi32(a, b) }
        times_128(x: __m256i) -> __m256i { _mm256_slli_epi32::<7>(x) }
        float(x: __m256i) -> __m256 { _mm256_cvtepi32_ps(x) }
        splat_float(x: f32) -> __m256 { _mm256_set1_ps(x) }
        mul_float(a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
        mul_add(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
        neg_mul_add(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fnmadd_ps(a, b, c) }
        pairs(partial: __m256i, codes: __m256i, x: __m256i) -> __m256i {
            _mm256_add_epi16(partial, _mm256_maddubs_epi16(codes, x))
        }
        add_pairs(acc: __m256i, partial: __m256i, weight: i16) -> __m256i {
            _mm256_add_epi32(acc, _mm256_madd_epi16(partial, _mm256_set1_epi16(weight)))
        }
        prefetch(at: *const u8) -> () { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    memory! {
        load(at: *const u8) -> __m256i { _mm256_loadu_si256(at.cast()) }
        store(x: __m256i, at: *mut u8) -> () { _mm256_storeu_si256(at.cast(), x) }
        quad(at: *const u8) -> __m256i { _mm256_set1_epi32(at.cast::<i32>().read_unaligned()) }
        widen_unsigned(at: *const u8) -> __m256i { _mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast())) }
        widen_signed(at: *const u8) -> __m256i { _mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast())) }
        load_float(at: *const f32) -> __m256 { _mm256_loadu_ps(at) }
        store_float(x: __m256, at: *mut f32) -> () { _mm256_storeu_ps(at, x) }
        load_scales(at: *const u8, kind: FloatType) -> __m256 { match kind {
            FloatType::F32 => _mm256_loadu_ps(at.cast()),
            FloatType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
            FloatType::Bf16 => {
                let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
            }
        } }
    }

    #[inline(always)]
    fn dot(self, acc: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the token proves the features.
        unsafe {
            if VNNI {
                return _mm256_dpbusd_avx_epi32(acc, codes, x);
            }
            self.add_pairs(acc, _mm256_maddubs_epi16(codes, x), 1)
        }
    }
}

shells! {
    /// The kernels of AVX2.
    Avx2, Vectors<false>, "avx2,fma,f16c", 6, [8, 4, 2, 2, 2, 2], [4, 2, 2, 2, 2, 2], unpack from 3,
    (2, 1)(4, 1)(8, 1)(2, 2)(4, 2)(2, 3)(2, 4)(2, 5)(2, 6),
    base three (2, 1)(4, 1)(8, 1)(2, 2)(4, 2)
}

shells! {
    /// The kernels of AVX-VNNI.
    AvxVnni, Vectors<true>, "avx2,fma,f16c,avxvnni", 6, [8, 4, 2, 2, 2, 2], [4, 2, 2, 2, 2, 2], unpack from usize::MAX,
    (2, 1)(4, 1)(8, 1)(2, 2)(4, 2)(2, 3)(2, 4)(2, 5)(2, 6),
    base three (2, 1)(4, 1)(8, 1)(2, 2)(4, 2)
}

/// Rows of a vector of activations.
const LANES: usize = 8;

/// Quantises one row `x` by groups.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::matmul) fn quantize(x: &[f32], shape: Shape, mut sink: Sink<'_>) {
    for (g, x) in x.chunks(shape.group).enumerate() {
        let group = quantize_group(x, shape, g, &mut sink);
        sink.group(g, group);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_group(x: &[f32], shape: Shape, g: usize, sink: &mut Sink<'_>) -> Group {
    let supers = sink.sub(g).is_some();
    let sign = _mm256_set1_epi32(i32::MAX);
    let mut absmax = _mm256_setzero_si256();
    for x in x.chunks(2 * LANES) {
        for x in load(x) {
            absmax = _mm256_max_epi32(absmax, _mm256_and_si256(_mm256_castps_si256(x), sign));
        }
    }
    let (factor, scale) = factors(lanes(absmax).into_iter().max().unwrap_or(0) as u32, shape.precision);
    let (plane, planes) = (g * shape.group * shape.planes(), shape.planes());
    let mut sums = _mm256_setzero_si256();
    let mut parts = [[0; 16]; 2];
    for (v, x) in x.chunks(2 * LANES).enumerate() {
        // A factor of 0 keeps Inf and NaN out: they would not become 0 by themselves. The default rounding is half to even.
        let round = |x: __m256| {
            if factor == 0.0 {
                _mm256_setzero_si256()
            } else {
                _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(factor)))
            }
        };
        let xq = load(x).map(round);
        sums = _mm256_add_epi32(sums, _mm256_add_epi32(xq[0], xq[1]));
        let low = xq.map(|xq| if planes == 2 { _mm256_and_si256(xq, _mm256_set1_epi32(127)) } else { xq });
        if planes == 2 {
            let high = xq.map(|xq| _mm256_srai_epi32::<7>(xq));
            sink.store(plane, 16 * v, &bytes(high));
            if supers {
                parts[0][v] = lanes(_mm256_add_epi32(high[0], high[1])).iter().sum();
            }
        }
        sink.store(plane + (planes - 1) * shape.plane(g), 16 * v, &bytes(low));
        if supers {
            parts[planes - 1][v] = lanes(_mm256_add_epi32(low[0], low[1])).iter().sum();
        }
    }
    if let Some(sub) = sink.sub(g) {
        (0..planes).for_each(|plane| sub.set(plane, &parts[plane]));
    }
    for first in (x.len().next_multiple_of(16)..shape.plane(g)).step_by(16) {
        (0..planes).for_each(|p| sink.store(plane + p * shape.plane(g), first, &[0; 16]));
    }
    Group::new(scale, lanes(sums).iter().sum())
}

#[target_feature(enable = "avx2")]
fn lanes(x: __m256i) -> [i32; LANES] {
    let mut lanes = [0; LANES];
    // SAFETY: the array has eight elements.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), x) };
    lanes
}

/// The low bytes of 16 lanes, each in -128..=127.
#[target_feature(enable = "avx2")]
fn bytes([first, second]: [__m256i; 2]) -> [u8; 16] {
    // Packing interleaves halves of 128 bits; the permutation puts fours of lanes in order again.
    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(first, second));
    let packed = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
    let mut bytes = [0; 16];
    // SAFETY: there are 16 bytes.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), packed) };
    bytes
}

/// Up to 16 floats, then zeros.
#[target_feature(enable = "avx2")]
fn load(x: &[f32]) -> [__m256; 2] {
    let mut padded = [0.0; 2 * LANES];
    let x = if x.len() == padded.len() {
        x
    } else {
        padded[..x.len()].copy_from_slice(x);
        &padded
    };
    // SAFETY: there are 16 elements.
    unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(LANES))] }
}
