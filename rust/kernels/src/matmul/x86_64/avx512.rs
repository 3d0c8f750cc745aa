//! AVX-512 with VNNI: `vpdpbusd` multiplies 64 unsigned codes with 64 signed activations and adds fours into 16 × i32.
//!
//! A cell (16 rows × 4 inputs, see `format::layout`) is one operand; the other is a broadcast of 4 activations. A16
//! runs two planes, `xq = 128 h + l` with `h = xq >> 7` in -128..=127 and `l = xq & 127`, so both fit signed bytes.
//! Ranges for groups of at most 128 inputs and codes of at most 255, and i32 sums:
//!
//! ```text
//! |Σ code · h| ≤ 128 · 255 · 128 < 2^22.0        (H << 7) < 2^29.0
//! |Σ code · l| ≤ 128 · 255 · 127 < 2^22.0        |(H << 7) + L| = |Σ code · xq| ≤ 128 · 255 · 16383 < 2^29.0
//! |zero · Σ xq| ≤ 255 · 128 · 16383 < 2^29.0     so the difference stays below 2^30
//! ```
//!
//! `vpdpbusd` does not saturate. Symmetric codes take their correction, `-bias · Σ xq`, as the initial value of L.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::format::layout::{CELL, Records, STEP, TILE};
use crate::format::{Bits, FloatType, Offset, Precision};
use crate::matmul::input::{Group, Plane, levels};

/// Groups whose divisions share vectors.
const BATCH: usize = 16;

/// Quantises one row `x` by groups of `group`; `codes` holds whole blocks of 16 inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::matmul) fn quantize(
    x: &[f32],
    group: usize,
    precision: Precision,
    codes: &mut [u8],
    scales: &mut [Group],
) {
    match (group, precision == Precision::A8) {
        (16, true) => quantize_row::<1, 16>(x, precision, codes, scales),
        (16, false) => quantize_row::<1, 32>(x, precision, codes, scales),
        (32, true) => quantize_row::<2, 16>(x, precision, codes, scales),
        (32, false) => quantize_row::<2, 32>(x, precision, codes, scales),
        (64, true) => quantize_row::<4, 16>(x, precision, codes, scales),
        (64, false) => quantize_row::<4, 32>(x, precision, codes, scales),
        (_, true) => quantize_row::<8, 16>(x, precision, codes, scales),
        (_, false) => quantize_row::<8, 32>(x, precision, codes, scales),
    }
}

/// Groups of `V` vectors; 16 inputs become `BYTES` of codes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn quantize_row<const V: usize, const BYTES: usize>(
    x: &[f32],
    precision: Precision,
    codes: &mut [u8],
    scales: &mut [Group],
) {
    let (whole, short) = x.split_at(x.len() / (V * 16) * (V * 16));
    let groups = whole.as_chunks().0.as_chunks::<V>().0;
    let (blocks, short_codes) = codes.split_at_mut(groups.len() * V * BYTES);
    let blocks = blocks.as_chunks_mut::<BYTES>().0.as_chunks_mut::<V>().0;
    let batches = groups.chunks(BATCH).zip(blocks.chunks_mut(BATCH));
    for ((x, codes), scales) in batches.zip(scales.chunks_mut(BATCH)) {
        quantize_batch(x, precision, codes, scales);
    }
    if !short.is_empty() {
        let (mut padded, mut padded_codes) = ([[0.0; 16]; V], [[0; BYTES]; V]);
        padded.as_flattened_mut()[..short.len()].copy_from_slice(short);
        quantize_batch(&[padded], precision, std::array::from_mut(&mut padded_codes), &mut scales[groups.len()..]);
        short_codes.copy_from_slice(&padded_codes.as_flattened()[..short_codes.len()]);
    }
}

