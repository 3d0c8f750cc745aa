//! The forward pass: one batch of rows, from any number of sequences, through all blocks.

use super::weights::Linear;
use super::{Model, feed_forward, mixer};
use crate::engine::cache::Cache;
use crate::error::Error;
use farthing_kernels::attention::Span;
use farthing_kernels::matmul::{Input, Job, matmul};
use farthing_kernels::norm::{add, rms_norm};
use farthing_kernels::pool::Pool;
use farthing_kernels::recurrent::Segment;
use farthing_kernels::rope::RopeTable;

/// Up to this many rows, experts of the next block are guessed; more rows choose most of them anyway.
const GUESSED: usize = 4;

/// One row as it enters the first block.
#[derive(Clone, Copy, Debug)]
pub enum Row<'a> {
    /// A token id below the vocabulary.
    Token(u32),
    /// `(hidden,)`: an embedding, already scaled as the model wants it (a patch of an image, say).
    Embedding(&'a [f32]),
}

/// The rows of one step.
#[derive(Clone, Debug)]
pub struct Batch<'a> {
    /// `(t,)` rows, sequence after sequence.
    pub rows: &'a [Row<'a>],
    /// `(t,)` rotary positions.
    pub positions: &'a [u32],
    /// Which rows belong to which sequence, and where its pages are.
    pub spans: &'a [Span<'a>],
    /// For each span the slot of its sequence's states, of no meaning to models without states.
    pub slots: &'a [usize],
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: &'a [usize],
    /// Blocks whose output is wanted for every row, ascending; the number of blocks stands for the normed states that the
    /// head reads.
    pub capture: &'a [usize],
}

/// What the parts of one pass share.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) pool: &'a Pool,
    pub(super) batch: &'a Batch<'a>,
    /// The rows of each sequence, and its states.
    pub(super) segments: &'a [Segment],
    pub(super) ropes: &'a [RopeTable],
    pub(super) epsilon: f32,
    /// Factor on what blocks add to the stream.
    pub(super) residual: f32,
}

/// The rows on their way through the blocks.
#[derive(Default)]
pub(super) struct Stream {
    /// `(t, hidden)`.
    rows: Vec<f32>,
    /// `(t, hidden)`: their norm.
    pub(super) normed: Vec<f32>,
    /// What the next matrices multiply, rounded as they want it.
    pub(super) input: Input,
    /// `(t, hidden)`: what is normed before it is added.
    product: Vec<f32>,
}

impl Stream {
    /// `(t, hidden)`.
    pub(super) fn rows(&self) -> &[f32] {
        &self.rows
    }

    /// Puts rows in, `(t, hidden)`.
    pub(super) fn set(&mut self, rows: &[f32]) {
        self.rows.clear();
        self.rows.extend_from_slice(rows);
    }

    /// Puts in what the next matrices read.
    pub(super) fn set_normed(&mut self, rows: &[f32]) {
        self.normed.clear();
        self.normed.extend_from_slice(rows);
    }
}

/// Buffers of the forward pass, kept from step to step.
#[derive(Default)]
pub struct Scratch {
    stream: Stream,
    /// `(t, hidden)`: the stream as the next block would norm it.
    ahead: Vec<f32>,
    mixer: mixer::Buffers,
    feed_forward: feed_forward::Buffers,
    head: Head,
    /// `(logit rows, vocab)`.
    logits: Vec<f32>,
    /// `(t, captured blocks, hidden)`.
    captured: Vec<f32>,
}

/// Buffers of the head.
#[derive(Default)]
pub struct Head {
    input: Input,
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Scratch({} floats of stream)", self.stream.rows.len())
    }
}

impl Scratch {
    /// `(logit rows, vocab)` of the last pass.
    pub fn logits(&mut self) -> &mut [f32] {
        &mut self.logits
    }

    /// `(t, captured blocks, hidden)`: the states that the last batch asked for.
    pub fn take_captured(&mut self) -> Vec<f32> {
        std::mem::take(&mut self.captured)
    }

    /// Bytes of experts that were read since the last call.
    pub fn take_expert_bytes(&mut self) -> u64 {
        self.feed_forward.take_expert_bytes()
    }
}

/// The buffer, `length` floats long; what they are is left to the caller.
pub(super) fn sized(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.resize(length, 0.0);
    &mut buffer[..length]
}

