//! Rounding to the nearest entry of a table, with the scale of least squared error among a few.
//!
//! MXFP4 has powers of two as scales (OCP Microscaling 1.0): the one that just covers the greatest weight, and the half of
//! it, which clips. Other tables try scales of both signs, from 1.15 to 0.7 of the one that covers the greatest weight: the
//! values of IQ4_NL are not symmetric.

use super::{FloatType, Table};

/// Codes and scales of one row.
pub(super) fn row(weights: &[f32], table: Table, group: usize, kind: FloatType, codes: &mut [u8], scales: &mut [f32]) {
    let values = table.values().map(f32::from);
    let most = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    for ((weights, codes), scale) in weights.chunks(group).zip(codes.chunks_mut(group)).zip(scales) {
        let covering = weights.iter().fold(0.0f32, |most, w| most.max(w.abs())) / most;
        let candidates: Vec<f32> = match table {
            // A scale below the least normal number rounds everything to zero.
            Table::Mxfp4 if covering < f32::MIN_POSITIVE => vec![0.0],
            Table::Mxfp4 => {
                let above = f32::from_bits((covering.to_bits() + 0x007f_ffff) & 0x7f80_0000);
                vec![above, above / 2.0]
            }
            Table::Nf4 | Table::Iq4Nl => {
                let ratios = (0..19).map(|step| kind.round(covering * (1.15 - step as f32 / 40.0)));
                ratios.flat_map(|scale| [scale, -scale]).collect()
            }
        };
        let mut least = f64::INFINITY;
        for candidate in candidates {
            let error: f64 = weights
                .iter()
                .map(|&w| f64::from(w - candidate * values[nearest(&values, w, candidate)]).powi(2))
                .sum();
            // An infinite scale, beyond the type, is left for packing to refuse.
            if error < least || !candidate.is_finite() {
                (least, *scale) = (error, candidate);
            }
        }
        for (code, &w) in codes.iter_mut().zip(weights) {
            *code = nearest(&values, w, *scale) as u8;
        }
    }
}

/// The first entry that is nearest to `w / scale`.
fn nearest(values: &[f32; 16], w: f32, scale: f32) -> usize {
    let target = if scale == 0.0 { 0.0 } else { w / scale };
    let distance = |code: usize| (values[code] - target).abs();
    (1..16).fold(0, |best, code| if distance(code) < distance(best) { code } else { best })
}
