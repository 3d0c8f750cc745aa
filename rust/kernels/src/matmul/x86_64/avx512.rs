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
use crate::matmul::input::{Group, Plane, factors};

/// Quantises one group `x`, at most 128 long; `codes` holds whole blocks of 16 inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::matmul) fn quantize(x: &[f32], precision: Precision, codes: &mut [u8]) -> Group {
    let bytes = if precision == Precision::A8 { 16 } else { 32 };
    assert_eq!(codes.len(), x.len().div_ceil(16) * bytes, "codes of a group");
    let load = |x: &[f32]| {
        let mask = if x.len() < 16 { (1 << x.len()) - 1 } else { u16::MAX };
        // SAFETY: the mask keeps the load inside the slice.
        unsafe { _mm512_maskz_loadu_epi32(mask, x.as_ptr().cast()) }
    };
    let sign = _mm512_set1_epi32(i32::MAX);
    let absmax =
        x.chunks(16).fold(_mm512_setzero_si512(), |max, x| _mm512_max_epi32(max, _mm512_and_si512(load(x), sign)));
    let (factor, scale) = factors(_mm512_reduce_max_epi32(absmax) as u32, precision);
    if factor == 0.0 {
        codes.fill(0);
        return Group::new(scale, 0);
    }
    let factor = _mm512_set1_ps(factor);
    let mut sums = _mm512_setzero_si512();
    for (x, codes) in x.chunks(16).zip(codes.chunks_exact_mut(bytes)) {
        // The default rounding mode is half to even.
        let xq = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(load(x)), factor));
        sums = _mm512_add_epi32(sums, xq);
        if precision == Precision::A8 {
            // SAFETY: the chunk is 16 bytes long.
            unsafe { _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(xq)) };
        } else {
            let high = _mm512_cvtepi32_epi8(_mm512_srai_epi32::<7>(xq));
            let low = _mm512_cvtepi32_epi8(_mm512_and_si512(xq, _mm512_set1_epi32(127)));
            // SAFETY: the chunk is 32 bytes long.
            unsafe {
                _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm_unpacklo_epi32(high, low));
                _mm_storeu_si128(codes.as_mut_ptr().add(16).cast(), _mm_unpackhi_epi32(high, low));
            }
        }
    }
    Group::new(scale, _mm512_reduce_add_epi32(sums))
}

const SYMMETRIC: u8 = 0;
const ZERO_POINT: u8 = 1;
const MINIMUM: u8 = 2;

/// Inputs of the span of groups that all tokens pass before the next span, so that its codes are read from memory once.
const SPAN: usize = 256;

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
    let span = (SPAN / (records.steps * STEP)).max(1);
    let (o, t, m) = (&operands, tiles.clone(), tokens.len());
    // SAFETY: the asserts above cover every address that a panel, its tiles and the tokens give.
    unsafe {
        match (records.bits, plane.precision, records.offset) {
            (Bits::Four, Precision::A8, Offset::Symmetric) => blocks::<true, 1, SYMMETRIC>(o, t, m, span),
            (Bits::Four, Precision::A8, Offset::ZeroPoint) => blocks::<true, 1, ZERO_POINT>(o, t, m, span),
            (Bits::Four, Precision::A8, Offset::Minimum) => blocks::<true, 1, MINIMUM>(o, t, m, span),
            (Bits::Four, _, Offset::Symmetric) => blocks::<true, 2, SYMMETRIC>(o, t, m, span),
            (Bits::Four, _, Offset::ZeroPoint) => blocks::<true, 2, ZERO_POINT>(o, t, m, span),
            (Bits::Four, _, Offset::Minimum) => blocks::<true, 2, MINIMUM>(o, t, m, span),
            (Bits::Eight, Precision::A8, Offset::Symmetric) => blocks::<false, 1, SYMMETRIC>(o, t, m, span),
            (Bits::Eight, Precision::A8, Offset::ZeroPoint) => blocks::<false, 1, ZERO_POINT>(o, t, m, span),
            (Bits::Eight, Precision::A8, Offset::Minimum) => blocks::<false, 1, MINIMUM>(o, t, m, span),
            (Bits::Eight, _, Offset::Symmetric) => blocks::<false, 2, SYMMETRIC>(o, t, m, span),
            (Bits::Eight, _, Offset::ZeroPoint) => blocks::<false, 2, ZERO_POINT>(o, t, m, span),
            (Bits::Eight, _, Offset::Minimum) => blocks::<false, 2, MINIMUM>(o, t, m, span),
        }
    }
}

/// Cuts (groups, tiles, tokens) into blocks whose sums fit the registers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn blocks<const FOUR: bool, const PLANES: usize, const OFFSET: u8>(
    o: &Operands<'_>,
    tiles: Range<usize>,
    tokens: usize,
    span: usize,
) {
    let groups = o.records.groups;
    // SAFETY: blocks lie inside the operands that the caller vouches for.
    unsafe {
        if tiles.len() == 4 && tokens * PLANES <= 4 {
            return run::<FOUR, PLANES, OFFSET>(o, 0..groups, tiles.start, 0, 4, 0, tokens);
        }
        let most = if PLANES == 1 { 6 } else { 4 };
        for first in (0..groups).step_by(span) {
            let groups = first..(first + span).min(groups);
            for tile in (0..tiles.len()).step_by(2) {
                for token in (0..tokens).step_by(most) {
                    let (t, m) = ((tiles.len() - tile).min(2), (tokens - token).min(most));
                    run::<FOUR, PLANES, OFFSET>(o, groups.clone(), tiles.start, tile, t, token, m);
                }
            }
        }
    }
}

