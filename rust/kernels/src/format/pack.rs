//! Packing rows of codes or floats into panels.

use rayon::prelude::*;

use super::layout::{CELL, Layout, PANEL, STEP, TILE, store_float};
use super::packed::half_index;
use super::{Bits, FloatType, Format, Offset, PackedMatrix, Precision, RowCodes};
use crate::memory::{AlignedBytes, OutOfMemory};

/// Why a matrix could not be packed; `E` is the error of the row source.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PackError<E> {
    /// The row source failed.
    #[error(transparent)]
    Source(E),
    /// The panels do not fit in memory.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// A side of the matrix is zero, or its bytes can't be counted.
    #[error("matrix shape: got ({n}, {k}), expected two positive sizes that fit in memory")]
    Shape {
        /// Outputs.
        n: usize,
        /// Inputs.
        k: usize,
    },
    /// The group size has no kernel.
    #[error("group size: got {got}, expected 16, 32, 64 or 128")]
    Group {
        /// The group size asked for.
        got: usize,
    },
    /// A float format where codes are packed.
    #[error("format: got {got:?}, expected an integer format")]
    NotInteger {
        /// The format asked for.
        got: Format,
    },
    /// The row source changed the length of a field.
    #[error("row {row}: got {got} {field}, expected {expected}")]
    Length {
        /// Row of the matrix.
        row: usize,
        /// The field of [`RowCodes`].
        field: &'static str,
        /// Its length after the source filled it.
        got: usize,
        /// The length it arrived with.
        expected: usize,
    },
    /// A code that does not fit the format.
    #[error("row {row}, input {column}: got code {got}, expected at most {maximum}")]
    Code {
        /// Row of the matrix.
        row: usize,
        /// Input.
        column: usize,
        /// The code.
        got: u8,
        /// The greatest code of the format.
        maximum: u8,
    },
    /// A scale that is not finite or not representable in the format's type.
    #[error("row {row}, group {group}: got scale {got}, expected a finite {kind:?}")]
    Scale {
        /// Row of the matrix.
        row: usize,
        /// Group of the row.
        group: usize,
        /// The scale.
        got: f32,
        /// Type of the scales.
        kind: FloatType,
    },
    /// A minimum that is not finite or not representable in the format's type.
    #[error("row {row}, group {group}: got minimum {got}, expected a finite {kind:?}")]
    Minimum {
        /// Row of the matrix.
        row: usize,
        /// Group of the row.
        group: usize,
        /// The minimum.
        got: f32,
        /// Type of the minima.
        kind: FloatType,
    },
    /// A zero point that is not a code.
    #[error("row {row}, group {group}: got zero point {got}, expected an integer in 0..={maximum}")]
    ZeroPoint {
        /// Row of the matrix.
        row: usize,
        /// Group of the row.
        group: usize,
        /// The zero point.
        got: f32,
        /// The greatest code of the format.
        maximum: u8,
    },
    /// A weight that is not finite, where weights are quantised.
    #[error("row {row}, input {column}: got weight {got}, expected a finite number")]
    Weight {
        /// Row of the matrix.
        row: usize,
        /// Input.
        column: usize,
        /// The weight.
        got: f32,
    },
}

impl PackedMatrix {
    /// Packs integer codes. `row(n, codes)` fills row `n`; its buffers arrive zeroed and sized for the format.
    ///
    /// Rows are asked for in parallel, each once. Codes, scales and offsets are kept as they are; those that the format
    /// can't hold are errors.
    pub fn pack_codes<E: Send>(
        n: usize,
        k: usize,
        format: Format,
        precision: Precision,
        row: impl Fn(usize, &mut RowCodes) -> Result<(), E> + Sync,
    ) -> Result<Self, PackError<E>> {
        pack_rows(n, k, format, precision, |n, codes| row(n, codes).map_err(PackError::Source))
    }

