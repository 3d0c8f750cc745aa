//! Layers whose memory of a sequence is a state of fixed size: short convolutions and the gated delta rule.
//!
//! A state is advanced row by row in the order of the sequence, and every sum has one order, so results depend on
//! neither chunks, batch-mates, threads nor instruction set.

mod columns;
mod convolution;
mod delta;
mod gates;
mod states;

pub(crate) use columns::multiply_with;
pub use columns::{Columns, multiply};
pub use convolution::Convolution;
pub use delta::{DeltaInput, GatedDelta};
pub use gates::{delta_gates, l2_norm, sigmoid_multiply};
pub(crate) use gates::{delta_gates_with, l2_norm_with, sigmoid_multiply_with};
pub use states::{Segment, States};

/// Elements below which a parallel region costs more than it saves.
const PARALLEL: usize = 1 << 14;
