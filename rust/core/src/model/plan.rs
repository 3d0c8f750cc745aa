//! What a model will need, from its headers alone: the same formats and precisions that loading would choose.

use super::config::Config;
use super::feed_forward::FeedForwardSpec;
use super::feed_forward::levers::{ExpertLevers, LayerShape};
use super::feed_forward::sources::{Search, Source};
use super::feed_forward::sparse::{Kind, SparseSpec};
use super::names::{Convention, Role};
use super::precision::precision;
use super::weights::{MatrixSpec, packed_format, router_format};
use super::{MatrixReport, describe};
use crate::engine::cache::Cache;
use crate::engine::{Activations, Kv, Weights};
use crate::error::Error;
use crate::load::{Checkpoint, FormatError};
use farthing_kernels::attention::PAGE;
use farthing_kernels::format::Format;
use farthing_kernels::isa::Isa;

/// What a model will need once loaded.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The model's description.
    pub config: Config,
    /// Every matrix as it would be packed.
    pub matrices: Vec<MatrixReport>,
    /// Bytes of the files.
    pub file_bytes: u64,
    /// Bytes of experts in memory where the others are on disk.
    expert_memory: Option<u64>,
    /// Precision of keys and values.
    kv: Kv,
    weights: Weights,
}

/// Reads the headers of `checkpoint` and the scales of ternary tensors; no other weight is touched. `levers` are asked
/// what will be done with experts.
pub fn plan(
    checkpoint: &Checkpoint,
    weights: Weights,
    activations: Activations,
    kv: Kv,
    levers: &dyn ExpertLevers,
) -> Result<Plan, Error> {
    let config = describe(checkpoint)?;
    let convention = Convention::of(checkpoint);
    let report = |layer: Option<usize>, spec: MatrixSpec| {
        let (shape, MatrixSpec { role, rows, columns, stored, .. }) = (spec.stored_shape(), spec);
        let name = config.names.tensor(convention, stored, layer.unwrap_or(0)) + ".weight";
        let tensor = checkpoint.require_rows(&name, shape)?;
        let format =
            if role == Role::Router { router_format(&tensor)? } else { packed_format(weights, activations, &tensor)? };
        let bytes = format.packed_bytes(rows, columns).ok_or_else(|| {
            let reason = format!("{rows} rows of {columns} are more bytes than can be addressed");
            FormatError::Pack { tensor: name, reason }
        })?;
        let activations = precision(role, format, activations).name();
        let kernel = Isa::active().name();
        Ok::<_, Error>(MatrixReport {
            layer,
            role,
            count: 1,
            used: 1,
            rows,
            columns,
            format: format.to_string(),
            activations,
            kernel,
            bytes,
            on_disk: false,
        })
    };
    let mut layers = Vec::new();
    let mut matrices = vec![report(None, config.embedding())?];
    for (layer, block) in config.blocks.iter().enumerate() {
        for spec in block.matrices(config.hidden) {
            matrices.push(report(Some(layer), spec)?);
        }
        if let FeedForwardSpec::Sparse(spec) = &block.feed_forward {
            let (shape, reports) = experts(checkpoint, &config, convention, layer, spec, weights, activations)?;
            layers.push(shape);
            matrices.extend(reports);
        }
    }
    if let Some(head) = config.head() {
        matrices.push(report(None, head)?);
    }
    let expert_memory = levers.resident_bytes(layers)?;
    for matrix in &mut matrices {
        matrix.on_disk = expert_memory.is_some() && matrix.role.of_routed_experts();
    }
    Ok(Plan { config, matrices, file_bytes: checkpoint.file_bytes(), expert_memory, kv, weights })
}

