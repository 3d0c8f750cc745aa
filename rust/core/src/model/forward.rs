//! The forward pass: one batch of rows, from any number of sequences, through all blocks.

use super::Model;
use super::weights::{Block, Linear};
use crate::engine::cache::Cache;
use crate::error::Error;
use farthing_kernels::activation::activate_multiply;
use farthing_kernels::attention::{AttentionShape, Span, attention};
use farthing_kernels::matmul::{Input, Job, gated, matmul};
use farthing_kernels::norm::{add, rms_norm, rms_norm_in_place};
use farthing_kernels::pool::Pool;
use farthing_kernels::rope::rotate;

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
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: &'a [usize],
}

/// Buffers of the forward pass, kept from step to step.
#[derive(Default)]
pub struct Scratch {
    /// `(t, hidden)`: the stream.
    stream: Vec<f32>,
    /// `(t, hidden)`: its norm, or what is to be added to it.
    normed: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// `(t, heads * head_dim)`.
    attended: Vec<f32>,
    /// `(t, intermediate)`.
    inner: Vec<f32>,
    other: Vec<f32>,
    input: Input,
    /// `(logit rows, vocab)`.
    logits: Vec<f32>,
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Scratch({} floats of stream)", self.stream.len())
    }
}

impl Scratch {
    /// `(logit rows, vocab)` of the last pass.
    pub fn logits(&mut self) -> &mut [f32] {
        &mut self.logits
    }
}

