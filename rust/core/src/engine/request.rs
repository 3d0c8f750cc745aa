//! What a caller asks for and what comes back.

use crate::error::Error;
use crate::ledger::Ledger;
use crate::reasoning::{Policy, Stop};
use farthing_kernels::sample::Sampling;

/// A prompt, as text or as token ids.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Text for the tokenizer, which adds the model's begin token; special tokens in it are recognised.
    Text(String),
    /// Text of a chat template, which holds its begin token itself.
    Rendered(String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
    /// Rows that enter the first block as they are: images and video come in this way.
    Embeddings(Embeddings),
}

/// A prompt of embeddings.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    /// `(t, hidden)`, row-major, scaled as the model scales its own.
    pub rows: Vec<f32>,
    /// `(t,)` rotary positions; the answer goes on behind the largest.
    pub positions: Vec<u32>,
}

/// How the tokens of an answer are drawn. Order: penalties, banned tokens and the ramp of thinking, temperature, min-p, top-k, top-p; Gumbel-max noise keyed by
/// the seed and counted by (absolute position, token).
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Keep the k likeliest tokens; `None` keeps all.
    pub top_k: Option<usize>,
    /// Keep the smallest set of tokens with at least this probability, in (0, 1].
    pub top_p: f32,
    /// Drop tokens less likely than this times the likeliest, in [0, 1).
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 does nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens seen in the output.
    pub presence_penalty: f32,
    /// Subtracted from the logits of output tokens, times their count.
    pub frequency_penalty: f32,
    /// Noise key; `None` draws a fresh one.
    pub seed: Option<u64>,
    /// The answer ends before the first of these texts; in thinking they mean nothing.
    pub stop: Vec<String>,
    /// Go on after the end-of-sequence token.
    pub ignore_eos: bool,
    /// Report the log-probabilities of the drawn token and of this many likeliest ones.
    pub logprobs: Option<usize>,
    /// How much thinking is wanted; `None` leaves it to the model.
    pub thinking: Option<Policy>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            max_tokens: 64,
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            stop: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            thinking: None,
        }
    }
}

/// Most alternatives that `logprobs` may ask for.
pub const MAX_LOGPROBS: usize = 20;

impl SamplingParams {
    /// How the token at `position` is drawn with noise of `seed`.
    pub fn at(&self, seed: u64, position: usize) -> Sampling<'static> {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            allowed: None,
            lift: None,
            seed,
            position: position as u64,
            top_logprobs: self.logprobs.unwrap_or(0),
        }
    }

    /// Whether every value is in range; the error names the first that is not.
    pub fn validate(&self) -> Result<(), Error> {
        let check = |good: bool, name, got: &dyn ToString, expected: &str| {
            if good { Ok(()) } else { Err(Error::argument(name, got.to_string(), expected)) }
        };
        check(self.max_tokens >= 1, "max_tokens", &self.max_tokens, "at least 1")?;
        check(
            self.temperature >= 0.0 && self.temperature.is_finite(),
            "temperature",
            &self.temperature,
            "a finite number ≥ 0",
        )?;
        check(self.top_k != Some(0), "top_k", &0, "None or at least 1")?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", &self.top_p, "a number in (0, 1]")?;
        check((0.0..1.0).contains(&self.min_p), "min_p", &self.min_p, "a number in [0, 1)")?;
        let repetition = self.repetition_penalty;
        check(repetition > 0.0 && repetition.is_finite(), "repetition_penalty", &repetition, "a finite number > 0")?;
        check(self.presence_penalty.is_finite(), "presence_penalty", &self.presence_penalty, "a finite number")?;
        check(self.frequency_penalty.is_finite(), "frequency_penalty", &self.frequency_penalty, "a finite number")?;
        check(
            self.stop.iter().all(|stop| !stop.is_empty()),
            "stop",
            &"an empty string",
            "texts of at least one character",
        )?;
        let logprobs = self.logprobs.unwrap_or(0);
        check(logprobs <= MAX_LOGPROBS, "logprobs", &logprobs, "at most 20")?;
        self.thinking.as_ref().map_or(Ok(()), Policy::validate)
    }
}

/// One prompt and how to answer it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The prompt.
    pub prompt: Prompt,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model's end token or a stop text.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
    /// The caller lost interest.
    Cancelled,
}

impl FinishReason {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// Natural-log probabilities at one generated token, under the model's own distribution (temperature 1, no processors).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The drawn token.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The likeliest tokens, descending, ties by lower id.
    pub top: Vec<(u32, f32)>,
}

/// A finished answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The answer's text, without thinking and stop text; empty when the model has no tokenizer.
    pub text: String,
    /// What the model thought, without markers; `None` when it never began to.
    pub thinking: Option<String>,
    /// Why it ended thinking; `None` when it never began to.
    pub thinking_stop: Option<Stop>,
    /// The generated ids, the end token included when one was drawn.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// What it cost.
    pub ledger: Ledger,
    /// Per generated token, if asked for; a dictated token has 0 and no alternatives.
    pub logprobs: Option<Vec<TokenLogprobs>>,
}

/// What a stream delivers.
#[derive(Debug)]
pub enum Event {
    /// A part of the prompt has been computed.
    Progress {
        /// Prompt tokens computed so far.
        computed: usize,
        /// Prompt tokens in all.
        total: usize,
    },
    /// The next piece of the answer's text; never half a character.
    Text(String),
    /// The next piece of thinking.
    Thinking(String),
    /// The answer is complete; the last event.
    Done(Box<Completion>),
    /// The request failed; the last event.
    Failed(Error),
}
