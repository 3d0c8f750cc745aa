//! Tensors of a checkpoint, checked against the description and packed straight into panels.

use super::config::{BlockSpec, Config};
use super::feed_forward::FeedForward;
use super::mixer::Mixer;
use super::names::{Convention, Norm, Part, Role};
use super::precision::precision;
use crate::engine::{Activations, Weights};
use crate::error::Error;
use crate::load::{Checkpoint, FormatError, TensorView};
use farthing_kernels::format::{Bits, FloatType, Format, Offset, PackError, PackedMatrix};
use std::sync::atomic::{AtomicU64, Ordering};

/// Group of the formats that `weights="int8"` and `"int4"` make.
const GROUP: usize = 32;

/// Takes tensors out of a checkpoint, in the wished precision.
pub(super) struct Loader<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) config: &'a Config,
    pub(super) convention: Convention,
    /// Whether rows of queries and keys interleave the two halves of a rotated pair (GGUF files of Llama).
    pub(super) interleaved: bool,
    pub(super) weights: Weights,
    pub(super) activations: Activations,
    pub(super) done: &'a AtomicU64,
    pub(super) progress: &'a (dyn Fn(u64) + Sync),
}

/// One block's tensors, in the order of use.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) mixer_norm: Vec<f32>,
    pub(super) mixer: Mixer,
    /// Behind the mixer (sandwich).
    pub(super) after_mixer: Option<Vec<f32>>,
    pub(super) feed_forward_norm: Vec<f32>,
    pub(super) feed_forward: FeedForward,
    /// Behind the feed-forward part (sandwich).
    pub(super) after_feed_forward: Option<Vec<f32>>,
}

/// A matrix and perhaps a bias.
#[derive(Debug)]
pub(super) struct Linear {
    pub(super) matrix: PackedMatrix,
    pub(super) bias: Option<Vec<f32>>,
}

/// One matrix: its use, its shape, and where the file has its rows.
#[derive(Clone, Debug)]
pub(super) struct MatrixSpec {
    pub(super) role: Role,
    /// Outputs.
    pub(super) rows: usize,
    /// Inputs.
    pub(super) columns: usize,
    /// The tensor that holds it.
    pub(super) stored: Part,
    bias: bool,
    /// Heads whose rotated halves some files interleave.
    rotated: Option<usize>,
    /// Rows of the tensor, and those among them that are ours, when it holds other matrices too.
    part: Option<(usize, Vec<Section>)>,
}

/// Rows that a tensor holds in runs of `width`, the first of them `offset`, their beginnings `period` apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Section {
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) offset: usize,
    pub(super) period: usize,
}

impl MatrixSpec {
    /// The matrix `(rows, columns)` that is stored under its role's own name.
    pub(super) fn new(role: Role, rows: usize, columns: usize) -> MatrixSpec {
        MatrixSpec { role, rows, columns, stored: Part::Matrix(role), bias: false, rotated: None, part: None }
    }

    /// Whether a bias belongs to it.
    pub(super) fn biased(self, bias: bool) -> MatrixSpec {
        MatrixSpec { bias, ..self }
    }

    /// The rows in `sections`, one after the other, of a tensor of `rows` rows.
    pub(super) fn part_of(self, rows: usize, sections: Vec<Section>) -> MatrixSpec {
        MatrixSpec { part: Some((rows, sections)), ..self }
    }

    /// Rows of the tensor that holds it.
    pub(super) fn stored_rows(&self) -> usize {
        self.part.as_ref().map_or(self.rows, |(rows, _)| *rows)
    }

    /// The rows of `heads` heads, which a rotary embedding turns.
    pub(super) fn rotated(self, heads: usize) -> MatrixSpec {
        MatrixSpec { rotated: Some(heads), ..self }
    }
}

impl Config {
    /// The token table: used as the head where there is no other.
    pub(super) fn embedding(&self) -> MatrixSpec {
        let role = if self.tied { Role::Head } else { Role::Embedding };
        MatrixSpec { stored: Part::Matrix(Role::Embedding), ..MatrixSpec::new(role, self.vocab, self.hidden) }
    }

    /// The head, unless the embedding is.
    pub(super) fn head(&self) -> Option<MatrixSpec> {
        (!self.tied).then(|| MatrixSpec::new(Role::Head, self.vocab, self.hidden))
    }
}

