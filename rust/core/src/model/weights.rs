//! Tensors of a checkpoint, checked against the description and packed straight into panels.

use super::config::{BlockSpec, Config};
use super::names::{Convention, Norm, Role};
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
    pub(super) spec: BlockSpec,
    pub(super) attention_norm: Vec<f32>,
    pub(super) query: Linear,
    pub(super) key: Linear,
    pub(super) value: Linear,
    /// Over each head of queries and of keys.
    pub(super) head_norms: Option<(Vec<f32>, Vec<f32>)>,
    pub(super) output: Linear,
    /// Behind attention and behind the feed-forward network.
    pub(super) sandwich: Option<(Vec<f32>, Vec<f32>)>,
    pub(super) feed_forward_norm: Vec<f32>,
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
}

/// A matrix and perhaps a bias.
#[derive(Debug)]
pub(super) struct Linear {
    pub(super) matrix: PackedMatrix,
    pub(super) bias: Option<Vec<f32>>,
}

impl Block {
    /// The matrices with their roles.
    pub(super) fn linears(&self) -> [(Role, &Linear); 7] {
        [
            (Role::Query, &self.query),
            (Role::Key, &self.key),
            (Role::Value, &self.value),
            (Role::AttentionOutput, &self.output),
            (Role::Gate, &self.gate),
            (Role::Up, &self.up),
            (Role::Down, &self.down),
        ]
    }
}

impl Loader<'_> {
    fn finished(&self, tensor: &TensorView<'_>) {
        tensor.release();
        let bytes = tensor.nbytes() as u64;
        (self.progress)(self.done.fetch_add(bytes, Ordering::Relaxed) + bytes);
    }

    /// A vector of `length` floats.
    pub(super) fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, Error> {
        let tensor = self.checkpoint.require(name, &[length])?;
        let mut out = vec![0.0; length];
        tensor.row(0, &mut out)?;
        if let Some(index) = out.iter().position(|value| !value.is_finite()) {
            return Err(FormatError::NonFinite { tensor: name.to_owned(), index }.into());
        }
        self.finished(&tensor);
        Ok(out)
    }

    fn norm(
        &self,
        config: &Config,
        norm: Norm,
        layer: usize,
        length: usize,
        sandwich: bool,
    ) -> Result<Vec<f32>, Error> {
        let mut weight = self.vector(&norm.tensor(self.convention, layer, sandwich), length)?;
        // GGUF files carry the offset in the weights already.
        if self.convention == Convention::HuggingFace && config.norm_offset != 0.0 {
            for weight in &mut weight {
                *weight += config.norm_offset;
            }
        }
        Ok(weight)
    }

    pub(super) fn final_norm(&self, config: &Config) -> Result<Vec<f32>, Error> {
        self.norm(config, Norm::Final, 0, config.hidden, false)
    }

    /// The tensor of `stored`, `(n, k)`, packed for its use as `role`; with `heads`, rows of each head are put in
    /// half-split order.
    pub(super) fn matrix(
        &self,
        stored: Role,
        role: Role,
        layer: usize,
        n: usize,
        k: usize,
        heads: Option<usize>,
    ) -> Result<PackedMatrix, Error> {
        let name = stored.tensor(self.convention, layer) + ".weight";
        let tensor = self.checkpoint.require(&name, &[n, k])?;
        let source = |row: usize| heads.map_or(row, |heads| deinterleave(row, n / heads));
        let format = packed_format(self.weights, self.activations, &tensor)?;
        let stored = self.weights == Weights::Auto;
        let precision = precision(role, format, self.activations);
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
        self.finished(&tensor);
        Ok(packed)
    }

    fn linear(
        &self,
        role: Role,
        layer: usize,
        n: usize,
        k: usize,
        heads: Option<usize>,
        bias: bool,
    ) -> Result<Linear, Error> {
        let matrix = self.matrix(role, role, layer, n, k, heads)?;
        let bias = if bias {
            let stored = self.vector(&(role.tensor(self.convention, layer) + ".bias"), n)?;
            let source = |row: usize| heads.map_or(row, |heads| deinterleave(row, n / heads));
            Some((0..n).map(|row| stored[source(row)]).collect())
        } else {
            None
        };
        Ok(Linear { matrix, bias })
    }

    /// Block `layer`.
    pub(super) fn block(&self, config: &Config, layer: usize) -> Result<Block, Error> {
        let spec = config.blocks[layer].clone();
        let (hidden, inner) = (config.hidden, spec.intermediate);
        let (queries, keys) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let rotated = |heads: usize| self.interleaved.then_some(heads);
        let norm = |norm, length| self.norm(config, norm, layer, length, spec.sandwich);
        Ok(Block {
            attention_norm: norm(Norm::Attention, hidden)?,
            query: self.linear(Role::Query, layer, queries, hidden, rotated(spec.heads), spec.qkv_bias)?,
            key: self.linear(Role::Key, layer, keys, hidden, rotated(spec.kv_heads), spec.qkv_bias)?,
            value: self.linear(Role::Value, layer, keys, hidden, None, spec.qkv_bias)?,
            head_norms: spec
                .qk_norm
                .then(|| Ok::<_, Error>((norm(Norm::Query, spec.head_dim)?, norm(Norm::Key, spec.head_dim)?)))
                .transpose()?,
            output: self.linear(Role::AttentionOutput, layer, hidden, queries, None, spec.output_bias)?,
            sandwich: spec
                .sandwich
                .then(|| Ok::<_, Error>((norm(Norm::AfterAttention, hidden)?, norm(Norm::AfterFeedForward, hidden)?)))
                .transpose()?,
            feed_forward_norm: norm(Norm::FeedForward, hidden)?,
            gate: self.linear(Role::Gate, layer, inner, hidden, None, spec.mlp_bias)?,
            up: self.linear(Role::Up, layer, inner, hidden, None, spec.mlp_bias)?,
            down: self.linear(Role::Down, layer, hidden, inner, None, spec.mlp_bias)?,
            spec,
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

#[cfg(test)]
mod tests {
    use super::deinterleave;

    #[test]
    fn rotated_pairs_come_back_to_halves() {
        let rows: Vec<usize> = (0..8).map(|row| deinterleave(row, 4)).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
