//! `farthing.machine`: what this machine is and what it can do.

use std::time::Duration;

use farthing_kernels::isa::Isa;
use farthing_kernels::matmul;
use farthing_kernels::pool::{Pool, default_threads as threads_by_default};
use farthing_kernels::probe;
use pyo3::prelude::*;

use crate::errors::exception;

/// Instruction sets this CPU can run, ascending.
#[pyfunction]
pub(crate) fn available_isas() -> Vec<&'static str> {
    Isa::ALL.into_iter().filter(|isa| isa.available()).map(Isa::name).collect()
}

/// The instruction set in force.
#[pyfunction]
pub(crate) fn isa() -> PyResult<&'static str> {
    Isa::requested().map_err(exception)?;
    Ok(Isa::active().name())
}

/// Threads an engine uses when told nothing.
#[pyfunction]
pub(crate) fn default_threads() -> usize {
    threads_by_default()
}

/// (bytes read from memory per second, int8 operations per second) of that many threads; takes about `seconds`.
#[pyfunction]
pub(crate) fn probe_limits(py: Python<'_>, threads: usize, seconds: f64) -> PyResult<(f64, f64)> {
    let half = Duration::try_from_secs_f64(seconds / 2.0).unwrap_or_default();
    py.detach(|| {
        let pool = Pool::new(threads);
        let bandwidth = probe::read_bandwidth(&pool, half).map_err(exception)?;
        Ok((bandwidth, probe::int8_rate(&pool, half)))
    })
}

/// (kernel, instruction set, passed) of every kernel this CPU can run, compared with its specification.
#[pyfunction]
pub(crate) fn self_tests(py: Python<'_>) -> Vec<(String, &'static str, bool)> {
    let tests = py.detach(matmul::self_tests);
    tests.into_iter().map(|test| (test.name, test.isa.name(), test.passed)).collect()
}
