//! Python bindings: convert, check, release the interpreter lock, call the core. One file per Python module.
#![allow(clippy::needless_pass_by_value, reason = "Python's arguments arrive by value")]

mod array;
mod divergence;
mod dlpack;
mod drafters;
mod errors;
mod experts;
mod floats;
mod ledger;
mod llm;
mod machine;
mod matrix;
mod moe;
mod plan;
mod product;
mod reasoning;
mod reasoning_effort;
mod speculation;
mod speculative_heads;
mod speculative_verify;

use pyo3::prelude::*;

/// The Rust side of farthing.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::divergence::row_divergences;
    #[pymodule_export]
    use super::drafters::{Drafter, SuffixCache, SuffixStore};
    #[pymodule_export]
    use super::experts::{PackedExperts, pack_experts};
    #[pymodule_export]
    use super::ledger::{EngineLedger, Ledger, cost};
    #[pymodule_export]
    use super::llm::{Completion, Llm, MatrixReport, Sampling, Stream};
    #[pymodule_export]
    use super::machine::{
        available_isas, cost_curve, default_threads, isa, pinning, probe_limits, processors, self_tests,
    };
    #[pymodule_export]
    use super::matrix::{PackedMatrix, from_parts, matmul_gated, matmul_together, quantize, rms_norm};
    #[pymodule_export]
    use super::moe::{RouterSpec, RoutingStatistics, route};
    #[pymodule_export]
    use super::plan::{Plan, plan};
    #[pymodule_export]
    use super::product::share_threads;
    #[pymodule_export]
    use super::reasoning::{Controller, Lexicon, Policy, Probe, ThinkSpec};
    #[pymodule_export]
    use super::reasoning_effort::{Dialect, EffortPlan};

    #[pymodule_export]
    use super::speculation::{DraftModel, SpeculationReport};
    #[pymodule_export]
    use super::speculative_heads::{Eagle3, Medusa, Mtp, draft_logits, token_weights};
    #[pymodule_export]
    use super::speculative_verify::{Intersection, draft_probabilities, draw_gumbel, verify_draft, verify_greedy};

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name Python gives versions")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
