//! Python bindings: convert, check, release the interpreter lock, call the core.
use pyo3::prelude::*;

#[pymodule]
mod _core {}
