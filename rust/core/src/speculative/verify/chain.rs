//! Sampled chains: token by token, and as a block.

use super::follow::{draw, sampled};
use super::{Coin, Draft, Float, Rows, Verdict};
use crate::error::Error;

/// Token-wise rejection sampling (Leviathan et al. 2022, <https://arxiv.org/abs/2211.17192>; Chen et al. 2023,
/// <https://arxiv.org/abs/2302.01318>): keep each token with probability `min(1, p/q)`, draw the first that is not kept from
/// `max(p - q, 0)`. One-hot drafts are followed ([`sampled`]).
///
/// ```
/// use farthing::speculative::verify::{Draft, Origin, Rows, Seeded, Shape, Siblings, tokens};
/// let p = Rows::new("p", &[0.0, 1.0, 0.5, 0.5f32], 2)?;
/// let q = Rows::new("q", &[1.0, 0.0f32], 2)?;
/// let shape = Shape::chain(&[0]);
/// let draft = Draft { shape: &shape, origin: Origin::Sampled { q: &q, siblings: Siblings::Independent } };
/// assert_eq!(tokens(&p, &draft, &mut Seeded::new(0, 0))?.tokens, [1]);
/// # Ok::<(), farthing::error::Error>(())
/// ```
pub fn tokens<F: Float>(p: &Rows<'_, F>, draft: &Draft<'_, F>, coin: &mut impl Coin) -> Result<Verdict, Error> {
    let Some(q) = draft.chain(p, "token-wise")? else { return sampled(p, draft.shape, coin) };
    let mut verdict = Verdict::root();
    for row in 0..draft.shape.len() {
        let (p, q, x) = (p.law(row), q.law(row), draft.shape.token(row + 1));
        if !coin.flip(p.of(x), q.of(x)) {
            return Ok(verdict.end(coin.draw(&p.residual(1.0, q))));
        }
        verdict.accept(draft.shape, row + 1);
    }
    Ok(verdict.end(draw(p.law(draft.shape.len()), coin)))
}

/// Block verification (Sun et al. 2024, <https://arxiv.org/abs/2403.10444>): how many tokens stay is decided for the chain as
/// a whole, and never fewer on average than token by token. One-hot drafts, where nothing is to be gained, are followed.
pub fn block<F: Float>(p: &Rows<'_, F>, draft: &Draft<'_, F>, coin: &mut impl Coin) -> Result<Verdict, Error> {
    let Some(q) = draft.chain(p, "block")? else { return sampled(p, draft.shape, coin) };
    let length = draft.shape.len();
    let mut masses = vec![1.0];
    for row in 0..length {
        let x = draft.shape.token(row + 1);
        masses.push(carried(masses[row], p.law(row).of(x), q.law(row).of(x)));
    }
    let mut last = length;
    while last > 0 {
        let mass = masses[last];
        let stays = if last == length {
            coin.flip(mass, 1.0)
        } else {
            let excess: f64 = p.law(last).excess(mass, q.law(last)).sum();
            stands(excess, mass, coin)
        };
        if stays {
            break;
        }
        last -= 1;
    }
    let next = if last == length {
        draw(p.law(last), coin)
    } else {
        coin.draw(&p.law(last).residual(masses[last], q.law(last)))
    };
    Ok(Verdict::at(draft.shape, last).end(next))
}

/// The mass that a path keeps with one more token: `min(1, mass · p/q)`, 0 for a token that the target never takes.
pub(super) fn carried(mass: f64, p: f64, q: f64) -> f64 {
    let part = mass * p;
    if part == 0.0 {
        0.0
    } else if part >= q {
        1.0
    } else {
        part / q
    }
}

/// With probability `s/(s + 1 - mass)`, certainly where that is 0/0.
fn stands(excess: f64, mass: f64, coin: &mut impl Coin) -> bool {
    let whole = excess + (1.0 - mass);
    whole <= 0.0 || coin.flip(excess, whole)
}
