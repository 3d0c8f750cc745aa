//! One draw from a row of logits: processors, truncation without a full sort, and Gumbel-max.
//!
//! Order: repetition, frequency and presence penalties, allowed tokens, a lift, temperature, min-p, top-k, top-p. The noise of
//! a token is a function of (seed, position, token) alone, so equal distributions give equal tokens whatever else runs.

mod counts;
mod truncate;

use crate::isa::Isa;
use crate::math::{exp_lanes, log};
use crate::philox::{GUMBEL_BOUND, VECTORS, gumbel_lanes, may_exceed, words};
use crate::selftest::float_level;
use crate::vector::{Kernel, LANES, Simd, dispatch};

pub use counts::TokenCounts;
use truncate::Cut;

/// Lifts one token's logit towards the greatest one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lift {
    /// The token.
    pub token: u32,
    /// Part of the way, 0 to 1.
    pub strength: f32,
    /// The way ends so far below the greatest logit, at least 0.
    pub margin: f32,
}

/// How a row of logits becomes a token.
#[derive(Clone, Debug)]
pub struct Sampling<'a> {
    /// Divides the logits; 0 takes the most likely token, the lower id among equals.
    pub temperature: f32,
    /// Keeps the k most likely tokens, lower ids among equals.
    pub top_k: Option<usize>,
    /// Keeps the smallest set of most likely tokens whose mass reaches it (among those that min-p and top-k left), the
    /// crossing one included, lower ids among equals; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this many times as likely as the most likely; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the output; 0 changes nothing.
    pub presence_penalty: f32,
    /// Subtracted once for each occurrence in the output; 0 changes nothing.
    pub frequency_penalty: f32,
    /// Bit `token % 64` of word `token / 64` says whether the token may be drawn; `None` allows all.
    pub allowed: Option<&'a [u64]>,
    /// Applied to what penalties and the allowed tokens leave; never lowers a logit, nor lifts a forbidden one.
    pub lift: Option<Lift>,
    /// Key of the noise.
    pub seed: u64,
    /// Absolute position of the token to be drawn; counter of the noise.
    pub position: u64,
    /// Number of most likely tokens to report in [`Draw::top`].
    pub top_logprobs: usize,
}

impl Default for Sampling<'_> {
    /// Plain sampling at temperature 1, seed 0, position 0.
    fn default() -> Self {
        Sampling {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            allowed: None,
            lift: None,
            seed: 0,
            position: 0,
            top_logprobs: 0,
        }
    }
}

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// Its id.
    pub token: u32,
    /// Its natural log-probability under the softmax of the logits as they came, before any processor.
    pub logprob: f32,
    /// The most likely tokens and their log-probabilities under the same softmax, descending, lower ids among equals.
    pub top: Vec<(u32, f32)>,
}

/// The logits define no distribution.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// A logit is NaN or positive infinity.
    #[error("logit of token {token}: got {value}, expected a number below infinity")]
    NotFinite {
        /// The first such token.
        token: u32,
        /// Its logit.
        value: f32,
    },
    /// Every token is at minus infinity, or forbidden.
    #[error("no token left to draw: all {tokens} are forbidden or at minus infinity")]
    NothingAllowed {
        /// Length of the row.
        tokens: usize,
    },
}

/// Draws a token from `logits`: (vocabulary,), which are left processed. `history` serves the penalties alone and may
/// be empty without them.
///
/// ```
/// use farthing_kernels::sample::{Sampling, TokenCounts, sample};
/// let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
/// let draw = sample(&mut [0.0, 2.0, 1.0], &greedy, &TokenCounts::default())?;
/// assert_eq!(draw.token, 1);
/// assert!((draw.logprob + 0.407_606).abs() < 1e-6);
/// # Ok::<(), farthing_kernels::sample::SampleError>(())
/// ```
///
/// # Panics
/// When `allowed` is shorter than the row, or there are no logits.
pub fn sample(logits: &mut [f32], sampling: &Sampling<'_>, history: &TokenCounts) -> Result<Draw, SampleError> {
    sample_with(float_level(), logits, sampling, history)
}

