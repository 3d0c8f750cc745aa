//! A block: some vectors of rows of one panel × some tokens, over a range of groups, with all integer sums in registers.
//!
//! Activations of `M` tokens lie together: `[group][plane][quad][M]` × 4 bytes. A16 has two planes, `xq = 128 h + l` with
//! `h = xq >> 7` in -128..=127 and `l = xq & 127`, both signed bytes; they take turns on the same sums, which are
//! multiplied by 128 in between, so that a block of A16 is two blocks of A8 and one epilogue.
//!
//! Ranges, for sums in i32:
//!
//! ```text
//! groups of at most 256 inputs  codes ≤ 255: |Σ code · x| ≤ 256 · 255 · 128 < 2^23 for each plane, times 128 < 2^30
//!                               |Σ (code - zero) · xq| ≤ 128 · 255 · 16383 < 2^29 (codes above 15 have groups ≤ 128)
//! one scale a row               codes ≤ 2, k ≤ 2^16: |Σ code · xq| ≤ 2^16 · 2 · 16383 < 2^31, |Σ xq| < 2^30
//! Q4_K                          |Σ sub · Σ code · x| ≤ 8 · 63 · 32 · 15 · 128 < 2^25, |Σ sub · Σ x| ≤ 8 · 63 · 32 · 128
//! Q6_K                          |Σ sub · Σ (code - 32) · x| ≤ 16 · 128 · 16 · 63 · 128 < 2^28
//! ```
//!
//! Levels without a dot product of bytes sum pairs of products in i16 first, for so many quads as fit whatever the codes
//! are: 32767 / (2 · 128 · maximum), which is 8 for codes ≤ 15, 42 for ≤ 3 and 2 for ≤ 63. Greater codes are multiplied
//! by nibbles, the high ones weighing 16: 256 · 15 · 128 · 16 < 2^23 for a group.

// Loops over registers read best by index.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::input::{Group, Subs};
use super::lanes::Lanes;
use crate::format::layout::{CELL, Codes, MINIMA, QUAD, Records, TILE, Trailer};
use crate::format::{FloatType, Offset, SuperBlock};

/// Inputs after which the planes of a long group take turns, so that its codes are still in the first-level cache.
const TURN: usize = 640;

/// Extents of one group of a panel, worked out once: the calls would drive sums out of the registers.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub(super) steps: usize,
    /// First scale, counted from the start of the record.
    pub(super) scales: usize,
    /// First zero point or minimum.
    pub(super) offsets: usize,
    /// Bytes of one plane of a token's activations.
    pub(super) plane: usize,
}

/// One panel, the quantised rows and the outputs.
pub(super) struct Operands<'a> {
    /// Of the codes.
    pub(super) records: &'a Records,
    /// First byte of the panel's codes.
    pub(super) panel: *const u8,
    /// Bytes from one group's codes to the next one's.
    pub(super) record_bytes: usize,
    /// Of the panel as it is stored, which differ where codes have been unpacked.
    pub(super) stored: &'a Records,
    /// First byte of the stored panel, where the scales are.
    pub(super) trailers: *const u8,
    /// Bytes of a stored record.
    pub(super) stored_bytes: usize,
    /// Of which are codes.
    pub(super) codes_bytes: usize,
    pub(super) full: Extent,
    pub(super) last: Extent,
    /// First tile of the outputs.
    pub(super) tile: usize,
    /// Codes of the first token of the plane.
    pub(super) codes: *const u8,
    /// Bytes of one token's codes.
    pub(super) stride: usize,
    pub(super) planes: usize,
    /// `[block][group][M]`.
    pub(super) groups: *const Group,
    /// `[block][group][M]`, for super-blocks.
    pub(super) subs: *const Subs,
    /// `(tokens, width)`.
    pub(super) y: *mut f32,
    pub(super) width: usize,
    /// Row of `y` that is token 0.
    pub(super) first_token: usize,
}

