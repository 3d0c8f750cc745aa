//! Products without quantised activations: spans of a panel are widened to f32 `(inputs, rows)` in the first-level
//! cache, then `y = fma(w, x, y)` with the inputs ascending. Widening gives the bits of [`PackedMatrix::row`].
//!
//! [`PackedMatrix::row`]: crate::format::PackedMatrix::row

use std::ops::Range;

use super::scalar;
use crate::format::layout::{CELL, Layout, PANEL, Records, STEP, TILE, load_float};
use crate::format::{Bits, FloatType, Format, Offset};
use crate::isa::Isa;

/// Inputs widened at a time; a multiple of every step and at most one group.
const SPAN: usize = 64;

/// `(inputs, rows)` of a span.
#[repr(align(64))]
pub(super) struct Widened([f32; SPAN * PANEL]);

impl Default for Widened {
    fn default() -> Self {
        Widened([0.0; SPAN * PANEL])
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
    let width = tiles.len() * TILE;
    for start in (0..layout.k).step_by(SPAN) {
        let inputs = SPAN.min(layout.k - start);
        let w = &mut widened.0[..inputs * width];
        match layout.format {
            Format::Float(FloatType::F32) => {
                for (i, w) in w.chunks_exact_mut(width).enumerate() {
                    let at = ((start + i) * panel_tiles + tiles.start) * TILE * 4;
                    w.copy_from_slice(bytemuck::cast_slice(&panel[at..at + width * 4]));
                }
            }
            Format::Float(kind) => widen_half(kind, panel, panel_tiles, tiles.clone(), start, w),
            Format::Integer { group, .. } => {
                let records = layout.records(panel_tiles);
                let ends = (start..start + inputs).step_by(group);
                for (at, w) in ends.zip(w.chunks_mut(group * width)) {
                    widen_group(&records, panel, at / group, at % group, tiles.clone(), w);
                }
            }
        }
        multiply(isa, w, width, &x[start..], layout.k, y);
    }
}

fn multiply(isa: Isa, w: &[f32], width: usize, x: &[f32], stride: usize, y: &mut [f32]) {
    match isa {
        Isa::Scalar => scalar::float(w, width, x, stride, y),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `prepare` has checked that the CPU has the level; the kernels check the shapes.
        Isa::Avx2 => unsafe { super::x86_64::avx2::float(w, width, x, stride, y) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Vnni => unsafe { super::x86_64::avx512::float(w, width, x, stride, y) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512Vnni => unreachable!("an unavailable level"),
    }
}

/// Inputs `start..` of a panel of 16-bit floats; a span starts at an even input.
fn widen_half(kind: FloatType, panel: &[u8], panel_tiles: usize, tiles: Range<usize>, start: usize, w: &mut [f32]) {
    let width = tiles.len() * TILE;
    for (pair, w) in w.chunks_mut(2 * width).enumerate() {
        let cells = &panel[((start / 2 + pair) * panel_tiles + tiles.start) * CELL..][..tiles.len() * CELL];
        for (i, w) in w.chunks_exact_mut(width).enumerate() {
            for (row, w) in w.iter_mut().enumerate() {
                *w = load_float(cells, kind, row * 2 + i);
            }
        }
    }
}

/// Inputs `from..` of group `g` of an integer panel; `from` is a multiple of a step.
fn widen_group(records: &Records, panel: &[u8], g: usize, from: usize, tiles: Range<usize>, w: &mut [f32]) {
    let width = tiles.len() * TILE;
    let steps = records.steps(g);
    let record = &panel[records.start(g)..][..records.bytes(g)];
    let (mut scales, mut offsets) = ([0.0; PANEL], [0.0; PANEL]);
    for (i, row) in (tiles.start * TILE..tiles.end * TILE).enumerate() {
        scales[i] = load_float(&record[records.scales(steps)..], records.scale, row);
        let stored = &record[records.offsets(steps)..];
        offsets[i] = match records.offset {
            Offset::Symmetric => f32::from(records.bits.bias()),
            Offset::ZeroPoint => f32::from(stored[row]),
            Offset::Minimum => load_float(stored, records.scale, row),
        };
    }
    for (i, w) in w.chunks_exact_mut(width).enumerate() {
        let input = from + i;
        let (step, shift, mask) = match records.bits {
            Bits::Four => (input / STEP, if input % STEP < 4 { 0 } else { 4 }, 15),
            Bits::Eight => (input / 4, 0, 255),
        };
        let cells = &record[(step * records.tiles + tiles.start) * CELL..][..tiles.len() * CELL];
        let codes = cells.chunks_exact(4).map(|codes| f32::from(codes[input % 4] >> shift & mask));
        let rows = w.iter_mut().zip(codes).zip(scales.iter().zip(&offsets));
        match records.offset {
            Offset::Symmetric | Offset::ZeroPoint => {
                rows.for_each(|((w, code), (scale, zero))| *w = scale * (code - zero));
            }
            Offset::Minimum => rows.for_each(|((w, code), (scale, minimum))| *w = scale.mul_add(code, *minimum)),
        }
    }
}