fn sized(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.resize(length, 0.0);
    &mut buffer[..length]
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
        self.enter(batch.rows, sized(&mut scratch.stream, t * hidden))?;
        for (layer, block) in self.blocks.iter().enumerate() {
            self.attend(pool, block, layer, batch, cache, scratch);
            self.feed_forward(pool, block, t, scratch);
        }
        let rows = batch.logit_rows.len();
        let normed = sized(&mut scratch.normed, rows * hidden);
        for (row, out) in batch.logit_rows.iter().zip(normed.chunks_exact_mut(hidden)) {
            rms_norm(&scratch.stream[row * hidden..(row + 1) * hidden], &self.final_norm, self.config.epsilon, out);
        }
        let head = self.head();
        scratch.input.prepare(pool, normed, rows, hidden, &[head]);
        let out = sized(&mut scratch.logits, rows * self.config.vocab);
        matmul(pool, normed, rows, &scratch.input, &mut [Job { matrix: head, bias: None, add: false, out }]);
        if let Some(cap) = self.config.final_softcap {
            scratch.logits.iter_mut().for_each(|logit| *logit = cap * farthing_kernels::math::tanh(*logit / cap));
        }
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

    fn attend(
        &self,
        pool: &Pool,
        block: &Block,
        layer: usize,
        batch: &Batch<'_>,
        cache: &mut Cache,
        scratch: &mut Scratch,
    ) {
        let (t, hidden, spec) = (batch.positions.len(), self.config.hidden, &block.spec);
        let (wide, narrow) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let normed = sized(&mut scratch.normed, t * hidden);
        self.norm(pool, &scratch.stream, &block.attention_norm, normed);
        scratch.input.prepare(pool, normed, t, hidden, &[&block.query.matrix, &block.key.matrix, &block.value.matrix]);
        let (queries, keys) = (sized(&mut scratch.queries, t * wide), sized(&mut scratch.keys, t * narrow));
        let values = sized(&mut scratch.values, t * narrow);
        let mut jobs = [(&block.query, &mut *queries), (&block.key, &mut *keys), (&block.value, &mut *values)]
            .map(|(linear, out)| linear.job(out, false));
        matmul(pool, normed, t, &scratch.input, &mut jobs);
        if let Some((query_norm, key_norm)) = &block.head_norms {
            pool.rows(queries, wide, |_, rows| rms_norm_in_place(rows, query_norm, self.config.epsilon));
            pool.rows(keys, narrow, |_, rows| rms_norm_in_place(rows, key_norm, self.config.epsilon));
        }
        if let Some(rope) = spec.rope {
            let turn = |x: &mut [f32], width: usize, heads: usize| {
                pool.rows(x, width, |first, rows| {
                    let positions = &batch.positions[first..first + rows.len() / width];
                    rotate(&self.ropes[rope], rows, width, heads, spec.head_dim, positions);
                });
            };
            turn(queries, wide, spec.heads);
            turn(keys, narrow, spec.kv_heads);
        }
        cache.write(pool, layer, batch.spans, keys, values);
        let shape = AttentionShape {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            scale: spec.attention_scale,
            window: spec.window,
            softcap: spec.attention_softcap,
        };
        let attended = sized(&mut scratch.attended, t * wide);
        attention(pool, queries, batch.spans, cache.pages(layer), &shape, attended);
        scratch.input.prepare(pool, attended, t, wide, &[&block.output.matrix]);
        let after = block.sandwich.as_ref().map(|(after, _)| after.as_slice());
        let (stream, normed) = (&mut scratch.stream[..], &mut scratch.normed);
        self.add(pool, attended, t, &scratch.input, &block.output, after, stream, normed);
    }

    fn feed_forward(&self, pool: &Pool, block: &Block, t: usize, scratch: &mut Scratch) {
        let (hidden, width) = (self.config.hidden, block.spec.intermediate);
        let normed = sized(&mut scratch.normed, t * hidden);
        self.norm(pool, &scratch.stream, &block.feed_forward_norm, normed);
        let (gate, up) = (&block.gate, &block.up);
        scratch.input.prepare(pool, normed, t, hidden, &[&gate.matrix, &up.matrix]);
        let inner = sized(&mut scratch.inner, t * width);
        if gate.bias.is_some() || up.bias.is_some() {
            let other = sized(&mut scratch.other, t * width);
            matmul(pool, normed, t, &scratch.input, &mut [gate.job(inner, false), up.job(other, false)]);
            activate_multiply(block.spec.activation, inner, other);
        } else {
            gated(pool, normed, t, &scratch.input, &gate.matrix, &up.matrix, block.spec.activation, inner);
        }
        scratch.input.prepare(pool, inner, t, width, &[&block.down.matrix]);
        let after = block.sandwich.as_ref().map(|(_, after)| after.as_slice());
        let (stream, normed) = (&mut scratch.stream[..], &mut scratch.normed);
        self.add(pool, inner, t, &scratch.input, &block.down, after, stream, normed);
    }

    /// `out = norm(x)`, row by row; `x, out: (t, hidden)`.
    fn norm(&self, pool: &Pool, x: &[f32], weight: &[f32], out: &mut [f32]) {
        let width = weight.len();
        pool.rows(out, width, |first, out| {
            let start = first * width;
            rms_norm(&x[start..start + out.len()], weight, self.config.epsilon, out);
        });
    }

    /// `stream += norm(x · Wᵀ + bias)`, the norm only if given. `x: (t, k)`, `stream: (t, hidden)`.
    fn add(
        &self,
        pool: &Pool,
        x: &[f32],
        t: usize,
        input: &Input,
        linear: &Linear,
        after: Option<&[f32]>,
        stream: &mut [f32],
        normed: &mut Vec<f32>,
    ) {
        let Some(after) = after else {
            return matmul(pool, x, t, input, &mut [linear.job(stream, true)]);
        };
        let mut product = vec![0.0; stream.len()];
        matmul(pool, x, t, input, &mut [linear.job(&mut product, false)]);
        let normed = sized(normed, stream.len());
        self.norm(pool, &product, after, normed);
        add(stream, normed);
    }

    /// Bytes of weights that a pass over `rows` rows with `logits` wanted rows reads.
    pub fn pass_bytes(&self, rows: usize, logits: usize) -> u64 {
        let row = (self.embedding.nbytes() / self.config.vocab) as u64;
        self.block_bytes() + rows as u64 * row + if logits > 0 { self.head_bytes() } else { 0 }
    }
}

impl Linear {
    fn job<'a>(&'a self, out: &'a mut [f32], add: bool) -> Job<'a> {
        Job { matrix: &self.matrix, bias: self.bias.as_deref(), add, out }
    }
}