/// Runs the body for each index below a constant of at most 8. Sums stay in registers only if no index is left to run
/// time, and the compiler unrolls no loop as large as an epilogue by itself.
macro_rules! each {
    ($i:ident < $n:expr, $body:block) => {{
        each!(@ $i, $n, $body, 0 1 2 3 4 5 6 7)
    }};
    (@ $i:ident, $n:expr, $body:block, $($index:literal)*) => {{
        $(if $index < $n {
            let $i = $index;
            $body
        })*
    }};
}

/// Where a block lies.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) groups: Range<usize>,
    /// First vector, counted from the first tile of the outputs.
    pub(super) vector: usize,
    /// First token.
    pub(super) token: usize,
    /// How far ahead codes are fetched, in bytes; 0 for not at all.
    pub(super) ahead: usize,
}

/// What turns stored cells into quads of byte codes.
pub(super) trait Source: Copy {
    const CODES: Codes;
    /// The greatest byte that `unpack` gives.
    const MAXIMUM: u8;
    /// What a byte counts.
    const WEIGHT: i16 = 1;
    /// Quad `p` of the step whose cells begin at `at` and lie `stride` bytes apart.
    unsafe fn unpack<L: Lanes>(l: L, at: *const u8, stride: usize, p: usize, table: L::I) -> L::I;
}

#[derive(Clone, Copy)]
pub(super) struct Four;
/// Codes that are bytes already, or have been unpacked.
#[derive(Clone, Copy)]
pub(super) struct Bytes<const MAXIMUM: u8>;
#[derive(Clone, Copy)]
pub(super) struct Two;
#[derive(Clone, Copy)]
pub(super) struct Six;
/// Four-bit codes through a table.
#[derive(Clone, Copy)]
pub(super) struct Lookup;

impl Source for Four {
    const CODES: Codes = Codes::Four;
    const MAXIMUM: u8 = 15;
    #[inline(always)]
    unsafe fn unpack<L: Lanes>(l: L, at: *const u8, _: usize, p: usize, _: L::I) -> L::I {
        // SAFETY: the caller's cell.
        l.and(l.shift_right(unsafe { l.load(at) }, 4 * p), l.bytes(15))
    }
}

impl<const MAXIMUM: u8> Source for Bytes<MAXIMUM> {
    const CODES: Codes = Codes::Eight;
    const MAXIMUM: u8 = MAXIMUM;
    #[inline(always)]
    unsafe fn unpack<L: Lanes>(l: L, at: *const u8, stride: usize, p: usize, _: L::I) -> L::I {
        // SAFETY: the caller's cells.
        unsafe { l.load(at.add(p * stride)) }
    }
}

impl Source for Two {
    const CODES: Codes = Codes::Two;
    const MAXIMUM: u8 = 3;
    #[inline(always)]
    unsafe fn unpack<L: Lanes>(l: L, at: *const u8, _: usize, p: usize, _: L::I) -> L::I {
        // SAFETY: the caller's cell.
        l.and(l.shift_right(unsafe { l.load(at) }, 2 * p), l.bytes(3))
    }
}

impl Source for Six {
    const CODES: Codes = Codes::Six;
    const MAXIMUM: u8 = 63;
    #[inline(always)]
    unsafe fn unpack<L: Lanes>(l: L, at: *const u8, stride: usize, p: usize, _: L::I) -> L::I {
        // SAFETY: the caller's cells.
        let (low, high) = unsafe { (l.load(at.add(p / 2 * stride)), l.load(at.add(2 * stride))) };
        let low = l.and(l.shift_right(low, p % 2 * 4), l.bytes(15));
        let high = if p < 2 { l.shift_left(high, 4 - 2 * p) } else { l.shift_right(high, 2 * p - 4) };
        l.or(low, l.and(high, l.bytes(0x30)))
    }
}

impl Source for Lookup {
    const CODES: Codes = Codes::Four;
    const MAXIMUM: u8 = 255;
    #[inline(always)]
    unsafe fn unpack<L: Lanes>(l: L, at: *const u8, stride: usize, p: usize, table: L::I) -> L::I {
        // SAFETY: as for Four.
        l.lookup(table, unsafe { Four::unpack(l, at, stride, p, table) })
    }
}

