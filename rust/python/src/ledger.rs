//! `farthing.ledger`: the records as the core keeps them, and the one formula for money.

use farthing::ledger::{self, Prices};
use pyo3::prelude::*;

macro_rules! record {
    ($(#[$meta:meta])* $name:ident($core:path) { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[pyclass(frozen, module = "farthing._core")]
        pub(crate) struct $name(pub(crate) $core);

        #[pymethods]
        impl $name {
            $(#[getter] fn $field(&self) -> $type { self.0.$field })*
        }
    };
}

record! {
    /// Cost of one request.
    Ledger(ledger::Ledger) {
        prompt_tokens: u64, cached_tokens: u64, thinking_tokens: u64, answer_tokens: u64, forced_tokens: u64,
        probe_tokens: u64, passes: u64, drafted: u64, accepted: u64, preemptions: u64, weight_bytes: f64,
        kv_bytes: u64, queue_seconds: f64, prefill_seconds: f64, decode_seconds: f64, cpu_seconds: f64,
    }
}

record! {
    /// Cost of everything an engine has done.
    EngineLedger(ledger::EngineLedger) {
        requests: u64, passes: u64, rows: u64, drawn: u64, drafted: u64, accepted: u64, preemptions: u64, weight_bytes: u64, kv_bytes: u64,
        prefill_seconds: f64, decode_seconds: f64, decode_bytes: u64, expert_hits: u64, expert_misses: u64,
        expert_bytes: u64, expert_evictions: u64, expert_guesses: u64, expert_right_guesses: u64,
    }
}

/// What tokens and processor time cost at these prices.
#[pyfunction]
#[pyo3(signature = (prompt_tokens, output_tokens, cpu_seconds, *, input_per_million, output_per_million, cpu_hour))]
pub(crate) fn cost(
    prompt_tokens: u64,
    output_tokens: u64,
    cpu_seconds: f64,
    input_per_million: f64,
    output_per_million: f64,
    cpu_hour: f64,
) -> f64 {
    let ledger = ledger::Ledger { prompt_tokens, answer_tokens: output_tokens, cpu_seconds, ..Default::default() };
    ledger.cost(&Prices { input_per_million, output_per_million, cpu_hour })
}
