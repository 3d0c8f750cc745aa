//! `farthing.llm`: loading, requests and streams.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use farthing::engine::{self, Activations, Event, Kv, Options, Prompt, Request, SamplingParams, Weights};
use numpy::{PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::errors::{FarthingError, exception};
use crate::ledger::{EngineLedger, Ledger};

/// How often Python is told of progress, at most.
const PROGRESS: Duration = Duration::from_millis(100);
/// How long a wait for the engine lasts before signals (an interrupt from the keyboard) are looked at.
const PATIENCE: Duration = Duration::from_millis(50);

/// Checked sampling parameters.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Sampling(SamplingParams);

#[pymethods]
impl Sampling {
    #[new]
    #[pyo3(signature = (*, max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
        frequency_penalty, seed, stop, ignore_eos, logprobs))]
    fn new(
        max_tokens: usize,
        temperature: f32,
        top_k: Option<usize>,
        top_p: f32,
        min_p: f32,
        repetition_penalty: f32,
        presence_penalty: f32,
        frequency_penalty: f32,
        seed: Option<u64>,
        stop: Vec<String>,
        ignore_eos: bool,
        logprobs: Option<usize>,
    ) -> PyResult<Self> {
        let params = SamplingParams {
            max_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            seed,
            stop,
            ignore_eos,
            logprobs,
        };
        params.validate().map_err(exception)?;
        Ok(Sampling(params))
    }
}

/// A finished answer.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Completion(engine::Completion);

#[pymethods]
impl Completion {
    #[getter]
    fn text(&self) -> &str {
        &self.0.text
    }

    #[getter]
    fn token_ids(&self) -> &[u32] {
        &self.0.token_ids
    }

    #[getter]
    fn finish_reason(&self) -> &'static str {
        self.0.finish_reason.name()
    }

    #[getter]
    fn ledger(&self) -> Ledger {
        Ledger(self.0.ledger.clone())
    }

    /// (token, log-probability, likeliest pairs) of each generated token.
    #[getter]
    fn logprobs(&self) -> Option<Vec<(u32, f32, Vec<(u32, f32)>)>> {
        let entries = self.0.logprobs.as_ref()?;
        Some(entries.iter().map(|entry| (entry.token, entry.logprob, entry.top.clone())).collect())
    }
}