/// The low or the high nibbles of bytes: their products fit pairs that those of whole bytes do not fit.
#[derive(Clone, Copy)]
struct Nibbles<S, const HIGH: bool>(S);

impl<S: Source, const HIGH: bool> Source for Nibbles<S, HIGH> {
    const CODES: Codes = S::CODES;
    const MAXIMUM: u8 = 15;
    const WEIGHT: i16 = if HIGH { 16 } else { 1 };
    #[inline(always)]
    unsafe fn unpack<L: Lanes>(l: L, at: *const u8, stride: usize, p: usize, table: L::I) -> L::I {
        // SAFETY: the caller's cells.
        let codes = unsafe { S::unpack(l, at, stride, p, table) };
        l.and(l.shift_right(codes, if HIGH { 4 } else { 0 }), l.bytes(15))
    }
}

impl Operands<'_> {
    #[inline(always)]
    fn extent(&self, g: usize) -> Extent {
        if g + 1 == self.stored.groups { self.last } else { self.full }
    }
}

/// Hides from the compiler that two pointers are the same, so that it loads again what it would otherwise spill.
#[inline(always)]
fn again(at: *const u8) -> *const u8 {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    let mut at = at;
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    #[allow(clippy::pointers_in_nomem_asm_block)]
    // SAFETY: no instruction at all; the memory behind the pointer is not touched.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) at, options(nomem, nostack, preserves_flags));
    }
    at
}

/// `acc += codes · x` over `steps` steps of `bytes` bytes, whose cells lie `stride` apart. `w` stands at the first vector's
/// part of the first step, `x` at the first quad.
#[inline(always)]
unsafe fn dots<L: Lanes, S: Source, const V: usize, const M: usize>(
    l: L,
    acc: &mut [[L::I; V]; M],
    stride: usize,
    bytes: usize,
    mut w: *const u8,
    mut x: *const u8,
    steps: usize,
    ahead: usize,
    table: L::I,
) {
    if let Some(most) = L::PAIRS {
        // SAFETY: the caller's promise.
        return unsafe {
            if S::MAXIMUM <= 127 {
                runs::<L, S, V, M>(l, acc, most, stride, bytes, w, x, steps, ahead, table);
            } else {
                runs::<L, Nibbles<S, true>, V, M>(l, acc, most, stride, bytes, w, x, steps, ahead, table);
                runs::<L, Nibbles<S, false>, V, M>(l, acc, most, stride, bytes, w, x, steps, 0, table);
            }
        };
    }
    let mut sums = *acc;
    // SAFETY: the caller has so many steps of codes and activations.
    unsafe {
        for _ in 0..steps {
            step::<L, S, V, M>(l, &mut sums, stride, w, x, ahead, table);
            w = w.add(bytes);
            x = x.add(S::CODES.quads() * M * QUAD);
        }
    }
    *acc = sums;
}

/// `dots` by sums of pairs, which are added to `acc` before one of them could pass `most`.
#[inline(always)]
unsafe fn runs<L: Lanes, S: Source, const V: usize, const M: usize>(
    l: L,
    acc: &mut [[L::I; V]; M],
    most: usize,
    stride: usize,
    bytes: usize,
    mut w: *const u8,
    mut x: *const u8,
    steps: usize,
    ahead: usize,
    table: L::I,
) {
    // Quads that fit, and what they are of a step or how many steps.
    let quads = most / (2 * 128 * usize::from(S::MAXIMUM));
    let (part, run) = (quads.min(S::CODES.quads()), (quads / S::CODES.quads()).max(1));
    let mut left = steps;
    // SAFETY: the caller has so many steps of codes and activations.
    unsafe {
        while left > 0 {
            let steps = run.min(left);
            for first in (0..S::CODES.quads()).step_by(part) {
                let mut sums = [[l.zero(); V]; M];
                for step in 0..steps {
                    let (w, x) = (w.add(step * bytes), x.add(step * S::CODES.quads() * M * QUAD));
                    if first == 0 {
                        fetch::<L, S, V>(l, stride, w, ahead);
                    }
                    for p in first..first + part {
                        let (codes, x) = (quad_codes::<L, S, V, M>(l, stride, w, p, table), x.add(p * M * QUAD));
                        for m in 0..M {
                            let quad = l.quad(x.add(m * QUAD));
                            for v in 0..V {
                                sums[m][v] = l.pairs(sums[m][v], codes[v], quad);
                            }
                        }
                    }
                }
                each!(m < M, {
                    each!(v < V, {
                        acc[m][v] = l.add_pairs(acc[m][v], sums[m][v], S::WEIGHT);
                    });
                });
            }
            w = w.add(steps * bytes);
            x = x.add(steps * S::CODES.quads() * M * QUAD);
            left -= steps;
        }
    }
}

