//! The default precision policy: how finely activations are rounded before they meet integer weights.
//!
//! A pure function of the matrix's role and format, fixed at load: never a timing, never a calibration.

use super::names::Role;
use crate::engine::Activations;
use farthing_kernels::format::{Format, Precision};

/// The precision of the activations that `role` multiplies, under the wish `activations`.
///
/// `Auto` rounds to 15 bits everywhere: with 8 bits close calls flip (KL above 1e-3).
pub fn precision(role: Role, format: Format, activations: Activations) -> Precision {
    let _ = role;
    match (format, activations) {
        (Format::Float(_), _) | (_, Activations::F32) => Precision::F32,
        (_, Activations::A8) => Precision::A8,
        (_, Activations::A16 | Activations::Auto) => Precision::A16,
    }
}
