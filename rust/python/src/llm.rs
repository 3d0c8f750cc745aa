//! `farthing.llm`: loading, requests and streams.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use farthing::engine::{self, Activations, Event, Kv, Options, Prompt, Request, SamplingParams, Weights};
use farthing::moe::Levers;
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::{FarthingError, exception};
use crate::ledger::{EngineLedger, Ledger};
use crate::reasoning::{Lexicon, Policy};
use crate::reasoning_effort::Dialect;
use crate::speculation::{Maker, Proposer, SpeculationReport};

/// How often Python is told of progress, at most.
const PROGRESS: Duration = Duration::from_millis(100);
/// How long a wait for the engine lasts before signals (an interrupt from the keyboard) are looked at.
const PATIENCE: Duration = Duration::from_millis(50);

/// Checked sampling parameters.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Sampling(pub(crate) SamplingParams);

#[pymethods]
impl Sampling {
    #[new]
    #[pyo3(signature = (*, max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
        frequency_penalty, seed, stop, ignore_eos, logprobs, thinking))]
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
        thinking: Option<&Policy>,
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
            thinking: thinking.map(|policy| policy.0.clone()),
        };
        params.validate().map_err(exception)?;
        Ok(Sampling(params))
    }
}

/// A token, its log-probability, and the likeliest (token, log-probability) pairs.
type TokenLogprobs = (u32, f32, Vec<(u32, f32)>);

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
    fn thinking(&self) -> Option<&str> {
        self.0.thinking.as_deref()
    }

    #[getter]
    fn thinking_stop(&self) -> Option<&'static str> {
        self.0.thinking_stop.map(farthing::reasoning::Stop::name)
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

    #[getter]
    fn logprobs(&self) -> Option<Vec<TokenLogprobs>> {
        let entries = self.0.logprobs.as_ref()?;
        Some(entries.iter().map(|entry| (entry.token, entry.logprob, entry.top.clone())).collect())
    }
}

/// What a stream delivers to Python.
#[derive(IntoPyObject)]
#[expect(clippy::large_enum_variant, reason = "a piece is handed on at once")]
pub(crate) enum Piece {
    Text(String),
    /// One text alone in a tuple.
    Thinking((String,)),
    Progress((usize, usize)),
    Done(Completion),
}

/// An answer being written.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Stream {
    inner: Mutex<engine::Stream>,
    ended: AtomicBool,
}

impl Stream {
    /// The next event, looking at signals while waiting with the interpreter released.
    fn event(&self, py: Python<'_>) -> PyResult<Event> {
        loop {
            let event = py.detach(|| {
                let mut stream = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
                if self.ended.load(Ordering::Acquire) {
                    return Err(FarthingError::new_err("the stream has ended"));
                }
                let event = stream.next(PATIENCE);
                self.ended.store(matches!(event, Some(Event::Done(_) | Event::Failed(_))), Ordering::Release);
                Ok(event)
            })?;
            match event {
                Some(event) => return Ok(event),
                None => py.check_signals()?,
            }
        }
    }
}

#[pymethods]
impl Stream {
    /// The next event: text, thinking alone in a tuple, (computed, total) prompt tokens, or the completion, which is the last.
    fn next(&self, py: Python<'_>) -> PyResult<Piece> {
        match self.event(py)? {
            Event::Text(text) => Ok(Piece::Text(text)),
            Event::Thinking(text) => Ok(Piece::Thinking((text,))),
            Event::Progress { computed, total } => Ok(Piece::Progress((computed, total))),
            Event::Done(completion) => Ok(Piece::Done(Completion(*completion))),
            Event::Failed(error) => Err(exception(error)),
        }
    }

    /// The completion, whatever comes before it.
    fn wait(&self, py: Python<'_>) -> PyResult<Completion> {
        loop {
            match self.event(py)? {
                Event::Done(completion) => return Ok(Completion(*completion)),
                Event::Failed(error) => return Err(exception(error)),
                Event::Text(_) | Event::Thinking(_) | Event::Progress { .. } => py.check_signals()?,
            }
        }
    }

