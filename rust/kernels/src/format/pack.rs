//! Packing rows of codes or floats into panels.

use rayon::prelude::*;

use super::layout::{Layout, PANEL, QUAD, Records, TILE, Trailer, store_float};
use super::packed::{Bytes, half_index};
use super::{FloatType, Format, Offset, PackedMatrix, Packing, Precision, RowCodes, SuperBlock};
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
    #[error("group size: got {got}, expected {expected}")]
    Group {
        /// The group size asked for.
        got: usize,
        /// Those of the format.
        expected: &'static str,
    },
    /// A number of inputs that the format can't have.
    #[error("inputs: got {got}, expected {expected}")]
    Inputs {
        /// Inputs of the matrix.
        got: usize,
        /// What the format allows.
        expected: &'static str,
    },
    /// Unquantised activations, for which the format has no kernel; an integer format can hold the same weights.
    #[error("activations: got f32, expected a8 or a16 for {format}")]
    Precision {
        /// The format asked for.
        format: Format,
    },
    /// Packed bytes of another length than the matrix has.
    #[error("packed bytes: got {got}, expected {expected}")]
    Bytes {
        /// Bytes given.
        got: usize,
        /// Bytes of the matrix.
        expected: usize,
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
    /// A sub-scale that the format can't hold.
    #[error("row {row}, sub-block {sub}: got sub-scale {got}, expected 0 to 63")]
    SubScale {
        /// Row of the matrix.
        row: usize,
        /// Sub-block of the row.
        sub: usize,
        /// The sub-scale.
        got: i8,
    },
    /// A sub-minimum that the format can't hold.
    #[error("row {row}, sub-block {sub}: got sub-minimum {got}, expected 0 to 63")]
    SubMinimum {
        /// Row of the matrix.
        row: usize,
        /// Sub-block of the row.
        sub: usize,
        /// The sub-minimum.
        got: u8,
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
    check(k, format, precision)?;
    let sizes = if n == 0 || k == 0 { return Err(PackError::Shape { n, k }) } else { Sizes::new(k, format) };
    pack_panels(n, k, format, precision, |layout, first, tiles, bytes| {
        let records = layout.records(tiles);
        let mut codes = RowCodes::default();
        for row_in_panel in 0..(n - first).min(PANEL) {
            sizes.reset(&mut codes);
            row(first + row_in_panel, &mut codes)?;
            sizes.check(first + row_in_panel, &codes)?;
            store_codes(&records, first + row_in_panel, &codes, bytes)?;
            store_trailers(&records, first + row_in_panel, &codes, bytes)?;
        }
        Ok(())
    })
}

/// Whether the format has a kernel for such matrices.
pub(super) fn check<E>(k: usize, format: Format, precision: Precision) -> Result<(), PackError<E>> {
    let one_of = |group: usize, sizes: &[usize], expected| {
        if sizes.contains(&group) { Ok(()) } else { Err(PackError::Group { got: group, expected }) }
    };
    match format {
        Format::Float(_) => return Err(PackError::NotInteger { got: format }),
        Format::Integer { group, .. } | Format::Lookup { group, .. } => {
            one_of(group, &[16, 32, 64, 128], "16, 32, 64 or 128")?;
        }
        Format::Ternary { packing: Packing::BaseThree, group: Some(got), .. } => {
            return Err(PackError::Group { got, expected: "the whole row for base 3" });
        }
        Format::Ternary { group: Some(group), .. } => {
            one_of(group, &[32, 64, 128, 256], "32, 64, 128, 256 or the row")?;
        }
        Format::Ternary { group: None, .. } if k > 1 << 16 => {
            return Err(PackError::Inputs { got: k, expected: "at most 65536 for one scale a row" });
        }
        Format::Super(_) if !k.is_multiple_of(SuperBlock::INPUTS) => {
            return Err(PackError::Inputs { got: k, expected: "a multiple of 256" });
        }
        Format::Ternary { .. } | Format::Super(_) => {}
    }
    if precision == Precision::F32 && !matches!(format, Format::Integer { .. }) {
        return Err(PackError::Precision { format });
    }
    Ok(())
}

/// Lengths of the fields of a row.
struct Sizes {
    codes: usize,
    scales: usize,
    offsets: usize,
    sub_scales: usize,
    sub_minima: usize,
}

impl Sizes {
    fn new(k: usize, format: Format) -> Sizes {
        let records = Layout { n: 1, k, format }.records(1);
        let subs = |kind: SuperBlock| k / kind.group();
        Sizes {
            codes: k,
            scales: records.groups,
            offsets: if records.offset_bytes() == 0 { 0 } else { records.groups },
            sub_scales: if let Format::Super(kind) = format { subs(kind) } else { 0 },
            sub_minima: if format == Format::Super(SuperBlock::Q4K) { subs(SuperBlock::Q4K) } else { 0 },
        }
    }

    fn reset(&self, row: &mut RowCodes) {
        fn zeros<T: Copy + Default>(field: &mut Vec<T>, length: usize) {
            field.clear();
            field.resize(length, T::default());
        }
        zeros(&mut row.codes, self.codes);
        zeros(&mut row.scales, self.scales);
        zeros(&mut row.offsets, self.offsets);
        zeros(&mut row.sub_scales, self.sub_scales);
        zeros(&mut row.sub_minima, self.sub_minima);
    }

    fn check<E>(&self, row: usize, codes: &RowCodes) -> Result<(), PackError<E>> {
        let lengths = [
            ("codes", codes.codes.len(), self.codes),
            ("scales", codes.scales.len(), self.scales),
            ("offsets", codes.offsets.len(), self.offsets),
            ("sub-scales", codes.sub_scales.len(), self.sub_scales),
            ("sub-minima", codes.sub_minima.len(), self.sub_minima),
        ];
        match lengths.iter().find(|(_, got, expected)| got != expected) {
            Some(&(field, got, expected)) => Err(PackError::Length { row, field, got, expected }),
            None => Ok(()),
        }
    }
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
    bytes.gather();
    Ok(PackedMatrix { layout, precision, bytes: Bytes::Own(bytes) })
}

/// Checks the codes of one row and stores them in its panel.
fn store_codes<E>(records: &Records, row: usize, codes: &RowCodes, bytes: &mut [u8]) -> Result<(), PackError<E>> {
    let maximum = records.codes.maximum();
    if codes.codes.iter().copied().max() > Some(maximum) {
        let column = codes.codes.iter().position(|&code| code > maximum).unwrap_or(0);
        return Err(PackError::Code { row, column, got: codes.codes[column], maximum });
    }
    for (g, codes) in codes.codes.chunks(records.group).enumerate() {
        let record = &mut bytes[records.start(g)..][..records.bytes(g)];
        for (quad, codes) in codes.chunks(QUAD).enumerate() {
            let mut four = [0; QUAD];
            four[..codes.len()].copy_from_slice(codes);
            records.store(record, row % PANEL, quad, four);
        }
    }
    Ok(())
}

/// Checks what stands behind the codes of one row and stores it in its panel.
fn store_trailers<E>(records: &Records, row: usize, codes: &RowCodes, bytes: &mut [u8]) -> Result<(), PackError<E>> {
    let (kind, row_in_panel) = (records.scale(), row % PANEL);
    let holds = |value: f32| value.is_finite() && kind.round(value) == value;
    for g in 0..records.groups {
        let steps = records.steps(g);
        let record = &mut bytes[records.start(g)..][..records.bytes(g)];
        let scale = codes.scales[g];
        if !holds(scale) {
            return Err(PackError::Scale { row, group: g, got: scale, kind });
        }
        store_float(&mut record[records.scales(steps)..], kind, row_in_panel, scale);
        let stored = &mut record[records.offsets(steps)..];
        match records.trailer {
            Trailer::Scales { offset: Offset::Symmetric, .. } | Trailer::Super(SuperBlock::Q6K) => {}
            Trailer::Scales { offset: Offset::ZeroPoint, .. } => {
                let (got, maximum) = (codes.offsets[g], records.codes.maximum());
                if !(0.0..=f32::from(maximum)).contains(&got) || got.fract() != 0.0 {
                    return Err(PackError::ZeroPoint { row, group: g, got, maximum });
                }
                stored[row_in_panel] = got as u8;
            }
            Trailer::Scales { offset: Offset::Minimum, .. } | Trailer::Super(SuperBlock::Q4K) => {
                let got = codes.offsets[g];
                if !holds(got) {
                    return Err(PackError::Minimum { row, group: g, got, kind });
                }
                store_float(stored, kind, row_in_panel, got);
            }
        }
        if let Trailer::Super(block) = records.trailer {
            let subs = SuperBlock::INPUTS / block.group();
            for sub in 0..subs {
                let got = codes.sub_scales[g * subs + sub];
                if block == SuperBlock::Q4K && !(0..=63).contains(&got) {
                    return Err(PackError::SubScale { row, sub: g * subs + sub, got });
                }
                record[records.sub_scale(block, row_in_panel, sub)] = got.cast_unsigned();
                if block == SuperBlock::Q4K {
                    let got = codes.sub_minima[g * subs + sub];
                    if got > 63 {
                        return Err(PackError::SubMinimum { row, sub: g * subs + sub, got });
                    }
                    record[records.sub_minimum(steps, row_in_panel, sub)] = got;
                }
            }
        }
    }
    Ok(())
}