impl Head {
    /// Logits of normed states. `states: (t, hidden)`, `out: (t, rows of the head)`.
    pub fn logits(&mut self, model: &Model, pool: &Pool, states: &[f32], out: &mut [f32]) {
        let (head, config) = (model.head(), &model.config);
        let rows = states.len() / config.hidden;
        self.input.prepare(pool, states, rows, config.hidden, &[head]);
        matmul(pool, states, rows, &self.input, &mut [Job { matrix: head, bias: None, add: false, out }]);
        if config.logit_scale != 1.0 {
            for logit in &mut *out {
                *logit *= config.logit_scale;
            }
        }
        if let Some(cap) = config.final_softcap {
            for logit in out {
                *logit = cap * farthing_kernels::math::tanh(*logit / cap);
            }
        }
    }
}

impl Batch<'_> {
    /// Keeps the output `(t, hidden)` of block `block`, if it is wanted.
    fn captured(&self, block: usize, rows: &[f32], captured: &mut [f32]) {
        let Ok(place) = self.capture.binary_search(&block) else { return };
        let (hidden, all) = (rows.len() / self.positions.len(), self.capture.len());
        for (row, out) in rows.chunks_exact(hidden).zip(captured.chunks_exact_mut(all * hidden)) {
            out[place * hidden..][..hidden].copy_from_slice(row);
        }
    }
}