/// Asks for the step that lies `ahead`.
#[inline(always)]
fn fetch<L: Lanes, S: Source, const V: usize>(l: L, stride: usize, w: *const u8, ahead: usize) {
    if ahead > 0 {
        for cell in 0..S::CODES.cells() {
            for v in 0..V {
                l.prefetch(w.wrapping_add(ahead + cell * stride + v * L::ROWS * QUAD));
            }
        }
    }
}

/// The codes of quad `p` of a step.
#[inline(always)]
unsafe fn quad_codes<L: Lanes, S: Source, const V: usize, const M: usize>(
    l: L,
    stride: usize,
    w: *const u8,
    p: usize,
    table: L::I,
) -> [L::I; V] {
    let at = if V * M > L::REGISTERS / 2 { again(w) } else { w };
    let mut codes = [l.zero(); V];
    for v in 0..V {
        // SAFETY: the caller's step.
        codes[v] = unsafe { S::unpack(l, at.add(v * L::ROWS * QUAD), stride, p, table) };
    }
    codes
}

/// One step of `dots`.
#[inline(always)]
unsafe fn step<L: Lanes, S: Source, const V: usize, const M: usize>(
    l: L,
    sums: &mut [[L::I; V]; M],
    stride: usize,
    w: *const u8,
    x: *const u8,
    ahead: usize,
    table: L::I,
) {
    // SAFETY: the caller's step.
    unsafe {
        fetch::<L, S, V>(l, stride, w, ahead);
        for p in 0..S::CODES.quads() {
            let codes = quad_codes::<L, S, V, M>(l, stride, w, p, table);
            for m in 0..M {
                let quad = l.quad(x.add((p * M + m) * QUAD));
                for v in 0..V {
                    sums[m][v] = l.dot(sums[m][v], codes[v], quad);
                }
            }
        }
    }
}