/// [`sample`] on a given level.
#[doc(hidden)]
pub fn sample_with(
    isa: Isa,
    logits: &mut [f32],
    sampling: &Sampling<'_>,
    history: &TokenCounts,
) -> Result<Draw, SampleError> {
    check(logits, sampling);
    dispatch(isa, Sample { logits, sampling, history })
}

fn check(logits: &[f32], sampling: &Sampling<'_>) {
    assert!(!logits.is_empty(), "sample: no logits");
    if let Some(allowed) = sampling.allowed {
        assert!(allowed.len() * 64 >= logits.len(), "sample: {} words allow {} tokens", allowed.len(), logits.len());
    }
}

struct Sample<'a> {
    logits: &'a mut [f32],
    sampling: &'a Sampling<'a>,
    history: &'a TokenCounts,
}

impl Kernel for Sample<'_> {
    type Output = Result<Draw, SampleError>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Result<Draw, SampleError> {
        let Sample { logits, sampling, history } = self;
        let greatest = greatest(simd, logits)?;
        let normaliser = greatest + log(sum_exp(simd, logits, greatest));
        let mut top = most_likely(simd, logits, sampling.top_logprobs);
        for (_, logprob) in &mut top {
            *logprob -= normaliser;
        }
        // Raw logits of the tokens that penalties change.
        let mut raw = history.penalise(logits, sampling);
        if let Some(Lift { token, .. }) = sampling.lift
            && let Some(&logit) = logits.get(token as usize)
            && !raw.iter().any(|(changed, _)| *changed == token)
        {
            raw.push((token, logit));
        }
        let row = Row::new(simd, logits, sampling)?;
        let token = if sampling.temperature == 0.0 {
            row.mode(simd)
        } else {
            let cut = truncate::cut(simd, row, sampling);
            gumbel_max(simd, row, cut, sampling)
        };
        let changed = raw.iter().find(|(changed, _)| *changed == token);
        let logit = changed.map_or(logits[token as usize], |(_, logit)| *logit);
        Ok(Draw { token, logprob: logit - normaliser, top })
    }
}

/// Turns `logits`: (vocabulary,) into the law that [`sample`] draws from with the same arguments: the softmax over the
/// tokens that are left, 0 for the others; at temperature 0 the most likely token has it all.
///
/// ```
/// use farthing_kernels::sample::{Sampling, TokenCounts, probabilities};
/// let mut row = [0.0, 2.0, 2.0, 1.0];
/// probabilities(&mut row, &Sampling { top_k: Some(2), ..Sampling::default() }, &TokenCounts::default())?;
/// assert_eq!(row, [0.0, 0.5, 0.5, 0.0]);
/// # Ok::<(), farthing_kernels::sample::SampleError>(())
/// ```
///
/// # Panics
/// As [`sample`].
pub fn probabilities(logits: &mut [f32], sampling: &Sampling<'_>, history: &TokenCounts) -> Result<(), SampleError> {
    probabilities_with(float_level(), logits, sampling, history)
}

/// [`probabilities`] on a given level.
fn probabilities_with(
    isa: Isa,
    logits: &mut [f32],
    sampling: &Sampling<'_>,
    history: &TokenCounts,
) -> Result<(), SampleError> {
    check(logits, sampling);
    dispatch(isa, Probabilities { logits, sampling, history })
}

struct Probabilities<'a> {
    logits: &'a mut [f32],
    sampling: &'a Sampling<'a>,
    history: &'a TokenCounts,
}

impl Kernel for Probabilities<'_> {
    type Output = Result<(), SampleError>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Result<(), SampleError> {
        let Probabilities { logits, sampling, history } = self;
        greatest(simd, logits)?;
        history.penalise(logits, sampling);
        let row = Row::new(simd, logits, sampling)?;
        if sampling.temperature == 0.0 {
            let token = row.mode(simd) as usize;
            logits.fill(0.0);
            logits[token] = 1.0;
            return Ok(());
        }
        let cut = truncate::cut(simd, row, sampling);
        let Row { greatest, inverse, .. } = row;
        let nothing = simd.splat(f32::NEG_INFINITY);
        for at in (0..logits.len()).step_by(LANES) {
            let x = Row { logits, greatest, inverse }.block(simd, at);
            let left = simd.select(simd.mask(cut.kept(simd, x, at)), x, nothing);
            let block = &mut logits[at..];
            let length = block.len().min(LANES);
            simd.store_part(left, &mut block[..length]);
        }
        // The most likely token is at 0 and always left.
        let share = simd.splat(1.0 / sum_exp(simd, logits, 0.0));
        for at in (0..logits.len()).step_by(LANES) {
            let p = simd.mul(exp_lanes(simd, block(simd, logits, at)), share);
            let block = &mut logits[at..];
            let length = block.len().min(LANES);
            simd.store_part(p, &mut block[..length]);
        }
        Ok(())
    }
}

