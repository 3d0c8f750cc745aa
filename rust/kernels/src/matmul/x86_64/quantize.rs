//! Quantising activations with AVX-512: 16 groups share divisions and the sums across lanes.
//!
//! The numbers are those of `matmul::input`; a batch holds up to 16 groups of one row, one in each lane.

use std::arch::x86_64::*;

use crate::format::Precision;
use crate::matmul::input::{Group, Shape, Sink, levels};

/// Groups of a batch.
const BATCH: usize = 16;
/// Floats of a vector.
const WIDTH: usize = 16;
/// How far ahead activations are fetched.
const AHEAD: usize = 4096;

#[repr(align(64))]
struct Batch<T>([T; BATCH]);

/// Lane `i` of the result holds all lanes of `vectors[i]` together under `op`.
macro_rules! across {
    ($op:ident, $vectors:expr) => {{
        let v = $vectors;
        let (mut eight, mut four) = ([_mm512_setzero_si512(); 8], [_mm512_setzero_si512(); 4]);
        for i in 0..8 {
            let (a, b) = (v[2 * i], v[2 * i + 1]);
            eight[i] = $op(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        }
        for i in 0..4 {
            let (a, b) = (eight[2 * i], eight[2 * i + 1]);
            four[i] = $op(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        }
        let low = $op(even(four[0], four[1]), odd(four[0], four[1]));
        let high = $op(even(four[2], four[3]), odd(four[2], four[3]));
        $op(even(low, high), odd(low, high))
    }};
}

/// Quantises one row `x` by groups.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::matmul) fn quantize(x: &[f32], shape: Shape, sink: Sink<'_>) {
    match (shape.group, shape.precision) {
        (32, Precision::A8) => row::<2, 1>(x, shape, sink),
        (32, _) => row::<2, 2>(x, shape, sink),
        (128, Precision::A8) => row::<8, 1>(x, shape, sink),
        (128, _) => row::<8, 2>(x, shape, sink),
        (_, Precision::A8) => row::<0, 1>(x, shape, sink),
        (..) => row::<0, 2>(x, shape, sink),
    }
}

/// `V`: vectors of a group, 0 when only `shape` knows; `P`: planes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn row<const V: usize, const P: usize>(x: &[f32], shape: Shape, mut sink: Sink<'_>) {
    let group = if V == 0 { shape.group } else { V * WIDTH };
    let sign = _mm512_set1_epi32(i32::MAX);
    for (batch, x) in x.chunks(BATCH * group).enumerate() {
        let mut maxima = [_mm512_setzero_si512(); BATCH];
        for (maximum, x) in maxima.iter_mut().zip(x.chunks(group)) {
            if V > 0 && x.len() == V * WIDTH {
                for v in 0..V {
                    let at = x.as_ptr().wrapping_add(v * WIDTH);
                    _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(AHEAD));
                    // SAFETY: the group has `V` vectors.
                    let x = unsafe { _mm512_loadu_si512(at.cast()) };
                    *maximum = _mm512_max_epi32(*maximum, _mm512_and_si512(x, sign));
                }
            } else {
                for x in x.chunks(WIDTH) {
                    _mm_prefetch::<_MM_HINT_T0>(x.as_ptr().cast::<i8>().wrapping_add(AHEAD));
                    *maximum = _mm512_max_epi32(*maximum, _mm512_and_si512(_mm512_castps_si512(load(x)), sign));
                }
            }
        }
        let (factors, scales) = factors(across!(_mm512_max_epi32, maxima), shape.precision);
        let mut sums = [_mm512_setzero_si512(); BATCH];
        for (i, x) in x.chunks(group).enumerate() {
            let (g, factor) = (batch * BATCH + i, factors.0[i]);
            sums[i] = if V > 0 && x.len() == V * WIDTH && shape.plane(g) == V * WIDTH {
                whole::<V, P>(x, factor, g, &mut sink)
            } else {
                codes::<P>(x, factor, shape, g, &mut sink)
            };
        }
        let groups = describe(scales, across!(_mm512_add_epi32, sums));
        for (i, &group) in groups.0[..x.len().div_ceil(group)].iter().enumerate() {
            sink.group(batch * BATCH + i, group);
        }
    }
}