    /// Tells the engine that nobody waits for the rest.
    fn cancel(&self, py: Python<'_>) {
        if !self.ended.load(Ordering::Acquire) {
            py.detach(|| self.inner.lock().unwrap_or_else(PoisonError::into_inner).cancel());
        }
    }
}

/// One matrix of a model.
#[pyclass(frozen, get_all, module = "farthing._core")]
pub(crate) struct MatrixReport {
    layer: Option<usize>,
    role: &'static str,
    count: usize,
    used: usize,
    rows: usize,
    columns: usize,
    format: String,
    activations: &'static str,
    kernel: &'static str,
    nbytes: usize,
    on_disk: bool,
}

impl From<&farthing::model::MatrixReport> for MatrixReport {
    fn from(report: &farthing::model::MatrixReport) -> Self {
        MatrixReport {
            layer: report.layer,
            role: report.role.name(),
            count: report.count,
            used: report.used,
            rows: report.rows,
            columns: report.columns,
            format: report.format.clone(),
            activations: report.activations,
            kernel: report.kernel,
            nbytes: report.bytes,
            on_disk: report.on_disk,
        }
    }
}

/// A prompt as Python gives it.
#[derive(FromPyObject)]
enum Given<'py> {
    Text(String),
    Tokens(PyReadonlyArray1<'py, u32>),
}

/// A loaded model and its engine.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Llm(engine::Llm);

