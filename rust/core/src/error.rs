//! Everything that can go wrong between a file and an answer, one variant per way.

use crate::load::FormatError;
use farthing_kernels::isa::IsaError;
use farthing_kernels::memory::OutOfMemory;
use farthing_kernels::sample::SampleError;

/// Error of the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model's files are not what they claim to be.
    #[error(transparent)]
    Format(FormatError),
    /// A well-formed wish that farthing can't grant, with what it can.
    #[error("{got} is not supported; {works}")]
    Unsupported {
        /// What was asked for.
        got: String,
        /// What would work instead.
        works: String,
    },
    /// An argument out of range.
    #[error("{name}: got {got}, expected {expected}")]
    Argument {
        /// Name of the argument.
        name: &'static str,
        /// Value given.
        got: String,
        /// Values accepted.
        expected: String,
    },
    /// `FARTHING_ISA` is wrong.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// The system has no memory left for weights or pages.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// Experts could not be written to disk, or not be read again.
    #[error("expert store {file}: {reason}")]
    Store {
        /// The file.
        file: String,
        /// The system's message, or what is wrong with the contents.
        reason: String,
    },
    /// A drafter written elsewhere failed.
    #[error("{method}: {reason}")]
    Drafter {
        /// What was asked of it.
        method: String,
        /// Its own message.
        reason: String,
    },
    /// The logits define no distribution: broken weights, or activations beyond the format's range.
    #[error("no token can be drawn at position {position}: {error} (are the weights broken?)")]
    NoToken {
        /// Absolute position of the token that was to be drawn.
        position: usize,
        /// What is wrong with the logits.
        error: SampleError,
    },
    /// The engine's thread is gone: it panicked, or the process forked.
    #[error("the engine has stopped: {reason}; load the model again")]
    Stopped {
        /// Why.
        reason: String,
    },
}

impl From<FormatError> for Error {
    /// A tensor type that is known but not readable is a wish we can't grant, not a broken file.
    fn from(error: FormatError) -> Error {
        match error {
            FormatError::UnsupportedType { tensor, got, expected } => {
                Error::unsupported(format!("{got} (tensor {tensor})"), format!("the types {expected} load"))
            }
            other => Error::Format(other),
        }
    }
}

impl Error {
    /// An [`Error::Argument`].
    pub fn argument(name: &'static str, got: impl ToString, expected: impl ToString) -> Error {
        Error::Argument { name, got: got.to_string(), expected: expected.to_string() }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(got: impl ToString, works: impl ToString) -> Error {
        Error::Unsupported { got: got.to_string(), works: works.to_string() }
    }
}
