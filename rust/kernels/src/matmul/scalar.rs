//! The specification: every other kernel gives these bits.
//!
//! Ranges: codes are at most 255, `|xq|` at most 16383 and a group has at most 128 inputs, so `|acc| ≤ 128 · 255 · 16383
//! < 2^29` with or without the zero point taken off, and `|Σ xq| < 2^21` is exact in f32.

use super::input::{Group, Plane, factors};
use crate::format::layout::{CELL, Records, STEP, TILE, load_float};
use crate::format::{Bits, Offset, Precision};

/// Quantises one row `x` by groups of `group`; `codes` holds i16, zero behind the end of `x`.
pub(crate) fn quantize(x: &[f32], group: usize, precision: Precision, codes: &mut [u8], scales: &mut [Group]) {
    for ((x, codes), scale) in x.chunks(group).zip(codes.chunks_mut(group * 2)).zip(scales) {
        *scale = quantize_group(x, precision, codes);
    }
}

fn quantize_group(x: &[f32], precision: Precision, codes: &mut [u8]) -> Group {
    let absmax = x.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    let (factor, scale) = factors(absmax, precision);
    let mut sum = 0;
    let padded = x.iter().copied().chain(std::iter::repeat(0.0));
    for (code, x) in codes.chunks_exact_mut(2).zip(padded) {
        // A factor of 0 keeps Inf and NaN out: they would not become 0 by themselves.
        let xq = if factor == 0.0 { 0 } else { (x * factor).round_ties_even() as i32 };
        sum += xq;
        code.copy_from_slice(&(xq as i16).to_ne_bytes());
    }
    Group::new(scale, sum)
}

/// `y += x · Wᵀ` for `tiles` of one panel and the rows `tokens` of `plane`; `y: (tokens, tiles * 16)`.
pub(crate) fn integer(
    records: &Records,
    panel: &[u8],
    tiles: std::ops::Range<usize>,
    plane: &Plane,
    tokens: std::ops::Range<usize>,
    y: &mut [f32],
) {
    let width = tiles.len() * TILE;
    for (token, y) in tokens.zip(y.chunks_exact_mut(width)) {
        let x = &plane.codes()[token * plane.stride..][..plane.stride];
        for g in 0..records.groups {
            let steps = records.steps(g);
            let record = &panel[records.start(g)..][..records.bytes(g)];
            let x = &x[g * plane.group * 2..][..steps * STEP * 2];
            let group = plane.scales[token * plane.groups + g];
            for (tile, y) in tiles.clone().zip(y.chunks_exact_mut(TILE)) {
                let sums = dot(records, record, tile, x);
                finish(records, &record[records.scales(steps)..], tile, &group, &sums, y);
            }
        }
    }
}

/// `Σ code · xq` for the 16 rows of a tile over one group.
fn dot(records: &Records, record: &[u8], tile: usize, x: &[u8]) -> [i32; TILE] {
    let mut sums = [0; TILE];
    for (cell, x) in x.chunks_exact(8).enumerate() {
        let x: [i32; 4] = std::array::from_fn(|j| i32::from(i16::from_ne_bytes([x[2 * j], x[2 * j + 1]])));
        let (at, shift, mask) = match records.bits {
            Bits::Four => (cell / 2 * records.tiles + tile, cell % 2 * 4, 15),
            Bits::Eight => (cell * records.tiles + tile, 0, 255),
        };
        for (sum, codes) in sums.iter_mut().zip(record[at * CELL..][..CELL].chunks_exact(4)) {
            *sum += codes.iter().zip(x).map(|(&code, x)| i32::from(code >> shift & mask) * x).sum::<i32>();
        }
    }
    sums
}

/// The float part of one group; `scales` begins at the scales of the record.
fn finish(records: &Records, scales: &[u8], tile: usize, group: &Group, sums: &[i32; TILE], y: &mut [f32]) {
    let offsets = &scales[records.tiles * TILE * records.scale.bytes()..];
    for (lane, (y, &sum)) in y.iter_mut().zip(sums).enumerate() {
        let row = tile * TILE + lane;
        let zero = match records.offset {
            Offset::Symmetric => i32::from(records.bits.bias()),
            Offset::ZeroPoint => i32::from(offsets[row]),
            Offset::Minimum => 0,
        };
        let acc = sum - zero * group.sum;
        *y = (acc as f32 * group.scale).mul_add(load_float(scales, records.scale, row), *y);
        if records.offset == Offset::Minimum {
            *y = load_float(offsets, records.scale, row).mul_add(group.moment, *y);
        }
    }
}
