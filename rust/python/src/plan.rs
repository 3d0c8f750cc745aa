//! `farthing.plan`: what a model will need, read from its headers alone.

use std::path::PathBuf;

use farthing::engine::{Activations, Kv, Weights};
use farthing::load::Checkpoint;
use farthing::model::plan as core;
use farthing::moe::Levers;
use pyo3::prelude::*;

use crate::errors::exception;
use crate::llm::MatrixReport;

/// What a model will need once loaded.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Plan(core::Plan);

#[pymethods]
impl Plan {
    #[getter]
    fn family(&self) -> &str {
        &self.0.config.family
    }

    #[getter]
    fn context(&self) -> usize {
        self.0.config.context
    }

    /// (in all, multiplied for one token).
    #[getter]
    fn parameters(&self) -> (u64, u64) {
        let parameters = self.0.config.parameters();
        (parameters.total, parameters.active)
    }

    #[getter]
    fn file_bytes(&self) -> u64 {
        self.0.file_bytes
    }

    #[getter]
    fn resident_bytes(&self) -> u64 {
        self.0.resident_bytes()
    }

    #[getter]
    fn disk_bytes(&self) -> u64 {
        self.0.disk_bytes()
    }

    #[getter]
    fn disk_bytes_per_token(&self) -> u64 {
        self.0.disk_bytes_per_token()
    }

    #[getter]
    fn bytes_per_token(&self) -> u64 {
        self.0.bytes_per_token()
    }

    #[getter]
    fn kv_bytes_per_token(&self) -> u64 {
        self.0.kv_bytes_per_token()
    }

    #[getter]
    fn state_bytes_per_sequence(&self) -> u64 {
        self.0.state_bytes_per_sequence()
    }

    #[getter]
    fn operations_per_token(&self) -> u64 {
        self.0.operations_per_token()
    }

    #[getter]
    fn matrices(&self) -> Vec<MatrixReport> {
        self.0.matrices.iter().map(MatrixReport::from).collect()
    }
}

/// Reads the headers at `path`; no weight is touched.
#[pyfunction]
#[pyo3(signature = (path, *, weights, activations, kv, expert_memory))]
pub(crate) fn plan(
    py: Python<'_>,
    path: PathBuf,
    weights: &str,
    activations: &str,
    kv: &str,
    expert_memory: Option<u64>,
) -> PyResult<Plan> {
    let weights = Weights::parse(weights).map_err(exception)?;
    let activations = Activations::parse(activations).map_err(exception)?;
    let kv = Kv::parse(kv).map_err(exception)?;
    let levers = Levers { memory: expert_memory, ..Levers::default() };
    let plan = py.detach(|| core::plan(&Checkpoint::open(&path)?, weights, activations, kv, &levers));
    Ok(Plan(plan.map_err(exception)?))
}