impl BlockSpec {
    /// Every matrix, in the order of use.
    pub(super) fn matrices(&self, hidden: usize) -> impl Iterator<Item = MatrixSpec> {
        self.mixer.matrices(hidden).into_iter().chain(self.feed_forward.matrices(hidden))
    }
}

impl Block {
    /// The matrices with their roles, in the order of use.
    pub(super) fn linears(&self) -> impl Iterator<Item = (Role, &Linear)> {
        self.mixer.linears().into_iter().chain(self.feed_forward.linears())
    }
}

impl Loader<'_> {
    /// `rows` rows of a tensor are packed, and its bytes may leave memory.
    fn finished(&self, tensor: &TensorView<'_>, rows: usize) {
        tensor.release();
        let bytes = (tensor.nbytes() / tensor.rows().max(1) * rows) as u64;
        (self.progress)(self.done.fetch_add(bytes, Ordering::Relaxed) + bytes);
    }

    /// A vector of `length` floats.
    pub(super) fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, Error> {
        let tensor = self.checkpoint.require(name, &[length])?;
        let mut out = vec![0.0; length];
        tensor.row(0, &mut out)?;
        self.checked(&tensor, out)
    }

    /// The values of a whole tensor, if they are finite.
    fn checked(&self, tensor: &TensorView<'_>, values: Vec<f32>) -> Result<Vec<f32>, Error> {
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(FormatError::NonFinite { tensor: tensor.name().to_owned(), index }.into());
        }
        self.finished(tensor, tensor.rows());
        Ok(values)
    }

    /// The weights of `norm`, `(length,)`.
    pub(super) fn norm(&self, norm: Norm, layer: usize, length: usize) -> Result<Vec<f32>, Error> {
        let mut weight = self.vector(&(self.name(Part::Norm(norm), layer) + ".weight"), length)?;
        // GGUF files carry the offset in the weights already.
        if self.convention != Convention::Gguf && self.config.norm_offset != 0.0 {
            for weight in &mut weight {
                *weight += self.config.norm_offset;
            }
        }
        Ok(weight)
    }

    /// The bias of `part`, `(length,)`.
    pub(super) fn bias(&self, part: Part, layer: usize, length: usize) -> Result<Vec<f32>, Error> {
        self.vector(&(self.name(part, layer) + ".bias"), length)
    }

    /// A convolution's weights, `(channels, taps)`.
    pub(super) fn taps(&self, part: Part, layer: usize, channels: usize, taps: usize) -> Result<Vec<f32>, Error> {
        let name = self.name(part, layer) + ".weight";
        // PyTorch counts the inputs of a channel too, which is one.
        let shape: &[usize] =
            if self.convention == Convention::Gguf { &[channels, taps] } else { &[channels, 1, taps] };
        let tensor = self.checkpoint.require(&name, shape)?;
        let mut out = vec![0.0; channels * taps];
        for (row, out) in out.chunks_exact_mut(taps).enumerate() {
            tensor.row(row, out)?;
        }
        self.checked(&tensor, out)
    }

    /// What the checkpoint calls `part`, without the ending.
    pub(super) fn name(&self, part: Part, layer: usize) -> String {
        self.config.names.tensor(self.convention, part, layer)
    }

    /// Row of the file that holds row `row` of a matrix.
    fn source(&self, spec: &MatrixSpec, row: usize) -> usize {
        match (&spec.part, spec.rotated) {
            (Some((_, sections)), _) => stored_row(sections, row),
            (None, Some(heads)) if self.interleaved => deinterleave(row, spec.rows / heads),
            _ => row,
        }
    }

    /// The matrix that `spec` describes, packed for its use.
    pub(super) fn matrix(&self, spec: &MatrixSpec, layer: usize) -> Result<PackedMatrix, Error> {
        let (n, k) = (spec.rows, spec.columns);
        let name = self.name(spec.stored, layer) + ".weight";
        let tensor = self.checkpoint.require(&name, &[spec.stored_rows(), k])?;
        let source = |row: usize| self.source(spec, row);
        let format = packed_format(self.weights, self.activations, &tensor)?;
        let stored = self.weights == Weights::Auto;
        let precision = precision(spec.role, format, self.activations);
        let packed = match format {
            Format::Float(float) => PackedMatrix::pack_float(n, k, float, |row, out| tensor.row(source(row), out)),
            _ if stored => {
                PackedMatrix::pack_codes(n, k, format, precision, |row, out| tensor.codes(source(row), format, out))
            }
            _ => PackedMatrix::quantize(n, k, format, precision, |row, out| tensor.row(source(row), out)),
        };
        let packed = packed.map_err(|error| match error {
            PackError::Source(error) => Error::from(error),
            PackError::OutOfMemory(error) => Error::OutOfMemory(error),
            other => FormatError::Pack { tensor: name.clone(), reason: other.to_string() }.into(),
        })?;
        self.finished(&tensor, n);
        Ok(packed)
    }

    /// The matrix that `spec` describes, with its bias.
    pub(super) fn linear(&self, spec: &MatrixSpec, layer: usize) -> Result<Linear, Error> {
        let matrix = self.matrix(spec, layer)?;
        let bias = if spec.bias {
            let stored = self.bias(spec.stored, layer, spec.stored_rows())?;
            Some((0..spec.rows).map(|row| stored[self.source(spec, row)]).collect())
        } else {
            None
        };
        Ok(Linear { matrix, bias })
    }

    /// Block `layer`.
    pub(super) fn block(&self, layer: usize) -> Result<Block, Error> {
        let spec = &self.config.blocks[layer];
        let norm = |norm| self.norm(norm, layer, self.config.hidden);
        let after = |which| spec.sandwich.then(|| norm(which)).transpose();
        Ok(Block {
            mixer_norm: norm(Norm::Mixer)?,
            mixer: spec.mixer.load(self, layer)?,
            after_mixer: after(Norm::AfterMixer)?,
            feed_forward_norm: norm(Norm::FeedForward)?,
            feed_forward: spec.feed_forward.load(self, layer)?,
            after_feed_forward: after(Norm::AfterFeedForward)?,
        })
    }
}

