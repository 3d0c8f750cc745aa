//! The books: what an answer really cost. The ledger is told, and asks nobody.

use std::time::Duration;

/// Cost of one request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ledger {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Prompt tokens whose keys and values were found ready.
    pub cached_tokens: u64,
    /// Drawn tokens inside a thinking span.
    pub thinking_tokens: u64,
    /// Drawn tokens outside a thinking span, markers and the end token included.
    pub answer_tokens: u64,
    /// Generated tokens that were dictated, not drawn.
    pub forced_tokens: u64,
    /// Tokens computed only to look at the model's state.
    pub probe_tokens: u64,
    /// Forward passes that this request took part in.
    pub passes: u64,
    /// Tokens proposed by a drafter.
    pub drafted: u64,
    /// Proposed tokens that were kept.
    pub accepted: u64,
    /// Times the request lost its pages and computed them again.
    pub preemptions: u64,
    /// Bytes of weights read, each pass divided by the sequences that shared it.
    pub weight_bytes: f64,
    /// Bytes of keys and values read and written.
    pub kv_bytes: u64,
    /// Seconds from submission to the first pass.
    pub queue_seconds: f64,
    /// Seconds from the first pass to the first token.
    pub prefill_seconds: f64,
    /// Seconds from the first token to the last.
    pub decode_seconds: f64,
    /// Thread-seconds, each pass divided by the sequences that shared it.
    pub cpu_seconds: f64,
}

/// What tokens and processors cost; leave at zero what is free.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prices {
    /// Currency per million prompt tokens.
    pub input_per_million: f64,
    /// Currency per million generated tokens.
    pub output_per_million: f64,
    /// Currency per hour of one CPU.
    pub cpu_hour: f64,
}

impl Ledger {
    /// Generated tokens: thinking, dictated ones and answer.
    pub fn output_tokens(&self) -> u64 {
        self.thinking_tokens + self.forced_tokens + self.answer_tokens
    }

    /// What the request cost, in the currency of `prices`.
    ///
    /// ```
    /// use farthing::ledger::{Ledger, Prices};
    /// let ledger = Ledger { prompt_tokens: 1_000_000, cpu_seconds: 1800.0, ..Ledger::default() };
    /// assert_eq!(ledger.cost(&Prices { input_per_million: 3.0, cpu_hour: 2.0, ..Prices::default() }), 4.0);
    /// ```
    pub fn cost(&self, prices: &Prices) -> f64 {
        self.prompt_tokens as f64 * prices.input_per_million / 1e6
            + self.output_tokens() as f64 * prices.output_per_million / 1e6
            + self.cpu_seconds * prices.cpu_hour / 3600.0
    }
}

/// Cost of everything an engine has done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineLedger {
    /// Requests finished, cancelled ones included.
    pub requests: u64,
    /// Forward passes.
    pub passes: u64,
    /// Rows (tokens) that went through the blocks.
    pub rows: u64,
    /// Tokens drawn.
    pub drawn: u64,
    /// Tokens proposed by drafters and verified.
    pub drafted: u64,
    /// Of which so many were kept.
    pub accepted: u64,
    /// Preemptions for lack of pages.
    pub preemptions: u64,
    /// Bytes of weights read.
    pub weight_bytes: u64,
    /// Bytes of keys and values read and written.
    pub kv_bytes: u64,
    /// Seconds in passes that held prompt rows.
    pub prefill_seconds: f64,
    /// Seconds in passes of decode rows only.
    pub decode_seconds: f64,
    /// Bytes of weights and pages read by passes of decode rows only.
    pub decode_bytes: u64,
    /// Experts that were in memory when a step needed them, where they come and go.
    pub expert_hits: u64,
    /// Experts that had to be fetched from disk.
    pub expert_misses: u64,
    /// Bytes of experts fetched from disk.
    pub expert_bytes: u64,
    /// Experts that left memory.
    pub expert_evictions: u64,
    /// Experts fetched because the next layer's router might choose them.
    pub expert_guesses: u64,
    /// Of which so many were needed before they left.
    pub expert_right_guesses: u64,
    /// Experts that routers chose, where something may change their choice.
    pub expert_choices: u64,
    /// Of which so many were left out (lossy).
    pub expert_skipped: u64,
    /// Of which so many gave way to experts in memory (lossy).
    pub expert_substituted: u64,
}

