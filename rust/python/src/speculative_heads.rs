//! `farthing.speculative`: drafters that carry weights of their own.

use std::path::PathBuf;

use farthing::engine::Weights;
use farthing::load::Checkpoint;
use farthing::model;
use farthing::speculative::draft::{self, MedusaOptions};
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

/// The head's rows of `tokens` in a model's file, `(tokens, hidden)`.
#[pyfunction]
pub(crate) fn head_weights<'py>(
    py: Python<'py>,
    path: PathBuf,
    tokens: PyReadonlyArray1<'py, u32>,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let tokens = tokens.as_array().to_vec();
    let rows = py.detach(|| model::head_weights(&Checkpoint::open(&path)?, &tokens)).map_err(exception)?;
    let hidden = rows.len() / tokens.len().max(1);
    PyArray1::from_vec(py, rows).reshape([tokens.len(), hidden])
}

/// What makes such a drafter when the engine is loaded.
pub(crate) enum Heads {
    Medusa(PathBuf, MedusaOptions),
}

impl From<&Medusa> for Heads {
    fn from(medusa: &Medusa) -> Heads {
        Heads::Medusa(medusa.path.clone(), medusa.options)
    }
}

impl Heads {
    /// The drafter.
    pub(crate) fn make(self) -> Result<Box<dyn draft::Drafter>, farthing::error::Error> {
        match self {
            Heads::Medusa(path, options) => Ok(Box::new(draft::Medusa::load(&path, options)?)),
        }
    }
}
