//! The engine: requests in, one batched step after another, answers out.

pub mod cache;
pub mod options;
pub mod request;

mod draft_logits;
mod draft_model;
mod llm;
mod look;
mod markings;
mod profile;
mod scheduler;
mod sequence;
mod speculation;
mod step;
mod thinking;

pub use draft_logits::draft_logits;
pub use draft_model::{DraftModel, DraftModelOptions};
pub use llm::{Llm, Progress, Stream};
pub use options::{Activations, Kv, Options, Weights};
pub use request::{Completion, Event, FinishReason, Prompt, Request, SamplingParams, TokenLogprobs};
pub use speculation::{Speculation, SpeculationReport};

/// A lock's contents, whether or not a holder panicked: every change under our locks is complete in one statement.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
