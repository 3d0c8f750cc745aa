//! Where a store has each expert.
//!
//! ```text
//! "farthing experts", length of the description (u64), the description: the model's identity, then every layer's
//! matrices; a checksum (u64) of each piece of each expert; a checksum of all that
//! experts, each from a multiple of 4096 on: its matrices one after the other, each from a multiple of 64 on
//! ```
//!
//! All of it follows from the description but the checksums. A reader makes the description itself and compares, so that
//! nothing in a file is taken for a size or an address.

use std::fmt::Write as _;
use std::ops::Range;

use crate::checksum::checksum;
use crate::error::Error;
use crate::model::feed_forward::levers::{LayerShape, MatrixShape};

const MAGIC: &[u8; 16] = b"farthing experts";
/// Of the file format.
const VERSION: u32 = 1;
/// Experts begin at multiples of a page.
const PAGE: usize = 4096;
/// Matrices begin at multiples of a cache line.
const LINE: usize = 64;
/// Bytes that a reader fetches and checks at once, at most.
pub(super) const PIECE: usize = 2 << 20;

#[derive(Debug)]
struct Layer {
    shape: LayerShape,
    /// Number of its first expert among those of all layers.
    first: usize,
    /// First byte of that expert.
    start: usize,
    /// From one expert to the next.
    stride: usize,
    /// Bytes of an expert.
    bytes: usize,
    /// Of each matrix within its expert.
    matrices: Vec<Range<usize>>,
}

/// A store's description, and all addresses.
#[derive(Debug)]
pub(crate) struct Layout {
    text: String,
    layers: Vec<Layer>,
    header: usize,
    length: usize,
}

impl Layout {
    /// Of the model that `identity` names.
    pub(crate) fn new(identity: &str, shapes: Vec<LayerShape>) -> Result<Layout, Error> {
        let mut text = format!("format {VERSION}, farthing {}\n{identity}", env!("CARGO_PKG_VERSION"));
        for LayerShape { layer, experts, top_k: _, source, matrices } in &shapes {
            let _ = write!(text, "block {layer}: {experts} experts, {source}");
            for MatrixShape { n, k, format, precision } in matrices {
                let _ = write!(text, ", {n} x {k} {format} {}", precision.name());
            }
            text.push('\n');
        }
        let too_large = || Error::unsupported("experts of more bytes than can be addressed", "a smaller model");
        Layout::place(text, shapes).ok_or_else(too_large)
    }

    fn place(text: String, shapes: Vec<LayerShape>) -> Option<Layout> {
        let (mut layers, mut first, mut pieces) = (Vec::with_capacity(shapes.len()), 0_usize, 0_usize);
        for shape in shapes {
            let (mut matrices, mut end) = (Vec::with_capacity(3), 0_usize);
            for matrix in &shape.matrices {
                let start = end.checked_next_multiple_of(LINE)?;
                end = start.checked_add(matrix.format.packed_bytes(matrix.n, matrix.k)?)?;
                matrices.push(start..end);
            }
            let experts = shape.experts;
            let stride = end.checked_next_multiple_of(PAGE)?;
            layers.push(Layer { shape, first, start: 0, stride, bytes: end, matrices });
            first += experts;
            pieces = pieces.checked_add(experts.checked_mul(end.div_ceil(PIECE))?)?;
        }
        let fields = MAGIC.len() + 8 + text.len() + 8;
        let header = pieces.checked_mul(8)?.checked_add(fields)?.checked_next_multiple_of(PAGE)?;
        let mut length = header;
        for layer in &mut layers {
            layer.start = length;
            length = length.checked_add(layer.stride.checked_mul(layer.shape.experts)?)?;
        }
        isize::try_from(length).ok()?;
        Some(Layout { text, layers, header, length })
    }

    /// Bytes of the file.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Bytes before the first expert.
    pub(super) fn header_length(&self) -> usize {
        self.header
    }

    /// Each expert's bytes, layer by layer.
    pub(super) fn experts(&self) -> impl Iterator<Item = Range<usize>> {
        self.layers.iter().flat_map(|layer| {
            (0..layer.shape.experts).map(|expert| {
                let start = layer.start + expert * layer.stride;
                start..start + layer.bytes
            })
        })
    }

    /// Bytes of all experts.
    pub(crate) fn expert_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| (layer.bytes * layer.shape.experts) as u64).sum()
    }

    /// The bytes that the experts of one token take, in the layer where they take the most, and that layer.
    pub(crate) fn largest_token(&self) -> (usize, usize) {
        let bytes = |layer: &Layer| (layer.bytes * layer.shape.top_k, layer.shape.layer);
        self.layers.iter().map(bytes).max().unwrap_or_default()
    }

    /// The number of the first expert of block `layer`, and the bytes of each.
    pub(crate) fn layer(&self, layer: usize) -> Option<(usize, usize)> {
        let found = self.layers.iter().find(|found| found.shape.layer == layer)?;
        Some((found.first, found.bytes))
    }

    /// The matrices of `expert` of block `layer`, and their bytes in the file.
    pub(crate) fn matrices(&self, layer: usize, expert: usize) -> impl Iterator<Item = (MatrixShape, Range<usize>)> {
        self.layers.iter().filter(move |found| found.shape.layer == layer).flat_map(move |found| {
            let start = found.start + expert * found.stride;
            let ranges = found.matrices.iter().map(move |range| start + range.start..start + range.end);
            found.shape.matrices.iter().copied().zip(ranges)
        })
    }

    /// The header of a store whose pieces have these checksums.
    pub(super) fn write(&self, sums: &[u64]) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.header);
        out.extend(MAGIC);
        out.extend((self.text.len() as u64).to_le_bytes());
        out.extend(self.text.as_bytes());
        out.extend(sums.iter().flat_map(|sum| sum.to_le_bytes()));
        out.extend(checksum(&out).to_le_bytes());
        out.resize(self.header, 0);
        out
    }

    /// The checksums of the store that begins with `header`; nothing unless it is one of this layout, undamaged.
    pub(super) fn read(&self, header: &[u8]) -> Option<Vec<u64>> {
        let pieces: usize = self.experts().map(|range| range.len().div_ceil(PIECE)).sum();
        let start = MAGIC.len() + 8 + self.text.len();
        let sums = header.get(start..start + 8 * pieces)?;
        let sums: Vec<u64> = sums.as_chunks().0.iter().map(|sum| u64::from_le_bytes(*sum)).collect();
        (header == self.write(&sums)).then_some(sums)
    }
}

/// The pieces of an expert that lies at `range`.
pub(super) fn pieces(range: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let (start, end) = (range.start, range.end);
    (start..end).step_by(PIECE).map(move |piece| piece..(piece + PIECE).min(end))
}
