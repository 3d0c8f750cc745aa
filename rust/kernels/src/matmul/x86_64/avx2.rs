//! AVX2 with FMA and F16C, without VNNI: 16-bit multiply-add.
//!
//! Codes become i16 without a shuffle: masking and shifting 16-bit lanes of a cell gives the even and the odd inputs of
//! 8 rows; `vpmaddwd` multiplies them with pairs of i16 activations (x0 x2, x1 x3) into i32. A pair is at most
//! 2 · 255 · 16383 < 2^23, a group 128 · 255 · 16383 < 2^29, its zero point as much again: i32 holds everything.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::format::layout::{CELL, Records, STEP, TILE};
use crate::format::{Bits, FloatType, Offset, Precision};
use crate::matmul::input::{Group, Plane, factors};

/// Rows of a vector.
const LANES: usize = 8;

/// Quantises one row `x` by groups of `group`; `codes` holds whole blocks of 16 inputs.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::matmul) fn quantize(
    x: &[f32],
    group: usize,
    precision: Precision,
    codes: &mut [u8],
    scales: &mut [Group],
) {
    for ((x, codes), scale) in x.chunks(group).zip(codes.chunks_mut(group * 2)).zip(scales) {
        *scale = quantize_group(x, precision, codes);
    }
}

/// One group, at most 128 long.
#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_group(x: &[f32], precision: Precision, codes: &mut [u8]) -> Group {
    let blocks = x.len().div_ceil(16);
    assert_eq!(codes.len(), blocks * 32, "codes of a group");
    let mut padded = [0.0f32; 128];
    padded[..x.len()].copy_from_slice(x);
    let load = |i: usize| {
        let eight = &padded[i * LANES..][..LANES];
        // SAFETY: the slice has eight elements.
        unsafe { _mm256_loadu_ps(eight.as_ptr()) }
    };
    let sign = _mm256_set1_epi32(i32::MAX);
    let mut absmax = _mm256_setzero_si256();
    for i in 0..2 * blocks {
        absmax = _mm256_max_epi32(absmax, _mm256_and_si256(_mm256_castps_si256(load(i)), sign));
    }
    let mut lanes = [0i32; LANES];
    // SAFETY: the array has eight elements.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), absmax) };
    let (factor, scale) = factors(lanes.into_iter().max().unwrap_or(0) as u32, precision);
    if factor == 0.0 {
        codes.fill(0);
        return Group::new(scale, 0);
    }
    let mut sums = _mm256_setzero_si256();
    for (i, codes) in codes.chunks_exact_mut(16).enumerate() {
        let xq = _mm256_cvtps_epi32(_mm256_mul_ps(load(i), _mm256_set1_ps(factor)));
        sums = _mm256_add_epi32(sums, xq);
        let xq = _mm_packs_epi32(_mm256_castsi256_si128(xq), _mm256_extracti128_si256::<1>(xq));
        let even_odd = _mm_shufflehi_epi16::<0b11_01_10_00>(_mm_shufflelo_epi16::<0b11_01_10_00>(xq));
        // SAFETY: the chunk is 16 bytes long.
        unsafe { _mm_storeu_si128(codes.as_mut_ptr().cast(), even_odd) };
    }
    // SAFETY: the array has eight elements.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sums) };
    Group::new(scale, lanes.into_iter().sum())
}

/// Inputs of the span of groups that all tokens and tiles pass before the next span.
const SPAN: usize = 256;

/// One panel, the quantised rows and the outputs; pointers and the strides between their elements.
struct Operands<'a> {
    records: &'a Records,
    panel: *const u8,
    codes: *const u8,
    stride: usize,
    groups: *const Group,
    y: *mut f32,
    width: usize,
    first_tile: usize,
}

/// `y += x · Wᵀ` for `tiles` of one panel and the rows `tokens` of `plane`; `y: (tokens, tiles * 16)`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::matmul) fn integer(
    records: &Records,
    panel: &[u8],
    tiles: Range<usize>,
    plane: &Plane,
    tokens: Range<usize>,
    y: &mut [f32],
) {
    let last = records.groups - 1;
    assert!(tiles.end <= records.tiles && plane.groups == records.groups, "tiles and groups of a panel");
    assert!(panel.len() >= records.start(last) + records.bytes(last), "bytes of a panel");
    assert!(tokens.end * plane.stride <= plane.codes().len() && tokens.end * plane.groups <= plane.scales.len());
    assert_eq!(y.len(), tokens.len() * tiles.len() * TILE, "outputs of a panel");
    let o = Operands {
        records,
        panel: panel.as_ptr(),
        codes: plane.codes()[tokens.start * plane.stride..].as_ptr(),
        stride: plane.stride,
        groups: plane.scales[tokens.start * plane.groups..].as_ptr(),
        y: y.as_mut_ptr(),
        width: tiles.len() * TILE,
        first_tile: tiles.start,
    };
    // SAFETY: the asserts above cover every address that a panel, its tiles and the tokens give.
    unsafe {
        match records.bits {
            Bits::Four => blocks::<true>(&o, tiles.len(), tokens.len()),
            Bits::Eight => blocks::<false>(&o, tiles.len(), tokens.len()),
        }
    }
}