/// At most 16 groups.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn quantize_batch<const V: usize, const BYTES: usize>(
    x: &[[[f32; 16]; V]],
    precision: Precision,
    codes: &mut [[[u8; BYTES]; V]],
    scales: &mut [Group],
) {
    let sign = _mm512_set1_epi32(i32::MAX);
    let mut absmax = Lanes([0; BATCH]);
    for (absmax, x) in absmax.0.iter_mut().zip(x) {
        let mut max = _mm512_setzero_si512();
        for x in x {
            _mm_prefetch::<_MM_HINT_T0>(x.as_ptr().cast::<i8>().wrapping_add(PAGE));
            max = _mm512_max_epi32(max, _mm512_and_si512(_mm512_castps_si512(load(x)), sign));
        }
        *absmax = _mm512_reduce_max_epi32(max);
    }
    let (factors, steps) = factors_of(&absmax, precision);
    for (i, ((x, codes), scale)) in x.iter().zip(codes).zip(scales).enumerate() {
        let mut sums = _mm512_setzero_si512();
        if factors.0[i] == 0.0 {
            // A factor of 0 keeps Inf and NaN out: they would not become 0 by themselves.
            codes.as_flattened_mut().fill(0);
        } else {
            let factor = _mm512_set1_ps(factors.0[i]);
            for (x, codes) in x.iter().zip(codes) {
                sums = _mm512_add_epi32(sums, store_codes(_mm512_mul_ps(load(x), factor), codes));
            }
        }
        *scale = Group::new(steps.0[i], _mm512_reduce_add_epi32(sums));
    }
}

#[repr(align(64))]
struct Lanes<T>([T; BATCH]);

#[inline]
#[target_feature(enable = "avx512f")]
fn load(x: &[f32; 16]) -> __m512 {
    // SAFETY: the array has 16 elements.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// `input::factors` of 16 groups.
#[inline]
#[target_feature(enable = "avx512f")]
fn factors_of(absmax: &Lanes<i32>, precision: Precision) -> (Lanes<f32>, Lanes<f32>) {
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
        let (mut factors, mut scales) = (Lanes([0.0; BATCH]), Lanes([0.0; BATCH]));
        _mm512_store_ps(factors.0.as_mut_ptr(), _mm512_maskz_mov_ps(usable, inverse));
        _mm512_store_ps(scales.0.as_mut_ptr(), scale);
        (factors, scales)
    }
}

/// Rounds 16 activations to codes and stores them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn store_codes<const BYTES: usize>(x: __m512, codes: &mut [u8; BYTES]) -> __m512i {
    // The default rounding mode is half to even.
    let xq = _mm512_cvtps_epi32(x);
    // SAFETY: there are 16 or 32 bytes.
    unsafe {
        if BYTES == 16 {
            _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(xq));
        } else {
            let high = _mm512_cvtepi32_epi8(_mm512_srai_epi32::<7>(xq));
            let low = _mm512_cvtepi32_epi8(_mm512_and_si512(xq, _mm512_set1_epi32(127)));
            _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm_unpacklo_epi32(high, low));
            _mm_storeu_si128(codes.as_mut_ptr().add(16).cast(), _mm_unpackhi_epi32(high, low));
        }
    }
    xq
}

const SYMMETRIC: u8 = 0;
const ZERO_POINT: u8 = 1;
const MINIMUM: u8 = 2;

/// Up to this many tokens a panel is streamed from memory once; more tokens make arithmetic the limit.
const STREAM: usize = 16;
/// Inputs of the span of groups that all tokens of a stream pass while the next span is on its way.
const STREAM_SPAN: usize = 256;
/// The same for many tokens, whose codes stay in the first-level cache.
const SPAN: usize = 768;
/// How far ahead of a single block its codes are fetched: one page.
const PAGE: usize = 4096;

/// One panel, the quantised rows and the outputs; pointers and the strides between their elements.
struct Operands<'a> {
    records: &'a Records,
    panel: *const u8,
    record_bytes: usize,
    codes: *const u8,
    stride: usize,
    groups: *const Group,
    y: *mut f32,
    width: usize,
}

