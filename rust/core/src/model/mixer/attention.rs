//! Softmax attention (Vaswani et al. 2017) with grouped key-value heads (arXiv 2305.13245), rotated queries and keys.

use super::super::forward::{Pass, Stream, sized};
use super::super::names::{Norm, Part, Role};
use super::super::weights::{Linear, Loader, MatrixSpec, Section};
use crate::engine::cache::Cache;
use crate::error::Error;
use farthing_kernels::attention::{AttentionShape, attention};
use farthing_kernels::matmul::matmul;
use farthing_kernels::norm::rms_norm_in_place;
use farthing_kernels::recurrent::sigmoid_multiply;
use farthing_kernels::rope::rotate;

/// Attention's description.
#[derive(Clone, Debug, PartialEq)]
// Each flag is a yes-or-no of the published configurations.
#[allow(clippy::struct_excessive_bools)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on query-key products.
    pub scale: f32,
    /// `c * tanh(score / c)`, if any.
    pub softcap: Option<f32>,
    /// Keys visible to a query, itself included; `None` is all before it.
    pub window: Option<usize>,
    /// Index of the rotary embedding; `None` leaves queries and keys unrotated.
    pub rope: Option<usize>,
    /// Biases on queries, keys and values.
    pub qkv_bias: bool,
    /// Bias on the output.
    pub output_bias: bool,
    /// RMS norms of queries and keys.
    pub head_norm: Option<HeadNorm>,
    /// A logit for each head that takes part in the softmax and has no value (gpt-oss).
    pub sinks: bool,
    /// A gate for each element of the heads' results; it stands behind its head's query in the query's tensor.
    pub gated: bool,
    /// Queries, keys and values are made of two rows beside each other (EAGLE-3).
    pub doubled: bool,
}

/// What an RMS norm of queries or keys goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadNorm {
    /// Each head by itself, all with the same weights.
    Each,
    /// All heads of a row (`OLMoE`).
    Together,
}

/// Attention's tensors.
#[derive(Debug)]
pub(in crate::model) struct Attention {
    spec: AttentionSpec,
    query: Linear,
    gate: Option<Linear>,
    key: Linear,
    value: Linear,
    /// Of queries and of keys.
    head_norms: Option<(Vec<f32>, Vec<f32>)>,
    output: Linear,
    /// `(heads,)`.
    sinks: Option<Vec<f32>>,
}

/// Buffers of the forward pass.
#[derive(Default)]
pub(super) struct Buffers {
    queries: Vec<f32>,
    /// `(t, heads * head_dim)`, like queries.
    gates: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// `(t, heads * head_dim)`.
    attended: Vec<f32>,
}

impl AttentionSpec {
    /// Width of what queries, keys and values are made of.
    fn inputs(&self, hidden: usize) -> usize {
        if self.doubled { 2 * hidden } else { hidden }
    }

    fn query(&self, hidden: usize) -> MatrixSpec {
        let inputs = self.inputs(hidden);
        let query = MatrixSpec::new(Role::Query, self.heads * self.head_dim, inputs).biased(self.qkv_bias);
        if self.gated { self.half(query, 0) } else { query.rotated(self.heads) }
    }

    fn gate(&self, hidden: usize) -> Option<MatrixSpec> {
        let inputs = self.inputs(hidden);
        let gate = || MatrixSpec::new(Role::AttentionGate, self.heads * self.head_dim, inputs).biased(self.qkv_bias);
        self.gated.then(|| self.half(gate(), self.head_dim))
    }

    /// One half of each head in a tensor that has twice the rows.
    fn half(&self, matrix: MatrixSpec, offset: usize) -> MatrixSpec {
        let (rows, width) = (matrix.rows, self.head_dim);
        matrix.sections(2 * rows, vec![Section { rows, width, offset, period: 2 * width }])
    }

    /// Keys, values, output.
    fn others(&self, hidden: usize) -> [MatrixSpec; 3] {
        let (wide, narrow) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [
            MatrixSpec::new(Role::Key, narrow, self.inputs(hidden)).rotated(self.kv_heads).biased(self.qkv_bias),
            MatrixSpec::new(Role::Value, narrow, self.inputs(hidden)).biased(self.qkv_bias),
            MatrixSpec::new(Role::AttentionOutput, hidden, wide).biased(self.output_bias),
        ]
    }