/// Processed logits as seen at a temperature: `(logit - greatest) / temperature`, so that the greatest is 0.
#[derive(Clone, Copy)]
struct Row<'a> {
    logits: &'a [f32],
    greatest: f32,
    inverse: f32,
}

impl<'a> Row<'a> {
    /// The row of logits that are penalised, the forbidden ones taken away.
    #[inline(always)]
    fn new<S: Simd>(simd: S, logits: &'a mut [f32], sampling: &Sampling<'_>) -> Result<Row<'a>, SampleError> {
        forbid(simd, logits, sampling.allowed);
        let greatest = greatest(simd, logits)?;
        if let Some(Lift { token, strength, margin }) = sampling.lift
            && let Some(logit) = logits.get_mut(token as usize).filter(|logit| **logit > f32::NEG_INFINITY)
        {
            *logit = logit.max(strength.mul_add(greatest - margin - *logit, *logit));
        }
        // A temperature that has no finite inverse is as good as 0.
        Ok(Row { logits, greatest, inverse: (1.0 / sampling.temperature).min(f32::MAX) })
    }

    /// The tempered logits of `at..at + 16`, filled up with minus infinity.
    #[inline(always)]
    fn block<S: Simd>(self, simd: S, at: usize) -> S::F {
        let shifted = simd.sub(block(simd, self.logits, at), simd.splat(self.greatest));
        simd.mul(shifted, simd.splat(self.inverse))
    }

    /// Where each block of 16 starts.
    fn blocks(self) -> impl Iterator<Item = usize> {
        (0..self.logits.len()).step_by(LANES)
    }

    /// The most likely token, the lower id among equals.
    #[inline(always)]
    fn mode<S: Simd>(self, simd: S) -> u32 {
        let greatest = simd.splat(self.greatest);
        for at in self.blocks() {
            let below = simd.bits(simd.less(block(simd, self.logits, at), greatest));
            if let Some(lane) = lanes(!below).next() {
                return (at + lane) as u32;
            }
        }
        unreachable!("some logit is the greatest")
    }
}

/// The vector of logits at `at`, filled up with minus infinity.
#[inline(always)]
fn block<S: Simd>(simd: S, logits: &[f32], at: usize) -> S::F {
    if let Some(whole) = logits[at..].first_chunk() {
        return simd.load(whole);
    }
    let mut padded = [f32::NEG_INFINITY; LANES];
    padded[..logits.len() - at].copy_from_slice(&logits[at..]);
    simd.load(&padded)
}

/// Lanes set in `bits`, ascending.
fn lanes(mut bits: u16) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = bits.trailing_zeros() as usize;
        bits &= bits.wrapping_sub(1);
        (lane < LANES).then_some(lane)
    })
}

/// The greatest logit, once all are known to be below infinity.
#[inline(always)]
fn greatest<S: Simd>(simd: S, logits: &[f32]) -> Result<f32, SampleError> {
    let infinity = simd.splat(f32::INFINITY);
    let mut greatest = simd.splat(f32::NEG_INFINITY);
    for at in (0..logits.len()).step_by(LANES) {
        let x = block(simd, logits, at);
        let bad = !simd.bits(simd.less(x, infinity));
        if let Some(lane) = lanes(bad).next() {
            return Err(SampleError::NotFinite { token: (at + lane) as u32, value: logits[at + lane] });
        }
        greatest = simd.max(greatest, x);
    }
    let greatest = simd.maximum(greatest);
    if greatest == f32::NEG_INFINITY {
        return Err(SampleError::NothingAllowed { tokens: logits.len() });
    }
    Ok(greatest)
}

