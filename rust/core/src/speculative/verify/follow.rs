//! Draw the target's own token at a row, and go on where it was drafted.
//!
//! Whatever was drafted, each token is the target's own draw, so nothing can bias it; for one-hot drafts no rule accepts
//! more. With noise that is a function of (seed, position, token) the text is that without any draft (Daliri, Musco and
//! Suresh 2024, <https://arxiv.org/abs/2408.07978>): the engine draws by `farthing_kernels::sample` and follows.

use std::convert::Infallible;

use farthing_kernels::math::log;
use farthing_kernels::sample::{SampleError, Sampling, TokenCounts, sample};

use super::rows::argmax;
use super::{Coin, Float, Law, Rows, Shape, Verdict};
use crate::error::Error;

/// Draws at row after row until the drawn token was not drafted; `draw` gets the row and the tokens before it.
///
/// ```
/// use farthing::speculative::verify::{Shape, follow};
/// let draft = Shape::tree(&[5, 6, 9], &[None, None, Some(1)])?;
/// let target = [6, 0, 9, 3];
/// let verdict = follow(&draft, |row, _| Ok::<u32, farthing::error::Error>(target[row]))?;
/// assert_eq!((verdict.tokens, verdict.rows), (vec![6, 9, 3], vec![0, 2, 3]));
/// # Ok::<(), farthing::error::Error>(())
/// ```
pub fn follow<E>(shape: &Shape, mut draw: impl FnMut(usize, &[u32]) -> Result<u32, E>) -> Result<Verdict, E> {
    let mut verdict = Verdict::root();
    loop {
        let row = verdict.row();
        let token = draw(row, &verdict.tokens)?;
        verdict.tokens.push(token);
        match shape.child(row, token) {
            Some(child) => verdict.rows.push(child),
            None => return Ok(verdict),
        }
    }
}

/// The most likely token at each row, the lower id among equals. `scores`: (rows, width) logits or probabilities.
pub fn greedy<F: Float>(scores: &[F], width: usize, shape: &Shape) -> Result<Verdict, Error> {
    if width == 0 || !scores.len().is_multiple_of(width) {
        return Err(Error::argument("p", format!("{} numbers", scores.len()), format!("rows of {width}, 1 or more")));
    }
    shape.check(scores.len() / width, width)?;
    follow(shape, |row, _| {
        let scores = &scores[row * width..][..width];
        match scores.iter().position(|&score| score.into().is_nan()) {
            Some(token) => Err(Error::argument("p", format!("NaN for token {token} in row {row}"), "numbers")),
            None => Ok(argmax(scores) as u32),
        }
    })
}

/// Each token by the coin.
pub fn sampled<F: Float>(p: &Rows<'_, F>, shape: &Shape, coin: &mut impl Coin) -> Result<Verdict, Error> {
    shape.check(p.len(), p.width())?;
    let drawn = follow(shape, |row, _| Ok::<u32, Infallible>(draw(p.law(row), coin) as u32));
    Ok(drawn.unwrap_or_else(|never| match never {}))
}

pub(super) fn draw<F: Float>(p: Law<'_, F>, coin: &mut impl Coin) -> usize {
    coin.draw(&p.probabilities().collect::<Vec<f64>>())
}

/// Each token by the noise of its position; `position` is that of the first. The text depends on seed and laws alone, not
/// on what was drafted. A drafter that draws by [`draw_coupled`] at the same positions is right with probability
/// `Σ 1/Σ max(p_y/p_x, q_y/q_x)`, at least `(1 - TV)/(1 + TV)`.
pub fn coupled<F: Float>(p: &Rows<'_, F>, shape: &Shape, seed: u64, position: u64) -> Result<Verdict, Error> {
    shape.check(p.len(), p.width())?;
    follow(shape, |row, before| draw_coupled(p.law(row), seed, position.wrapping_add(before.len() as u64)))
}

/// `argmax(log p + noise)`, as the engine's sampler draws it from the logits `log p`.
pub fn draw_coupled<F: Float>(p: Law<'_, F>, seed: u64, position: u64) -> Result<u32, Error> {
    let no_token = |error: SampleError| Error::NoToken { position: position as usize, error };
    let mut logits: Vec<f32> = p.probabilities().map(|p| log(p as f32)).collect();
    let sampling = Sampling { seed, position, ..Sampling::default() };
    Ok(sample(&mut logits, &sampling, &TokenCounts::default()).map_err(no_token)?.token)
}