/// Groups that have one scale each: `y += x · Wᵀ` for `V` vectors and `M` tokens at `place`.
#[inline(always)]
pub(super) unsafe fn grouped<L: Lanes, S: Source, const V: usize, const M: usize>(
    l: L,
    o: &Operands<'_>,
    place: &Place,
) {
    let records = o.records;
    let Trailer::Scales { offset, zero, table, .. } = records.trailer else { return };
    let table = table.map_or(l.zero(), |table| l.table(&table.unsigned()));
    let (bytes, stride, groups) = (records.step_bytes(), records.tiles * CELL, records.groups);
    let turn = TURN / QUAD / S::CODES.quads();
    let zero = if offset == Offset::Symmetric { i32::from(zero) } else { 0 };
    // SAFETY: the caller vouches for every tile, token and group.
    unsafe {
        let y = o.y.add((place.token - o.first_token) * o.width + place.vector * L::ROWS);
        let x = o.codes.add(place.token * o.stride);
        let mut out = [[l.splat_float(0.0); V]; M];
        if held::<L>(V, M) {
            each!(m < M, {
                each!(v < V, {
                    out[m][v] = l.load_float(y.add(m * o.width + v * L::ROWS));
                });
            });
        }
        for g in place.groups.clone() {
            let extent = o.extent(g);
            let steps = extent.steps;
            let w = o.panel.add(g * o.record_bytes + (o.tile * TILE + place.vector * L::ROWS) * QUAD);
            let x = x.add(g * records.group * o.planes * M);
            let scales = o.groups.add(place.token * groups + g * M);
            let mut acc = [[l.zero(); V]; M];
            each!(m < M, {
                let group = &*scales.add(m);
                acc[m] = [l.splat(if zero == 8 { group.minus_eight_sums } else { -(group.sum * zero) }); V];
            });
            if o.planes == 1 {
                dots::<L, S, V, M>(l, &mut acc, stride, bytes, w, x, steps, place.ahead, table);
            } else {
                let planes = [x, x.add(extent.plane * M)];
                two_planes::<L, S, V, M>(l, &mut acc, stride, bytes, w, planes, steps, turn, place.ahead, table);
            }
            fetch_trailer(l, o, g, place.ahead);
            finish::<L, V, M>(l, o, &acc, g, scales, place.vector, &mut out, y);
        }
        if held::<L>(V, M) {
            each!(m < M, {
                each!(v < V, {
                    l.store_float(out[m][v], y.add(m * o.width + v * L::ROWS));
                });
            });
        }
    }
}

/// Fetches `ahead` what stands behind the codes of group `g`: `dots` skips it.
#[inline(always)]
fn fetch_trailer<L: Lanes>(l: L, o: &Operands<'_>, g: usize, ahead: usize) {
    if ahead > 0 {
        let record = o.trailers.wrapping_add(g * o.stored_bytes + ahead);
        for line in (o.codes_bytes..o.stored_bytes).step_by(CELL) {
            l.prefetch(record.wrapping_add(line));
        }
    }
}

/// Whether the outputs of a block stay in registers beside its sums.
const fn held<L: Lanes>(v: usize, m: usize) -> bool {
    2 * v * m <= L::REGISTERS - 8
}

/// `acc += 128 · (codes · high) + codes · low`.
#[inline(always)]
unsafe fn two_planes<L: Lanes, S: Source, const V: usize, const M: usize>(
    l: L,
    acc: &mut [[L::I; V]; M],
    stride: usize,
    bytes: usize,
    w: *const u8,
    [high, low]: [*const u8; 2],
    steps: usize,
    turn: usize,
    ahead: usize,
    table: L::I,
) {
    for first in (0..steps).step_by(turn) {
        let steps = turn.min(steps - first);
        let quads = first * S::CODES.quads() * M * QUAD;
        let mut sums = [[l.zero(); V]; M];
        // SAFETY: the caller has so many steps of codes and activations.
        unsafe {
            dots::<L, S, V, M>(l, &mut sums, stride, bytes, w.add(first * bytes), high.add(quads), steps, ahead, table);
            each!(m < M, {
                each!(v < V, {
                    sums[m][v] = l.add(l.times_128(sums[m][v]), acc[m][v]);
                });
            });
            dots::<L, S, V, M>(l, &mut sums, stride, bytes, w.add(first * bytes), low.add(quads), steps, 0, table);
        }
        *acc = sums;
    }
}