    /// Packs floats. `row(n, weights)` fills `weights: (k,)` of row `n`; they are rounded to `kind`, half to even.
    pub fn pack_float<E: Send>(
        n: usize,
        k: usize,
        kind: FloatType,
        row: impl Fn(usize, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, PackError<E>> {
        pack_panels(n, k, Format::Float(kind), Precision::F32, |_, first, tiles, bytes| {
            let mut weights = vec![0.0; k];
            for row_in_panel in 0..(n - first).min(PANEL) {
                weights.fill(0.0);
                row(first + row_in_panel, &mut weights).map_err(PackError::Source)?;
                for (k, &weight) in weights.iter().enumerate() {
                    let index = match kind {
                        FloatType::F32 => k * tiles * TILE + row_in_panel,
                        FloatType::F16 | FloatType::Bf16 => half_index(tiles, row_in_panel, k),
                    };
                    store_float(bytes, kind, index, weight);
                }
            }
            Ok(())
        })
    }
}

/// [`PackedMatrix::pack_codes`] from a source that can itself find a fault in a row.
pub(super) fn pack_rows<E: Send>(
    n: usize,
    k: usize,
    format: Format,
    precision: Precision,
    row: impl Fn(usize, &mut RowCodes) -> Result<(), PackError<E>> + Sync,
) -> Result<PackedMatrix, PackError<E>> {
    let Format::Integer { group, offset, .. } = format else { return Err(PackError::NotInteger { got: format }) };
    if ![16, 32, 64, 128].contains(&group) {
        return Err(PackError::Group { got: group });
    }
    let groups = k.div_ceil(group);
    let offsets = if offset == Offset::Symmetric { 0 } else { groups };
    pack_panels(n, k, format, precision, |layout, first, tiles, bytes| {
        let mut codes = RowCodes::default();
        for row_in_panel in 0..(n - first).min(PANEL) {
            codes.codes.clear();
            codes.scales.clear();
            codes.offsets.clear();
            codes.codes.resize(k, 0);
            codes.scales.resize(groups, 0.0);
            codes.offsets.resize(offsets, 0.0);
            row(first + row_in_panel, &mut codes)?;
            store_codes(layout, first + row_in_panel, tiles, &codes, bytes)?;
        }
        Ok(())
    })
}

/// Allocates the panels and fills each with `fill(layout, first row, tiles, bytes)`, in parallel.
fn pack_panels<E: Send>(
    n: usize,
    k: usize,
    format: Format,
    precision: Precision,
    fill: impl Fn(&Layout, usize, usize, &mut [u8]) -> Result<(), PackError<E>> + Sync,
) -> Result<PackedMatrix, PackError<E>> {
    if n == 0 || k == 0 {
        return Err(PackError::Shape { n, k });
    }
    let layout = Layout { n, k, format };
    let total = layout.checked_bytes().ok_or(PackError::Shape { n, k })?;
    let mut bytes = AlignedBytes::zeroed(total)?;
    bytes
        .par_chunks_mut(layout.panel_bytes(PANEL / TILE))
        .enumerate()
        .try_for_each(|(panel, bytes)| fill(&layout, panel * PANEL, layout.tiles(panel), bytes))?;
    Ok(PackedMatrix { layout, precision, bytes })
}

/// Checks one row of codes and stores it in its panel.
fn store_codes<E>(
    layout: &Layout,
    row: usize,
    tiles: usize,
    codes: &RowCodes,
    bytes: &mut [u8],
) -> Result<(), PackError<E>> {
    let records = layout.records(tiles);
    let group = records.steps * STEP;
    let maximum = records.bits.maximum();
    let offsets = if records.offset == Offset::Symmetric { 0 } else { records.groups };
    let lengths = [
        ("codes", codes.codes.len(), layout.k),
        ("scales", codes.scales.len(), records.groups),
        ("offsets", codes.offsets.len(), offsets),
    ];
    if let Some(&(field, got, expected)) = lengths.iter().find(|(_, got, expected)| got != expected) {
        return Err(PackError::Length { row, field, got, expected });
    }
    if codes.codes.iter().copied().max() > Some(maximum) {
        let column = codes.codes.iter().position(|&code| code > maximum).unwrap_or(0);
        return Err(PackError::Code { row, column, got: codes.codes[column], maximum });
    }
    let holds = |value: f32| value.is_finite() && records.scale.round(value) == value;
    let row_in_panel = row % PANEL;
    for (g, codes_of_group) in codes.codes.chunks(group).enumerate() {
        let steps = records.steps(g);
        let record = &mut bytes[records.start(g)..];
        for (step, codes) in codes_of_group.chunks(STEP).enumerate() {
            let mut eight = [0; STEP];
            eight[..codes.len()].copy_from_slice(codes);
            let (at, _) = records.code(row_in_panel, step * STEP);
            let [first, second] =
                [0, 4].map(|i| u32::from_le_bytes([eight[i], eight[i + 1], eight[i + 2], eight[i + 3]]));
            match records.bits {
                Bits::Four => record[at..at + 4].copy_from_slice(&(first | second << 4).to_le_bytes()),
                Bits::Eight => {
                    record[at..at + 4].copy_from_slice(&first.to_le_bytes());
                    let at = at + tiles * CELL;
                    record[at..at + 4].copy_from_slice(&second.to_le_bytes());
                }
            }
        }
        let scale = codes.scales[g];
        if !holds(scale) {
            return Err(PackError::Scale { row, group: g, got: scale, kind: records.scale });
        }
        store_float(&mut record[records.scales(steps)..], records.scale, row_in_panel, scale);
        let stored = &mut record[records.offsets(steps)..];
        match records.offset {
            Offset::Symmetric => {}
            Offset::ZeroPoint => {
                let got = codes.offsets[g];
                if !(0.0..=f32::from(maximum)).contains(&got) || got.fract() != 0.0 {
                    return Err(PackError::ZeroPoint { row, group: g, got, maximum });
                }
                stored[row_in_panel] = got as u8;
            }
            Offset::Minimum => {
                let got = codes.offsets[g];
                if !holds(got) {
                    return Err(PackError::Minimum { row, group: g, got, kind: records.scale });
                }
                store_float(stored, records.scale, row_in_panel, got);
            }
        }
    }
    Ok(())
}
