//! Sampled trees, from the leaves to the root.

use super::chain::carried;
use super::follow::sampled;
use super::rounds::Left;
use super::{Coin, Draft, Float, Origin, Rows, Verdict};
use crate::error::Error;

/// A row on the path that is being looked at.
struct Visit<'a, F> {
    row: usize,
    /// Share of the path's probability that is left for this row.
    mass: f64,
    left: Left<'a, F>,
    /// The child whose subtree is looked at, or comes next.
    child: Option<usize>,
}

/// Traversal verification (Weng et al. 2025, <https://arxiv.org/abs/2505.12398>): a path is kept or rejected from its leaf
/// upwards, the next sibling's subtree before the parent; never fewer tokens on average than [`rounds`](super::rounds), and
/// on a chain the same as [`block`](super::block). One-hot trees are followed ([`sampled`]).
pub fn traversal<F: Float>(p: &Rows<'_, F>, draft: &Draft<'_, F>, coin: &mut impl Coin) -> Result<Verdict, Error> {
    draft.check(p)?;
    let Origin::Sampled { q, siblings } = draft.origin else { return sampled(p, draft.shape, coin) };
    let shape = draft.shape;
    let visit =
        |row: usize, mass: f64| Visit { row, mass, left: Left::new(p.law(row)), child: shape.children(row).next() };
    // A stack, for chains can be longer than the thread's own.
    let mut above = Vec::new();
    let mut top = visit(0, 1.0);
    loop {
        if let Some(child) = top.child {
            let x = shape.token(child);
            let mass = carried(top.mass, top.left.target(x), top.left.drafter(q.law(top.row), x));
            above.push(std::mem::replace(&mut top, visit(child, mass)));
            continue;
        }
        // The root's mass stays 1.
        let stays = above.is_empty() || coin.flip(top.mass, 1.0);
        let parent = if stays { None } else { above.pop() };
        let Some(parent) = parent else {
            let next = coin.draw(&top.left.law());
            return Ok(Verdict::at(shape, top.row).end(next));
        };
        let rejected = std::mem::replace(&mut top, parent).row;
        let sum = top.left.reject(top.mass, q.law(top.row), shape.token(rejected), siblings);
        let whole = sum + (1.0 - top.mass);
        top.mass = if whole > 0.0 { sum / whole } else { 1.0 };
        top.child = shape.sibling(rejected);
    }
}
