//! Rounding to -1, 0 and 1, as BitNet b1.58 does (arXiv 2402.17764): `q = clamp(rne(w / mean|w|), -1, 1)`.
//!
//! The scale is then the one of least squares for these codes, `Σ w q / Σ q²`: weights that are ternary already come back
//! as they are, and others lose less than with the mean itself. Ordinary models do not survive ternary weights.

use super::FloatType;

/// Codes and scales of one row.
pub(super) fn row(weights: &[f32], group: usize, kind: FloatType, codes: &mut [u8], scales: &mut [f32]) {
    let groups = weights.chunks(group).zip(codes.chunks_mut(group));
    for ((weights, codes), scale) in groups.zip(scales) {
        let mean = weights.iter().map(|&w| f64::from(w.abs())).sum::<f64>() / weights.len() as f64;
        let inverse = if mean > 0.0 { 1.0 / mean } else { 0.0 };
        let (mut product, mut count) = (0.0, 0u32);
        for (code, &w) in codes.iter_mut().zip(weights) {
            let q = (f64::from(w) * inverse).round_ties_even().clamp(-1.0, 1.0);
            product += q * f64::from(w);
            count += u32::from(q != 0.0);
            *code = (q + 1.0) as u8;
        }
        *scale = kind.round(if count > 0 { (product / f64::from(count)) as f32 } else { 0.0 });
    }
}