/// `y += x · Wᵀ` for `tiles` of one panel and the rows `tokens` of `plane`; `y: (tokens, tiles * 16)`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::matmul) fn integer(
    records: &Records,
    panel: &[u8],
    tiles: Range<usize>,
    plane: &Plane,
    tokens: Range<usize>,
    y: &mut [f32],
) {
    let width = tiles.len() * TILE;
    let last = records.groups - 1;
    assert!(tiles.end <= records.tiles && plane.groups == records.groups, "tiles and groups of a panel");
    assert!(panel.len() >= records.start(last) + records.bytes(last), "bytes of a panel");
    assert!(tokens.end * plane.stride <= plane.codes().len() && tokens.end * plane.groups <= plane.scales.len());
    assert_eq!(y.len(), tokens.len() * width, "outputs of a panel");
    let operands = Operands {
        records,
        panel: panel[tiles.start * CELL..].as_ptr(),
        record_bytes: records.start(1),
        codes: plane.codes()[tokens.start * plane.stride..].as_ptr(),
        stride: plane.stride,
        groups: plane.scales[tokens.start * plane.groups..].as_ptr(),
        y: y.as_mut_ptr(),
        width,
    };
    let (o, t, m) = (&operands, tiles.clone(), tokens.len());
    // SAFETY: the asserts above cover every address that a panel, its tiles and the tokens give.
    unsafe {
        match (records.bits, plane.precision, records.offset) {
            (Bits::Four, Precision::A8, Offset::Symmetric) => blocks::<true, 1, SYMMETRIC>(o, t, m),
            (Bits::Four, Precision::A8, Offset::ZeroPoint) => blocks::<true, 1, ZERO_POINT>(o, t, m),
            (Bits::Four, Precision::A8, Offset::Minimum) => blocks::<true, 1, MINIMUM>(o, t, m),
            (Bits::Four, _, Offset::Symmetric) => blocks::<true, 2, SYMMETRIC>(o, t, m),
            (Bits::Four, _, Offset::ZeroPoint) => blocks::<true, 2, ZERO_POINT>(o, t, m),
            (Bits::Four, _, Offset::Minimum) => blocks::<true, 2, MINIMUM>(o, t, m),
            (Bits::Eight, Precision::A8, Offset::Symmetric) => blocks::<false, 1, SYMMETRIC>(o, t, m),
            (Bits::Eight, Precision::A8, Offset::ZeroPoint) => blocks::<false, 1, ZERO_POINT>(o, t, m),
            (Bits::Eight, Precision::A8, Offset::Minimum) => blocks::<false, 1, MINIMUM>(o, t, m),
            (Bits::Eight, _, Offset::Symmetric) => blocks::<false, 2, SYMMETRIC>(o, t, m),
            (Bits::Eight, _, Offset::ZeroPoint) => blocks::<false, 2, ZERO_POINT>(o, t, m),
            (Bits::Eight, _, Offset::Minimum) => blocks::<false, 2, MINIMUM>(o, t, m),
        }
    }
}

/// Cuts (groups, tiles, tokens) into blocks whose sums fit the registers: 4 tiles wide while streaming, else 2.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn blocks<const FOUR: bool, const PLANES: usize, const OFFSET: u8>(
    o: &Operands<'_>,
    tiles: Range<usize>,
    tokens: usize,
) {
    let groups = o.records.groups;
    let stream = tokens <= STREAM;
    let (most_tiles, most_tokens) = match (stream && tiles.len() == 4, PLANES) {
        (true, _) => (4, 4 / PLANES),
        (false, 1) => (2, 6),
        (false, _) => (2, 4),
    };
    let single = tiles.len() <= most_tiles && tokens <= most_tokens;
    let inputs = if stream { STREAM_SPAN } else { SPAN };
    let span = if single { groups } else { (inputs / (o.records.steps * STEP)).max(1) };
    for first in (0..groups).step_by(span) {
        let groups = first..(first + span).min(groups);
        for tile in (0..tiles.len()).step_by(most_tiles) {
            for token in (0..tokens).step_by(most_tokens) {
                let (t, m) = ((tiles.len() - tile).min(most_tiles), (tokens - token).min(most_tokens));
                let ahead = match (stream && token == 0, single) {
                    (true, true) => PAGE,
                    (true, false) => span * o.record_bytes,
                    (false, _) => 0,
                };
                // SAFETY: the block lies inside the operands that the caller vouches for.
                unsafe { run::<FOUR, PLANES, OFFSET>(o, groups.clone(), tiles.start, tile, t, token, m, ahead) };
            }
        }
    }
}

