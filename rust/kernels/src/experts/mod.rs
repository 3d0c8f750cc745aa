//! The experts of a mixture-of-experts layer, packed, and how a step runs the ones that its tokens chose.
//!
//! Expert `e` computes `f_e(x) = activation(gate · x + gate_bias, up · x + up_bias) · downᵀ + down_bias`. For a token with
//! choices `(id, weight)` the layer computes `out = fma(weight, f_id(x), out)`, ids ascending, and among equal ids in the
//! order of the choices. Products are those of [`matmul`], so a token's result depends on its own row, ids and weights
//! alone: not on the other tokens, on threads or on the instruction set.
//!
//! The tokens of a step are sorted by expert, so that each expert's weights are read once. Each row is quantised once, as
//! it would be alone, and copied to where its experts' rows lie together in blocks. Then all experts' gates and ups
//! make up one region, and all downs another, in which a thread owns columns of `out`.
//!
//! [`matmul`]: crate::matmul

mod activation;
mod route;
mod run;
#[cfg(test)]
mod tests;

pub use activation::ExpertActivation;
pub use route::{ExpertScratch, Statistics};

use crate::format::PackedMatrix;
use crate::isa::Isa;
use crate::matmul::best;
use crate::pool::Pool;

/// One expert: a gated or ungated feed-forward network. Widths may differ from expert to expert, so that a shared expert is
/// one more expert, which every token chooses.
#[derive(Debug)]
pub struct Expert {
    /// `(width, hidden)`; exactly where the activation is gated.
    pub gate: Option<PackedMatrix>,
    /// `(width, hidden)`.
    pub up: PackedMatrix,
    /// `(hidden, width)`.
    pub down: PackedMatrix,
    /// Added to the products.
    pub biases: Option<Biases>,
}

/// What is added to the three products of an expert.
#[derive(Debug)]
pub struct Biases {
    /// `(width,)`; empty without a gate.
    pub gate: Vec<f32>,
    /// `(width,)`.
    pub up: Vec<f32>,
    /// `(hidden,)`.
    pub down: Vec<f32>,
}

impl Expert {
    /// Outputs of `up`.
    pub fn width(&self) -> usize {
        self.up.rows()
    }

    /// Bytes of the weights: what one use reads.
    pub fn nbytes(&self) -> usize {
        self.inputs().map(PackedMatrix::nbytes).sum::<usize>() + self.down.nbytes()
    }

    /// The matrices that read the token: gate, if there is one, and up.
    fn inputs(&self) -> impl Iterator<Item = &PackedMatrix> {
        self.gate.iter().chain(std::iter::once(&self.up))
    }
}

/// An expert that does not belong in its layer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ExpertError {
    /// A matrix has the wrong shape.
    #[error("{name} of expert {expert}: got shape {got:?}, expected {expected:?}")]
    Shape {
        /// Number of the expert.
        expert: usize,
        /// gate, up or down.
        name: &'static str,
        /// (outputs, inputs).
        got: (usize, usize),
        /// (outputs, inputs).
        expected: (usize, usize),
    },
    /// A bias has the wrong length.
    #[error("bias of {name} of expert {expert}: got {got} numbers, expected {expected}")]
    Bias {
        /// Number of the expert.
        expert: usize,
        /// gate, up or down.
        name: &'static str,
        /// Length.
        got: usize,
        /// Length.
        expected: usize,
    },
    /// A gated activation without a gate, or a gate that nothing would use.
    #[error("gate of expert {expert}: got {}, expected {} for {activation:?}", some(*.got), some(!.got))]
    Gate {
        /// Number of the expert.
        expert: usize,
        /// Whether there is one.
        got: bool,
        /// What the layer computes.
        activation: ExpertActivation,
    },
}

fn some(gate: bool) -> &'static str {
    if gate { "one" } else { "none" }
}

/// The experts of a layer.
///
/// ```
/// use farthing_kernels::activation::Activation;
/// use farthing_kernels::experts::{Expert, ExpertActivation, ExpertScratch, PackedExperts};
/// use farthing_kernels::format::{FloatType, PackError, PackedMatrix};
/// use farthing_kernels::pool::Pool;
///
/// let matrix = |n, k, value: f32| {
///     PackedMatrix::pack_float(n, k, FloatType::F32, |_, row| {
///         row.fill(value);
///         Ok::<(), std::convert::Infallible>(())
///     })
/// };
/// let mut experts = PackedExperts::new(2, ExpertActivation::Gated(Activation::Silu));
/// for scale in [1.0, 2.0] {
///     experts.push(Expert { gate: Some(matrix(3, 2, 8.0)?), up: matrix(3, 2, scale)?, down: matrix(2, 3, 1.0)?, biases: None }).unwrap();
/// }
/// let (pool, mut scratch, mut out) = (Pool::new(1), ExpertScratch::default(), [0.0; 4]);
/// // Two tokens with one expert each.
/// experts.run(&pool, &[1.0, 1.0, 2.0, 2.0], &[1, 0], &[0.5, 1.0], &mut scratch, &mut out, false);
/// // Token 0: width · scale · Σx · silu(8 · Σx) · weight.
/// assert!((out[0] - 3.0 * 2.0 * 2.0 * 16.0 * 0.5).abs() < 1e-3);
/// assert_eq!(scratch.statistics().tokens, [1, 1]);
/// # Ok::<(), PackError<std::convert::Infallible>>(())
/// ```
#[derive(Debug)]
pub struct PackedExperts {
    hidden: usize,
    activation: ExpertActivation,
    experts: Vec<Expert>,
}

