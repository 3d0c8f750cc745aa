//! The engine: requests in, one batched step after another, answers out.

pub mod request;

pub use request::{Completion, Event, FinishReason, Prompt, Request, SamplingParams, TokenLogprobs};