/// `Σ exp(x - greatest)`, in f64 across blocks of 1024.
#[inline(always)]
fn sum_exp<S: Simd>(simd: S, logits: &[f32], greatest: f32) -> f32 {
    let greatest = simd.splat(greatest);
    let mut total = 0.0f64;
    for logits in logits.chunks(64 * LANES) {
        let mut sums = simd.splat(0.0);
        for at in (0..logits.len()).step_by(LANES) {
            sums = simd.add(sums, exp_lanes(simd, simd.sub(block(simd, logits, at), greatest)));
        }
        total += f64::from(simd.sum(sums));
    }
    total as f32
}

/// The `count` greatest logits, descending, lower ids among equals.
#[inline(always)]
fn most_likely<S: Simd>(simd: S, logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let count = count.min(logits.len());
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    if count == 0 {
        return top;
    }
    for at in (0..logits.len()).step_by(LANES) {
        let last = if top.len() < count { f32::NEG_INFINITY } else { top[count - 1].1 };
        let present = if logits.len() - at < LANES { (1 << (logits.len() - at)) - 1 } else { u16::MAX };
        let mut bits = simd.bits(simd.less(simd.splat(last), block(simd, logits, at)));
        if top.len() < count {
            bits = present;
        }
        for lane in lanes(bits) {
            let x = logits[at + lane];
            let place = top.partition_point(|(_, other)| *other >= x);
            if place < count {
                top.insert(place, ((at + lane) as u32, x));
                top.truncate(count);
            }
        }
    }
    top
}

/// Sets the logits of forbidden tokens to minus infinity.
#[inline(always)]
fn forbid<S: Simd>(simd: S, logits: &mut [f32], allowed: Option<&[u64]>) {
    let Some(allowed) = allowed else { return };
    let nothing = simd.splat(f32::NEG_INFINITY);
    let bits = |block: usize| (allowed[block / 4] >> (block % 4 * LANES)) as u16;
    let (whole, tail) = logits.as_chunks_mut::<LANES>();
    for (i, logits) in whole.iter_mut().enumerate() {
        simd.store(simd.select(simd.mask(bits(i)), simd.load(logits), nothing), logits);
    }
    if !tail.is_empty() {
        let kept = simd.select(simd.mask(bits(whole.len())), simd.load_part(tail), nothing);
        simd.store_part(kept, tail);
    }
}

/// The kept token with the greatest sum of logit and noise, the lower id among equals.
#[inline(always)]
fn gumbel_max<S: Simd>(simd: S, row: Row<'_>, cut: Cut, sampling: &Sampling<'_>) -> u32 {
    // The mode first: most of the others can't beat it, whatever their noise.
    let mut token = row.mode(simd);
    let mut best = f32::NEG_INFINITY;
    let step = VECTORS * LANES;
    let mode = token as usize / step * step;
    for first in std::iter::once(mode).chain((0..row.logits.len()).step_by(step)) {
        let mut blocks = [simd.splat(f32::NEG_INFINITY); VECTORS];
        let mut kept = [0; VECTORS];
        for (i, at) in (first..row.logits.len()).step_by(LANES).take(VECTORS).enumerate() {
            blocks[i] = row.block(simd, at);
            kept[i] = simd.bits(simd.less(simd.splat(best - GUMBEL_BOUND), blocks[i])) & cut.kept(simd, blocks[i], at);
        }
        if kept == [0; VECTORS] {
            continue;
        }
        let words = words(sampling.seed, sampling.position, first as u32);
        for i in 0..VECTORS {
            // Only noise above best - x can win; most words rule it out before any logarithm.
            let bound = exp_lanes(simd, simd.sub(blocks[i], simd.splat(best)));
            let hopeful = kept[i] & simd.bits(may_exceed(simd, &words[i], bound));
            if hopeful == 0 {
                continue;
            }
            let score = simd.add(blocks[i], gumbel_lanes(simd, &words[i]));
            let winners = hopeful & !simd.bits(simd.less(score, simd.splat(best)));
            if winners == 0 {
                continue;
            }
            let mut scores = [0.0; LANES];
            simd.store(score, &mut scores);
            for lane in lanes(winners) {
                let candidate = (first + i * LANES + lane) as u32;
                if scores[lane] > best || (scores[lane] == best && candidate < token) {
                    (best, token) = (scores[lane], candidate);
                }
            }
        }
    }
    token
}

#[cfg(test)]
mod tests;