#[pymethods]
impl Llm {
    #[new]
    #[pyo3(signature = (path, *, weights, activations, kv, threads, max_sequences, context, chunk, kv_pages,
        expert_memory, expert_skip, expert_cache_margin, speculation, draft_tokens, progress))]
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
        expert_memory: Option<u64>,
        expert_skip: Option<f32>,
        expert_cache_margin: Option<f32>,
        speculation: Vec<Proposer<'_>>,
        draft_tokens: Option<usize>,
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
            experts: Levers { memory: expert_memory, skip: expert_skip, cache_margin: expert_cache_margin },
        };
        let report = Report { callable: progress, state: Mutex::new(State::default()) };
        let (most, length) = (options.max_sequences, options.context.unwrap_or(usize::MAX));
        let mut makers: Vec<Maker> = Vec::new();
        for proposer in speculation {
            makers.extend(proposer.makers()?);
        }
        let loaded = py.detach(|| {
            let drafters = makers.into_iter().map(|maker| maker.make(most, length)).collect::<Result<_, _>>()?;
            let speculation = engine::Speculation { drafters, draft_tokens };
            engine::Llm::load(&path, &options, speculation, &|progress| report.tell(progress))
        });
        py.check_signals()?;
        match report.state.into_inner().unwrap_or_else(PoisonError::into_inner).raised {
            Some(raised) => Err(raised),
            None => Ok(Llm(loaded.map_err(exception)?)),
        }
    }

    /// Queues prompts together, each with its parameters; `rendered` text holds its begin token itself.
    fn submit(
        &self,
        py: Python<'_>,
        prompts: Vec<Given<'_>>,
        params: Vec<PyRef<'_, Sampling>>,
        rendered: bool,
    ) -> PyResult<Vec<Stream>> {
        let prompt = |given| match given {
            Given::Text(text) if rendered => Prompt::Rendered(text),
            Given::Text(text) => Prompt::Text(text),
            Given::Tokens(tokens) => Prompt::Tokens(tokens.as_array().to_vec()),
        };
        let pairs = prompts.into_iter().zip(&params);
        let requests =
            pairs.map(|(given, params)| Request { prompt: prompt(given), sampling: params.0.clone() }).collect();
        let streams = py.detach(|| self.0.submit(requests)).map_err(exception)?;
        Ok(streams
            .into_iter()
            .map(|stream| Stream { inner: Mutex::new(stream), ended: AtomicBool::new(false) })
            .collect())
    }

    /// Logits `(t, vocab)` after each token.
    fn logits<'py>(&self, py: Python<'py>, ids: PyReadonlyArray1<'py, u32>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let ids = ids.as_array().to_vec();
        let logits = py.detach(|| self.0.logits(&ids)).map_err(exception)?;
        PyArray1::from_vec(py, logits).reshape([ids.len(), self.0.config().vocab])
    }

    /// States `(t, hidden)` of each token behind the final norm.
    fn hidden<'py>(&self, py: Python<'py>, ids: PyReadonlyArray1<'py, u32>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let ids = ids.as_array().to_vec();
        let states = py.detach(|| self.0.hidden(&ids)).map_err(exception)?;
        PyArray1::from_vec(py, states).reshape([ids.len(), self.0.config().hidden])
    }

    /// The prompt the chat template makes of messages and variables, both JSON.
    fn chat_prompt(&self, py: Python<'_>, messages: &str, variables: &str) -> PyResult<String> {
        let wrong = |error: serde_json::Error| PyValueError::new_err(format!("messages: {error}"));
        let messages = serde_json::from_str(messages).map_err(wrong)?;
        let variables = serde_json::from_str(variables).map_err(wrong)?;
        py.detach(|| self.0.chat_prompt(&messages, &variables)).map_err(exception)
    }

    /// How the model is told how much to think.
    fn dialect(&self, py: Python<'_>) -> PyResult<Dialect> {
        py.detach(|| self.0.dialect().cloned()).map(Dialect).map_err(exception)
    }

    #[getter]
    fn has_chat_template(&self) -> bool {
        self.0.has_chat_template()
    }

    fn encode(&self, py: Python<'_>, text: &str, add_special: bool) -> PyResult<Vec<u32>> {
        let tokenizer = self.0.tokenizer().map_err(exception)?;
        Ok(py.detach(|| tokenizer.encode(text, add_special)))
    }

    fn decode(&self, py: Python<'_>, ids: Vec<u32>, skip_special: bool) -> PyResult<String> {
        let tokenizer = self.0.tokenizer().map_err(exception)?;
        Ok(py.detach(|| tokenizer.decode(&ids, skip_special)))
    }

    /// The spellings of the vocabulary, special tokens as they are written.
    fn lexicon(&self, py: Python<'_>) -> PyResult<Lexicon> {
        py.detach(|| self.0.lexicon()).map(Lexicon).map_err(exception)
    }

    /// Tokens that end an answer.
    fn end_tokens(&self) -> Vec<u32> {
        self.0.end_tokens().to_vec()
    }

    fn explain(&self) -> Vec<MatrixReport> {
        self.0.explain().iter().map(MatrixReport::from).collect()
    }

    /// Bytes of weights in memory, at most.
    #[getter]
    fn resident_bytes(&self) -> u64 {
        self.0.resident_bytes()
    }

    fn ledger(&self) -> EngineLedger {
        EngineLedger(self.0.ledger())
    }

    /// What speculation expects and has done, once a request has ended.
    fn speculation(&self) -> Option<SpeculationReport> {
        self.0.speculation().map(SpeculationReport)
    }

    /// What users should hear, once.
    fn take_warnings(&self) -> Vec<String> {
        self.0.take_warnings()
    }

    #[getter]
    fn vocab(&self) -> usize {
        self.0.config().vocab
    }

    #[getter]
    fn context(&self) -> usize {
        self.0.context()
    }

    #[getter]
    fn threads(&self) -> usize {
        self.0.threads()
    }

    #[getter]
    fn family(&self) -> &str {
        &self.0.config().family
    }
}

/// Forwards progress to a Python callable, now and then; an exception it raises is kept for the end.
struct Report {
    callable: Option<Py<PyAny>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last: Option<Instant>,
    raised: Option<PyErr>,
}

impl Report {
    fn tell(&self, progress: engine::Progress) {
        let Some(callable) = &self.callable else { return };
        // Loading threads report at the same time; whoever finds another one reporting has nothing to add.
        let Ok(mut state) = self.state.try_lock() else { return };
        let due = progress.done >= progress.total || state.last.is_none_or(|last| last.elapsed() >= PROGRESS);
        if due && state.raised.is_none() {
            state.last = Some(Instant::now());
            let told = Python::attach(|py| callable.call1(py, ("load", progress.done, progress.total)).map(drop));
            state.raised = told.err();
        }
    }
}
