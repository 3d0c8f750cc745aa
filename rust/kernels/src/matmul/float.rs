//! Products without quantised activations: `y = fma(w, x, y)` with the inputs ascending, one accumulator per output.
//!
//! A panel of f32 is read in place; other weights are widened a span at a time into the first-level cache, to the bits of
//! [`PackedMatrix::row`]. Everything is written once over [`Simd`]: a vector is one tile of 16 rows.
//!
//! [`PackedMatrix::row`]: crate::format::PackedMatrix::row

use std::ops::Range;

use half::{bf16, f16};

use crate::format::layout::{CELL, Codes, Layout, PANEL, QUAD, Records, TILE, Trailer};
use crate::format::{FloatType, Format, Offset};
use crate::isa::Isa;
use crate::vector::{Kernel, Simd, dispatch};

/// Inputs widened at a time; a multiple of every step.
const SPAN: usize = 64;

/// Rows of x in a block.
const ROWS: usize = 6;

/// One vector: an input's weights in the 16 rows of a tile.
type Tile = [f32; TILE];

/// `(inputs, tiles)` of a span.
#[repr(align(64))]
pub(crate) struct Widened([Tile; SPAN * PANEL / TILE]);

impl Default for Widened {
    fn default() -> Self {
        Widened([[0.0; TILE]; SPAN * PANEL / TILE])
    }
}

/// `y += x · Wᵀ` for `tiles` of a panel of `panel_tiles`; `x: (tokens, k)`, `y: (tokens, tiles * 16)`.
pub(super) fn product(
    isa: Isa,
    layout: &Layout,
    panel: &[u8],
    panel_tiles: usize,
    tiles: Range<usize>,
    x: &[f32],
    y: &mut [f32],
    widened: &mut Widened,
) {
    dispatch(isa, Product { layout, panel, panel_tiles, tiles, x, y: y.as_chunks_mut().0, widened });
}

struct Product<'a> {
    layout: &'a Layout,
    panel: &'a [u8],
    panel_tiles: usize,
    tiles: Range<usize>,
    /// `(tokens, k)`.
    x: &'a [f32],
    /// `(tokens, tiles)`.
    y: &'a mut [Tile],
    widened: &'a mut Widened,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (k, width) = (self.layout.k, self.tiles.len());
        // A panel that is read in place is one span.
        let in_place = self.layout.format == Format::Float(FloatType::F32) && width == self.panel_tiles;
        let span = if in_place { k } else { SPAN };
        for start in (0..k).step_by(span) {
            let inputs = span.min(k - start);
            let w = if in_place {
                bytemuck::cast_slice(self.panel)
            } else {
                let w = &mut self.widened.0[..inputs * width];
                widen(simd, self.layout, self.panel, self.panel_tiles, self.tiles.clone(), start, w);
                &*w
            };
            for first in (0..self.y.len() / width).step_by(ROWS) {
                let tokens = ROWS.min(self.y.len() / width - first);
                let x = &self.x[first * k + start..(first + tokens - 1) * k + start + inputs];
                multiply(simd, w, width, x, k, tokens, &mut self.y[first * width..(first + tokens) * width]);
            }
        }
    }
}

/// `y: (m, width) += x · Wᵀ` for `w: (inputs, width)` and rows of `x` that lie `stride` apart, for at most `ROWS` rows.
#[inline(always)]
fn multiply<S: Simd>(simd: S, w: &[Tile], width: usize, x: &[f32], stride: usize, m: usize, y: &mut [Tile]) {
    let mut tile = 0;
    while tile < width {
        // Thirty-two registers hold the sums of 6 rows × 4 tiles; sixteen, of which a tile takes two, those of 6 × 1.
        tile += match width - tile {
            4.. if S::VECTORS == 2 => rows::<S, 4>(simd, w, width, tile, x, stride, m, y),
            2.. if S::VECTORS == 2 => rows::<S, 2>(simd, w, width, tile, x, stride, m, y),
            _ => rows::<S, 1>(simd, w, width, tile, x, stride, m, y),
        };
    }
}

/// `T` tiles from `tile` on; returns `T`.
#[inline(always)]
fn rows<S: Simd, const T: usize>(
    simd: S,
    w: &[Tile],
    width: usize,
    tile: usize,
    x: &[f32],
    stride: usize,
    m: usize,
    y: &mut [Tile],
) -> usize {
    match m {
        1 => block::<S, T, 1>(simd, w, width, tile, x, stride, y),
        2 => block::<S, T, 2>(simd, w, width, tile, x, stride, y),
        3 => block::<S, T, 3>(simd, w, width, tile, x, stride, y),
        4 => block::<S, T, 4>(simd, w, width, tile, x, stride, y),
        5 => block::<S, T, 5>(simd, w, width, tile, x, stride, y),
        _ => block::<S, T, ROWS>(simd, w, width, tile, x, stride, y),
    }
    T
}

/// `M` rows × `T` tiles, sums in registers.
#[inline(always)]
fn block<S: Simd, const T: usize, const M: usize>(
    simd: S,
    w: &[Tile],
    width: usize,
    tile: usize,
    x: &[f32],
    stride: usize,
    y: &mut [Tile],
) {
    let inputs = w.len() / width;
    let x: [&[f32]; M] = std::array::from_fn(|m| &x[m * stride..][..inputs]);
    let mut sums: [[S::F; T]; M] =
        std::array::from_fn(|m| std::array::from_fn(|t| simd.load(&y[m * width + tile + t])));
    for (i, w) in w.chunks_exact(width).enumerate() {
        let w: [S::F; T] = std::array::from_fn(|t| simd.load(&w[tile + t]));
        for (sums, x) in sums.iter_mut().zip(&x) {
            let x = simd.splat(x[i]);
            for (sum, &w) in sums.iter_mut().zip(&w) {
                *sum = simd.mul_add(w, x, *sum);
            }
        }
    }
    for (m, sums) in sums.into_iter().enumerate() {
        for (t, sum) in sums.into_iter().enumerate() {
            simd.store(sum, &mut y[m * width + tile + t]);
        }
    }
}

