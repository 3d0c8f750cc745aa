//! `farthing.machine`: what this machine is and what it can do.

use farthing_kernels::affinity;
use farthing_kernels::cost::CostCurve;
use farthing_kernels::format::PackError;
use farthing_kernels::isa::Isa;
use farthing_kernels::matmul;
use farthing_kernels::pool::{Pool, default_threads as threads_by_default, pinning as pinned};
use farthing_kernels::{probe, selftest};
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::errors::exception;
use crate::matrix::{named, precision_of};

/// Rows for which [`cost_curve`] answers.
const ROWS: usize = 64;

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

/// (CPUs that the affinity mask allows, cores among them, CPUs' worth of time that the quota grants).
#[pyfunction]
pub(crate) fn processors() -> (Vec<usize>, usize, Option<f64>) {
    let mut cpus = affinity::allowed_cpus();
    cpus.sort_unstable();
    (cpus, affinity::allowed_cores(), affinity::cpu_quota())
}

/// Whether worker threads are pinned where the rules allow it.
#[pyfunction]
pub(crate) fn pinning() -> bool {
    pinned()
}

/// The time of 1, 2, ... 64 rows over the time of one; measured unless the cache directory has it.
#[pyfunction]
#[pyo3(signature = (weights, *, group, symmetric, activations, rows, columns, threads))]
pub(crate) fn cost_curve(
    py: Python<'_>,
    weights: &str,
    group: usize,
    symmetric: bool,
    activations: &str,
    rows: usize,
    columns: usize,
    threads: usize,
) -> PyResult<Vec<f64>> {
    let format = named(weights, group, symmetric)?;
    let precision = precision_of(format, activations, None)?;
    // Packing is done by threads of its own: those of rayon's global pool do not survive a fork.
    let packers = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let packers = packers.map_err(|error| PyRuntimeError::new_err(format!("no thread to pack with: {error}")))?;
    let curve =
        py.detach(|| packers.install(|| CostCurve::cached(&Pool::new(threads), format, precision, rows, columns)));
    match curve {
        Ok(curve) => Ok((1..=ROWS).map(|m| curve.at(m)).collect()),
        Err(PackError::OutOfMemory(error)) => Err(PyMemoryError::new_err(error.to_string())),
        Err(error) => Err(PyValueError::new_err(error.to_string())),
    }
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