/// Rounds the `V` vectors of group `g` to codes, stores them and returns their sums by lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn whole<const V: usize, const P: usize>(x: &[f32], factor: f32, g: usize, sink: &mut Sink<'_>) -> __m512i {
    assert!(x.len() == V * WIDTH);
    let (out, stride) = sink.quads(g * V * WIDTH * P, V * WIDTH * P);
    let (finite, factor) = (if factor == 0.0 { 0 } else { u16::MAX }, _mm512_set1_ps(factor));
    let mut sums = _mm512_setzero_si512();
    for v in 0..V {
        // SAFETY: the group has `V` vectors.
        let x = unsafe { _mm512_loadu_ps(x.as_ptr().add(v * WIDTH)) };
        let xq = _mm512_maskz_cvtps_epi32(finite, _mm512_mul_ps(x, factor));
        sums = _mm512_add_epi32(sums, xq);
        for (p, codes) in split::<P>(xq).into_iter().enumerate() {
            // SAFETY: the planes of the group have `P * V` times four quads.
            unsafe { store_quads(out.add((p * V + v) * 4 * stride), stride, codes) };
        }
    }
    sums
}

/// The planes of codes, as bytes.
#[inline]
#[target_feature(enable = "avx512f")]
fn split<const P: usize>(xq: __m512i) -> [__m128i; P] {
    let mut planes = [_mm512_cvtepi32_epi8(xq); P];
    if P == 2 {
        planes[0] = _mm512_cvtepi32_epi8(_mm512_srai_epi32::<7>(xq));
        planes[P - 1] = _mm512_cvtepi32_epi8(_mm512_and_si512(xq, _mm512_set1_epi32(127)));
    }
    planes
}

/// Four quads, `stride` bytes apart.
///
/// # Safety
/// There is room for them behind `out`.
#[inline]
#[target_feature(enable = "sse4.1")]
unsafe fn store_quads(out: *mut u8, stride: usize, codes: __m128i) {
    // SAFETY: the caller's promise.
    unsafe {
        out.cast::<i32>().write_unaligned(_mm_extract_epi32::<0>(codes));
        out.add(stride).cast::<i32>().write_unaligned(_mm_extract_epi32::<1>(codes));
        out.add(2 * stride).cast::<i32>().write_unaligned(_mm_extract_epi32::<2>(codes));
        out.add(3 * stride).cast::<i32>().write_unaligned(_mm_extract_epi32::<3>(codes));
    }
}

/// The same for groups of any length, super-blocks and the end of a row.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn codes<const P: usize>(x: &[f32], factor: f32, shape: Shape, g: usize, sink: &mut Sink<'_>) -> __m512i {
    let (first, plane) = (g * shape.group * P, shape.plane(g));
    // A factor of 0 keeps Inf and NaN out: they would not become 0 by themselves. The default rounding is half to even.
    let (finite, factor) = (if factor == 0.0 { 0 } else { u16::MAX }, _mm512_set1_ps(factor));
    let supers = sink.sub(g).is_some();
    let mut parts = [[_mm512_setzero_si512(); BATCH]; P];
    let mut sums = _mm512_setzero_si512();
    let vectors = x.len().div_ceil(WIDTH);
    for (v, x) in x.chunks(WIDTH).enumerate() {
        let x = load(x);
        let xq = _mm512_maskz_cvtps_epi32(finite, _mm512_mul_ps(x, factor));
        sums = _mm512_add_epi32(sums, xq);
        for (p, codes) in split::<P>(xq).into_iter().enumerate() {
            store(sink, first + p * plane, v * WIDTH, codes);
            if supers {
                parts[p][v] = _mm512_cvtepi8_epi32(codes);
            }
        }
    }
    if let Some(sub) = sink.sub(g) {
        for p in 0..P {
            let mut sums = Batch([0; BATCH]);
            // SAFETY: there are 16 lanes, aligned.
            unsafe { _mm512_store_si512(sums.0.as_mut_ptr().cast(), across!(_mm512_add_epi32, parts[p])) };
            sub.set(p, &sums.0);
        }
    }
    for v in vectors..plane / WIDTH {
        (0..P).for_each(|p| store(sink, first + p * plane, v * WIDTH, _mm_setzero_si128()));
    }
    sums
}