impl EngineLedger {
    /// Bytes per second of the decode passes; `None` before the first.
    pub fn decode_bandwidth(&self) -> Option<f64> {
        (self.decode_seconds > 0.0).then(|| self.decode_bytes as f64 / self.decode_seconds)
    }
}

/// What one pass cost, as the step reports it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass {
    /// Rows (tokens).
    pub rows: usize,
    /// Sequences.
    pub sequences: usize,
    /// Whether some row belonged to a prompt.
    pub prefill: bool,
    /// Bytes of weights read.
    pub weight_bytes: u64,
    /// Wall time.
    pub elapsed: Duration,
    /// Threads that worked.
    pub threads: usize,
}

/// What was done with experts, as levers on them report it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertCounts {
    /// Experts that were in memory when a step needed them.
    pub hits: u64,
    /// Experts that were not.
    pub misses: u64,
    /// Bytes that were fetched.
    pub bytes: u64,
    /// Experts that left.
    pub evictions: u64,
    /// Experts that were fetched because a layer's router might choose them.
    pub guesses: u64,
    /// Of which so many were needed before they left.
    pub right_guesses: u64,
    /// Experts that routers chose.
    pub choices: u64,
    /// Of which so many were left out.
    pub skipped: u64,
    /// Of which so many gave way to others.
    pub substituted: u64,
}

impl std::ops::Sub for ExpertCounts {
    type Output = ExpertCounts;

    fn sub(self, before: ExpertCounts) -> ExpertCounts {
        ExpertCounts {
            hits: self.hits - before.hits,
            misses: self.misses - before.misses,
            bytes: self.bytes - before.bytes,
            evictions: self.evictions - before.evictions,
            guesses: self.guesses - before.guesses,
            right_guesses: self.right_guesses - before.right_guesses,
            choices: self.choices - before.choices,
            skipped: self.skipped - before.skipped,
            substituted: self.substituted - before.substituted,
        }
    }
}

impl EngineLedger {
    /// Notes what was done with experts up to now.
    pub fn note(&mut self, experts: ExpertCounts) {
        let ExpertCounts { hits, misses, bytes, evictions, guesses, right_guesses, choices, skipped, substituted } =
            experts;
        (self.expert_hits, self.expert_misses, self.expert_bytes) = (hits, misses, bytes);
        (self.expert_evictions, self.expert_guesses, self.expert_right_guesses) = (evictions, guesses, right_guesses);
        (self.expert_choices, self.expert_skipped, self.expert_substituted) = (choices, skipped, substituted);
    }

    /// Books a pass and the bytes of keys and values of its sequences.
    pub fn book(&mut self, pass: &Pass, kv_bytes: u64) {
        self.passes += 1;
        self.rows += pass.rows as u64;
        self.weight_bytes += pass.weight_bytes;
        self.kv_bytes += kv_bytes;
        if pass.prefill {
            self.prefill_seconds += pass.elapsed.as_secs_f64();
        } else {
            self.decode_seconds += pass.elapsed.as_secs_f64();
            self.decode_bytes += pass.weight_bytes + kv_bytes;
        }
    }
}

impl Ledger {
    /// Books this request's share of a pass.
    pub fn book(&mut self, pass: &Pass, kv_bytes: u64) {
        let sequences = pass.sequences.max(1) as f64;
        self.passes += 1;
        self.weight_bytes += pass.weight_bytes as f64 / sequences;
        self.kv_bytes += kv_bytes;
        self.cpu_seconds += pass.elapsed.as_secs_f64() * pass.threads as f64 / sequences;
    }
}