/// The float part of a group: `y += (acc · sx) · scale`, and the minimum.
#[inline(always)]
unsafe fn finish<L: Lanes, const V: usize, const M: usize>(
    l: L,
    o: &Operands<'_>,
    acc: &[[L::I; V]; M],
    g: usize,
    groups: *const Group,
    vector: usize,
    out: &mut [[L::F; V]; M],
    y: *mut f32,
) {
    let held = held::<L>(V, M);
    let Trailer::Scales { scale: kind, offset, .. } = o.stored.trailer else { return };
    let extent = o.extent(g);
    let (rows, size) = (o.tile * TILE + vector * L::ROWS, kind.bytes());
    // SAFETY: the caller vouches for the record, the tokens and the outputs.
    unsafe {
        let record = o.trailers.add(g * o.stored_bytes);
        let scales = record.add(extent.scales + rows * size);
        let offsets = record.add(extent.offsets + rows * if offset == Offset::ZeroPoint { 1 } else { size });
        each!(v < V, {
            let scale = l.load_scales(scales.add(v * L::ROWS * size), kind);
            let y = y.add(v * L::ROWS);
            match offset {
                Offset::Symmetric => {
                    each!(m < M, {
                        let y = y.add(m * o.width);
                        let scaled = l.mul_float(l.float(acc[m][v]), l.splat_float((*groups.add(m)).scale));
                        out[m][v] = l.mul_add(scaled, scale, if held { out[m][v] } else { l.load_float(y) });
                        if !held {
                            l.store_float(out[m][v], y);
                        }
                    });
                }
                Offset::ZeroPoint => {
                    let zero = l.widen_unsigned(offsets.add(v * L::ROWS));
                    each!(m < M, {
                        let (y, group) = (y.add(m * o.width), &*groups.add(m));
                        let sum = l.add(acc[m][v], l.mul(zero, l.splat(-group.sum)));
                        let scaled = l.mul_float(l.float(sum), l.splat_float(group.scale));
                        out[m][v] = l.mul_add(scaled, scale, if held { out[m][v] } else { l.load_float(y) });
                        if !held {
                            l.store_float(out[m][v], y);
                        }
                    });
                }
                Offset::Minimum => {
                    let minimum = l.load_scales(offsets.add(v * L::ROWS * size), kind);
                    each!(m < M, {
                        let (y, group) = (y.add(m * o.width), &*groups.add(m));
                        let scaled = l.mul_float(l.float(acc[m][v]), l.splat_float(group.scale));
                        let value = l.mul_add(scaled, scale, if held { out[m][v] } else { l.load_float(y) });
                        out[m][v] = l.mul_add(minimum, l.splat_float(group.moment), value);
                        if !held {
                            l.store_float(out[m][v], y);
                        }
                    });
                }
            }
        });
    }
}

/// Base-3 codes, one scale a row: `y += x · Wᵀ` for `V` vectors and `M` tokens at `place`.
#[inline(always)]
pub(super) unsafe fn base_three<L: Lanes, const V: usize, const M: usize>(l: L, o: &Operands<'_>, place: &Place) {
    let records = o.records;
    let (steps, stride, bytes) = (records.steps(0), records.tiles * CELL, records.step_bytes());
    // SAFETY: the caller vouches for every tile and token.
    unsafe {
        let y = o.y.add((place.token - o.first_token) * o.width + place.vector * L::ROWS);
        let groups = o.groups.add(place.token * records.groups);
        let mut acc = [[l.zero(); V]; M];
        for m in 0..M {
            acc[m] = [l.splat(-(*groups.add(m)).sum); V];
        }
        for step in 0..steps {
            let w = o.panel.add((o.tile * TILE + place.vector * L::ROWS) * QUAD + step * bytes);
            let mut sums = [[l.zero(); V]; M];
            for plane in 0..o.planes {
                let x = o.codes.add(place.token * o.stride + plane * o.last.plane * M);
                let x = x.add(step * Codes::BaseThree.quads() * QUAD * M);
                if plane == 1 {
                    each!(m < M, {
                        each!(v < V, {
                            sums[m][v] = l.times_128(sums[m][v]);
                        });
                    });
                }
                for cell in 0..4 {
                    let at = w.add(cell * stride);
                    for v in 0..V {
                        let at = at.add(v * L::ROWS * QUAD);
                        l.prefetch(at.wrapping_add(place.ahead));
                        let (two, last) = l.base_three(l.load(at));
                        for m in 0..M {
                            for p in 0..4 {
                                let codes = l.and(l.shift_right(two, 2 * p), l.bytes(3));
                                let quad = l.quad(x.add(((4 * cell + p) * M + m) * QUAD));
                                sums[m][v] = l.dot(sums[m][v], codes, quad);
                            }
                            let quad = l.quad(x.add(((16 + cell) * M + m) * QUAD));
                            sums[m][v] = l.dot(sums[m][v], last, quad);
                        }
                    }
                }
            }
            for m in 0..M {
                for v in 0..V {
                    acc[m][v] = l.add(acc[m][v], sums[m][v]);
                }
            }
        }
        let mut out = [[l.splat_float(0.0); V]; M];
        each!(m < M, {
            each!(v < V, {
                out[m][v] = l.load_float(y.add(m * o.width + v * L::ROWS));
            });
        });
        finish::<L, V, M>(l, o, &acc, 0, groups, place.vector, &mut out, y);
        each!(m < M, {
            each!(v < V, {
                l.store_float(out[m][v], y.add(m * o.width + v * L::ROWS));
            });
        });
    }
}