/// 16 codes of a plane that begins at `plane`, from input `first` on.
#[inline]
#[target_feature(enable = "sse4.1")]
fn store(sink: &mut Sink<'_>, plane: usize, first: usize, codes: __m128i) {
    let (out, stride) = sink.quads(plane + first, WIDTH);
    // SAFETY: there are four quads.
    unsafe { store_quads(out, stride, codes) };
}

/// Up to 16 floats, then zeros.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(x: &[f32]) -> __m512 {
    let mask = if x.len() == WIDTH { u16::MAX } else { (1 << x.len()) - 1 };
    // SAFETY: the mask covers the elements of the slice.
    unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) }
}

/// The first and third quarters of `a`, then of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn even(a: __m512i, b: __m512i) -> __m512i {
    _mm512_shuffle_i32x4::<0x88>(a, b)
}

/// The second and fourth quarters of `a`, then of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn odd(a: __m512i, b: __m512i) -> __m512i {
    _mm512_shuffle_i32x4::<0xdd>(a, b)
}

/// `input::factors` of 16 groups, whose largest bits are given: factors in memory, and scales.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn factors(bits: __m512i, precision: Precision) -> (Batch<f32>, __m512) {
    let levels = _mm512_set1_ps(levels(precision));
    let infinity = _mm512_set1_epi32(f32::INFINITY.to_bits() as i32);
    let absmax = _mm512_castsi512_ps(bits);
    let inverse = _mm512_div_ps(levels, absmax);
    let finite = _mm512_cmplt_epi32_mask(bits, infinity);
    let usable = finite & _mm512_cmplt_epi32_mask(_mm512_castps_si512(inverse), infinity);
    let scales = _mm512_maskz_div_ps(usable, absmax, levels);
    let scales = _mm512_mask_blend_ps(finite, _mm512_set1_ps(f32::NAN), scales);
    let mut factors = Batch([0.0; BATCH]);
    // SAFETY: the array has 16 elements and is aligned.
    unsafe { _mm512_store_ps(factors.0.as_mut_ptr(), _mm512_maskz_mov_ps(usable, inverse)) };
    (factors, scales)
}

/// `Group::new` of 16 groups.
#[inline]
#[target_feature(enable = "avx512f")]
fn describe(scales: __m512, sums: __m512i) -> Batch<Group> {
    let moments = _mm512_castps_si512(_mm512_mul_ps(scales, _mm512_cvtepi32_ps(sums)));
    let minus_eight_sums = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32::<3>(sums));
    // Four fields of 16 groups become 16 groups of four fields.
    let scales = _mm512_castps_si512(scales);
    let fields = [
        _mm512_unpacklo_epi32(scales, sums),
        _mm512_unpackhi_epi32(scales, sums),
        _mm512_unpacklo_epi32(moments, minus_eight_sums),
        _mm512_unpackhi_epi32(moments, minus_eight_sums),
    ];
    let quarters = [
        _mm512_unpacklo_epi64(fields[0], fields[2]),
        _mm512_unpackhi_epi64(fields[0], fields[2]),
        _mm512_unpacklo_epi64(fields[1], fields[3]),
        _mm512_unpackhi_epi64(fields[1], fields[3]),
    ];
    let mut groups = Batch([Group::default(); BATCH]);
    for (i, quarters) in quarters.into_iter().enumerate() {
        // Quarter `q` of the `i`th vector is group `4 * q + i`.
        let parts: [Group; 4] =
            // SAFETY: a group is four fields of four bytes, in the order above.
            unsafe { std::mem::transmute::<__m512i, [Group; 4]>(quarters) };
        for (q, part) in parts.into_iter().enumerate() {
            groups.0[4 * q + i] = part;
        }
    }
    groups
}
