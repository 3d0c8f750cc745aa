//! What a model will need, from its headers alone: the same formats and precisions that loading would choose.

use super::config::Config;
use super::names::{Convention, Role};
use super::precision::precision;
use super::weights::{MatrixSpec, packed_format};
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
        let stored_rows = spec.stored_rows();
        let MatrixSpec { role, rows, columns, stored, .. } = spec;
        let name = config.names.tensor(convention, stored, layer.unwrap_or(0)) + ".weight";
        let tensor = checkpoint.require(&name, &[stored_rows, columns])?;
        let format = packed_format(weights, activations, &tensor)?;
        let bytes = format.packed_bytes(rows, columns).ok_or_else(|| {
            let reason = format!("{rows} rows of {columns} are more bytes than can be addressed");
            FormatError::Pack { tensor: name, reason }
        })?;
        let activations = precision(role, format, activations).name();
        let kernel = Isa::active().name();
        Ok::<_, Error>(MatrixReport {
            layer,
            role,
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
    }
    if let Some(head) = config.head() {
        matrices.push(report(None, head)?);
    }
    Ok(Plan { config, matrices, file_bytes: checkpoint.file_bytes(), kv, weights })
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
        self.multiplied().map(|matrix| matrix.bytes as u64).sum()
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
        in_blocks.map(|matrix| 2 * matrix.rows as u64 * matrix.columns as u64).sum()
    }
}
