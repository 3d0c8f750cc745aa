//! The engine: requests in, one batched step after another, answers out.

pub mod cache;
pub mod options;
pub mod request;

mod llm;
mod scheduler;
mod sequence;
mod step;

pub use llm::{Llm, Progress, Stream};
pub use options::{Activations, Kv, Options, Weights};
pub use request::{Completion, Event, FinishReason, Prompt, Request, SamplingParams, TokenLogprobs};
