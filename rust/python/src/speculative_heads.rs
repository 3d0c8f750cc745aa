//! `farthing.speculative`: drafters that carry weights of their own.

use std::path::PathBuf;

use farthing::engine::Weights;
use farthing::speculative::draft::{self, MedusaOptions};
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
