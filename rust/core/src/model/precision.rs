//! The default precision policy: how finely activations are rounded before they meet integer weights.
//!
//! A pure function of the matrix's role and format, fixed at load: never a timing, never a calibration, never the number
//! of rows. Attention outputs are averages of values and have no outliers: 8 bits cost them little. Everything else
//! takes 15 bits, because 8 flip close calls; except ternary matrices with one scale a row, which are trained with 8 bits
//! for each token. Against exact activations, on the first tokens of WikiText-2 (KL in nats,
//! share of equal top tokens):
//!
//! | rounded to 8 bits | SmolLM2-135M Q4_1 | Qwen2.5-Coder-0.5B Q4_K_M | Gemma 3 270M Q4_K_M |
//! |---|---|---|---|
//! | everything (`a8`) | 2.4e-3, 97.3 % | 5.9e-4, 98.2 % | 1.6e-3, 98.3 % |
//! | gate and up | 6.6e-4, 98.6 % | 1.1e-4, 99.2 % | |
//! | attention output (the policy) | 5.0e-5, 99.9 % | 5.1e-5, 99.0 % | 7.5e-5, 99.8 % |
//! | nothing (`a16`) | 6.0e-7, 100 % | 2.5e-6, 99.6 % | 3.3e-7, 100 % |

use super::names::Role;
use crate::engine::Activations;
use farthing_kernels::format::{Format, Precision};

/// The precision of the activations that `role` multiplies, under the wish `activations`.
pub fn precision(role: Role, format: Format, activations: Activations) -> Precision {
    match (format, activations, role) {
        (Format::Float(_), ..) | (_, Activations::F32, _) => Precision::F32,
        (_, Activations::A8, _)
        | (_, Activations::Auto, Role::AttentionOutput)
        | (Format::Ternary { group: None, .. }, Activations::Auto, _) => Precision::A8,
        (_, Activations::A16 | Activations::Auto, _) => Precision::A16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use farthing_kernels::format::{Bits, FloatType, Offset};

    #[test]
    fn wishes_win_and_floats_stay_floats() {
        let scale = FloatType::F16;
        let int4 = Format::Integer { bits: Bits::Four, group: 32, offset: Offset::Minimum, scale };
        for role in Role::IN_BLOCK {
            assert_eq!(precision(role, Format::Float(scale), Activations::A8), Precision::F32);
            assert_eq!(precision(role, int4, Activations::A8), Precision::A8);
            assert_eq!(precision(role, int4, Activations::A16), Precision::A16);
            assert_eq!(precision(role, int4, Activations::F32), Precision::F32);
        }
        assert_eq!(precision(Role::AttentionOutput, int4, Activations::Auto), Precision::A8);
        assert_eq!(precision(Role::Down, int4, Activations::Auto), Precision::A16);
    }
}
