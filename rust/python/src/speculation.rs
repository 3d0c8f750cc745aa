//! `farthing.speculative`: who drafts for an engine, drafters written in Python among them.

use std::path::PathBuf;

use farthing::engine::{self, Activations, DraftModelOptions, Weights};
use farthing::error::Error;
use farthing::speculative::draft::{Draft, Drafter, Observed, Target};
use numpy::PyArray1;
use pyo3::prelude::*;

use crate::errors::exception;
use crate::speculative_heads::{GivenHeads, Heads};

/// A model that drafts, loaded with the engine it drafts for.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct DraftModel {
    path: PathBuf,
    options: DraftModelOptions,
}

#[pymethods]
impl DraftModel {
    #[new]
    fn new(path: PathBuf, weights: &str, activations: &str, vocabulary: Option<usize>) -> PyResult<Self> {
        let options = DraftModelOptions {
            weights: Weights::parse(weights).map_err(exception)?,
            activations: Activations::parse(activations).map_err(exception)?,
            vocabulary,
        };
        Ok(DraftModel { path, options })
    }
}

/// A drafter as Python gives it.
#[derive(FromPyObject)]
pub(crate) enum Proposer<'py> {
    Model(PyRef<'py, DraftModel>),
    Rule(PyRef<'py, crate::drafters::Drafter>),
    Heads(GivenHeads<'py>),
    Python(Bound<'py, PyAny>),
}

/// What makes the drafter when the engine is loaded.
pub(crate) enum Maker {
    Model(PathBuf, DraftModelOptions),
    Heads(Heads),
    Ready(Box<dyn Drafter>),
}

impl Proposer<'_> {
    /// Who makes its drafters.
    pub(crate) fn makers(self) -> PyResult<Vec<Maker>> {
        Ok(match self {
            Proposer::Model(model) => vec![Maker::Model(model.path.clone(), model.options)],
            Proposer::Rule(rule) => rule.for_engine()?.into_iter().map(Maker::Ready).collect(),
            Proposer::Heads(heads) => vec![Maker::Heads(heads.into())],
            Proposer::Python(object) => vec![Maker::Ready(Box::new(PythonDrafter::new(&object)))],
        })
    }
}

impl Maker {
    /// The drafter for an engine of so many sequences of at most so many tokens.
    pub(crate) fn make(self, sequences: usize, context: usize) -> Result<Box<dyn Drafter>, Error> {
        match self {
            Maker::Model(path, options) => Ok(Box::new(engine::DraftModel::load(&path, options, sequences, context)?)),
            Maker::Heads(heads) => Ok(heads.make(sequences, context)?),
            Maker::Ready(drafter) => Ok(drafter),
        }
    }
}

/// An object with a method `draft`, and perhaps `begin`, `observe` and `end`.
#[derive(Debug)]
struct PythonDrafter {
    name: String,
    object: Py<PyAny>,
}

/// A chain of tokens, or tokens and the index of each one's parent, -1 behind the text.
#[derive(FromPyObject)]
enum Drafted {
    Tree(Vec<i64>, Vec<i64>),
    Chain(Vec<i64>),
}

impl PythonDrafter {
    fn new(object: &Bound<'_, PyAny>) -> PythonDrafter {
        let name = object.get_type().name().map_or_else(|_| "drafter".to_owned(), |name| name.to_string());
        PythonDrafter { name, object: object.clone().unbind() }
    }

    /// Calls a method that need not be there.
    fn tell(&self, method: &str, request: u64, tokens: Option<&[u32]>) -> Result<(), Error> {
        Python::attach(|py| {
            let object = self.object.bind(py);
            if !object.hasattr(method)? {
                return Ok(());
            }
            match tokens {
                Some(tokens) => object.call_method1(method, (request, PyArray1::from_slice(py, tokens)))?,
                None => object.call_method1(method, (request,))?,
            };
            Ok(())
        })
        .map_err(|error| raised(method, &error))
    }

    fn fill(&self, draft: &mut Draft<'_>) -> Result<(), Error> {
        let drafted: Drafted = Python::attach(|py| {
            let tokens = PyArray1::from_slice(py, draft.tokens);
            self.object.bind(py).call_method1("draft", (draft.request, tokens, draft.budget))?.extract()
        })
        .map_err(|error| raised("draft", &error))?;
        let (tokens, parents) = match drafted {
            Drafted::Tree(tokens, parents) => (tokens, parents),
            Drafted::Chain(tokens) => {
                let parents = (-1..tokens.len() as i64 - 1).collect();
                (tokens, parents)
            }
        };
        if tokens.len() != parents.len() {
            let got = format!("{} tokens and {} parents", tokens.len(), parents.len());
            return Err(Error::argument("draft", got, "a parent for each token"));
        }
        let mut places: Vec<Option<u8>> = Vec::with_capacity(tokens.len());
        for (&token, &parent) in tokens.iter().zip(&parents).take(draft.budget) {
            let token = u32::try_from(token).map_err(|_| Error::argument("draft", token, "token ids from 0 on"))?;
            let parent = match usize::try_from(parent) {
                Ok(parent) if parent < places.len() => places[parent],
                Ok(parent) => return Err(Error::argument("draft", parent, "parents before their children")),
                Err(_) if parent == -1 => None,
                Err(_) => return Err(Error::argument("draft", parent, "-1 or the index of a token before")),
            };
            places.push(draft.tree.push(parent, token, 5, 1.0));
        }
        Ok(())
    }
}

/// What Python raised, as an error of the engine.
fn raised(method: &str, error: &PyErr) -> Error {
    Error::Drafter { method: method.to_owned(), reason: error.to_string() }
}

impl Drafter for PythonDrafter {
    fn name(&self) -> &str {
        &self.name
    }

    fn begin(&mut self, request: u64, prompt: &[u32]) -> Result<(), Error> {
        self.tell("begin", request, Some(prompt))
    }

    fn draft(&mut self, _: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        drafts.iter_mut().try_for_each(|draft| self.fill(draft))
    }

    fn observe(&mut self, observed: &Observed<'_>) -> Result<(), Error> {
        self.tell("observe", observed.request, Some(observed.tokens))
    }

    fn end(&mut self, request: u64) {
        // Nothing follows a request's end, so there is nobody to tell of an error.
        let _ = self.tell("end", request, None);
    }
}

/// What speculation has done and expects.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct SpeculationReport(pub(crate) engine::SpeculationReport);

/// Name, drafted, accepted, acceptance of first tokens, seconds a node, why it stopped.
type DrafterReport = (String, u64, u64, f64, f64, Option<String>);

#[pymethods]
impl SpeculationReport {
    #[getter]
    fn pass_costs(&self) -> Vec<(usize, f64)> {
        self.0.pass_costs.clone()
    }

    #[getter]
    fn pass_seconds(&self) -> f64 {
        self.0.pass_seconds
    }

    #[getter]
    fn drafters(&self) -> Vec<DrafterReport> {
        let report = |it: &farthing::speculative::controller::DrafterReport| {
            (it.name.clone(), it.drafted, it.accepted, it.acceptance, it.seconds, it.stopped.clone())
        };
        self.0.drafters.iter().map(report).collect()
    }
}