/// Inputs `start..` of `tiles` of a panel as f32, `w: (inputs, tiles)`.
#[inline(always)]
fn widen<S: Simd>(
    simd: S,
    layout: &Layout,
    panel: &[u8],
    panel_tiles: usize,
    tiles: Range<usize>,
    start: usize,
    w: &mut [Tile],
) {
    let width = tiles.len();
    match layout.format {
        Format::Float(FloatType::F32) => {
            let panel: &[Tile] = bytemuck::cast_slice(panel);
            for (w, panel) in w.chunks_exact_mut(width).zip(panel[start * panel_tiles..].chunks_exact(panel_tiles)) {
                w.copy_from_slice(&panel[tiles.clone()]);
            }
        }
        Format::Float(kind) => {
            let cells: &[[u32; TILE]] = bytemuck::cast_slice(panel);
            let cells = cells[start / 2 * panel_tiles..].chunks_exact(panel_tiles);
            for (w, cells) in w.chunks_mut(2 * width).zip(cells) {
                for (tile, cell) in cells[tiles.clone()].iter().enumerate() {
                    store_float(simd, kind, &cell.map(|pair| pair as u16), &mut w[tile]);
                    if let Some(w) = w.get_mut(width + tile) {
                        store_float(simd, kind, &cell.map(|pair| (pair >> 16) as u16), w);
                    }
                }
            }
        }
        _ => {
            let records = layout.records(panel_tiles);
            let group = records.group;
            let inputs = w.len() / width;
            let firsts = (start..start + inputs).step_by(group);
            for (first, w) in firsts.zip(w.chunks_mut(group * width)) {
                let g = first / group;
                let record = &panel[records.start(g)..][..records.bytes(g)];
                for (i, tile) in tiles.clone().enumerate() {
                    widen_group(
                        simd,
                        &records,
                        record,
                        records.steps(g),
                        first % group,
                        tile,
                        w[i..].chunks_mut(width),
                    );
                }
            }
        }
    }
}

#[inline(always)]
fn store_float<S: Simd>(simd: S, kind: FloatType, bits: &[u16; TILE], out: &mut Tile) {
    if kind == FloatType::F16 {
        simd.store(simd.load_f16(&bits.map(f16::from_bits)), out);
    } else {
        simd.store(simd.load_bf16(&bits.map(bf16::from_bits)), out);
    }
}

/// Inputs `from..` of one tile of an integer group; the first tile of each item of `w` is an input's.
#[inline(always)]
fn widen_group<'w, S: Simd>(
    simd: S,
    records: &Records,
    record: &[u8],
    steps: usize,
    from: usize,
    tile: usize,
    w: impl Iterator<Item = &'w mut [Tile]>,
) {
    let Trailer::Scales { scale: kind, offset: meaning, zero, table: None } = records.trailer else {
        unreachable!("tables and super-blocks are packed for quantised activations only")
    };
    let rows = tile * TILE;
    let scale = floats(simd, kind, &record[records.scales(steps) + rows * kind.bytes()..]);
    let offsets = &record[records.offsets(steps) + rows * records.offset_bytes()..];
    let offset = match meaning {
        Offset::Symmetric => simd.splat(f32::from(zero)),
        Offset::ZeroPoint => simd.of_u32(&std::array::from_fn(|row| u32::from(offsets[row]))),
        Offset::Minimum => floats(simd, kind, offsets),
    };
    let cells: &[[u32; TILE]] = bytemuck::cast_slice(&record[..records.scales(steps)]);
    for (i, w) in (from..).zip(w) {
        let (cell, half, mask) = match records.codes {
            Codes::Four => (i / (2 * QUAD), i / QUAD % 2 * 4, 15),
            _ => (i / (CELL / TILE), 0, 255),
        };
        let shift = i % QUAD * 8 + half;
        let code = simd.of_u32(&cells[cell * records.tiles + tile].map(|four| four >> shift & mask));
        let value = match meaning {
            Offset::Symmetric | Offset::ZeroPoint => simd.mul(scale, simd.sub(code, offset)),
            Offset::Minimum => simd.mul_add(scale, code, offset),
        };
        simd.store(value, &mut w[0]);
    }
}

/// The first 16 floats of type `kind`.
#[inline(always)]
fn floats<S: Simd>(simd: S, kind: FloatType, bytes: &[u8]) -> S::F {
    let bytes = &bytes[..TILE * kind.bytes()];
    match kind {
        FloatType::F32 => simd.load(&std::array::from_fn(|i| bytemuck::pod_read_unaligned(&bytes[i * 4..][..4]))),
        FloatType::F16 => simd.load_f16(&std::array::from_fn(|i| bytemuck::pod_read_unaligned(&bytes[i * 2..][..2]))),
        FloatType::Bf16 => simd.load_bf16(&std::array::from_fn(|i| bytemuck::pod_read_unaligned(&bytes[i * 2..][..2]))),
    }
}
