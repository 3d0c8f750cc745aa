//! Tensors of a checkpoint, checked against the description and packed straight into panels.

use super::config::{BlockSpec, Config};
use super::feed_forward::FeedForward;
use super::feed_forward::levers::{ExpertStore, Selection};
use super::feed_forward::sources::Search;
use super::feed_forward::sparse::SparseSpec;
use super::mixer::Mixer;
use super::names::{Convention, Norm, Part, Role};
use super::precision::precision;
use crate::engine::{Activations, Weights};
use crate::error::Error;
use crate::load::{Checkpoint, FormatError, Rows, TensorView};
use farthing_kernels::format::{Bits, FloatType, Format, Offset, PackError, PackedMatrix};
use std::sync::Arc;
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
    /// Where experts are that do not stay in memory.
    pub(super) store: Option<&'a dyn ExpertStore>,
    /// Who chooses experts in place of the routers.
    pub(super) selection: Option<Arc<dyn Selection>>,
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
    /// `(width, tail)`: of every `width` rows the last `tail` are pairs side by side.
    tail: Option<(usize, usize)>,
    /// Shape of the tensor of which this matrix is a part.
    pub(super) whole: Option<[usize; 2]>,
    /// The rows of that tensor which are ours, one after the other; all of them when there are none.
    sections: Vec<Section>,
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
        MatrixSpec {
            role,
            rows,
            columns,
            stored: Part::Matrix(role),
            bias: false,
            rotated: None,
            tail: None,
            whole: None,
            sections: Vec::new(),
        }
    }

    /// Stored as another part.
    pub(super) fn stored_as(self, stored: Part) -> MatrixSpec {
        MatrixSpec { stored, ..self }
    }

    /// A part of the tensor `stored`, whose shape is `whole`.
    pub(super) fn part_of(self, stored: Part, whole: [usize; 2]) -> MatrixSpec {
        MatrixSpec { stored, whole: Some(whole), ..self }
    }

    /// The rows in `sections`, one after the other, of its role's tensor, which has `rows` rows.
    pub(super) fn sections(self, rows: usize, sections: Vec<Section>) -> MatrixSpec {
        MatrixSpec { whole: Some([rows, self.columns]), sections, ..self }
    }

    /// Shape of the tensor that holds it.
    pub(super) fn stored_shape(&self) -> [usize; 2] {
        self.whole.unwrap_or([self.rows, self.columns])
    }

    /// The last `tail` of every `width` rows come as pairs side by side.
    pub(super) fn interleaved_tail(self, width: usize, tail: usize) -> MatrixSpec {
        MatrixSpec { tail: Some((width, tail)), ..self }
    }

    /// Whether a bias belongs to it.
    pub(super) fn biased(self, bias: bool) -> MatrixSpec {
        MatrixSpec { bias, ..self }
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
    pub(super) fn matrices(&self) -> impl Iterator<Item = (Role, &PackedMatrix)> {
        let linears = self.feed_forward.linears().into_iter().map(|(role, linear)| (role, &linear.matrix));
        self.mixer.matrices().into_iter().chain(linears)
    }
}

