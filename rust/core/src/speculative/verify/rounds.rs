//! Sampled trees, node by node from the root.

use std::borrow::Cow;

use super::follow::sampled;
use super::{Coin, Draft, Float, Law, Origin, Rows, Siblings, Verdict};
use crate::error::Error;

/// Multi-round verification (`SpecInfer`, Miao et al. 2023, <https://arxiv.org/abs/2305.09781>): children of a node in the order
/// in which they were drawn, each kept with probability `min(1, p/q)`, each rejected one taken out of p (and out of q,
/// where siblings are distinct). A chain is verified token by token; one-hot trees are followed ([`sampled`]).
pub fn rounds<F: Float>(p: &Rows<'_, F>, draft: &Draft<'_, F>, coin: &mut impl Coin) -> Result<Verdict, Error> {
    draft.check(p)?;
    let Origin::Sampled { q, siblings } = draft.origin else { return sampled(p, draft.shape, coin) };
    let mut verdict = Verdict::root();
    'rows: loop {
        let row = verdict.row();
        let mut left = Left::new(p.law(row));
        for child in draft.shape.children(row) {
            let (q, x) = (q.law(row), draft.shape.token(child));
            if coin.flip(left.target(x), left.drafter(q, x)) {
                verdict.accept(draft.shape, child);
                continue 'rows;
            }
            left.reject(1.0, q, x, siblings);
        }
        return Ok(verdict.end(coin.draw(&left.law())));
    }
}

/// What is left of the laws at a row while its children are rejected; copied with the first of them.
pub(super) struct Left<'a, F> {
    p: Law<'a, F>,
    left: Option<(Vec<f64>, Vec<f64>)>,
}

impl<'a, F: Float> Left<'a, F> {
    pub(super) fn new(p: Law<'a, F>) -> Left<'a, F> {
        Left { p, left: None }
    }

    /// What the target would still take.
    pub(super) fn target(&self, token: u32) -> f64 {
        self.left.as_ref().map_or_else(|| self.p.of(token), |(p, _)| p[token as usize])
    }

    /// The law that the next child was drawn from.
    pub(super) fn drafter(&self, q: Law<'_, F>, token: u32) -> f64 {
        self.left.as_ref().map_or_else(|| q.of(token), |(_, q)| q[token as usize])
    }

    /// Takes a rejected child out: `p ← max(mass · p - q, 0)`, normalised; returns the sum before. Where that is 0, p
    /// stays.
    pub(super) fn reject(&mut self, mass: f64, q: Law<'_, F>, token: u32, siblings: Siblings) -> f64 {
        let target = self.p;
        let (p, q) = self.left.get_or_insert_with(|| (target.probabilities().collect(), q.probabilities().collect()));
        let sum: f64 = p.iter().zip(&*q).map(|(&p, &q)| (mass * p - q).max(0.0)).sum();
        if sum > 0.0 {
            p.iter_mut().zip(&*q).for_each(|(p, &q)| *p = (mass * *p - q).max(0.0) / sum);
        }
        if siblings == Siblings::Distinct {
            q[token as usize] = 0.0;
            let total: f64 = q.iter().sum();
            if total > 0.0 {
                for q in q {
                    *q /= total;
                }
            }
        }
        sum
    }

    /// What the target would still take, to draw from.
    pub(super) fn law(&self) -> Cow<'_, [f64]> {
        match &self.left {
            Some((p, _)) => Cow::Borrowed(p),
            None => Cow::Owned(self.p.probabilities().collect()),
        }
    }
}
