//! What a model will need, from its headers alone: the same formats and precisions that loading would choose.

use super::config::Config;
use super::feed_forward::FeedForwardSpec;
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
    /// Precision of keys and values.
    kv: Kv,
    weights: Weights,
}

/// Reads the headers of `checkpoint` and the scales of ternary tensors; no other weight is touched.
pub fn plan(checkpoint: &Checkpoint, weights: Weights, activations: Activations, kv: Kv) -> Result<Plan, Error> {
    let config = describe(checkpoint)?;
    let convention = Convention::of(checkpoint);
    let report = |layer: Option<usize>, spec: MatrixSpec| {
        let (shape, MatrixSpec { role, rows, columns, stored, .. }) = (spec.stored_shape(), spec);
        let name = config.names.tensor(convention, stored, layer.unwrap_or(0)) + ".weight";
        let tensor = checkpoint.require(&name, &shape)?;
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
        })
    };
    let mut matrices = vec![report(None, config.embedding())?];
    for (layer, block) in config.blocks.iter().enumerate() {
        for spec in block.matrices(config.hidden) {
            matrices.push(report(Some(layer), spec)?);
        }
        if let FeedForwardSpec::Sparse(spec) = &block.feed_forward {
            matrices.extend(experts(checkpoint, &config, convention, layer, spec, weights, activations)?);
        }
    }
    if let Some(head) = config.head() {
        matrices.push(report(None, head)?);
    }
    Ok(Plan { config, matrices, file_bytes: checkpoint.file_bytes(), kv, weights })
}

/// One report for each kind of matrix of the experts in block `layer`.
fn experts(
    checkpoint: &Checkpoint,
    config: &Config,
    convention: Convention,
    layer: usize,
    spec: &SparseSpec,
    weights: Weights,
    wish: Activations,
) -> Result<Vec<MatrixReport>, Error> {
    let (experts, joined) = (spec.router.experts, spec.joined);
    let search = Search { checkpoint, convention, names: &config.names, layer, experts, joined };
    let sources = spec.sources(search, config.hidden)?;
    let report = |(kind, source): (Kind, &Source<'_>)| {
        let format = source.format(|rows| packed_format(weights, wish, rows))?;
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
        })
    };
    spec.kinds(config.hidden).into_iter().zip(&sources).map(report).collect()
}

impl Plan {
    /// Bytes of packed weights that stay in memory.
    pub fn resident_bytes(&self) -> u64 {
        self.matrices.iter().map(|matrix| matrix.bytes as u64).sum()
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