/// The experts of block `layer`, and one report for each kind of their matrices.
fn experts(
    checkpoint: &Checkpoint,
    config: &Config,
    convention: Convention,
    layer: usize,
    spec: &SparseSpec,
    weights: Weights,
    wish: Activations,
) -> Result<(LayerShape, Vec<MatrixReport>), Error> {
    let (experts, joined) = (spec.router.experts, spec.joined);
    let search = Search { checkpoint, convention, names: &config.names, layer, experts, joined };
    let sources = spec.sources(search, config.hidden)?;
    let format = |source: &Source<'_>| source.format(|rows| packed_format(weights, wish, rows));
    let formats = sources.iter().map(format).collect::<Result<Vec<_>, _>>()?;
    let report = |(kind, &format): (Kind, &Format)| {
        let Kind { role, rows, columns, count, used } = kind;
        let each = format.packed_bytes(rows, columns).and_then(|bytes| bytes.checked_mul(count)).ok_or_else(|| {
            let reason = format!("{count} times {rows} rows of {columns} are more bytes than can be addressed");
            FormatError::Pack { tensor: format!("{} of block {layer}", role.name()), reason }
        })?;
        Ok(MatrixReport {
            layer: Some(layer),
            role,
            count,
            used,
            rows,
            columns,
            format: format.to_string(),
            activations: precision(role, format, wish).name(),
            kernel: Isa::active().name(),
            bytes: each,
            on_disk: false,
        })
    };
    let reports = spec.kinds(config.hidden).into_iter().zip(&formats).map(report).collect::<Result<_, Error>>()?;
    Ok((spec.shape(layer, &sources, &formats, wish), reports))
}

/// The share of a token's experts that are found in a memory of a share `kept` of all, where a token chooses a share
/// `chosen` and the least recently used leave: those of the last tokens, as many as were kept whole. Layers take turns, so
/// of an older token nothing is left when its layer comes again.
fn found(chosen: f64, kept: f64) -> f64 {
    if kept >= 1.0 {
        return 1.0;
    }
    let (mut found, mut next) = (0.0, chosen);
    while next < kept {
        (found, next) = (next, 1.0 - (1.0 - next) * (1.0 - chosen));
    }
    found
}

impl Plan {
    /// Bytes of packed weights in memory, at most.
    pub fn resident_bytes(&self) -> u64 {
        let staying = self.matrices.iter().filter(|matrix| !matrix.on_disk);
        staying.map(|matrix| matrix.bytes as u64).sum::<u64>() + self.expert_memory.unwrap_or(0)
    }

    /// Bytes of packed experts on disk; those in memory are copies.
    pub fn disk_bytes(&self) -> u64 {
        self.matrices.iter().filter(|matrix| matrix.on_disk).map(|matrix| matrix.bytes as u64).sum()
    }

    /// Bytes of experts that one decoded token, alone in its pass, has fetched from disk, where tokens are sent to all
    /// experts alike.
    pub fn disk_bytes_per_token(&self) -> u64 {
        let kept = self.expert_memory.unwrap_or(0) as f64 / self.disk_bytes().max(1) as f64;
        let absent = |matrix: &MatrixReport| {
            let read = (matrix.bytes / matrix.count * matrix.used) as f64;
            (read * (1.0 - found(matrix.used as f64 / matrix.count as f64, kept))) as u64
        };
        self.matrices.iter().filter(|matrix| matrix.on_disk).map(absent).sum()
    }

    /// The matrices that a pass with logits multiplies: all but an embedding that is not also the head.
    fn multiplied(&self) -> impl Iterator<Item = &MatrixReport> {
        self.matrices.iter().filter(|matrix| matrix.role != Role::Embedding)
    }

    /// Bytes of weights that one decoded token reads when it is alone in its pass.
    pub fn bytes_per_token(&self) -> u64 {
        self.multiplied().map(|matrix| (matrix.bytes / matrix.count * matrix.used) as u64).sum()
    }

    /// Bytes of keys and values that one token of context takes, in all layers.
    pub fn kv_bytes_per_token(&self) -> u64 {
        Cache::page_bytes(&self.config, self.kv.resolve(self.weights)) / PAGE as u64
    }

    /// Bytes of the states that a sequence keeps, however long it is.
    pub fn state_bytes_per_sequence(&self) -> u64 {
        Cache::state_bytes(&self.config)
    }

    /// Multiplications and additions of the blocks' matrices for one prompt token (the head sees the last one only).
    pub fn operations_per_token(&self) -> u64 {
        let in_blocks = self.matrices.iter().filter(|matrix| matrix.layer.is_some());
        in_blocks.map(|matrix| 2 * (matrix.used * matrix.rows) as u64 * matrix.columns as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::found;

    #[test]
    fn experts_of_whole_tokens_are_found() {
        assert_eq!((found(0.25, 0.2), found(0.25, 0.25), found(0.25, 1.0)), (0.0, 0.0, 1.0));
        assert_eq!((found(0.25, 0.26), found(0.5, 0.76)), (0.25, 0.75));
        assert!((found(0.0625, 0.5) - 0.5).abs() < 0.05, "many experts: about what is kept");
    }
}
