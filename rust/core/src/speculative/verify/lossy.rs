//! Rules that accept more and change the text's law. Nothing uses them unless it is asked for by name.

use farthing_kernels::math::{exp, log};

use super::follow::draw;
use super::{Coin, Draft, Float, Law, Rows, Shape, Verdict};
use crate::error::Error;

/// Medusa's typical acceptance (Cai et al. 2024, <https://arxiv.org/abs/2401.10774>): a token stays where
/// `p > min(epsilon, delta · exp(-entropy))`; of the longest paths that stay the likeliest, then the most likely token.
/// No chance is involved. The reference code has epsilon 0.09 and delta 0.3.
pub fn typical<F: Float>(p: &Rows<'_, F>, shape: &Shape, epsilon: f64, delta: f64) -> Result<Verdict, Error> {
    shape.check(p.len(), p.width())?;
    share("epsilon", epsilon, 0.0..=1.0)?;
    share("delta", delta, 0.0..=1.0)?;
    // (tokens that stay, their log-probability) of each row that does.
    let mut kept = vec![None; p.len()];
    kept[0] = Some((0usize, 0.0f64));
    let mut best = (0, 0, 0.0);
    for row in 0..p.len() {
        let Some((length, likelihood)) = kept[row] else { continue };
        if length > best.1 || (length == best.1 && likelihood > best.2) {
            best = (row, length, likelihood);
        }
        let law = p.law(row);
        let threshold = epsilon.min(delta * f64::from(exp(-(entropy(law) as f32))));
        for child in shape.children(row) {
            let p = law.of(shape.token(child));
            if p > threshold {
                kept[child] = Some((length + 1, likelihood + f64::from(log(p as f32))));
            }
        }
    }
    Ok(Verdict::at(shape, best.0).end(p.law(best.0).mode() as usize))
}

fn entropy<F: Float>(p: Law<'_, F>) -> f64 {
    p.probabilities().filter(|&p| p > 0.0).map(|p| -p * f64::from(log(p as f32))).sum()
}

/// The thresholds of `SGLang`: of the children of a row, in their order, the one stays at which `Σ p / accumulated` of those so far
/// exceeds a number drawn once, or whose own p is at least `single`; behind none of them p without them is drawn from. Both
/// 1 is exact, for any draft.
pub fn threshold<F: Float>(
    p: &Rows<'_, F>,
    shape: &Shape,
    single: f64,
    accumulated: f64,
    coin: &mut impl Coin,
) -> Result<Verdict, Error> {
    shape.check(p.len(), p.width())?;
    share("single", single, 0.0..=1.0)?;
    share("accumulated", accumulated, f64::MIN_POSITIVE..=1.0)?;
    let mut verdict = Verdict::root();
    'rows: loop {
        let row = verdict.row();
        let law = p.law(row);
        let mut left: Vec<f64> = law.probabilities().collect();
        let mut reached = 0.0;
        for child in shape.children(row) {
            let token = shape.token(child);
            let p = law.of(token);
            // The number is above what was reached before.
            if p >= single || coin.flip(p, accumulated - reached) {
                verdict.accept(shape, child);
                continue 'rows;
            }
            reached += p;
            left[token as usize] = 0.0;
        }
        if left.iter().all(|&p| p == 0.0) {
            left = law.probabilities().collect();
        }
        return Ok(verdict.end(coin.draw(&left)));
    }
}

/// TensorRT-LLM's relaxed acceptance: a token stays where it is among the `top` most likely and no less likely than the
/// most likely by more than `delta`; then the most likely token. No chance is involved.
pub fn relaxed<F: Float>(p: &Rows<'_, F>, shape: &Shape, top: usize, delta: f64) -> Result<Verdict, Error> {
    shape.check(p.len(), p.width())?;
    share("delta", delta, 0.0..=1.0)?;
    if top == 0 {
        return Err(Error::argument("top", top, "1 or more"));
    }
    let mut verdict = Verdict::root();
    loop {
        let row = verdict.row();
        let law = p.law(row);
        let mode = law.mode();
        let stays = |&child: &usize| {
            let token = shape.token(child);
            let p = law.of(token);
            let rank =
                law.probabilities().enumerate().filter(|&(other, q)| q > p || (q == p && other < token as usize));
            p >= law.of(mode) - delta && rank.take(top).count() < top
        };
        match shape.children(row).find(stays) {
            Some(child) => verdict.accept(shape, child),
            None => return Ok(verdict.end(mode as usize)),
        }
    }
}

/// Token-wise verification against `weight · p + (1 - weight) · q` (Diverse, <https://arxiv.org/abs/2604.07622>, as
/// transformers' `assistant_ensemble_weight`); the token behind a chain that stays whole is drawn from p. Weight 1 is exact.
pub fn ensemble<F: Float>(
    p: &Rows<'_, F>,
    draft: &Draft<'_, F>,
    weight: f64,
    coin: &mut impl Coin,
) -> Result<Verdict, Error> {
    share("weight", weight, 0.0..=1.0)?;
    let Some(q) = draft.chain(p, "ensemble")? else {
        return Err(Error::unsupported(
            "a one-hot draft under ensemble verification",
            "it takes drafts drawn from a law q",
        ));
    };
    let mut verdict = Verdict::root();
    for row in 0..draft.shape.len() {
        let (p, q, x) = (p.law(row), q.law(row), draft.shape.token(row + 1));
        if !coin.flip(weight * p.of(x) + (1.0 - weight) * q.of(x), q.of(x)) {
            // What the mixture has above q is `weight` times what p has.
            return Ok(verdict.end(coin.draw(&p.residual(1.0, q))));
        }
        verdict.accept(draft.shape, row + 1);
    }
    Ok(verdict.end(draw(p.law(draft.shape.len()), coin)))
}

fn share(name: &'static str, got: f64, expected: std::ops::RangeInclusive<f64>) -> Result<(), Error> {
    if expected.contains(&got) {
        return Ok(());
    }
    let expected = if *expected.start() > 0.0 { "a number above 0, 1 at most" } else { "a number from 0 to 1" };
    Err(Error::argument(name, got, expected))
}
