//! Verification: which drafted tokens stay, and what follows them, so that the text has the target's law.
//!
//! Rows: row 0 stands behind the last committed token, row `i + 1` behind drafted node `i`. All rules speak of laws after
//! the processors ([`laws`]). Lossless: [`greedy`], [`coupled`] (the engine's own), [`tokens`], [`block`], [`rounds`],
//! [`traversal`]; the rules of [`lossy`] are not.
//!
//! A rule decides by a [`Coin`]; tests put one in that takes every side in turn, and so see the exact law of this very
//! code. Every lossless rule gives the target's law for whatever was drafted, provided that its [`Origin`] is true.

mod chain;
mod coin;
mod follow;
mod intersection;
pub mod lossy;
mod processors;
mod rounds;
mod rows;
mod shape;
mod traversal;

#[cfg(test)]
mod enumerate;
#[cfg(test)]
mod tests;

pub use chain::{block, tokens};
pub use coin::{Coin, Seeded};
pub use follow::{coupled, draw_coupled, follow, greedy, sampled};
pub use intersection::Intersection;
pub use processors::laws;
pub use rounds::rounds;
pub use rows::{Float, Law, Rows};
pub use shape::Shape;
pub use traversal::traversal;

use crate::error::Error;

/// How the tokens of a draft came to be. There is no default: a softmax is no origin of tokens that an argmax took.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'a, F = f32> {
    /// Each token is a function of the tokens before it: a look-up, the most likely token of a head, the k most likely.
    OneHot,
    /// Each token was drawn from a law, and nothing that depends on the token itself decided whether to submit it.
    Sampled {
        /// `(rows, vocabulary)`: from row r the children of row r were drawn. Rows behind the last with children may be
        /// missing, so a chain of k tokens brings k.
        q: &'a Rows<'a, F>,
        /// How those of one node were drawn.
        siblings: Siblings,
    },
}

/// How several children of one node were drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Siblings {
    /// With replacement.
    Independent,
    /// Without: each from the law less its elder siblings.
    Distinct,
}

/// Drafted tokens and their origin.
#[derive(Clone, Copy, Debug)]
pub struct Draft<'a, F = f32> {
    /// The tokens and where they hang.
    pub shape: &'a Shape,
    /// Where they come from.
    pub origin: Origin<'a, F>,
}

impl<'a, F: Float> Draft<'a, F> {
    /// Whether shapes and tokens fit the target's laws.
    fn check(&self, p: &Rows<'_, F>) -> Result<(), Error> {
        self.shape.check(p.len(), p.width())?;
        let Origin::Sampled { q, .. } = self.origin else { return Ok(()) };
        if q.width() != p.width() {
            return Err(Error::argument("q", format!("rows of {}", q.width()), format!("{}, as p has", p.width())));
        }
        match (0..p.len()).find(|&row| self.shape.has_children(row) && !q.has(row)) {
            Some(row) => Err(Error::argument("q", format!("no law at row {row}"), "one wherever tokens were drafted")),
            None => Ok(()),
        }
    }

    /// The laws that the tokens of a chain were drawn from, if they were.
    fn chain(&self, p: &Rows<'_, F>, rule: &str) -> Result<Option<&'a Rows<'a, F>>, Error> {
        self.check(p)?;
        match self.origin {
            Origin::OneHot => Ok(None),
            Origin::Sampled { q, .. } if self.shape.is_chain() => Ok(Some(q)),
            Origin::Sampled { .. } => {
                let got = format!("a sampled tree under {rule} verification");
                Err(Error::unsupported(got, "multi-round and traversal verification take trees"))
            }
        }
    }
}

/// What a pass has brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The drafted tokens that stay, and one more.
    pub tokens: Vec<u32>,
    /// The row that each of them was decided at: its law is there, its logits, and the keys and values of the token
    /// before it.
    pub rows: Vec<usize>,
}

impl Verdict {
    fn root() -> Verdict {
        Verdict { tokens: Vec::new(), rows: vec![0] }
    }

    /// The path to a row.
    fn at(shape: &Shape, row: usize) -> Verdict {
        let mut rows: Vec<usize> = shape.path(row).chain([0]).collect();
        rows.reverse();
        Verdict { tokens: rows[1..].iter().map(|&row| shape.token(row)).collect(), rows }
    }

    /// The row whose token is to be decided next.
    fn row(&self) -> usize {
        self.rows[self.rows.len() - 1]
    }

    fn accept(&mut self, shape: &Shape, child: usize) {
        self.tokens.push(shape.token(child));
        self.rows.push(child);
    }

    fn end(mut self, token: usize) -> Verdict {
        self.tokens.push(token as u32);
        self
    }

    /// Drafted tokens that stay.
    pub fn accepted(&self) -> usize {
        self.tokens.len() - 1
    }

    /// The drafted node behind which the last token stands; `None` where no draft stays.
    pub fn node(&self) -> Option<usize> {
        self.row().checked_sub(1)
    }
}