impl Model {
    /// Computes the batch: writes its keys and values into `cache` and the wanted logits into `scratch`.
    pub fn forward(
        &mut self,
        pool: &Pool,
        batch: &Batch<'_>,
        cache: &mut Cache,
        scratch: &mut Scratch,
    ) -> Result<(), Error> {
        let (t, hidden) = (batch.positions.len(), self.config.hidden);
        let last = batch.positions.iter().max().map_or(0, |&position| position as usize + 1);
        self.ropes.iter_mut().for_each(|rope| rope.ensure(last));
        let Scratch { stream, ahead, mixer, feed_forward, head, logits, captured } = scratch;
        captured.clear();
        captured.resize(t * batch.capture.len() * hidden, 0.0);
        self.enter(batch.rows, sized(&mut stream.rows, t * hidden))?;
        let segment = |(span, &slot): (&Span<'_>, _)| Segment { first_row: span.first_row, rows: span.rows, slot };
        let segments: Vec<Segment> = batch.spans.iter().zip(batch.slots).map(segment).collect();
        let pass = Pass {
            pool,
            batch,
            segments: &segments,
            ropes: &self.ropes,
            epsilon: self.config.epsilon,
            residual: self.config.residual_scale,
        };
        for (layer, block) in self.blocks.iter().enumerate() {
            pass.norm(&block.mixer_norm, stream);
            block.mixer.forward(&pass, layer, cache, stream, mixer, block.after_mixer.as_deref());
            pass.norm(&block.feed_forward_norm, stream);
            block.feed_forward.choose(&pass, stream, feed_forward);
            if let Some(next) = self.blocks.get(layer + 1).filter(|_| self.store.is_some() && t <= GUESSED) {
                let normed = sized(ahead, t * hidden);
                pass.normalise(&stream.rows, &next.feed_forward_norm, normed);
                next.feed_forward.guess(&pass, normed, feed_forward);
            }
            block.feed_forward.forward(&pass, stream, feed_forward, block.after_feed_forward.as_deref())?;
            batch.captured(layer, &stream.rows, captured);
        }
        if batch.capture.last() == Some(&self.blocks.len()) {
            let mut normed = vec![0.0; t * hidden];
            pass.normalise(&stream.rows, &self.final_norm, &mut normed);
            batch.captured(self.blocks.len(), &normed, captured);
        }
        let rows = batch.logit_rows.len();
        let Stream { rows: all, normed, .. } = stream;
        let normed = sized(normed, rows * hidden);
        for (row, out) in batch.logit_rows.iter().zip(normed.chunks_exact_mut(hidden)) {
            rms_norm(&all[row * hidden..(row + 1) * hidden], &self.final_norm, self.config.epsilon, out);
        }
        head.logits(self, pool, normed, sized(logits, rows * self.head().rows()));
        Ok(())
    }

    /// The row that `token` enters the first block as. `out: (hidden,)`.
    pub fn embed(&self, token: u32, out: &mut [f32]) {
        self.embedding.row(token as usize, out);
        if self.config.embedding_scale != 1.0 {
            for value in out {
                *value *= self.config.embedding_scale;
            }
        }
    }

    /// Fills the stream `(t, hidden)` with the batch's rows.
    fn enter(&self, rows: &[Row<'_>], stream: &mut [f32]) -> Result<(), Error> {
        let (hidden, vocab) = (self.config.hidden, self.config.vocab);
        for (row, out) in rows.iter().zip(stream.chunks_exact_mut(hidden)) {
            match *row {
                Row::Token(id) if (id as usize) < vocab => self.embed(id, out),
                Row::Token(id) => return Err(Error::argument("token id", id, format!("below {vocab}"))),
                Row::Embedding(embedding) if embedding.len() == hidden => out.copy_from_slice(embedding),
                Row::Embedding(embedding) => {
                    return Err(Error::argument("embedding", embedding.len(), format!("{hidden} floats")));
                }
            }
        }
        Ok(())
    }

    /// Bytes of weights, experts left out, that a pass over `rows` rows with `logits` wanted rows reads.
    pub fn pass_bytes(&self, rows: usize, logits: usize) -> u64 {
        let row = (self.embedding.nbytes() / self.config.vocab) as u64;
        self.block_bytes() + rows as u64 * row + if logits > 0 { self.head_bytes() } else { 0 }
    }
}

impl Pass<'_> {
    /// Rows of the pass.
    pub(super) fn rows(&self) -> usize {
        self.batch.positions.len()
    }

    /// `stream.normed = norm(stream.rows)`.
    pub(super) fn norm(&self, weight: &[f32], stream: &mut Stream) {
        let Stream { rows, normed, .. } = stream;
        self.normalise(rows, weight, sized(normed, rows.len()));
    }

    /// `out = norm(x)`, row by row; `x, out: (t, hidden)`.
    fn normalise(&self, x: &[f32], weight: &[f32], out: &mut [f32]) {
        let width = weight.len();
        self.pool.rows(out, width, |first, out| {
            let start = first * width;
            rms_norm(&x[start..start + out.len()], weight, self.epsilon, out);
        });
    }

    /// Makes `stream.normed` ready for products with `linears`.
    pub(super) fn prepare<const N: usize>(&self, stream: &mut Stream, linears: &[&Linear; N]) {
        let Stream { normed, input, .. } = stream;
        let matrices = linears.map(|linear| &linear.matrix);
        input.prepare(self.pool, normed, self.rows(), matrices[0].columns(), &matrices);
    }

    /// `stream.rows += residual · norm(x · Wᵀ + bias)`, the norm only if given. `x: (t, k)`.
    pub(super) fn add(&self, x: &[f32], linear: &Linear, after: Option<&[f32]>, stream: &mut Stream) {
        let (t, pool, Stream { rows, normed, input, product }) = (self.rows(), self.pool, stream);
        input.prepare(pool, x, t, linear.matrix.columns(), &[&linear.matrix]);
        if after.is_none() && self.residual == 1.0 {
            return matmul(pool, x, t, input, &mut [linear.job(rows, true)]);
        }
        let product = sized(product, rows.len());
        matmul(pool, x, t, input, &mut [linear.job(product, false)]);
        if let Some(after) = after {
            self.normalise(product, after, normed);
        } else {
            normed.copy_from_slice(product);
        }
        if self.residual != 1.0 {
            for value in &mut *normed {
                *value *= self.residual;
            }
        }
        add(rows, normed);
    }

    /// `stream.rows += norm(f(stream.normed))`, the norm only if given; `f(x, out, add)` writes or adds `(t, hidden)`.
    pub(super) fn add_with(
        &self,
        after: Option<&[f32]>,
        stream: &mut Stream,
        f: impl FnOnce(&[f32], &mut [f32], bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Stream { rows, normed, product, .. } = stream;
        let Some(after) = after else { return f(normed, rows, true) };
        let product = sized(product, rows.len());
        f(normed, product, false)?;
        self.normalise(product, after, normed);
        add(rows, normed);
        Ok(())
    }
}

impl Linear {
    pub(super) fn job<'a>(&'a self, out: &'a mut [f32], add: bool) -> Job<'a> {
        Job { matrix: &self.matrix, bias: self.bias.as_deref(), add, out }
    }
}
