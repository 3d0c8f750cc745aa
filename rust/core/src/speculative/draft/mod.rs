//! Who proposes tokens: one trait for all.

mod block;
mod eagle3;
mod head;
mod medusa;
mod mtp;
mod weights;

pub use eagle3::{Eagle3, Eagle3Options};
pub use medusa::{Medusa, MedusaOptions};
pub use mtp::{Mtp, MtpOptions};

use super::tree::DraftTree;
use crate::error::Error;
use crate::load::Tokenizer;
use farthing_kernels::format::PackedMatrix;
use farthing_kernels::pool::Pool;
use farthing_kernels::sample::{Sampling, TokenCounts};

/// What a drafter wants to see of the target's passes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Blocks whose output it wants for every committed token, ascending; the number of blocks stands for the normed
    /// states that the head reads.
    pub hidden: Vec<usize>,
    /// Number of likeliest tokens it wants for every verified row.
    pub top: usize,
}

/// A request for one tree.
#[derive(Debug)]
pub struct Draft<'a> {
    /// Who asks.
    pub request: u64,
    /// `(t,)` all committed tokens, prompt and answer; never empty.
    pub tokens: &'a [u32],
    /// Most nodes to add.
    pub budget: usize,
    /// A node less likely than this, all before it considered, is not worth the time of drafting it.
    pub least: f32,
    /// How the target draws its tokens: a drafter that draws by the same noise at the same positions is right more often.
    pub sampling: &'a Sampling<'a>,
    /// What penalties count.
    pub counts: &'a TokenCounts,
    /// Where the tokens go; other drafters' nodes may be there.
    pub tree: &'a mut DraftTree,
}

/// What has become of a request in a pass.
#[derive(Clone, Copy, Debug, Default)]
pub struct Observed<'a> {
    /// Whose tokens.
    pub request: u64,
    /// `(n,)` the tokens committed by the pass.
    pub tokens: &'a [u32],
    /// Position of the first of the computed tokens whose states are given.
    pub start: usize,
    /// `(m,)` the tokens that follow them in the text.
    pub following: &'a [u32],
    /// `(m, wanted · hidden)` their states; empty unless wanted. Those of prompts come in passes that commit nothing.
    pub hidden: &'a [f32],
    /// `(rows,)` the tokens of all verified rows, rejected ones included.
    pub rows: &'a [u32],
    /// `(rows, wanted)` the likeliest tokens behind each of them; empty unless wanted.
    pub top: &'a [u32],
}

/// The model that verifies, as far as drafters may use it between its passes.
pub trait Target {
    /// The engine's threads, at rest meanwhile.
    fn pool(&self) -> &Pool;

    /// Number of token ids.
    fn vocabulary(&self) -> usize;

    /// Width of its states.
    fn hidden(&self) -> usize;

    /// Number of its blocks.
    fn blocks(&self) -> usize;

    /// Its tokenizer, if it has one.
    fn tokenizer(&self) -> Option<&Tokenizer>;

    /// The row that `token` enters the first block as. `out: (hidden,)`.
    fn embed(&self, token: u32, out: &mut [f32]);

    /// Logits of normed states. `states: (t, hidden)`, `out: (t, vocabulary)`.
    fn logits(&self, states: &[f32], out: &mut [f32]);

    /// The head's rows of `tokens`, in this order, in 4 bits: a drafter's own small head.
    fn head_rows(&self, tokens: &[u32]) -> Result<PackedMatrix, Error>;
}

/// Proposes tokens. Whatever it proposes, the text stays what it is without it; only speed can change.
pub trait Drafter: Send + std::fmt::Debug {
    /// A name for reports.
    fn name(&self) -> &str;

    /// What it wants to see.
    fn wants(&self) -> Wants {
        Wants::default()
    }

    /// Called once, before anything else: whether it fits the model, or why not.
    fn attach(&mut self, _target: &dyn Target) -> Result<(), Error> {
        Ok(())
    }

    /// A request begins with the tokens of its prompt, `(t,)`.
    fn begin(&mut self, request: u64, prompt: &[u32]) -> Result<(), Error>;

    /// Adds nodes to each tree, at most its budget.
    fn draft(&mut self, target: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error>;

    /// Takes in what was committed.
    fn observe(&mut self, observed: &Observed<'_>) -> Result<(), Error>;

    /// The request is over.
    fn end(&mut self, request: u64);
}

/// A drafter with weights of its own.
pub trait Heads: Drafter {
    /// Keeps the logits of what is drafted from now on.
    fn keep_logits(&mut self);

    /// Those kept so far, `(rows, tokens it tells apart)`, in the order in which they were computed.
    fn kept_logits(&mut self) -> Vec<f32>;
}
