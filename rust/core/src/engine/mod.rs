//! The engine: requests in, one batched step after another, answers out.

pub mod options;
pub mod request;

pub use options::{Activations, Kv, Options, Weights};
pub use request::{Completion, Event, FinishReason, Prompt, Request, SamplingParams, TokenLogprobs};
