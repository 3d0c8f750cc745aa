//! From a drafter's states to the tokens it finds likeliest: by the target's head, by a few of its rows in 4 bits, or by a
//! head of the drafter's own.

use super::weights::Linear;
use super::{Draft, Target};
use crate::error::Error;
use farthing_kernels::sample::{Sampling, sample};
use farthing_kernels::score::{Score, score};
use farthing_kernels::topk::top_k;

/// The head of a drafter.
#[derive(Debug, Default)]
pub(super) struct TokenHead {
    /// `None` asks the target's.
    own: Option<Linear>,
    /// Of each row; empty when rows are ids.
    tokens: Vec<u32>,
    /// `(t, rows)` of the last call: logits, or their softmax.
    values: Vec<f32>,
    rows: usize,
    /// All logits since they were asked for.
    kept: Option<Vec<f32>>,
}

/// A token that may come next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Likely {
    pub(super) token: u32,
    pub(super) probability: f32,
}

impl TokenHead {
    /// A head of its own whose row `i` stands for `tokens[i]`, or for `i` when there are no tokens.
    pub(super) fn own(linear: Linear, tokens: Vec<u32>) -> TokenHead {
        TokenHead { rows: linear.rows(), own: Some(linear), tokens, ..TokenHead::default() }
    }

    /// The target's head, or its rows of `tokens` in 4 bits.
    pub(super) fn of_target(target: &dyn Target, tokens: Option<Vec<u32>>) -> Result<TokenHead, Error> {
        match tokens {
            Some(tokens) => Ok(TokenHead::own(Linear::new(target.head_rows(&tokens)?, None), tokens)),
            None => Ok(TokenHead { rows: target.vocabulary(), ..TokenHead::default() }),
        }
    }

    /// Bytes of a head of its own.
    pub(super) fn nbytes(&self) -> usize {
        self.own.as_ref().map_or(0, Linear::nbytes)
    }

    /// Computes the logits of `states: (t, hidden)`, for the calls that follow.
    pub(super) fn compute(&mut self, target: &dyn Target, states: &[f32]) {
        let t = states.len() / target.hidden();
        self.values.resize(t * self.rows, 0.0);
        match &mut self.own {
            Some(own) => own.multiply(target.pool(), states, &mut self.values),
            None => target.logits(states, &mut self.values),
        }
        if let Some(kept) = &mut self.kept {
            kept.extend_from_slice(&self.values);
        }
    }

    /// Keeps all logits from now on.
    pub(super) fn keep(&mut self) {
        self.kept = Some(Vec::new());
    }

    /// The logits kept so far.
    pub(super) fn kept(&mut self) -> Vec<f32> {
        self.kept.take().unwrap_or_default()
    }

    /// Rows: tokens that it tells apart.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    fn token(&self, row: usize) -> u32 {
        self.tokens.get(row).copied().unwrap_or(row as u32)
    }

    /// The token that the request's own sampling draws from row `row` at `depth` tokens behind the text: with the noise
    /// that the target will meet there. `None` when the logits define no distribution.
    pub(super) fn draw(&self, row: usize, depth: usize, draft: &Draft<'_>, vocabulary: usize) -> Option<Likely> {
        // By id, so that each token meets its own noise; tokens without a row are never drawn.
        let mut whole = vec![f32::NEG_INFINITY; vocabulary];
        for (index, &logit) in self.values[row * self.rows..][..self.rows].iter().enumerate() {
            if let Some(place) = whole.get_mut(self.token(index) as usize) {
                *place = logit;
            }
        }
        let position = (draft.tokens.len() + depth - 1) as u64;
        let sampling = Sampling { position, top_logprobs: 0, ..draft.sampling.clone() };
        let drawn = sample(&mut whole, &sampling, draft.counts).ok()?;
        Some(Likely { token: drawn.token, probability: drawn.logprob.exp() })
    }

    /// Turns all logits into probabilities; `draw` is of no use afterwards.
    pub(super) fn normalise(&mut self) {
        score(Score::Softmax, &mut self.values, self.rows);
    }

    /// The `count` likeliest tokens of row `row` after [`TokenHead::normalise`], descending; fewer when there are fewer.
    pub(super) fn likeliest(&self, row: usize, count: usize) -> Vec<Likely> {
        let mut ids = vec![0; count.min(self.rows)];
        let values = &self.values[row * self.rows..][..self.rows];
        top_k(values, self.rows, ids.len(), &mut ids);
        let likely = |&id: &u32| Likely { token: self.token(id as usize), probability: values[id as usize] };
        // States that are not finite give no probabilities.
        ids.iter().map(likely).filter(|likely| likely.probability > 0.0).collect()
    }
}

/// Puts a token that the target's noise draws from the guess before the others: it is right more often than its
/// probability says.
pub(super) fn favour(likely: &mut Vec<Likely>, drawn: Option<Likely>) {
    if let (Some(drawn), Some(&first)) = (drawn, likely.first()) {
        likely.retain(|other| other.token != drawn.token);
        likely.insert(0, Likely { probability: drawn.probability.max(first.probability), ..drawn });
    }
}

/// Class of confidence of a node with this probability.
pub(super) fn class(probability: f32) -> u8 {
    (probability * 10.0).clamp(0.0, 9.0) as u8
}

/// The first `most` ids and those that end an answer; `None` when that is the whole vocabulary.
pub(super) fn first_tokens(target: &dyn Target, most: usize) -> Option<Vec<u32>> {
    let vocabulary = target.vocabulary();
    if most >= vocabulary {
        return None;
    }
    let ends = target.tokenizer().map_or(&[][..], |tokenizer| tokenizer.eos_ids());
    let ends = ends.iter().copied().filter(|&id| (most..vocabulary).contains(&(id as usize)));
    Some((0..most as u32).chain(ends).collect())
}
