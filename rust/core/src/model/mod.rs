//! Models: a description read from the checkpoint, packed weights, and the forward pass over a step's rows.

pub mod config;
pub mod feed_forward;
pub mod mixer;
pub mod plan;
pub mod precision;
pub mod rope;

mod deepseek;
mod explain;
mod forward;
mod gemma;
mod gguf_config;
mod gpt_oss;
mod granite;
mod lfm2;
mod llama;
mod mixtral;
mod names;
mod olmoe;
mod parameters;
mod part;
mod qwen;
mod qwen_hybrid;
mod qwen_moe;
mod weights;

pub use explain::MatrixReport;
pub use forward::{Batch, Head, Row, Scratch};
pub use names::{Names, Role};
pub use parameters::Parameters;
pub use part::{Part, PartRows, rms_norms};
pub(crate) use weights::packed_format;

use crate::engine::{Activations, Weights};
use crate::error::Error;
use crate::ledger::ExpertCounts;
use crate::load::{Checkpoint, FormatError, Metadata, Rows};
use config::Config;
use farthing_kernels::format::{Bits, PackError, PackedMatrix};
use farthing_kernels::rope::RopeTable;
use feed_forward::levers::{ExpertLevers, ExpertStore, Selection};
use feed_forward::sparse::Sparse;
pub(crate) use names::Convention;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use weights::{Block, Loader, MatrixSpec};

/// Families whose GGUF files have the two halves of rotated pairs side by side.
const INTERLEAVED: [&str; 6] = ["llama", "mistral", "smollm3", "mixtral", "granite", "granitemoe"];

/// A loaded model: everything the forward pass reads, nothing it writes.
#[derive(Debug)]
pub struct Model {
    config: Config,
    embedding: PackedMatrix,
    /// `None` when the embedding is the head.
    head: Option<PackedMatrix>,
    blocks: Vec<Block>,
    final_norm: Vec<f32>,
    ropes: Vec<RopeTable>,
    /// Where experts are that do not stay in memory.
    store: Option<Box<dyn ExpertStore>>,
    /// Who chooses experts in place of the routers.
    selection: Option<Arc<dyn Selection>>,
}

/// Reads a checkpoint's description without touching its weights.
pub fn describe(checkpoint: &Checkpoint) -> Result<Config, Error> {
    let mut config = match &checkpoint.metadata {
        Metadata::HuggingFace(files) => config::read(files.config.as_object().unwrap_or(&serde_json::Map::new()))?,
        Metadata::Gguf(gguf) => config::read(&gguf_config::translate(gguf, checkpoint)?)?,
    };
    // Llama 3 files carry their rotary scaling as one factor per frequency.
    if let (Metadata::Gguf(_), Some(tensor)) = (&checkpoint.metadata, checkpoint.tensor("rope_freqs.weight")) {
        let pairs = config.ropes.first().map_or(0, |rope| rope.inverse_frequencies.len());
        let mut factors = vec![0.0; pairs];
        checkpoint.require(tensor.name(), &[pairs])?.row(0, &mut factors)?;
        if let Some(index) = factors.iter().position(|factor| !factor.is_finite() || *factor == 0.0) {
            return Err(FormatError::NonFinite { tensor: tensor.name().to_owned(), index }.into());
        }
        config.ropes[0].divide(&factors);
    }
    Ok(config)
}

/// The head's rows of `tokens`, in this order, as the file stores them: `(tokens, hidden)`, row-major.
pub fn head_weights(checkpoint: &Checkpoint, tokens: &[u32]) -> Result<Vec<f32>, Error> {
    let config = describe(checkpoint)?;
    let spec = config.head().unwrap_or_else(|| config.embedding());
    token_rows(checkpoint, &config, &spec, tokens, config.logit_scale)
}

/// The rows that `tokens` enter the first block as, `(tokens, hidden)`, row-major.
pub fn embedding_weights(checkpoint: &Checkpoint, tokens: &[u32]) -> Result<Vec<f32>, Error> {
    let config = describe(checkpoint)?;
    token_rows(checkpoint, &config, &config.embedding(), tokens, config.embedding_scale)
}

fn token_rows(
    checkpoint: &Checkpoint,
    config: &Config,
    spec: &MatrixSpec,
    tokens: &[u32],
    scale: f32,
) -> Result<Vec<f32>, Error> {
    let name = config.names.tensor(Convention::of(checkpoint), spec.stored, 0) + ".weight";
    let tensor = checkpoint.require(&name, &[spec.rows, spec.columns])?;
    let mut rows = vec![0.0; tokens.len() * spec.columns];
    for (&token, row) in tokens.iter().zip(rows.chunks_exact_mut(spec.columns)) {
        if token as usize >= spec.rows {
            return Err(Error::argument("token id", token, format!("below {}", spec.rows)));
        }
        tensor.row(token as usize, row)?;
        for value in row {
            *value *= scale;
        }
    }
    Ok(rows)
}