/// Cuts (groups, tiles, tokens) into blocks whose sums fit the registers.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn blocks<const FOUR: bool>(o: &Operands<'_>, tiles: usize, tokens: usize) {
    let groups = o.records.groups;
    let span = (SPAN / (o.records.steps * STEP)).max(1);
    // SAFETY: blocks lie inside the operands that the caller vouches for.
    unsafe {
        if tiles == 4 && tokens == 1 {
            return block::<FOUR, 8, 1>(o, 0..groups, 0, 0);
        }
        for first in (0..groups).step_by(span) {
            let groups = first..(first + span).min(groups);
            for tile in 0..tiles {
                for token in (0..tokens).step_by(4) {
                    match tokens - token {
                        1 => block::<FOUR, 2, 1>(o, groups.clone(), tile, token),
                        2 => block::<FOUR, 2, 2>(o, groups.clone(), tile, token),
                        3 => block::<FOUR, 2, 3>(o, groups.clone(), tile, token),
                        _ => block::<FOUR, 2, 4>(o, groups.clone(), tile, token),
                    }
                }
            }
        }
    }
}

/// `V` vectors of 8 rows, from the `tile`-th tile on, × `M` tokens over the groups `g`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block<const FOUR: bool, const V: usize, const M: usize>(
    o: &Operands<'_>,
    g: Range<usize>,
    tile: usize,
    token: usize,
) {
    let records = o.records;
    let cells = records.tiles * CELL;
    let mask = _mm256_set1_epi16(if FOUR { 15 } else { 255 });
    // SAFETY: the caller vouches for every tile, token and group; a record holds `steps` steps of each tile, then the
    // scales and offsets of its rows; a row of x holds 16 bytes of activations for each step.
    unsafe {
        let y = o.y.add(token * o.width + tile * TILE);
        for g in g {
            let steps = records.steps(g);
            let record = o.panel.add(records.start(g));
            let groups = o.groups.add(token * records.groups + g);
            let mut acc = [[_mm256_setzero_si256(); V]; M];
            for step in 0..steps {
                let w = record.add(step * records.step_bytes() * records.tiles + (o.first_tile + tile) * CELL);
                let x = o.codes.add(token * o.stride + (g * records.steps + step) * STEP * 2);
                for v in 0..V {
                    let first = _mm256_loadu_si256(w.add(v * 32).cast());
                    let second = if FOUR { first } else { _mm256_loadu_si256(w.add(cells + v * 32).cast()) };
                    let codes = if FOUR {
                        [
                            _mm256_and_si256(first, mask),
                            _mm256_and_si256(_mm256_srli_epi16::<8>(first), mask),
                            _mm256_and_si256(_mm256_srli_epi16::<4>(first), mask),
                            _mm256_srli_epi16::<12>(first),
                        ]
                    } else {
                        [
                            _mm256_and_si256(first, mask),
                            _mm256_srli_epi16::<8>(first),
                            _mm256_and_si256(second, mask),
                            _mm256_srli_epi16::<8>(second),
                        ]
                    };
                    for m in 0..M {
                        for (i, &codes) in codes.iter().enumerate() {
                            let x = pair(x.add(m * o.stride + i * 4));
                            acc[m][v] = _mm256_add_epi32(acc[m][v], _mm256_madd_epi16(codes, x));
                        }
                    }
                }
            }
            let rows = (o.first_tile + tile) * TILE;
            let scales = record.add(records.scales(steps) + rows * records.scale.bytes());
            let offsets = record.add(records.offsets(steps) + rows * records.offset_bytes());
            for v in 0..V {
                let scale = floats(scales, records.scale, v);
                for m in 0..M {
                    let group = &*groups.add(m * records.groups);
                    let mut sum = acc[m][v];
                    match records.offset {
                        Offset::Symmetric => {
                            let zero = group.sum * i32::from(records.bits.bias());
                            sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(zero));
                        }
                        Offset::ZeroPoint => {
                            let zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(offsets.add(v * LANES).cast()));
                            sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zero, _mm256_set1_epi32(group.sum)));
                        }
                        Offset::Minimum => {}
                    }
                    let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(group.scale));
                    let y = y.add(m * o.width + v * LANES);
                    let mut value = _mm256_fmadd_ps(scaled, scale, _mm256_loadu_ps(y));
                    if records.offset == Offset::Minimum {
                        let minimum = floats(offsets, records.scale, v);
                        value = _mm256_fmadd_ps(minimum, _mm256_set1_ps(group.moment), value);
                    }
                    _mm256_storeu_ps(y, value);
                }
            }
        }
    }
}

/// A pair of 16-bit activations in every lane.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn pair(x: *const u8) -> __m256i {
    // SAFETY: the caller has 4 bytes there.
    _mm256_set1_epi32(i32::from_ne_bytes(unsafe { x.cast::<[u8; 4]>().read() }))
}

/// The `v`-th 8 floats of type `kind`, widened.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn floats(start: *const u8, kind: FloatType, v: usize) -> __m256 {
    // SAFETY: the caller has 8 elements there.
    unsafe {
        match kind {
            FloatType::F32 => _mm256_loadu_ps(start.add(v * 32).cast()),
            FloatType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(start.add(v * 16).cast())),
            FloatType::Bf16 => {
                let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(start.add(v * 16).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
            }
        }
    }
}