/// The format that `tensor` is packed in.
pub(super) fn packed_format(
    wish: Weights,
    activations: Activations,
    tensor: &TensorView<'_>,
) -> Result<Format, FormatError> {
    let natural = tensor.natural_format()?;
    Ok(match wish {
        Weights::Auto if activations == Activations::F32 => tensor.exact_format()?,
        Weights::Auto => tensor.ternary_rows().unwrap_or(natural),
        Weights::F32 => Format::Float(FloatType::F32),
        Weights::Bf16 => Format::Float(FloatType::Bf16),
        Weights::Int8 => integer(Bits::Eight),
        Weights::Int4 => integer(Bits::Four),
    })
}

fn integer(bits: Bits) -> Format {
    Format::Integer { bits, group: GROUP, offset: Offset::Minimum, scale: FloatType::F16 }
}

/// Row of the file that holds row `row` of a head-wise half-split matrix: inside each head of `width` rows, the file
/// alternates the two halves.
fn deinterleave(row: usize, width: usize) -> usize {
    let (head, inside) = (row / width, row % width);
    let (half, pair) = (inside / (width / 2), inside % (width / 2));
    head * width + 2 * pair + half
}

/// Row of the file that holds row `row` of a matrix made of `sections`.
fn stored_row(sections: &[Section], row: usize) -> usize {
    let mut row = row;
    for section in sections {
        if row < section.rows {
            return row / section.width * section.period + section.offset + row % section.width;
        }
        row -= section.rows;
    }
    row
}

#[cfg(test)]
mod tests {
    use super::{Section, deinterleave, stored_row};

    #[test]
    fn sections_stand_one_after_the_other() {
        let sections =
            [Section { rows: 4, width: 2, offset: 0, period: 5 }, Section { rows: 6, width: 3, offset: 2, period: 5 }];
        let rows: Vec<usize> = (0..10).map(|row| stored_row(&sections, row)).collect();
        assert_eq!(rows, [0, 1, 5, 6, 2, 3, 4, 7, 8, 9]);
    }

    #[test]
    fn rotated_pairs_come_back_to_halves() {
        let rows: Vec<usize> = (0..8).map(|row| deinterleave(row, 4)).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
