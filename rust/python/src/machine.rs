//! `farthing.machine`: what this machine is and what it can do.

use farthing_kernels::isa::Isa;
use farthing_kernels::matmul;
use farthing_kernels::pool::{Pool, default_threads as threads_by_default};
use farthing_kernels::{probe, selftest};
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;

use crate::errors::exception;

/// Instruction sets this CPU can run, ascending.
#[pyfunction]
pub(crate) fn available_isas() -> Vec<&'static str> {
    available().map(Isa::name).collect()
}

fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
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

/// (bytes read from memory per second, int8 operations per second) of that many threads; takes half a second.
#[pyfunction]
pub(crate) fn probe_limits(py: Python<'_>, threads: usize) -> PyResult<(f64, f64)> {
    let (bandwidth, rate) = py.detach(|| {
        let pool = Pool::new(threads);
        (probe::read_bandwidth(&pool), probe::int8_rate(&pool))
    });
    if bandwidth > 0.0 {
        Ok((bandwidth, rate))
    } else {
        Err(PyMemoryError::new_err("no memory to measure its bandwidth"))
    }
}

/// (kernel, instruction set, passed) of every kernel this CPU can run, compared with its specification.
#[pyfunction]
pub(crate) fn self_tests(py: Python<'_>) -> Vec<(String, &'static str, bool)> {
    py.detach(|| {
        let matrices = matmul::self_tests().into_iter().map(|test| (test.name, test.isa, test.passed));
        let floats = available().flat_map(selftest::float_self_tests);
        let floats = floats.map(|test| (test.name.clone(), test.isa, test.passed));
        matrices.chain(floats).map(|(name, isa, passed)| (name, isa.name(), passed)).collect()
    })
}
