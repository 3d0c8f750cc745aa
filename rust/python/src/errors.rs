//! From the core's errors to the exceptions of `farthing.errors`.

use farthing::error::Error;
use pyo3::PyErr;
use pyo3::exceptions::{PyMemoryError, PyValueError};

pyo3::import_exception!(farthing.errors, FarthingError);
pyo3::import_exception!(farthing.errors, FormatError);
pyo3::import_exception!(farthing.errors, UnsupportedError);

/// The exception for `error`, with its message.
pub(crate) fn exception(error: impl Into<Error>) -> PyErr {
    let error = error.into();
    let message = error.to_string();
    match error {
        Error::Format(_) => FormatError::new_err(message),
        Error::Unsupported { .. } => UnsupportedError::new_err(message),
        Error::Argument { .. } | Error::Isa(_) => PyValueError::new_err(message),
        Error::OutOfMemory(_) => PyMemoryError::new_err(message),
        Error::Drafter { .. } | Error::NoToken { .. } | Error::Store { .. } | Error::Stopped { .. } => {
            FarthingError::new_err(message)
        }
    }
}