impl Loader<'_> {
    pub(super) fn finished(&self, tensor: &TensorView<'_>) {
        tensor.release();
        self.read(tensor.nbytes() as u64);
    }

    /// Tells of `bytes` of the file that are packed.
    pub(super) fn read(&self, bytes: u64) {
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
        self.finished(tensor);
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
        if !spec.sections.is_empty() {
            return stored_row(&spec.sections, row);
        }
        if let Some((width, tail)) = spec.tail {
            let (start, inside) = (row / width * width, row % width);
            let plain = width - tail;
            return if inside < plain { row } else { start + plain + deinterleave(inside - plain, tail) };
        }
        match spec.rotated {
            Some(heads) if self.interleaved => deinterleave(row, spec.rows / heads),
            _ => row,
        }
    }

    /// The matrix that `spec` describes, packed for its use.
    pub(super) fn matrix(&self, spec: &MatrixSpec, layer: usize) -> Result<PackedMatrix, Error> {
        let name = self.name(spec.stored, layer) + ".weight";
        let tensor = self.checkpoint.require_rows(&name, spec.stored_shape())?;
        let format = self.format(&tensor)?;
        let shape = (spec.rows, spec.columns);
        let packed = self.pack(&name, spec.role, shape, format, &tensor, |row| self.source(spec, row))?;
        tensor.release();
        self.read((tensor.nbytes() / tensor.rows().max(1) * spec.rows) as u64);
        Ok(packed)
    }

    /// A router's matrix: floats as stored, or what quantised ones stand for.
    pub(super) fn router(&self, spec: &MatrixSpec, layer: usize) -> Result<PackedMatrix, Error> {
        let name = self.name(spec.stored, layer) + ".weight";
        let tensor = self.checkpoint.require(&name, &[spec.rows, spec.columns])?;
        let format = router_format(&tensor)?;
        let packed = self.pack(&name, spec.role, (spec.rows, spec.columns), format, &tensor, |row| row)?;
        self.finished(&tensor);
        Ok(packed)
    }

    /// Whether weights are kept as they are stored.
    pub(super) fn stored(&self) -> bool {
        self.weights == Weights::Auto
    }

    /// The format that rows of a file are packed in.
    pub(super) fn format(&self, rows: &dyn Rows) -> Result<Format, FormatError> {
        packed_format(self.weights, self.activations, rows)
    }

    /// The matrix `(n, k)` whose row `i` is row `source(i)` of `rows`.
    pub(super) fn pack(
        &self,
        name: &str,
        role: Role,
        (n, k): (usize, usize),
        format: Format,
        rows: &dyn Rows,
        source: impl Fn(usize) -> usize + Sync,
    ) -> Result<PackedMatrix, Error> {
        let stored = self.stored();
        let precision = precision(role, format, self.activations);
        let packed = match format {
            Format::Float(float) => PackedMatrix::pack_float(n, k, float, |row, out| rows.row(source(row), out)),
            _ if stored => {
                PackedMatrix::pack_codes(n, k, format, precision, |row, out| rows.codes(source(row), format, out))
            }
            _ => PackedMatrix::quantize(n, k, format, precision, |row, out| rows.row(source(row), out)),
        };
        packed.map_err(|error| match error {
            PackError::Source(error) => Error::from(error),
            PackError::OutOfMemory(error) => Error::OutOfMemory(error),
            other => FormatError::Pack { tensor: name.to_owned(), reason: other.to_string() }.into(),
        })
    }

    /// What the experts of block `layer` are looked for with.
    pub(super) fn search(&self, layer: usize, spec: &SparseSpec) -> Search<'_> {
        Search {
            checkpoint: self.checkpoint,
            convention: self.convention,
            names: &self.config.names,
            layer,
            experts: spec.router.experts,
            joined: spec.joined,
        }
    }

    /// The matrix that `spec` describes, with its bias.
    pub(super) fn linear(&self, spec: &MatrixSpec, layer: usize) -> Result<Linear, Error> {
        let matrix = self.matrix(spec, layer)?;
        let bias = if spec.bias {
            let stored = self.bias(spec.stored, layer, spec.stored_shape()[0])?;
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

/// The format that `rows` are packed in.
pub(crate) fn packed_format(wish: Weights, activations: Activations, rows: &dyn Rows) -> Result<Format, FormatError> {
    let natural = rows.natural_format()?;
    Ok(match wish {
        Weights::Auto if activations == Activations::F32 => rows.exact_format()?,
        Weights::Auto => rows.ternary_rows().unwrap_or(natural),
        Weights::F32 => Format::Float(FloatType::F32),
        Weights::Bf16 => Format::Float(FloatType::Bf16),
        Weights::Int8 => integer(Bits::Eight),
        Weights::Int4 => integer(Bits::Four),
    })
}

/// The format of a router that is stored as `rows`: never quantised.
pub(super) fn router_format(rows: &dyn Rows) -> Result<Format, FormatError> {
    let natural = rows.natural_format()?;
    Ok(if matches!(natural, Format::Float(_)) { natural } else { Format::Float(FloatType::F32) })
}

pub(super) fn integer(bits: Bits) -> Format {
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