impl PackedExperts {
    /// No experts yet, for tokens of `hidden` numbers.
    pub fn new(hidden: usize, activation: ExpertActivation) -> PackedExperts {
        PackedExperts { hidden, activation, experts: Vec::new() }
    }

    /// Adds an expert under the next number.
    pub fn push(&mut self, expert: Expert) -> Result<(), ExpertError> {
        let (number, hidden, width) = (self.experts.len(), self.hidden, expert.width());
        let got = expert.gate.is_some();
        if got != self.activation.gated() {
            return Err(ExpertError::Gate { expert: number, got, activation: self.activation });
        }
        let matrices = [
            ("gate", expert.gate.as_ref(), (width, hidden)),
            ("up", Some(&expert.up), (width, hidden)),
            ("down", Some(&expert.down), (hidden, width)),
        ];
        for (name, matrix, expected) in matrices {
            let got = matrix.map_or(expected, |matrix| (matrix.rows(), matrix.columns()));
            if got != expected {
                return Err(ExpertError::Shape { expert: number, name, got, expected });
            }
        }
        if let Some(biases) = &expert.biases {
            let gate = if got { width } else { 0 };
            for (name, bias, expected) in
                [("gate", &biases.gate, gate), ("up", &biases.up, width), ("down", &biases.down, hidden)]
            {
                if bias.len() != expected {
                    return Err(ExpertError::Bias { expert: number, name, got: bias.len(), expected });
                }
            }
        }
        self.experts.push(expert);
        Ok(())
    }

    /// Numbers of a token.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// What stands between the products.
    pub fn activation(&self) -> ExpertActivation {
        self.activation
    }

    /// The experts by their numbers.
    pub fn experts(&self) -> &[Expert] {
        &self.experts
    }

    /// Bytes of all weights.
    pub fn nbytes(&self) -> usize {
        self.experts.iter().map(Expert::nbytes).sum()
    }

    /// `out: (t, hidden)` from `x: (t, hidden)`, and for each token the numbers `ids: (t, k)` and `weights: (t, k)` of its
    /// experts; adds to `out` if `add`. Numbers that no expert has are skipped; a number may occur twice in a row.
    ///
    /// # Panics
    /// When shapes disagree.
    pub fn run(
        &self,
        pool: &Pool,
        x: &[f32],
        ids: &[u32],
        weights: &[f32],
        scratch: &mut ExpertScratch,
        out: &mut [f32],
        add: bool,
    ) {
        self.run_with(best(), pool, x, ids, weights, scratch, out, add);
    }

    /// [`PackedExperts::run`] with the kernels of `isa`.
    #[doc(hidden)]
    pub fn run_with(
        &self,
        isa: Isa,
        pool: &Pool,
        x: &[f32],
        ids: &[u32],
        weights: &[f32],
        scratch: &mut ExpertScratch,
        out: &mut [f32],
        add: bool,
    ) {
        assert!(isa.available(), "{isa:?} on this CPU");
        assert!(x.len().is_multiple_of(self.hidden), "length of x: (t, {}), got {}", self.hidden, x.len());
        let t = x.len() / self.hidden;
        assert_eq!(out.len(), x.len(), "length of out: ({t}, {})", self.hidden);
        assert!(ids.len().is_multiple_of(t.max(1)), "length of ids: ({t}, k), got {}", ids.len());
        assert_eq!(weights.len(), ids.len(), "length of weights");
        if !add {
            out.fill(0.0);
        }
        scratch.begin(self.experts.len());
        let (k, rows) = (ids.len() / t.max(1), run::TOKENS);
        for first in (0..t).step_by(rows) {
            let tokens = first..(first + rows).min(t);
            let (inputs, choices) =
                (tokens.start * self.hidden..tokens.end * self.hidden, tokens.start * k..tokens.end * k);
            scratch.route(isa, self, tokens.len(), &ids[choices.clone()], &weights[choices]);
            run::run(self, isa, pool, &x[inputs.clone()], scratch, &mut out[inputs]);
        }
    }
}
