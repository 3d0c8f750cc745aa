//! Rows of weights as laws: f32 or f64 outside, f64 inside.

use super::Shape;
use crate::error::Error;

/// What laws are stored as.
pub trait Float: Copy + Into<f64> + std::fmt::Debug {}
impl Float for f32 {}
impl Float for f64 {}

/// `(rows, width)` weights, each row a law once divided by its sum: what rounding left of a softmax is no bias.
#[derive(Clone, Debug)]
pub struct Rows<'a, F = f32> {
    weights: &'a [F],
    totals: Vec<f64>,
    width: usize,
}

impl<'a, F: Float> Rows<'a, F> {
    /// Rows of `width` weights, none negative, none infinite, in no row all zero.
    pub fn new(name: &'static str, weights: &'a [F], width: usize) -> Result<Rows<'a, F>, Error> {
        Rows::some(name, weights, width, |_| true)
    }

    /// The laws that a draft was drawn from: only rows with children are looked at.
    pub fn of_draft(weights: &'a [F], width: usize, shape: &Shape) -> Result<Rows<'a, F>, Error> {
        Rows::some("q", weights, width, |row| shape.has_children(row))
    }

    fn some(
        name: &'static str,
        weights: &'a [F],
        width: usize,
        wanted: impl Fn(usize) -> bool,
    ) -> Result<Rows<'a, F>, Error> {
        if width == 0 || !weights.len().is_multiple_of(width) {
            return Err(Error::argument(
                name,
                format!("{} weights", weights.len()),
                format!("rows of {width}, 1 or more"),
            ));
        }
        let mut totals = Vec::with_capacity(weights.len() / width);
        for (row, weights) in weights.chunks_exact(width).enumerate() {
            let mut total = 0.0;
            if !wanted(row) {
                totals.push(total);
                continue;
            }
            for (token, &weight) in weights.iter().enumerate() {
                let weight: f64 = weight.into();
                if !(0.0..f64::INFINITY).contains(&weight) {
                    let got = format!("{weight} for token {token} in row {row}");
                    return Err(Error::argument(name, got, "probabilities, 0 or above"));
                }
                total += weight;
            }
            // Rows of f64 may add up to infinity.
            if !(total > 0.0 && total < f64::INFINITY) {
                return Err(Error::argument(name, format!("row {row} with sum {total}"), "probabilities of sum 1"));
            }
            totals.push(total);
        }
        Ok(Rows { weights, totals, width })
    }

    /// Whether a row was looked at.
    pub(super) fn has(&self, row: usize) -> bool {
        self.totals.get(row).is_some_and(|&total| total > 0.0)
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.totals.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.totals.is_empty()
    }

    /// Tokens of the vocabulary.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The law of a row.
    pub fn law(&self, row: usize) -> Law<'_, F> {
        Law { weights: &self.weights[row * self.width..][..self.width], total: self.totals[row] }
    }
}

/// The law of one token.
#[derive(Clone, Copy, Debug)]
pub struct Law<'a, F = f32> {
    weights: &'a [F],
    total: f64,
}

impl<'a, F: Float> Law<'a, F> {
    /// Probability of a token.
    pub fn of(self, token: u32) -> f64 {
        self.weights[token as usize].into() / self.total
    }

    /// Probabilities of all tokens.
    pub fn probabilities(self) -> impl Iterator<Item = f64> + 'a {
        self.weights.iter().map(move |&weight| weight.into() / self.total)
    }

    /// `max(mass · self - other, 0)` for each token.
    pub(super) fn excess(self, mass: f64, other: Law<'a, F>) -> impl Iterator<Item = f64> + 'a {
        self.probabilities().zip(other.probabilities()).map(move |(p, q)| (mass * p - q).max(0.0))
    }

    /// The same to draw from; the law itself where nothing of it exceeds the other, which is rounding's work.
    pub(super) fn residual(self, mass: f64, other: Law<'a, F>) -> Vec<f64> {
        let residual: Vec<f64> = self.excess(mass, other).collect();
        if residual.iter().any(|&weight| weight > 0.0) { residual } else { self.probabilities().collect() }
    }

    /// The most likely token, the lower id among equals.
    pub fn mode(self) -> u32 {
        argmax(self.weights) as u32
    }
}

/// Index of the greatest, the first among equals.
pub(super) fn argmax<F: Float>(values: &[F]) -> usize {
    let mut best = 0;
    for (index, &value) in values.iter().enumerate() {
        if value.into() > values[best].into() {
            best = index;
        }
    }
    best
}