/// Chooses the instance for `t` tiles from the `tile`-th, and `m` tokens from `token`; see `block`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn run<const FOUR: bool, const PLANES: usize, const OFFSET: u8>(
    o: &Operands<'_>,
    g: Range<usize>,
    start: usize,
    tile: usize,
    t: usize,
    token: usize,
    m: usize,
    ahead: usize,
) {
    // SAFETY: as for `blocks`.
    unsafe {
        match (t, m) {
            (4, 1) => block::<FOUR, PLANES, OFFSET, 4, 1>(o, g, start, tile, token, ahead),
            (4, 2) => block::<FOUR, PLANES, OFFSET, 4, 2>(o, g, start, tile, token, ahead),
            (4, 3) => block::<FOUR, PLANES, OFFSET, 4, 3>(o, g, start, tile, token, ahead),
            (4, 4) => block::<FOUR, PLANES, OFFSET, 4, 4>(o, g, start, tile, token, ahead),
            (2, 1) => block::<FOUR, PLANES, OFFSET, 2, 1>(o, g, start, tile, token, ahead),
            (2, 2) => block::<FOUR, PLANES, OFFSET, 2, 2>(o, g, start, tile, token, ahead),
            (2, 3) => block::<FOUR, PLANES, OFFSET, 2, 3>(o, g, start, tile, token, ahead),
            (2, 4) => block::<FOUR, PLANES, OFFSET, 2, 4>(o, g, start, tile, token, ahead),
            (2, 5) => block::<FOUR, PLANES, OFFSET, 2, 5>(o, g, start, tile, token, ahead),
            (2, 6) => block::<FOUR, PLANES, OFFSET, 2, 6>(o, g, start, tile, token, ahead),
            (1, 1) => block::<FOUR, PLANES, OFFSET, 1, 1>(o, g, start, tile, token, ahead),
            (1, 2) => block::<FOUR, PLANES, OFFSET, 1, 2>(o, g, start, tile, token, ahead),
            (1, 3) => block::<FOUR, PLANES, OFFSET, 1, 3>(o, g, start, tile, token, ahead),
            (1, 4) => block::<FOUR, PLANES, OFFSET, 1, 4>(o, g, start, tile, token, ahead),
            (1, 5) => block::<FOUR, PLANES, OFFSET, 1, 5>(o, g, start, tile, token, ahead),
            (1, 6) => block::<FOUR, PLANES, OFFSET, 1, 6>(o, g, start, tile, token, ahead),
            _ => unreachable!("a block of {t} tiles and {m} tokens"),
        }
    }
}