impl Model {
    /// Loads every tensor; `progress` hears the bytes of the file that are packed so far, and `levers` are asked what is
    /// done with experts.
    pub fn load(
        checkpoint: &Checkpoint,
        weights: Weights,
        activations: Activations,
        levers: Option<&dyn ExpertLevers>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Model, Error> {
        let config = describe(checkpoint)?;
        let convention = Convention::of(checkpoint);
        let interleaved = convention == Convention::Gguf && INTERLEAVED.contains(&config.family.as_str());
        let done = AtomicU64::new(0);
        let mut loader = Loader {
            checkpoint,
            config: &config,
            convention,
            interleaved,
            weights,
            activations,
            store: None,
            selection: levers.and_then(ExpertLevers::selection),
            done: &done,
            progress,
        };
        let store = levers.map(|levers| levers.store(&loader)).transpose()?.flatten();
        loader.store = store.as_deref();
        let embedding = loader.matrix(&config.embedding(), 0)?;
        let head = config.head().map(|head| loader.matrix(&head, 0)).transpose()?;
        let blocks = (0..config.blocks.len()).map(|layer| loader.block(layer)).collect::<Result<_, _>>()?;
        let final_norm = loader.norm(names::Norm::Final, 0, config.hidden)?;
        let ropes =
            config.ropes.iter().map(|rope| RopeTable::new(rope.inverse_frequencies.clone(), rope.scale)).collect();
        let selection = loader.selection.take();
        Ok(Model { config, embedding, head, blocks, final_norm, ropes, store, selection })
    }

    /// The description.
    pub fn config(&self) -> &Config {
        &self.config
    }

    fn head(&self) -> &PackedMatrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Leaves of the head the rows of `tokens` alone, in 4 bits: logits are theirs from now on, in this order.
    pub fn trim_head(&mut self, tokens: &[u32]) -> Result<(), Error> {
        self.head = Some(self.head_rows(tokens)?);
        Ok(())
    }

    /// The head's rows of `tokens`, in this order, in 4 bits.
    pub fn head_rows(&self, tokens: &[u32]) -> Result<PackedMatrix, Error> {
        let format = weights::integer(Bits::Four);
        let fits = farthing_kernels::format::Precision::A8;
        let head = self.head();
        let packed = PackedMatrix::quantize(tokens.len(), head.columns(), format, fits, |row, out| {
            head.row(tokens[row] as usize, out);
            Ok::<_, std::convert::Infallible>(())
        });
        packed.map_err(|error| match error {
            PackError::OutOfMemory(error) => Error::OutOfMemory(error),
            other => Error::unsupported(format!("a head in 4 bits: {other}"), "the whole head drafts"),
        })
    }

    /// Bytes of the blocks' matrices that every pass reads: all but those of experts.
    pub fn block_bytes(&self) -> u64 {
        let matrices = self.blocks.iter().flat_map(Block::matrices).map(|(_, matrix)| matrix.nbytes() as u64);
        let routers = self.mixtures().map(|mixture| mixture.router().nbytes() as u64);
        matrices.chain(routers).sum()
    }

    fn mixtures(&self) -> impl Iterator<Item = &Sparse> {
        self.blocks.iter().filter_map(|block| block.feed_forward.sparse())
    }

    /// Bytes of all experts.
    pub fn expert_bytes(&self) -> u64 {
        self.mixtures().map(|mixture| mixture.experts().nbytes() as u64).sum()
    }

    /// Bytes of the head: what a pass reads that computes logits.
    pub fn head_bytes(&self) -> u64 {
        self.head().nbytes() as u64
    }

    /// What was done with experts so far; nothing where all stay and routers choose.
    pub fn stream_statistics(&self) -> ExpertCounts {
        let moved = self.store.as_ref().map(|store| store.counts()).unwrap_or_default();
        let ExpertCounts { choices, skipped, substituted, .. } =
            self.selection.as_ref().map(|selection| selection.counts()).unwrap_or_default();
        ExpertCounts { choices, skipped, substituted, ..moved }
    }

    /// Bytes of matrices in memory, at most.
    pub fn resident_bytes(&self) -> u64 {
        let matrices = self.explain();
        let staying: u64 = matrices.iter().filter(|matrix| !matrix.on_disk).map(|matrix| matrix.bytes as u64).sum();
        staying + self.store.as_ref().map_or(0, |store| store.resident_bytes())
    }
}
