//! A look ahead: whether the answer has settled, found out in the sequence's own pages and taken back.
//!
//! The text waits for the verdict, since where thinking ends may not depend on how fast anything is computed. So nothing
//! has to be forked: what is read to look ahead lies behind the text in its pages, goes through the same steps as
//! everybody else's rows, and is cut off again.

use super::cache::{Cache, Snapshot, Table};
use crate::reasoning::{Lexicon, Probe, Settled, entropy};
use farthing_kernels::math::{exp, log};

/// A look under way.
#[derive(Clone, Debug)]
pub(super) struct Look {
    /// Tokens of the text.
    pub(super) text: usize,
    /// Tokens of it that count as computed behind the look.
    base: usize,
    /// States after `base` tokens, where there are any.
    snapshot: Option<Snapshot>,
    /// Whether the verdict is known.
    pub(super) over: bool,
    /// Whether the short answer is being written.
    answering: bool,
    written: Vec<u8>,
    tokens: u32,
    /// Sum of the logarithms of their probabilities.
    logs: f32,
}

/// What a row of logits says about a look.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Verdict {
    /// This token comes next in the short answer.
    On(u32),
    /// The answer has settled, or has not.
    Over(bool),
}

impl Look {
    /// From behind `text` tokens, of which `computed` are in `cache`'s pages.
    pub(super) fn new(text: usize, computed: usize, snapshot: Option<Snapshot>, stateful: bool) -> Look {
        // States can't be shortened; keys and values can, once all of them are there.
        let base = if stateful { computed } else { text - 1 };
        Look { text, base, snapshot, over: false, answering: false, written: Vec::new(), tokens: 0, logs: 0.0 }
    }

    /// Takes in the logits `(vocab,)` behind what was read so far.
    pub(super) fn judge(
        &mut self,
        logits: &[f32],
        probe: &Probe,
        settled: &mut Settled,
        lexicon: &Lexicon,
        end_tokens: &[u32],
    ) -> Verdict {
        let (nats, probability, token) = entropy(logits);
        if !self.answering {
            if !settled.entropy(probe, nats) {
                return Verdict::Over(false);
            }
            self.answering = true;
        }
        let before = self.written.len();
        let ended = end_tokens.contains(&token);
        if !ended {
            self.written.extend_from_slice(lexicon.spelling(token));
        }
        let until = probe.until.as_bytes();
        let until = self.written.windows(until.len().max(1)).position(|window| window == until);
        if !ended && until.is_none_or(|at| at > before) {
            self.tokens += 1;
            self.logs += log(probability);
        }
        if !ended && until.is_none() && self.tokens < probe.answer_tokens {
            return Verdict::On(token);
        }
        let answer = String::from_utf8_lossy(&self.written[..until.unwrap_or(self.written.len())]);
        let confidence = if self.tokens == 0 { 0.0 } else { exp(self.logs / self.tokens as f32) };
        Verdict::Over(settled.answer(probe, &answer, confidence))
    }

    /// Takes back what was read; returns how many tokens are computed.
    pub(super) fn undo(&self, cache: &mut Cache, table: &mut Table) -> usize {
        match &self.snapshot {
            Some(snapshot) => {
                cache.restore(table, snapshot);
            }
            None => cache.truncate(table, self.base),
        }
        self.base
    }
}
