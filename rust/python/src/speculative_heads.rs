//! `farthing.speculative`: drafters that carry weights of their own.

use std::path::PathBuf;

use farthing::engine::{self, Activations, Weights};
use farthing::error::Error;
use farthing::load::Checkpoint;
use farthing::model;
use farthing::speculative::draft::{self, Eagle3Options, MedusaOptions, MtpOptions};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::errors::exception;

/// Medusa heads, loaded with the engine they draft for.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Medusa {
    path: PathBuf,
    options: MedusaOptions,
}

#[pymethods]
impl Medusa {
    #[new]
    fn new(path: PathBuf, weights: &str, vocabulary: Option<usize>) -> PyResult<Self> {
        let options = MedusaOptions { weights: Weights::parse(weights).map_err(exception)?, vocabulary };
        Ok(Medusa { path, options })
    }
}

/// The heads of a checkpoint, loaded with the engine they draft for.
#[pyclass(frozen, module = "farthing._core", name = "MTP")]
pub(crate) struct Mtp {
    path: PathBuf,
    options: MtpOptions,
}

#[pymethods]
impl Mtp {
    #[new]
    fn new(path: PathBuf, weights: &str, activations: &str, vocabulary: Option<usize>) -> PyResult<Self> {
        let weights = Weights::parse(weights).map_err(exception)?;
        let activations = Activations::parse(activations).map_err(exception)?;
        Ok(Mtp { path, options: MtpOptions { weights, activations, vocabulary } })
    }
}

/// An EAGLE-3 drafter, loaded with the engine it drafts for.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Eagle3 {
    path: PathBuf,
    options: Eagle3Options,
}

#[pymethods]
impl Eagle3 {
    #[new]
    fn new(path: PathBuf, weights: &str, activations: &str) -> PyResult<Self> {
        let weights = Weights::parse(weights).map_err(exception)?;
        let activations = Activations::parse(activations).map_err(exception)?;
        Ok(Eagle3 { path, options: Eagle3Options { weights, activations } })
    }
}

/// Rows `(tokens, hidden)` of a model's file: of its head, or those that tokens enter the first block as.
#[pyfunction]
pub(crate) fn token_weights<'py>(
    py: Python<'py>,
    path: PathBuf,
    tokens: PyReadonlyArray1<'py, u32>,
    head: bool,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let tokens = tokens.as_array().to_vec();
    let weights = if head { model::head_weights } else { model::embedding_weights };
    let rows = py.detach(|| weights(&Checkpoint::open(&path)?, &tokens)).map_err(exception)?;
    let hidden = rows.len() / tokens.len().max(1);
    PyArray1::from_vec(py, rows).reshape([tokens.len(), hidden])
}

/// A drafter with weights of its own, as Python gives it.
#[derive(FromPyObject)]
pub(crate) enum GivenHeads<'py> {
    Medusa(PyRef<'py, Medusa>),
    Mtp(PyRef<'py, Mtp>),
    Eagle3(PyRef<'py, Eagle3>),
}

/// What makes it when the engine is loaded.
pub(crate) enum Heads {
    Medusa(PathBuf, MedusaOptions),
    Mtp(PathBuf, MtpOptions),
    Eagle3(PathBuf, Eagle3Options),
}

impl From<GivenHeads<'_>> for Heads {
    fn from(given: GivenHeads<'_>) -> Heads {
        match given {
            GivenHeads::Medusa(it) => Heads::Medusa(it.path.clone(), it.options),
            GivenHeads::Mtp(it) => Heads::Mtp(it.path.clone(), it.options),
            GivenHeads::Eagle3(it) => Heads::Eagle3(it.path.clone(), it.options),
        }
    }
}

impl Heads {
    /// The drafter for an engine of so many sequences of at most so many tokens.
    pub(crate) fn make(self, sequences: usize, context: usize) -> Result<Box<dyn draft::Heads>, Error> {
        Ok(match self {
            Heads::Medusa(path, options) => Box::new(draft::Medusa::load(&path, options)?),
            Heads::Eagle3(path, options) => Box::new(draft::Eagle3::load(&path, options, sequences, context)?),
            Heads::Mtp(path, options) => Box::new(draft::Mtp::load(&path, options, sequences, context)?),
        })
    }
}

/// Logits, tokens and parents.
type DraftLogits<'py> = (Bound<'py, PyArray1<f32>>, Vec<u32>, Vec<i64>);

/// Logits of a drafter's heads behind a text, and what it drafts: tokens, and the index of each one's parent, -1 behind the
/// text.
#[pyfunction]
pub(crate) fn draft_logits<'py>(
    py: Python<'py>,
    path: PathBuf,
    heads: GivenHeads<'py>,
    tokens: PyReadonlyArray1<'py, u32>,
    count: usize,
) -> PyResult<DraftLogits<'py>> {
    let (heads, tokens) = (Heads::from(heads), tokens.as_array().to_vec());
    let drafted = py.detach(|| {
        let mut drafter = heads.make(1, tokens.len() + count)?;
        engine::draft_logits(&path, &mut *drafter, &tokens, count)
    });
    let (logits, tree) = drafted.map_err(exception)?;
    let parents = tree.nodes().iter().map(|node| node.parent.map_or(-1, i64::from)).collect();
    Ok((PyArray1::from_vec(py, logits), tree.nodes().iter().map(|node| node.token).collect(), parents))
}
