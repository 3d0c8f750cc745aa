//! Softmax attention (Vaswani et al. 2017) with grouped key-value heads (arXiv 2305.13245), rotated queries and keys.

use super::super::forward::{Pass, Stream, sized};
use super::super::names::{Norm, Part, Role};
use super::super::weights::{Linear, Loader, MatrixSpec};
use crate::engine::cache::Cache;
use crate::error::Error;
use farthing_kernels::attention::{AttentionShape, attention};
use farthing_kernels::matmul::matmul;
use farthing_kernels::norm::rms_norm_in_place;
use farthing_kernels::rope::rotate;

/// Attention's description.
#[derive(Clone, Debug, PartialEq)]
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
    keys: Vec<f32>,
    values: Vec<f32>,
    /// `(t, heads * head_dim)`.
    attended: Vec<f32>,
}

impl AttentionSpec {
    pub(super) fn matrices(&self, hidden: usize) -> [MatrixSpec; 4] {
        let (wide, narrow) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [
            MatrixSpec::new(Role::Query, wide, hidden).rotated(self.heads).biased(self.qkv_bias),
            MatrixSpec::new(Role::Key, narrow, hidden).rotated(self.kv_heads).biased(self.qkv_bias),
            MatrixSpec::new(Role::Value, narrow, hidden).biased(self.qkv_bias),
            MatrixSpec::new(Role::AttentionOutput, hidden, wide).biased(self.output_bias),
        ]
    }

    pub(super) fn load(&self, loader: &Loader<'_>, layer: usize) -> Result<Attention, Error> {
        let [query, key, value, output] = self.matrices(loader.config.hidden);
        let norms = |over| {
            let width = |heads: usize| self.head_dim * if over == HeadNorm::Each { 1 } else { heads };
            let (heads, kv_heads) = (width(self.heads), width(self.kv_heads));
            Ok::<_, Error>((loader.norm(Norm::Query, layer, heads)?, loader.norm(Norm::Key, layer, kv_heads)?))
        };
        Ok(Attention {
            spec: self.clone(),
            query: loader.linear(&query, layer)?,
            key: loader.linear(&key, layer)?,
            value: loader.linear(&value, layer)?,
            head_norms: self.head_norm.map(norms).transpose()?,
            output: loader.linear(&output, layer)?,
            sinks: self.sinks.then(|| loader.vector(&loader.name(Part::Sinks, layer), self.heads)).transpose()?,
        })
    }
}

impl Attention {
    pub(super) fn linears(&self) -> [(Role, &Linear); 4] {
        [
            (Role::Query, &self.query),
            (Role::Key, &self.key),
            (Role::Value, &self.value),
            (Role::AttentionOutput, &self.output),
        ]
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
        let mut jobs = [(&self.query, &mut *queries), (&self.key, &mut *keys), (&self.value, &mut *values)]
            .map(|(linear, out)| linear.job(out, false));
        pass.prepare(stream, &[&self.query, &self.key, &self.value]);
        matmul(pool, &stream.normed, t, &stream.input, &mut jobs);
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
        pass.add(attended, &self.output, after, stream);
    }
}
