//! How far a product may be from the exact one, for each format and precision.
//!
//! The error is relative, in the L2 norm over many outputs, against the f64 product of the dequantised weights: it is the
//! error of rounding the activations, `s / √12` for each of step `s`, which grows with the greatest of the inputs that
//! share a scale. Rounding 4096 standard normal numbers by groups gives 0.54 % for groups of 32, 0.65 % for 128, 0.70 %
//! for 256 and 0.87 % for one scale a row with 8 bits, and 16383 / 127 times less with 15; with 8 of the 4096
//! channels 40 times as large 1.1 %, 2.2 %, 3.0 % and 8.3 %. The budgets are these figures, with room for chance: a tenth,
//! and a quarter for outliers, since their number is small.

use crate::format::{Format, Precision};

/// What the activations look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// Independent and normally distributed.
    Gaussian,
    /// The same, with 8 of 4096 channels 40 times as large.
    Outliers,
}

/// 8-bit rounding error of groups of up to so many inputs: Gaussian, with outliers.
const A8: [(usize, f64, f64); 6] = [
    (16, 0.0047, 0.0078),
    (32, 0.0054, 0.0111),
    (64, 0.0059, 0.0157),
    (128, 0.0065, 0.0215),
    (256, 0.0070, 0.0304),
    (4096, 0.0087, 0.0832),
];
/// Levels of 15 bits over those of 8.
const A16_LEVELS: f64 = 16383.0 / 127.0;
/// Of sums of 4096 terms in f32: about 2⁻²⁴ for each term, added like a random walk.
const F32: f64 = 3e-6;

/// The greatest relative L2 error of products with `k` inputs, at most 4096.
///
/// ```
/// use farthing_kernels::format::{Format, Precision, SuperBlock};
/// use farthing_kernels::matmul::budget::{Activations, error_budget};
/// let q4k = Format::Super(SuperBlock::Q4K);
/// assert!(error_budget(q4k, Precision::A8, 4096, Activations::Gaussian) < 0.01);
/// ```
pub fn error_budget(format: Format, precision: Precision, k: usize, activations: Activations) -> f64 {
    let Some(group) = format.activation_group(k).filter(|_| precision != Precision::F32) else { return F32 };
    let (_, gaussian, outliers) = A8.into_iter().find(|&(most, ..)| group <= most).unwrap_or(A8[A8.len() - 1]);
    let error = match activations {
        Activations::Gaussian => 1.1 * gaussian,
        Activations::Outliers => 1.25 * outliers,
    };
    // The sums themselves are rounded too.
    F32 + if precision == Precision::A16 { error / A16_LEVELS } else { error }
}