    pub(super) fn matrices(&self, hidden: usize) -> Vec<MatrixSpec> {
        [self.query(hidden)].into_iter().chain(self.gate(hidden)).chain(self.others(hidden)).collect()
    }

    pub(super) fn load(&self, loader: &Loader<'_>, layer: usize) -> Result<Attention, Error> {
        let hidden = loader.config.hidden;
        let [key, value, output] = self.others(hidden);
        let norms = |over| {
            let width = |heads: usize| self.head_dim * if over == HeadNorm::Each { 1 } else { heads };
            let (heads, kv_heads) = (width(self.heads), width(self.kv_heads));
            Ok::<_, Error>((loader.norm(Norm::Query, layer, heads)?, loader.norm(Norm::Key, layer, kv_heads)?))
        };
        Ok(Attention {
            spec: self.clone(),
            query: loader.linear(&self.query(hidden), layer)?,
            gate: self.gate(hidden).map(|gate| loader.linear(&gate, layer)).transpose()?,
            key: loader.linear(&key, layer)?,
            value: loader.linear(&value, layer)?,
            head_norms: self.head_norm.map(norms).transpose()?,
            output: loader.linear(&output, layer)?,
            sinks: self.sinks.then(|| loader.vector(&loader.name(Part::Sinks, layer), self.heads)).transpose()?,
        })
    }
}

impl Attention {
    pub(super) fn linears(&self) -> Vec<(Role, &Linear)> {
        let gate = self.gate.as_ref().map(|gate| (Role::AttentionGate, gate));
        let others = [(Role::Key, &self.key), (Role::Value, &self.value), (Role::AttentionOutput, &self.output)];
        [(Role::Query, &self.query)].into_iter().chain(gate).chain(others).collect()
    }

    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        layer: usize,
        cache: &mut Cache,
        stream: &mut Stream,
        buffers: &mut Buffers,
        after: Option<&[f32]>,
    ) {
        let (spec, t, pool) = (&self.spec, pass.rows(), pass.pool);
        let (wide, narrow) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let queries = sized(&mut buffers.queries, t * wide);
        let (keys, values) = (sized(&mut buffers.keys, t * narrow), sized(&mut buffers.values, t * narrow));
        let [query, key, value] = [(&self.query, &mut *queries), (&self.key, &mut *keys), (&self.value, &mut *values)]
            .map(|(linear, out)| linear.job(out, false));
        if let Some(gate) = &self.gate {
            pass.prepare(stream, &[&self.query, gate, &self.key, &self.value]);
            let gate = gate.job(sized(&mut buffers.gates, t * wide), false);
            matmul(pool, &stream.normed, t, &stream.input, &mut [query, gate, key, value]);
        } else {
            pass.prepare(stream, &[&self.query, &self.key, &self.value]);
            matmul(pool, &stream.normed, t, &stream.input, &mut [query, key, value]);
        }
        if let Some((query_norm, key_norm)) = &self.head_norms {
            pool.rows(queries, wide, |_, rows| rms_norm_in_place(rows, query_norm, pass.epsilon));
            pool.rows(keys, narrow, |_, rows| rms_norm_in_place(rows, key_norm, pass.epsilon));
        }
        if let Some(rope) = spec.rope {
            let turn = |x: &mut [f32], width: usize, heads: usize| {
                pool.rows(x, width, |first, rows| {
                    let positions = &pass.batch.positions[first..first + rows.len() / width];
                    rotate(&pass.ropes[rope], rows, width, heads, spec.head_dim, positions);
                });
            };
            turn(queries, wide, spec.heads);
            turn(keys, narrow, spec.kv_heads);
        }
        cache.write(pool, layer, pass.batch.spans, keys, values);
        let shape = AttentionShape {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            scale: spec.scale,
            window: spec.window,
            softcap: spec.softcap,
            sinks: self.sinks.as_deref(),
        };
        let attended = sized(&mut buffers.attended, t * wide);
        attention(pool, queries, pass.batch.spans, cache.pages(layer), &shape, attended);
        if self.gate.is_some() {
            let gates = sized(&mut buffers.gates, t * wide);
            pool.rows(gates, wide, |first, gates| sigmoid_multiply(gates, &attended[first * wide..][..gates.len()]));
            return pass.add(gates, &self.output, after, stream);
        }
        pass.add(attended, &self.output, after, stream);
    }
}
