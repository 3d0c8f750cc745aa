//! What stands between the products of an expert, and what is done with the last one.

use std::ops::Range;

use crate::activation::{Activation, gelu_tanh, silu};
use crate::math::exp_lanes;
use crate::pool::Disjoint;
use crate::vector::{Kernel, LANES, Simd};

/// The nonlinearity of an expert, of its gate `g` and its up product `u`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExpertActivation {
    /// `activation(g) · u`.
    Gated(Activation),
    /// gpt-oss: with `g = min(g, limit)` and `u = clamp(u, -limit, limit)`, `(u + 1) · (g · sigmoid(alpha · g))`.
    ClampedSwiglu {
        /// Slope of the sigmoid.
        alpha: f32,
        /// Bound of both.
        limit: f32,
    },
    /// DeepSeek-V4: `silu(min(g, limit)) · clamp(u, -limit, limit)`.
    ClampedSilu {
        /// Bound of both.
        limit: f32,
    },
    /// `max(u, 0)²`; there is no gate.
    ReluSquared,
}

impl ExpertActivation {
    /// Whether experts have a gate.
    pub fn gated(self) -> bool {
        self != ExpertActivation::ReluSquared
    }
}

#[inline(always)]
fn activate<S: Simd>(simd: S, activation: ExpertActivation, gate: S::F, up: S::F) -> S::F {
    // Of two arguments min and max give the second where one is NaN.
    match activation {
        ExpertActivation::Gated(Activation::Silu) => simd.mul(silu(simd, gate), up),
        ExpertActivation::Gated(Activation::GeluTanh) => simd.mul(gelu_tanh(simd, gate), up),
        ExpertActivation::ClampedSwiglu { alpha, limit } => {
            let gate = simd.min(simd.splat(limit), gate);
            let up = simd.min(simd.splat(limit), simd.max(simd.splat(-limit), up));
            let e = exp_lanes(simd, simd.mul(simd.splat(-alpha), gate));
            simd.mul(simd.add(up, simd.splat(1.0)), simd.div(gate, simd.add(simd.splat(1.0), e)))
        }
        ExpertActivation::ClampedSilu { limit } => {
            let up = simd.min(simd.splat(limit), simd.max(simd.splat(-limit), up));
            simd.mul(silu(simd, simd.min(simd.splat(limit), gate)), up)
        }
        ExpertActivation::ReluSquared => {
            let up = simd.max(simd.splat(0.0), up);
            simd.mul(up, up)
        }
    }
}

/// Some columns of the rows of a matrix.
pub(super) struct Columns<'a> {
    pub(super) out: Disjoint<'a, f32>,
    /// Elements before row 0.
    pub(super) offset: usize,
    /// Elements of a row.
    pub(super) stride: usize,
    pub(super) range: Range<usize>,
}

impl<'a> Columns<'a> {
    /// The columns of `row`.
    ///
    /// # Safety
    /// No one else uses them.
    #[inline(always)]
    pub(super) unsafe fn row(&self, row: usize) -> &'a mut [f32] {
        let start = self.offset + row * self.stride;
        // SAFETY: the caller's promise.
        unsafe { self.out.slice(start + self.range.start..start + self.range.end) }
    }
}

/// Applies the activation to some columns of all tokens from the first row of `out` on, which are the caller's alone.
pub(super) struct Activate<'a> {
    pub(super) activation: ExpertActivation,
    /// `(tokens, tiles)`; whatever, without a gate.
    pub(super) gate: &'a [[f32; LANES]],
    /// `(tokens, tiles)`.
    pub(super) up: &'a [[f32; LANES]],
    /// `(width,)`, of gate and up; or empty, as is that of a missing gate.
    pub(super) biases: [&'a [f32]; 2],
    pub(super) out: Columns<'a>,
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let columns = self.out.range.clone();
        let tiles = columns.len().div_ceil(LANES);
        let [gate_bias, up_bias] = self.biases.map(|bias| bias.get(columns.clone()).unwrap_or_default());
        for (row, (gate, up)) in self.gate.chunks_exact(tiles).zip(self.up.chunks_exact(tiles)).enumerate() {
            // SAFETY: the columns are the caller's.
            let out = unsafe { self.out.row(row) };
            for (tile, out) in out.chunks_mut(LANES).enumerate() {
                let gate = add_bias(simd, simd.load(&gate[tile]), gate_bias, tile);
                let up = add_bias(simd, simd.load(&up[tile]), up_bias, tile);
                store(simd, activate(simd, self.activation, gate, up), out);
            }
        }
    }
}

/// `out = fma(weight, y + bias, out)` for some columns of some tokens, which are the caller's alone.
pub(super) struct AddWeighted<'a> {
    /// `(tokens, tiles)`.
    pub(super) y: &'a [[f32; LANES]],
    /// `(tokens,)` rows of `out`.
    pub(super) tokens: &'a [u32],
    /// `(tokens,)`.
    pub(super) weights: &'a [f32],
    /// `(hidden,)`, or empty.
    pub(super) bias: &'a [f32],
    pub(super) out: Columns<'a>,
}

impl Kernel for AddWeighted<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let columns = self.out.range.clone();
        let bias = self.bias.get(columns.clone()).unwrap_or_default();
        let rows = self.y.chunks_exact(columns.len().div_ceil(LANES));
        for ((y, &token), &weight) in rows.zip(self.tokens).zip(self.weights) {
            // SAFETY: the columns are the caller's.
            let out = unsafe { self.out.row(token as usize) };
            let weight = simd.splat(weight);
            for (tile, out) in out.chunks_mut(LANES).enumerate() {
                let y = add_bias(simd, simd.load(&y[tile]), bias, tile);
                let before = if let Ok(whole) = <&[f32; LANES]>::try_from(&*out) {
                    simd.load(whole)
                } else {
                    simd.load_part(out)
                };
                store(simd, simd.mul_add(weight, y, before), out);
            }
        }
    }
}

/// `y` plus the bias of its tile, if there are biases.
#[inline(always)]
fn add_bias<S: Simd>(simd: S, y: S::F, bias: &[f32], tile: usize) -> S::F {
    if bias.is_empty() {
        return y;
    }
    let bias = &bias[tile * LANES..];
    simd.add(y, if let Some(bias) = bias.first_chunk() { simd.load(bias) } else { simd.load_part(bias) })
}

/// The first lanes of `x`, as many as `out` has.
#[inline(always)]
fn store<S: Simd>(simd: S, x: S::F, out: &mut [f32]) {
    if let Ok(out) = <&mut [f32; LANES]>::try_from(&mut *out) {
        simd.store(x, out);
    } else {
        simd.store_part(x, out);
    }
}
