//! The specification: every other kernel gives these bits. The ranges of its integers stand in `matmul::block`.

use std::ops::Range;

use super::input::{Group, Rows, Shape, Subs, factors};
use crate::format::layout::{QUAD, Records, TILE, Trailer, load_float};
use crate::format::{Offset, Precision, SuperBlock, Table};

/// Quantises one row `x` by groups; `codes` holds i16.
pub(crate) fn quantize(x: &[f32], shape: Shape, codes: &mut [u8], scales: &mut [Group], subs: &mut [Subs]) {
    let (codes, _) = codes.as_chunks_mut::<2>();
    for (g, (x, scale)) in x.chunks(shape.group).zip(scales).enumerate() {
        let codes = &mut codes[g * shape.group..][..shape.plane(g)];
        *scale = quantize_group(x, shape.precision, codes);
        if let Some(sub) = subs.get_mut(g) {
            for plane in 0..shape.planes() {
                let part = |code: &[u8; 2]| split(i16::from_ne_bytes(*code), shape.planes())[plane];
                let sums =
                    codes[..SuperBlock::INPUTS].as_chunks::<16>().0.iter().map(|codes| codes.iter().map(part).sum());
                sub.set(plane, &sums.collect::<Vec<_>>().try_into().expect("256 inputs are 16 times 16"));
            }
        }
    }
}

/// The planes of a code: A8 has one, A16 `xq >> 7` and `xq & 127`.
fn split(xq: i16, planes: usize) -> [i32; 2] {
    let xq = i32::from(xq);
    if planes == 1 { [xq, 0] } else { [xq >> 7, xq & 127] }
}

fn quantize_group(x: &[f32], precision: Precision, codes: &mut [[u8; 2]]) -> Group {
    let absmax = x.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    let (factor, scale) = factors(absmax, precision);
    let mut sum = 0;
    let padded = x.iter().copied().chain(std::iter::repeat(0.0));
    for (code, x) in codes.iter_mut().zip(padded) {
        // A factor of 0 keeps Inf and NaN out: they would not become 0 by themselves.
        let xq = if factor == 0.0 { 0 } else { (x * factor).round_ties_even() as i32 };
        sum += xq;
        *code = (xq as i16).to_ne_bytes();
    }
    Group::new(scale, sum)
}

/// `y += x · Wᵀ` for `tiles` of one panel and the rows `tokens` of `rows`; `y: (tokens, tiles * 16)`.
pub(crate) fn integer(
    records: &Records,
    panel: &[u8],
    tiles: Range<usize>,
    rows: Rows<'_>,
    tokens: Range<usize>,
    y: &mut [f32],
) {
    let width = tiles.len() * TILE;
    for (token, y) in tokens.zip(y.chunks_exact_mut(width)) {
        let (x, _) = rows.codes[token * rows.stride..][..rows.stride].as_chunks::<2>();
        for g in 0..records.groups {
            let record = &panel[records.start(g)..][..records.bytes(g)];
            let x = &x[g * records.group..][..records.inputs(g).next_multiple_of(QUAD)];
            let group = rows.scales[token * records.groups + g];
            for (tile, y) in tiles.clone().zip(y.as_chunks_mut::<TILE>().0) {
                match records.trailer {
                    Trailer::Scales { .. } => {
                        let sums = dot(records, record, tile, 0, x, i32::from);
                        finish(records, &record[records.scales(records.steps(g))..], tile, &group, &sums, y);
                    }
                    Trailer::Super(kind) => {
                        let sub = &rows.subs[token * records.groups + g];
                        super_block(records, kind, record, tile, x, rows.shape.planes(), &group, sub, y);
                    }
                }
            }
        }
    }
}