/// Unpacks a base-3 panel to the two-bit codes of the same inputs, `[step of 16 inputs][tiles]` cells.
#[inline(always)]
pub(super) unsafe fn unpack_base_three<L: Lanes>(
    l: L,
    records: &Records,
    panel: *const u8,
    out: *mut u8,
    ahead: usize,
) {
    let cells = records.tiles * CELL;
    // SAFETY: the caller has the panel, and room for 5 cells for each 4 of it.
    unsafe {
        for step in 0..records.steps(0) {
            let (from, to) = (panel.add(step * 4 * cells), out.add(step * 5 * cells));
            for lane in (0..cells).step_by(L::ROWS * QUAD) {
                let mut last = l.zero();
                for cell in (0..4).rev() {
                    let at = from.add(cell * cells + lane);
                    l.prefetch(at.wrapping_add(ahead));
                    let (two, digit) = l.base_three(l.load(at));
                    l.store(two, to.add(cell * cells + lane));
                    last = l.or(l.shift_left(last, 2), digit);
                }
                l.store(last, to.add(4 * cells + lane));
            }
        }
    }
}

/// Unpacks the codes of `groups` to bytes, `[quad][tiles]` cells.
#[inline(always)]
pub(super) unsafe fn unpack<L: Lanes, S: Source>(
    l: L,
    records: &Records,
    panel: *const u8,
    groups: Range<usize>,
    mut out: *mut u8,
    ahead: usize,
) {
    let table = if let Trailer::Scales { table, .. } = records.trailer { table } else { None };
    let table = table.map_or(l.zero(), |table| l.table(&table.unsigned()));
    let cells = records.tiles * CELL;
    // SAFETY: the caller has the groups, and room for their bytes.
    unsafe {
        for g in groups {
            let record = panel.add(records.start(g));
            for step in 0..records.steps(g) {
                let from = record.add(records.step_start(step));
                for lane in (0..cells).step_by(L::ROWS * QUAD) {
                    for cell in 0..S::CODES.cells() {
                        l.prefetch(from.wrapping_add(cell * cells + lane + ahead));
                    }
                    for p in 0..S::CODES.quads() {
                        l.store(S::unpack(l, from.add(lane), cells, p, table), out.add(p * cells + lane));
                    }
                }
                out = out.add(S::CODES.quads() * cells);
            }
        }
    }
}

