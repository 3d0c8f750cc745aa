//! Microscaling 4-bit floats (OCP MX v1.0, MXFP4) as gpt-oss stores them in safetensors: two tensors of bytes.
//!
//! `NAME_blocks (experts, rows, columns / 32, 16)`: byte `j` of a block holds elements `2 j` (low half) and `2 j + 1`.
//! `NAME_scales (experts, rows, columns / 32)`: exponents of two, biased by 127.

use super::blocks::{Blocks, blocks};
use super::checkpoint::{Checkpoint, Rows, TensorView};
use super::error::FormatError;
use super::kind::TensorKind;
use farthing_kernels::format::{Format, RowCodes};

/// Elements that share a scale.
const BLOCK: usize = 32;

/// The rows of all experts, numbered through.
pub struct Mxfp4Rows<'a> {
    codes: TensorView<'a>,
    scales: TensorView<'a>,
    /// Blocks of a row.
    blocks: usize,
    as_gguf: Blocks,
}

impl<'a> Mxfp4Rows<'a> {
    /// The tensors that `name` begins, of `outer` = (experts, rows) rows of `columns`; nothing when there are none.
    pub fn find(
        checkpoint: &'a Checkpoint,
        name: &str,
        outer: &[usize; 2],
        columns: usize,
    ) -> Result<Option<Mxfp4Rows<'a>>, FormatError> {
        let (codes, scales) = (format!("{name}_blocks"), format!("{name}_scales"));
        if checkpoint.tensor(&codes).is_none() {
            return Ok(None);
        }
        let (blocks_in_row, [experts, rows]) = (columns / BLOCK, *outer);
        let codes = checkpoint.require(&codes, &[experts, rows, blocks_in_row, BLOCK / 2])?;
        let scales = checkpoint.require(&scales, &[experts, rows, blocks_in_row])?;
        for tensor in [&codes, &scales] {
            if tensor.kind().name() != "U8" {
                let (got, expected) = (tensor.kind().name(), "U8");
                return Err(FormatError::UnsupportedType { tensor: tensor.name().to_owned(), got, expected });
            }
        }
        Ok(blocks(TensorKind::Mxfp4).map(|as_gguf| Mxfp4Rows { codes, scales, blocks: blocks_in_row, as_gguf }))
    }

    /// The name of the blocks.
    pub fn name(&self) -> &'a str {
        self.codes.name()
    }

    /// Bytes in the file.
    pub fn nbytes(&self) -> usize {
        self.codes.nbytes() + self.scales.nbytes()
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.codes.shape()[0]
    }

    /// Row `i` as GGUF would have it: scale, then the low halves before the high ones.
    fn blocks_of(&self, i: usize) -> Vec<u8> {
        let scales = self.scales.row_bytes(i);
        let mut out = Vec::with_capacity(self.blocks * (1 + BLOCK / 2));
        for (block, &scale) in scales.iter().enumerate() {
            let (pairs, element) = (self.codes.row_bytes(i * self.blocks + block), |pairs: &[u8], i: usize| {
                if i.is_multiple_of(2) { pairs[i / 2] & 15 } else { pairs[i / 2] >> 4 }
            });
            out.push(scale);
            out.extend((0..BLOCK / 2).map(|i| element(pairs, i) | element(pairs, i + BLOCK / 2) << 4));
        }
        out
    }
}

impl Rows for Mxfp4Rows<'_> {
    fn columns(&self) -> usize {
        self.blocks * BLOCK
    }

    fn natural_format(&self) -> Result<Format, FormatError> {
        Ok(self.as_gguf.format())
    }

    fn exact_format(&self) -> Result<Format, FormatError> {
        Ok(self.as_gguf.exact_format())
    }

    fn row(&self, i: usize, out: &mut [f32]) -> Result<(), FormatError> {
        self.as_gguf.dequantize(&self.blocks_of(i), out);
        Ok(())
    }

    fn codes(&self, i: usize, format: Format, out: &mut RowCodes) -> Result<(), FormatError> {
        self.as_gguf.codes(&self.blocks_of(i), format, out);
        Ok(())
    }
}