/// `Σ code · part(xq)` for the 16 rows of a tile, from quad `first` of a group on.
fn dot(
    records: &Records,
    record: &[u8],
    tile: usize,
    first: usize,
    x: &[[u8; 2]],
    part: impl Fn(i16) -> i32,
) -> [i32; TILE] {
    let mut sums = [0; TILE];
    let table = if let Trailer::Scales { table, .. } = records.trailer { table.map(Table::unsigned) } else { None };
    for (quad, x) in x.as_chunks::<QUAD>().0.iter().enumerate() {
        let x = x.map(|xq| part(i16::from_ne_bytes(xq)));
        let mut cell = records.cell(record, tile, first + quad);
        if let Some(table) = &table {
            cell = cell.map(|code| table[usize::from(code)]);
        }
        for (sum, codes) in sums.iter_mut().zip(cell.as_chunks::<QUAD>().0) {
            *sum += codes.iter().zip(x).map(|(&code, x)| i32::from(code) * x).sum::<i32>();
        }
    }
    sums
}

/// One super-block of one tile.
fn super_block(
    records: &Records,
    kind: SuperBlock,
    record: &[u8],
    tile: usize,
    x: &[[u8; 2]],
    planes: usize,
    group: &Group,
    subs: &Subs,
    y: &mut [f32; TILE],
) {
    let steps = records.steps(0);
    let (mut total, mut minimum) = ([0.0f32; TILE], [0.0f32; TILE]);
    for plane in 0..planes {
        let (mut sums, mut minima) = ([0i32; TILE], [0i32; TILE]);
        for (sub, x) in x.chunks(kind.group()).enumerate() {
            let codes = dot(records, record, tile, sub * kind.group() / QUAD, x, |xq| split(xq, planes)[plane]);
            for lane in 0..TILE {
                let row = tile * TILE + lane;
                let scale = record[records.sub_scale(kind, row, sub)].cast_signed();
                match kind {
                    SuperBlock::Q4K => {
                        let quads = &subs.quads[plane];
                        let sum = 128 * i32::from(quads[sub].cast_signed()) + i32::from(quads[sub + 8]);
                        minima[lane] += i32::from(record[records.sub_minimum(steps, row, sub)]) * sum;
                        sums[lane] += codes[lane] * i32::from(scale);
                    }
                    SuperBlock::Q6K => {
                        sums[lane] += (codes[lane] + subs.minus_32_sums[plane][sub]) * i32::from(scale);
                    }
                }
            }
        }
        for lane in 0..TILE {
            total[lane] = total[lane].mul_add(128.0, sums[lane] as f32);
            minimum[lane] = minimum[lane].mul_add(128.0, minima[lane] as f32);
        }
    }
    for (lane, y) in y.iter_mut().enumerate() {
        let row = tile * TILE + lane;
        *y =
            (total[lane] * group.scale).mul_add(load_float(&record[records.scales(steps)..], records.scale(), row), *y);
        if kind == SuperBlock::Q4K {
            let dmin = load_float(&record[records.offsets(steps)..], records.scale(), row);
            *y = (-(minimum[lane] * group.scale)).mul_add(dmin, *y);
        }
    }
}

/// The float part of one group; `scales` begins at the scales of the record.
fn finish(records: &Records, scales: &[u8], tile: usize, group: &Group, sums: &[i32; TILE], y: &mut [f32; TILE]) {
    let Trailer::Scales { scale: kind, offset, zero, .. } = records.trailer else { return };
    let offsets = &scales[records.tiles * TILE * kind.bytes()..];
    for (lane, (y, &sum)) in y.iter_mut().zip(sums).enumerate() {
        let row = tile * TILE + lane;
        let zero = match offset {
            Offset::Symmetric => i32::from(zero),
            Offset::ZeroPoint => i32::from(offsets[row]),
            Offset::Minimum => 0,
        };
        let acc = sum - zero * group.sum;
        *y = (acc as f32 * group.scale).mul_add(load_float(scales, kind, row), *y);
        if offset == Offset::Minimum {
            *y = load_float(offsets, kind, row).mul_add(group.moment, *y);
        }
    }
}
