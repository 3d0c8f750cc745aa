//! Gated `DeltaNet` (arXiv 2412.06464) as Qwen3-Next and Qwen3.5 have it: a short convolution, then a state for each head
//! that the gated delta rule corrects, normed and gated on its way out.

use super::super::forward::{Pass, Stream, sized};
use super::super::names::{Convention, Part, Role};
use super::super::weights::{Linear, Loader, MatrixSpec, Section};
use crate::error::Error;
use farthing_kernels::activation::{Activation, activate_multiply};
use farthing_kernels::math::exp;
use farthing_kernels::matmul::matmul;
use farthing_kernels::norm::rms_norm_in_place;
use farthing_kernels::recurrent::{Convolution, DeltaInput, GatedDelta as Heads, States, delta_gates, l2_norm};

/// Epsilon of the norms of queries and keys, in every published model.
const EPSILON: f32 = 1e-6;

/// A gated delta rule's description.
#[derive(Clone, Debug, PartialEq)]
pub struct GatedDeltaSpec {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Width of a query or key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Rows that the convolution sees.
    pub taps: usize,
    /// Whether one tensor holds queries, keys, values and gates, key head by key head (Qwen3-Next).
    pub packed: bool,
    /// Whether another holds decays and rates so (the same, and its GGUF files).
    pub packed_rates: bool,
}

/// A gated delta rule's tensors.
#[derive(Debug)]
pub(in crate::model) struct GatedDelta {
    heads: Heads,
    input: Linear,
    gate: Linear,
    decay: Linear,
    rate: Linear,
    convolution: Convolution,
    /// `(value_heads,)`: `-e^A_log`.
    negative: Vec<f32>,
    /// `(value_heads,)`.
    time_bias: Vec<f32>,
    /// `(value_dim,)`: over each head of the result.
    norm: Vec<f32>,
    output: Linear,
}

/// Buffers of the forward pass.
#[derive(Default)]
pub(super) struct Buffers {
    /// `(t, queries, keys and values)`, before and behind the convolution.
    projected: Vec<f32>,
    qkv: Vec<f32>,
    /// `(t, value_heads)`.
    decay: Vec<f32>,
    rate: Vec<f32>,
    /// `(t, value_heads * value_dim)`.
    gate: Vec<f32>,
    mixed: Vec<f32>,
}

impl GatedDeltaSpec {
    fn heads(&self, tiled: bool) -> Heads {
        let GatedDeltaSpec { key_heads, value_heads, key_dim, value_dim, .. } = *self;
        Heads { key_heads, value_heads, key_dim, value_dim, tiled }
    }

    /// Floats of the convolution's state: whole vectors, so that the heads' states begin at one.
    fn convolution_floats(&self) -> usize {
        ((self.taps - 1) * self.heads(false).width()).next_multiple_of(16)
    }

    pub(super) fn state_floats(&self) -> usize {
        self.convolution_floats() + self.heads(false).state_floats()
    }

    pub(super) fn matrices(&self, hidden: usize) -> [MatrixSpec; 5] {
        let values = self.value_heads * self.value_dim;
        let new = MatrixSpec::new;
        let [input, gate, decay, rate] = [
            new(Role::DeltaInput, self.heads(false).width(), hidden),
            new(Role::DeltaGate, values, hidden),
            new(Role::DeltaDecay, self.value_heads, hidden),
            new(Role::DeltaRate, self.value_heads, hidden),
        ];
        let output = new(Role::DeltaOutput, hidden, values);
        // For each key head: its query, its key, its values, their gates; in another tensor their rates, their decays.
        let group = self.value_heads / self.key_heads;
        let (key, value) = (self.key_dim, group * self.value_dim);
        let section = |width, offset, period| Section { rows: self.key_heads * width, width, offset, period };
        let (all, gates) = (2 * key + 2 * value, 2 * group);
        let (input, gate) = if self.packed {
            let inputs = vec![section(key, 0, all), section(key, key, all), section(value, 2 * key, all)];
            let gates = vec![section(value, 2 * key + value, all)];
            (input.sections(self.key_heads * all, inputs), gate.sections(self.key_heads * all, gates))
        } else {
            (input, gate)
        };
        let (decay, rate) = if self.packed_rates {
            let rows = self.key_heads * gates;
            let (decays, rates) = (vec![section(group, group, gates)], vec![section(group, 0, gates)]);
            (decay.sections(rows, decays), rate.sections(rows, rates))
        } else {
            (decay, rate)
        };
        [input, gate, decay, rate, output]
    }