/// Super-blocks: `y += x · Wᵀ` for `V` vectors and `M` tokens at `place`.
#[inline(always)]
pub(super) unsafe fn super_blocks<L: Lanes, S: Source, const V: usize, const M: usize>(
    l: L,
    o: &Operands<'_>,
    place: &Place,
) {
    let records = o.stored;
    let Trailer::Super(kind) = records.trailer else { return };
    let (steps, rows, groups) = (records.steps(0), o.tile * TILE + place.vector * L::ROWS, records.groups);
    let sub_steps = kind.group() / (S::CODES.quads() * QUAD);
    let (stride, bytes) = (records.tiles * CELL, o.records.step_bytes());
    let (sub_row, sub_minima) = (records.tiles * TILE, records.sub_minima(steps) + rows * MINIMA);
    // Codes that have been unpacked have no scales between them.
    let stride_of_sub = sub_steps * bytes + if o.records.codes == records.codes { sub_row } else { 0 };
    let (first_scale, stride_of_scales) =
        (records.sub_scale(kind, rows, 0), records.sub_scale(kind, 0, 1) - records.sub_scale(kind, 0, 0));
    let signed = kind == SuperBlock::Q6K;
    // SAFETY: the caller vouches for every tile, token and group.
    unsafe {
        let y = o.y.add((place.token - o.first_token) * o.width + place.vector * L::ROWS);
        for g in place.groups.clone() {
            let record = o.trailers.add(g * o.stored_bytes);
            let extent = o.extent(g);
            let w = o.panel.add(g * o.record_bytes + rows * QUAD);
            let x = o.codes.add(place.token * o.stride + g * SuperBlock::INPUTS * o.planes * M);
            let scales = o.groups.add(place.token * groups + g * M);
            let subs = o.subs.add(place.token * groups + g * M);
            let mut total = [[l.splat_float(0.0); V]; M];
            let mut minimum = [[l.splat_float(0.0); V]; M];
            for plane in 0..o.planes {
                let x = x.add(plane * extent.plane * M);
                let ahead = if plane == 0 { place.ahead } else { 0 };
                let mut sums = [[l.zero(); V]; M];
                for sub in 0..SuperBlock::INPUTS / kind.group() {
                    let mut acc = [[l.zero(); V]; M];
                    if signed {
                        each!(m < M, {
                            acc[m] = [l.splat((*subs.add(m)).minus_32_sums[plane][sub]); V];
                        });
                    }
                    let (w, x) = (w.add(sub * stride_of_sub), x.add(sub * kind.group() * M));
                    dots::<L, S, V, M>(l, &mut acc, stride, bytes, w, x, sub_steps, ahead, l.zero());
                    let at = record.add(first_scale + sub * stride_of_scales);
                    if ahead > 0 {
                        l.prefetch(at.wrapping_add(ahead));
                    }
                    each!(v < V, {
                        let at = at.add(v * L::ROWS);
                        let scale = if signed { l.widen_signed(at) } else { l.widen_unsigned(at) };
                        each!(m < M, {
                            sums[m][v] = l.add(sums[m][v], l.mul(acc[m][v], scale));
                        });
                    });
                }
                each!(m < M, {
                    each!(v < V, {
                        total[m][v] = l.mul_add(total[m][v], l.splat_float(128.0), l.float(sums[m][v]));
                    });
                });
                if !signed {
                    let at = record.add(sub_minima);
                    each!(v < V, {
                        let at = at.add(v * L::ROWS * MINIMA);
                        let (first, second) = (l.load(at), l.load(at.add(stride)));
                        each!(m < M, {
                            let quads = (*subs.add(m)).quads[plane].as_ptr();
                            let high = l.dot(l.zero(), first, l.quad(quads));
                            let high = l.dot(high, second, l.quad(quads.add(4)));
                            let low = l.dot(l.times_128(high), first, l.quad(quads.add(8)));
                            let sum = l.dot(low, second, l.quad(quads.add(12)));
                            minimum[m][v] = l.mul_add(minimum[m][v], l.splat_float(128.0), l.float(sum));
                        });
                    });
                }
            }
            fetch_trailer(l, o, g, place.ahead);
            let (d, dmin) = (record.add(extent.scales + rows * 2), record.add(extent.offsets + rows * 2));
            each!(v < V, {
                let scale = l.load_scales(d.add(v * L::ROWS * 2), FloatType::F16);
                each!(m < M, {
                    let factor = l.splat_float((*scales.add(m)).scale);
                    let y = y.add(m * o.width + v * L::ROWS);
                    let mut value = l.mul_add(l.mul_float(total[m][v], factor), scale, l.load_float(y));
                    if !signed {
                        let dmin = l.load_scales(dmin.add(v * L::ROWS * 2), FloatType::F16);
                        value = l.neg_mul_add(l.mul_float(minimum[m][v], factor), dmin, value);
                    }
                    l.store_float(value, y);
                });
            });
        }
    }
}
