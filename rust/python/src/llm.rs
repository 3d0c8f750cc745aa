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

/// What a stream delivers to Python.
#[derive(IntoPyObject)]
pub(crate) enum Piece {
    Text(String),
    Progress((usize, usize)),
    Done(Completion),
}

/// An answer being written.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Stream {
    inner: engine::Stream,
    ended: AtomicBool,
}

#[pymethods]
impl Stream {
    /// The next event: text, the completion, or (computed, total) prompt tokens. Waits with the interpreter released.
    fn next(&self, py: Python<'_>) -> PyResult<Piece> {
        loop {
            if self.ended.load(Ordering::Relaxed) {
                return Err(FarthingError::new_err("the stream has ended"));
            }
            let event = py.detach(|| self.inner.next(PATIENCE));
            match event {
                Some(Event::Text(text)) => return Ok(Piece::Text(text)),
                Some(Event::Progress { computed, total }) => return Ok(Piece::Progress((computed, total))),
                Some(Event::Done(completion)) => {
                    self.ended.store(true, Ordering::Relaxed);
                    return Ok(Piece::Done(Completion(*completion)));
                }
                Some(Event::Failed(error)) => {
                    self.ended.store(true, Ordering::Relaxed);
                    return Err(exception(error));
                }
                None => py.check_signals()?,
            }
        }
    }

    /// Tells the engine that nobody waits for the rest.
    fn cancel(&self) {
        self.inner.cancel();
    }
}

/// A loaded model and its engine.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Llm(engine::Llm);

#[pymethods]
impl Llm {
    #[new]
    #[pyo3(signature = (path, *, weights, activations, kv, threads, max_sequences, context, chunk, kv_pages, progress))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        weights: &str,
        activations: &str,
        kv: &str,
        threads: Option<usize>,
        max_sequences: usize,
        context: Option<usize>,
        chunk: Option<usize>,
        kv_pages: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let options = Options {
            weights: Weights::parse(weights).map_err(exception)?,
            activations: Activations::parse(activations).map_err(exception)?,
            kv: Kv::parse(kv).map_err(exception)?,
            threads,
            max_sequences,
            context,
            chunk,
            kv_pages,
        };
        options.validate().map_err(exception)?;
        let report = Report::new(progress);
        let loaded = py.detach(|| engine::Llm::load(&path, &options, &|progress| report.tell(progress)));
        report.finish()?;
        Ok(Llm(loaded.map_err(exception)?))
    }
}

/// Forwards progress to a Python callable, now and then; its first exception is kept for the end.
struct Report {
    callable: Option<Py<PyAny>>,
    state: Mutex<(Option<Instant>, Option<PyErr>)>,
}