    pub(super) fn load(&self, loader: &Loader<'_>, layer: usize) -> Result<GatedDelta, Error> {
        let [input, gate, decay, rate, output] = self.matrices(loader.config.hidden);
        let gguf = loader.convention == Convention::Gguf;
        // llama.cpp's converter has taken the exponential, and lets value heads go round the key heads but in Qwen3-Next.
        let heads = self.heads(gguf && !self.packed_rates);
        let vector = |part| loader.vector(&loader.name(part, layer), self.value_heads);
        let mut negative = vector(Part::DeltaDecay)?;
        if !gguf {
            for x in &mut negative {
                *x = -exp(*x);
            }
        }
        let weight = loader.taps(Part::DeltaConvolution, layer, heads.width(), self.taps)?;
        Ok(GatedDelta {
            heads,
            input: loader.linear(&input, layer)?,
            gate: loader.linear(&gate, layer)?,
            decay: loader.linear(&decay, layer)?,
            rate: loader.linear(&rate, layer)?,
            convolution: Convolution::new(&weight, None, heads.width(), true),
            negative,
            time_bias: vector(Part::DeltaTime)?,
            // Unlike the other norms of these families, stored without an offset.
            norm: loader.vector(&(loader.name(Part::DeltaNorm, layer) + ".weight"), self.value_dim)?,
            output: loader.linear(&output, layer)?,
        })
    }
}

impl GatedDelta {
    pub(super) fn linears(&self) -> [(Role, &Linear); 5] {
        [
            (Role::DeltaInput, &self.input),
            (Role::DeltaGate, &self.gate),
            (Role::DeltaDecay, &self.decay),
            (Role::DeltaRate, &self.rate),
            (Role::DeltaOutput, &self.output),
        ]
    }

    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        states: &mut States,
        stream: &mut Stream,
        buffers: &mut Buffers,
        after: Option<&[f32]>,
    ) {
        let (t, pool, heads) = (pass.rows(), pass.pool, &self.heads);
        let (width, values) = (heads.width(), heads.value_heads * heads.value_dim);
        let projected = sized(&mut buffers.projected, t * width);
        let (decay, rate) =
            (sized(&mut buffers.decay, t * heads.value_heads), sized(&mut buffers.rate, t * heads.value_heads));
        let gate = sized(&mut buffers.gate, t * values);
        pass.prepare(stream, &[&self.input, &self.gate, &self.decay, &self.rate]);
        let mut jobs = [
            self.input.job(projected, false),
            self.gate.job(gate, false),
            self.decay.job(decay, false),
            self.rate.job(rate, false),
        ];
        matmul(pool, &stream.normed, t, &stream.input, &mut jobs);
        let qkv = sized(&mut buffers.qkv, t * width);
        self.convolution.run(pool, projected, pass.segments, states, qkv);
        let keys = heads.key_heads * heads.key_dim;
        let scale = 1.0 / (heads.key_dim as f32).sqrt();
        l2_norm(pool, qkv, width, 0..keys, heads.key_dim, EPSILON, scale);
        l2_norm(pool, qkv, width, keys..2 * keys, heads.key_dim, EPSILON, 1.0);
        delta_gates(decay, rate, &self.negative, &self.time_bias);
        let mixed = sized(&mut buffers.mixed, t * values);
        let at = states.floats() - heads.state_floats();
        heads.run(pool, &DeltaInput { qkv, decay, rate }, pass.segments, states, at, mixed);
        pool.rows(mixed, values, |_, rows| rms_norm_in_place(rows, &self.norm, pass.epsilon));
        pool.rows(gate, values, |first, gate| {
            activate_multiply(Activation::Silu, gate, &mixed[first * values..][..gate.len()]);
        });
        pass.add(gate, &self.output, after, stream);
    }
}