/// `T` tiles × `M` tokens over the groups `g`, sums in registers. The panel pointer stands at tile `start`; codes are
/// fetched `ahead` bytes ahead.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn block<const FOUR: bool, const PLANES: usize, const OFFSET: u8, const T: usize, const M: usize>(
    o: &Operands<'_>,
    g: Range<usize>,
    start: usize,
    tile: usize,
    token: usize,
    ahead: usize,
) {
    let records = o.records;
    let cells = records.tiles * CELL;
    let nibble = _mm512_set1_epi8(15);
    // SAFETY: the caller vouches for every tile, token and group; a record holds `steps` steps of each tile, then the
    // scales and offsets of its rows; a row of x holds a block of activations for each step.
    unsafe {
        let y = o.y.add(token * o.width + tile * TILE);
        let mut sums = [[_mm512_setzero_ps(); T]; M];
        for m in 0..M {
            for t in 0..T {
                sums[m][t] = _mm512_loadu_ps(y.add(m * o.width + t * TILE));
            }
        }
        for g in g {
            let steps = records.steps(g);
            let record = o.panel.add(g * o.record_bytes);
            let groups = o.groups.add(token * records.groups + g);
            let mut acc = [[[_mm512_setzero_si512(); PLANES]; T]; M];
            if OFFSET == SYMMETRIC {
                for m in 0..M {
                    let eight = _mm512_set1_epi32((*groups.add(m * records.groups)).minus_eight_sums);
                    let bias = if FOUR { eight } else { _mm512_slli_epi32::<4>(eight) };
                    for t in 0..T {
                        acc[m][t][PLANES - 1] = bias;
                    }
                }
            }
            let mut w = record.add(tile * CELL);
            let mut x = o.codes.add(token * o.stride + g * records.steps * STEP * PLANES);
            for _ in 0..steps {
                let mut low = [_mm512_setzero_si512(); T];
                let mut high = [_mm512_setzero_si512(); T];
                for t in 0..T {
                    let at = w.add(t * CELL);
                    if T == 4 || M * PLANES <= 4 {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(ahead).cast());
                    }
                    let codes = _mm512_loadu_si512(at.cast());
                    if FOUR {
                        low[t] = _mm512_and_si512(codes, nibble);
                        high[t] = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), nibble);
                    } else {
                        low[t] = codes;
                        high[t] = _mm512_loadu_si512(at.add(cells).cast());
                        if T == 4 || M * PLANES <= 4 {
                            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(cells + ahead).cast());
                        }
                    }
                }
                for m in 0..M {
                    for plane in 0..PLANES {
                        let x = x.add(m * o.stride + plane * 4);
                        let first = four(x);
                        for t in 0..T {
                            acc[m][t][plane] = _mm512_dpbusd_epi32(acc[m][t][plane], low[t], first);
                        }
                        let second = four(x.add(4 * PLANES));
                        for t in 0..T {
                            acc[m][t][plane] = _mm512_dpbusd_epi32(acc[m][t][plane], high[t], second);
                        }
                    }
                }
                w = w.add(if FOUR { cells } else { 2 * cells });
                x = x.add(STEP * PLANES);
            }
            let rows = (start + tile) * TILE;
            // `record` stands at tile `start`; the scales are counted from the record's own beginning.
            let scales = record.sub(start * CELL).add(records.scales(steps) + rows * records.scale.bytes());
            let offsets = record.sub(start * CELL).add(records.offsets(steps) + rows * records.offset_bytes());
            for t in 0..T {
                let scale = floats(scales, records.scale, t);
                let minimum = if OFFSET == MINIMUM { floats(offsets, records.scale, t) } else { _mm512_setzero_ps() };
                let zero = if OFFSET == ZERO_POINT {
                    _mm512_cvtepu8_epi32(_mm_loadu_si128(offsets.add(t * TILE).cast()))
                } else {
                    _mm512_setzero_si512()
                };
                for m in 0..M {
                    let group = &*groups.add(m * records.groups);
                    let mut sum = acc[m][t][PLANES - 1];
                    if PLANES == 2 {
                        sum = _mm512_add_epi32(_mm512_slli_epi32::<7>(acc[m][t][0]), sum);
                    }
                    if OFFSET == ZERO_POINT {
                        sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, _mm512_set1_epi32(group.sum)));
                    }
                    let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(group.scale));
                    sums[m][t] = _mm512_fmadd_ps(scaled, scale, sums[m][t]);
                    if OFFSET == MINIMUM {
                        sums[m][t] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(group.moment), sums[m][t]);
                    }
                }
            }
        }
        for m in 0..M {
            for t in 0..T {
                _mm512_storeu_ps(y.add(m * o.width + t * TILE), sums[m][t]);
            }
        }
    }
}

/// 4 bytes of activations in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn four(x: *const u8) -> __m512i {
    // SAFETY: the caller has 4 bytes there.
    _mm512_set1_epi32(i32::from_ne_bytes(unsafe { x.cast::<[u8; 4]>().read() }))
}

/// The `t`-th 16 floats of type `kind`, widened.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn floats(start: *const u8, kind: FloatType, t: usize) -> __m512 {
    // SAFETY: the caller has 16 elements there.
    unsafe {
        match kind {
            FloatType::F32 => _mm512_loadu_ps(start.add(t * 64).cast()),
            FloatType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(start.add(t * 32).cast())),
            FloatType::Bf16 => {
                let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(start.add(t * 32).cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
            }
        }
    }
}
