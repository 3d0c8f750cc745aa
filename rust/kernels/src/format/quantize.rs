//! Round-to-nearest quantisation by groups, without calibration.
//!
//! symmetric: `s = absmax / (2^(b-1) - 1)`, `q = clamp(rne(w / s), -2^(b-1), 2^(b-1) - 1)`; zero point:
//! `s = (max(w, 0) - min(w, 0)) / (2^b - 1)`, `z = rne(-min / s)`; minimum: `s = (max - min) / (2^b - 1)`. Scale and
//! minimum are rounded to their stored type before the codes are computed from them.

use super::pack::pack_rows;
use super::{Bits, FloatType, Format, Offset, PackError, PackedMatrix, Precision};

impl PackedMatrix {
    /// Quantises rows of floats to an integer `format`. `row(n, weights)` fills `weights: (k,)` of row `n`.
    ///
    /// A weight that is not finite is an error, and so is a range that the type of the scales can't hold.
    pub fn quantize<E: Send>(
        n: usize,
        k: usize,
        format: Format,
        precision: Precision,
        row: impl Fn(usize, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, PackError<E>> {
        let Format::Integer { bits, group, offset, scale: kind } = format else {
            return Err(PackError::NotInteger { got: format });
        };
        pack_rows(n, k, format, precision, |n, codes| {
            let mut weights = vec![0.0; k];
            row(n, &mut weights).map_err(PackError::Source)?;
            if let Some(column) = weights.iter().position(|weight| !weight.is_finite()) {
                return Err(PackError::Weight { row: n, column, got: weights[column] });
            }
            for (g, (weights, codes_of_group)) in weights.chunks(group).zip(codes.codes.chunks_mut(group)).enumerate() {
                let (scale, stored) = quantize_group(bits, offset, kind, weights, codes_of_group);
                codes.scales[g] = scale;
                if let Some(offset) = codes.offsets.get_mut(g) {
                    *offset = stored;
                }
            }
            Ok(())
        })
    }
}

/// Codes of one group; returns its scale and its zero point or minimum.
fn quantize_group(bits: Bits, offset: Offset, kind: FloatType, weights: &[f32], codes: &mut [u8]) -> (f32, f32) {
    let top = f32::from(bits.maximum());
    let low = weights.iter().copied().fold(f32::INFINITY, f32::min);
    let high = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (scale, zero, base, stored) = match offset {
        Offset::Symmetric => {
            let bias = f32::from(bits.bias());
            (kind.round(low.abs().max(high.abs()) / (bias - 1.0)), bias, 0.0, 0.0)
        }
        Offset::ZeroPoint => {
            let (low, high) = (low.min(0.0), high.max(0.0));
            let scale = kind.round((high - low) / top);
            let zero = if scale > 0.0 { (-low / scale).round_ties_even().clamp(0.0, top) } else { 0.0 };
            (scale, zero, 0.0, zero)
        }
        Offset::Minimum => {
            let minimum = kind.round(low);
            (kind.round((high - low) / top), 0.0, minimum, minimum)
        }
    };
    for (code, &weight) in codes.iter_mut().zip(weights) {
        // A scale that rounds to zero leaves every weight at the code of zero.
        let steps = if scale > 0.0 { ((weight - base) / scale).round_ties_even() } else { 0.0 };
        *code = (steps + zero).clamp(0.0, top) as u8;
    }
    (scale, stored)
}