/// Chooses the instance for `t` tiles from the `tile`-th, and `m` tokens from `token`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn run<const FOUR: bool, const PLANES: usize, const OFFSET: u8>(
    o: &Operands<'_>,
    g: Range<usize>,
    start: usize,
    tile: usize,
    t: usize,
    token: usize,
    m: usize,
) {
    // SAFETY: as for `blocks`.
    unsafe {
        match (t, m) {
            (4, 1) => block::<FOUR, PLANES, OFFSET, 4, 1>(o, g, start, tile, token),
            (4, 2) => block::<FOUR, PLANES, OFFSET, 4, 2>(o, g, start, tile, token),
            (4, 3) => block::<FOUR, PLANES, OFFSET, 4, 3>(o, g, start, tile, token),
            (4, 4) => block::<FOUR, PLANES, OFFSET, 4, 4>(o, g, start, tile, token),
            (2, 1) => block::<FOUR, PLANES, OFFSET, 2, 1>(o, g, start, tile, token),
            (2, 2) => block::<FOUR, PLANES, OFFSET, 2, 2>(o, g, start, tile, token),
            (2, 3) => block::<FOUR, PLANES, OFFSET, 2, 3>(o, g, start, tile, token),
            (2, 4) => block::<FOUR, PLANES, OFFSET, 2, 4>(o, g, start, tile, token),
            (2, 5) => block::<FOUR, PLANES, OFFSET, 2, 5>(o, g, start, tile, token),
            (2, 6) => block::<FOUR, PLANES, OFFSET, 2, 6>(o, g, start, tile, token),
            (1, 1) => block::<FOUR, PLANES, OFFSET, 1, 1>(o, g, start, tile, token),
            (1, 2) => block::<FOUR, PLANES, OFFSET, 1, 2>(o, g, start, tile, token),
            (1, 3) => block::<FOUR, PLANES, OFFSET, 1, 3>(o, g, start, tile, token),
            (1, 4) => block::<FOUR, PLANES, OFFSET, 1, 4>(o, g, start, tile, token),
            (1, 5) => block::<FOUR, PLANES, OFFSET, 1, 5>(o, g, start, tile, token),
            (1, 6) => block::<FOUR, PLANES, OFFSET, 1, 6>(o, g, start, tile, token),
            _ => unreachable!("a block of {t} tiles and {m} tokens"),
        }
    }
}

/// `T` tiles × `M` tokens over the groups `g`, sums in registers. The panel pointer stands at tile `start`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn block<const FOUR: bool, const PLANES: usize, const OFFSET: u8, const T: usize, const M: usize>(
    o: &Operands<'_>,
    g: Range<usize>,
    start: usize,
    tile: usize,
    token: usize,
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
                    if M * PLANES <= 4 {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(4096).cast());
                    }
                    let codes = _mm512_loadu_si512(at.cast());
                    if FOUR {
                        low[t] = _mm512_and_si512(codes, nibble);
                        high[t] = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), nibble);
                    } else {
                        low[t] = codes;
                        high[t] = _mm512_loadu_si512(at.add(cells).cast());
                        if M * PLANES <= 4 {
                            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(cells + 4096).cast());
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

/// `y += x · Wᵀ` for float weights `w: (k, width)`, rows `x` of stride `stride`, and `y: (tokens, width)`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::matmul) fn float(w: &[f32], width: usize, x: &[f32], stride: usize, y: &mut [f32]) {
    let (k, tokens) = (w.len() / width, y.len() / width);
    assert!(width.is_multiple_of(TILE) && x.len() >= (tokens - 1) * stride + k, "rows of x");
    for first in (0..tokens).step_by(6) {
        let y = &mut y[first * width..tokens.min(first + 6) * width];
        let x = &x[first * stride..];
        // SAFETY: the assert covers the rows of x; y is cut to whole rows, w is (k, width).
        unsafe {
            match y.len() / width {
                1 => float_tokens::<1>(w, width, x, stride, y),
                2 => float_tokens::<2>(w, width, x, stride, y),
                3 => float_tokens::<3>(w, width, x, stride, y),
                4 => float_tokens::<4>(w, width, x, stride, y),
                5 => float_tokens::<5>(w, width, x, stride, y),
                _ => float_tokens::<6>(w, width, x, stride, y),
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn float_tokens<const M: usize>(w: &[f32], width: usize, x: &[f32], stride: usize, y: &mut [f32]) {
    // SAFETY: the caller vouches for M rows of x and y.
    unsafe {
        match width / TILE {
            1 => float_block::<M, 1>(w, x, stride, y),
            2 => float_block::<M, 2>(w, x, stride, y),
            3 => float_block::<M, 3>(w, x, stride, y),
            _ => float_block::<M, 4>(w, x, stride, y),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn float_block<const M: usize, const T: usize>(w: &[f32], x: &[f32], stride: usize, y: &mut [f32]) {
    // SAFETY: y is (M, T * 16), w is (k, T * 16), and x has M rows of k inputs.
    unsafe {
        let y = y.as_mut_ptr();
        let mut sums = [[_mm512_setzero_ps(); T]; M];
        for m in 0..M {
            for t in 0..T {
                sums[m][t] = _mm512_loadu_ps(y.add((m * T + t) * TILE));
            }
        }
        for (k, w) in w.chunks_exact(T * TILE).enumerate() {
            for m in 0..M {
                let x = _mm512_set1_ps(*x.as_ptr().add(m * stride + k));
                for t in 0..T {
                    sums[m][t] = _mm512_fmadd_ps(_mm512_loadu_ps(w.as_ptr().add(t * TILE)), x, sums[m][t]);
                }
            }
        }
        for m in 0..M {
            for t in 0..T {
                _mm512_storeu_ps(y.add((m * T + t) * TILE), sums[m][t]);
            }
        }
    }
}
