//! One gated network (Shazeer 2020) for all rows.

use super::super::forward::{Pass, Stream, sized};
use super::super::names::Role;
use super::super::weights::{Linear, Loader, MatrixSpec};
use crate::error::Error;
use farthing_kernels::activation::{Activation, activate_multiply};
use farthing_kernels::matmul::{gated, matmul};

/// `down(activation(gate(x)) · up(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseSpec {
    /// Width between.
    pub intermediate: usize,
    /// Applied to the gate.
    pub activation: Activation,
    /// Biases on gate, up and down.
    pub bias: bool,
}

/// A gated network's tensors.
#[derive(Debug)]
pub(in crate::model) struct Dense {
    spec: DenseSpec,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Buffers of the forward pass.
#[derive(Default)]
pub(super) struct Buffers {
    /// `(t, intermediate)`.
    inner: Vec<f32>,
    other: Vec<f32>,
}

impl DenseSpec {
    pub(super) fn matrices(&self, hidden: usize) -> [MatrixSpec; 3] {
        [
            MatrixSpec::new(Role::Gate, self.intermediate, hidden).biased(self.bias),
            MatrixSpec::new(Role::Up, self.intermediate, hidden).biased(self.bias),
            MatrixSpec::new(Role::Down, hidden, self.intermediate).biased(self.bias),
        ]
    }

    pub(super) fn load(&self, loader: &Loader<'_>, layer: usize) -> Result<Dense, Error> {
        let [gate, up, down] = self.matrices(loader.config.hidden);
        Ok(Dense {
            spec: self.clone(),
            gate: loader.linear(&gate, layer)?,
            up: loader.linear(&up, layer)?,
            down: loader.linear(&down, layer)?,
        })
    }
}

impl Dense {
    pub(super) fn linears(&self) -> [(Role, &Linear); 3] {
        [(Role::Gate, &self.gate), (Role::Up, &self.up), (Role::Down, &self.down)]
    }

    pub(super) fn forward(&self, pass: &Pass<'_>, stream: &mut Stream, buffers: &mut Buffers, after: Option<&[f32]>) {
        let (t, pool, Dense { spec, gate, up, down }) = (pass.rows(), pass.pool, self);
        pass.prepare(stream, &[gate, up]);
        let inner = sized(&mut buffers.inner, t * spec.intermediate);
        if gate.bias.is_some() || up.bias.is_some() {
            let other = sized(&mut buffers.other, t * spec.intermediate);
            let mut jobs = [gate.job(inner, false), up.job(other, false)];
            matmul(pool, &stream.normed, t, &stream.input, &mut jobs);
            activate_multiply(spec.activation, inner, other);
        } else {
            gated(pool, &stream.normed, t, &stream.input, &gate.matrix, &up.matrix, spec.activation, inner);
        }
        pass.add(inner, down, after, stream);
    }
}
