//! [`PackedMatrix`]: one weight matrix in kernel order.

use std::convert::Infallible;
use std::ops::Deref;

use super::layout::{self, Layout, QUAD, Records, TILE, Trailer, load_float};
use super::pack::check;
use super::{FloatType, Format, Offset, PackError, Precision, SuperBlock};
use crate::file_map::MappedBytes;
use crate::memory::AlignedBytes;

/// A weight matrix `(n, k)` = (outputs, inputs), packed once into the order in which the kernels read it.
///
/// ```
/// use farthing_kernels::format::{Bits, FloatType, Format, Offset, PackedMatrix, Precision};
/// let format = Format::Integer { bits: Bits::Four, group: 32, offset: Offset::Minimum, scale: FloatType::F16 };
/// let matrix = PackedMatrix::quantize(3, 64, format, Precision::A16, |n, row| {
///     row.iter_mut().enumerate().for_each(|(k, w)| *w = (n * 64 + k) as f32 / 192.0);
///     Ok::<(), std::convert::Infallible>(())
/// })?;
/// let mut row = [0.0; 64];
/// matrix.row(2, &mut row);
/// assert!((row[63] - 191.0 / 192.0).abs() < 0.01);
/// # Ok::<(), farthing_kernels::format::PackError<std::convert::Infallible>>(())
/// ```
#[derive(Debug)]
pub struct PackedMatrix {
    pub(super) layout: Layout,
    pub(super) precision: Precision,
    pub(super) bytes: Bytes,
}

/// Where the panels lie.
pub(super) enum Bytes {
    Own(AlignedBytes),
    Mapped(MappedBytes),
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Own(bytes) => bytes,
            Bytes::Mapped(bytes) => bytes,
        }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if matches!(self, Bytes::Own(_)) { "Own" } else { "Mapped" };
        write!(f, "{kind}({})", self.len())
    }
}

impl PackedMatrix {
    /// The matrix whose [`PackedMatrix::as_bytes`] a file holds; any bytes make a matrix, if there are as many as it has.
    pub fn mapped(
        n: usize,
        k: usize,
        format: Format,
        precision: Precision,
        bytes: MappedBytes,
    ) -> Result<PackedMatrix, PackError<Infallible>> {
        let expected = format.packed_bytes(n, k).ok_or(PackError::Shape { n, k })?;
        match format {
            Format::Float(_) if precision == Precision::F32 => {}
            _ => check(k, format, precision)?,
        }
        if bytes.len() != expected {
            return Err(PackError::Bytes { got: bytes.len(), expected });
        }
        Ok(PackedMatrix { layout: Layout { n, k, format }, precision, bytes: Bytes::Mapped(bytes) })
    }

    /// The panels as they lie in memory, for a file that [`PackedMatrix::mapped`] reads.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Outputs, n.
    pub fn rows(&self) -> usize {
        self.layout.n
    }

    /// Inputs, k.
    pub fn columns(&self) -> usize {
        self.layout.k
    }

    /// What the stored bytes mean.
    pub fn format(&self) -> Format {
        self.layout.format
    }

    /// Precision of the activations in products with this matrix.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes of the panels: what one product reads.
    pub fn nbytes(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The bytes of `panel`.
    pub(crate) fn panel(&self, panel: usize) -> &[u8] {
        let start = self.layout.panel_start(panel);
        &self.bytes[start..start + self.layout.panel_bytes(self.layout.tiles(panel))]
    }

    /// Dequantises row `n` into `out: (k,)`.
    ///
    /// `scale * (code - offset)` rounds once; `scale * code + minimum` is one fused multiply-add. For the scales of the
    /// GGUF formats the product is exact, so both equal the reference dequantisers bit for bit.
    ///
    /// # Panics
    /// When `n` or the length of `out` is wrong.
    pub fn row(&self, n: usize, out: &mut [f32]) {
        assert!(n < self.layout.n, "row {n} of {}", self.layout.n);
        assert_eq!(out.len(), self.layout.k, "length of a dequantised row");
        let (panel, row) = (n / layout::PANEL, n % layout::PANEL);
        let bytes = self.panel(panel);
        let tiles = self.layout.tiles(panel);
        match self.layout.format {
            Format::Float(FloatType::F32) => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = load_float(bytes, FloatType::F32, k * tiles * TILE + row);
                }
            }
            Format::Float(kind) => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = load_float(bytes, kind, half_index(tiles, row, k));
                }
            }
            _ => {
                let records = self.layout.records(tiles);
                for (g, out) in out.chunks_mut(records.group).enumerate() {
                    let record = &bytes[records.start(g)..][..records.bytes(g)];
                    dequantize_group(record, &records, records.steps(g), row, out);
                }
            }
        }
    }

    /// All rows dequantised, `(n, k)` row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.layout.n * self.layout.k];
        out.chunks_exact_mut(self.layout.k).enumerate().for_each(|(n, row)| self.row(n, row));
        out
    }
}

/// Index of the 16-bit float of `row` and input `k` in a panel of `tiles` tiles.
pub(crate) fn half_index(tiles: usize, row: usize, k: usize) -> usize {
    ((k / 2 * tiles + row / TILE) * TILE + row % TILE) * 2 + k % 2
}

fn dequantize_group(record: &[u8], records: &Records, steps: usize, row: usize, out: &mut [f32]) {
    for (quad, out) in out.chunks_mut(QUAD).enumerate() {
        let cell = records.cell(record, row / TILE, quad);
        let codes = &cell[row % TILE * QUAD..];
        out.iter_mut().zip(codes).for_each(|(out, &code)| *out = f32::from(code));
    }
    let scale = load_float(&record[records.scales(steps)..], records.scale(), row);
    let offsets = &record[records.offsets(steps)..];
    match records.trailer {
        Trailer::Scales { table: Some(table), .. } => {
            let values = table.values();
            for w in out {
                *w = scale * f32::from(values[*w as usize]);
            }
        }
        Trailer::Scales { offset: Offset::Minimum, .. } => {
            let minimum = load_float(offsets, records.scale(), row);
            for w in out {
                *w = scale.mul_add(*w, minimum);
            }
        }
        Trailer::Scales { offset, zero, .. } => {
            let zero = f32::from(if offset == Offset::ZeroPoint { offsets[row] } else { zero });
            for w in out {
                *w = scale * (*w - zero);
            }
        }
        Trailer::Super(kind) => {
            for (sub, out) in out.chunks_mut(kind.group()).enumerate() {
                let stored = record[records.sub_scale(kind, row, sub)];
                let scale = scale * f32::from(stored.cast_signed());
                match kind {
                    SuperBlock::Q4K => {
                        let stored = record[records.sub_minimum(steps, row, sub)];
                        let minimum = -(load_float(offsets, FloatType::F16, row) * f32::from(stored));
                        for w in out {
                            *w = scale.mul_add(*w, minimum);
                        }
                    }
                    SuperBlock::Q6K => {
                        for w in out {
                            *w = scale * (*w - 32.0);
                        }
                    }
                }
            }
        }
    }
}
