//! A block by itself, with the norm behind it: drafters that have a block of their own run it beside the model's.

use super::config::Config;
use super::forward::{Batch, Pass, Stream};
use super::names::Convention;
use super::weights::{Block, Loader};
use super::{feed_forward, mixer};
use crate::engine::cache::Cache;
use crate::engine::{Activations, Weights};
use crate::error::Error;
use crate::load::Checkpoint;
use farthing_kernels::attention::Span;
use farthing_kernels::norm::rms_norm;
use farthing_kernels::pool::Pool;
use farthing_kernels::recurrent::Segment;
use farthing_kernels::rope::RopeTable;
use std::sync::atomic::AtomicU64;

/// The block, its norm, and the buffers of its passes.
pub struct Part {
    /// Of one block.
    config: Config,
    block: Block,
    norm: Vec<f32>,
    ropes: Vec<RopeTable>,
    stream: Stream,
    mixer: mixer::Buffers,
    feed_forward: feed_forward::Buffers,
}

/// Rows of one pass.
#[derive(Clone, Copy, Debug)]
pub struct PartRows<'a> {
    /// `(t, hidden)`: what the block adds to.
    pub stream: &'a [f32],
    /// `(t, inputs of the mixer)`: what the mixer reads, already normed; `None` is the norm of the stream.
    pub normed: Option<&'a [f32]>,
    /// `(t,)` rotary positions.
    pub positions: &'a [u32],
    /// Which rows belong to which sequence.
    pub spans: &'a [Span<'a>],
}

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Part({} bytes)", self.nbytes())
    }
}

impl Part {
    /// Block `layer` of `config`, named by `convention`, and the norm behind it, whose weights are the tensor `norm`.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        mut config: Config,
        convention: Convention,
        layer: usize,
        norm: &str,
        weights: Weights,
        activations: Activations,
    ) -> Result<Part, Error> {
        let done = AtomicU64::new(0);
        let loader = Loader {
            checkpoint,
            config: &config,
            convention,
            interleaved: false,
            weights,
            activations,
            store: None,
            selection: None,
            done: &done,
            progress: &|_| (),
        };
        let block = loader.block(layer)?;
        let mut norm = loader.vector(norm, config.hidden)?;
        for weight in &mut norm {
            *weight += config.norm_offset;
        }
        let ropes = config.ropes.iter().map(|rope| RopeTable::new(rope.inverse_frequencies.clone(), rope.scale));
        let ropes = ropes.collect();
        config.blocks = vec![config.blocks.swap_remove(layer)];
        Ok(Part {
            config,
            block,
            norm,
            ropes,
            stream: Stream::default(),
            mixer: mixer::Buffers::default(),
            feed_forward: feed_forward::Buffers::default(),
        })
    }

    /// What it is a part of, with one block.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Weights of the norm before the mixer.
    pub fn mixer_norm(&self) -> &[f32] {
        &self.block.mixer_norm
    }

    /// Bytes of the block's matrices, experts left out.
    pub fn nbytes(&self) -> usize {
        self.block.matrices().map(|(_, matrix)| matrix.nbytes()).sum()
    }

    /// Sends rows through the block; keys and values go into the one layer of `cache`. Returns the stream `(t, hidden)`.
    pub fn forward(&mut self, pool: &Pool, rows: PartRows<'_>, cache: &mut Cache) -> Result<&[f32], Error> {
        let last = rows.positions.iter().max().map_or(0, |&position| position as usize + 1);
        self.ropes.iter_mut().for_each(|rope| rope.ensure(last));
        let segment = |span: &Span<'_>| Segment { first_row: span.first_row, rows: span.rows, slot: 0 };
        let segments: Vec<Segment> = rows.spans.iter().map(segment).collect();
        let batch = Batch {
            rows: &[],
            positions: rows.positions,
            spans: rows.spans,
            slots: &[],
            logit_rows: &[],
            capture: &[],
        };
        let pass = Pass {
            pool,
            batch: &batch,
            segments: &segments,
            ropes: &self.ropes,
            epsilon: self.config.epsilon,
            residual: self.config.residual_scale,
        };
        let Part { block, stream, mixer, feed_forward, .. } = self;
        stream.set(rows.stream);
        match rows.normed {
            Some(normed) => stream.set_normed(normed),
            None => pass.norm(&block.mixer_norm, stream),
        }
        block.mixer.forward(&pass, 0, cache, stream, mixer, block.after_mixer.as_deref());
        pass.norm(&block.feed_forward_norm, stream);
        block.feed_forward.choose(&pass, stream, feed_forward);
        block.feed_forward.forward(&pass, stream, feed_forward, block.after_feed_forward.as_deref())?;
        Ok(stream.rows())
    }

    /// The norm of rows `(t, hidden)`: what heads read.
    pub fn normalise(&self, rows: &[f32]) -> Vec<f32> {
        rms_norms(rows, &self.norm, self.config.epsilon)
    }
}

/// The norm of each row. `rows: (t, weight.len())`.
pub fn rms_norms(rows: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let mut out = vec![0.0; rows.len()];
    for (row, out) in rows.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        rms_norm(row, weight, epsilon, out);
    }
    out
}
