//! Who proposes tokens: one trait for all.

use super::tree::DraftTree;
use crate::error::Error;
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
    /// `(n, wanted · hidden)` states of the rows from which those tokens were drawn; empty unless wanted.
    pub hidden: &'a [f32],
    /// `(rows,)` the tokens of all verified rows, rejected ones included.
    pub rows: &'a [u32],
    /// `(rows, wanted)` the likeliest tokens behind each of them; empty unless wanted.
    pub top: &'a [u32],
}

/// Proposes tokens. Whatever it proposes, the text stays what it is without it; only speed can change.
pub trait Drafter: Send + std::fmt::Debug {
    /// A name for reports.
    fn name(&self) -> &str;

    /// What it wants to see.
    fn wants(&self) -> Wants {
        Wants::default()
    }

    /// A request begins with the tokens of its prompt, `(t,)`.
    fn begin(&mut self, request: u64, prompt: &[u32]) -> Result<(), Error>;

    /// Adds nodes to each tree, at most its budget. `pool`: the engine's threads, at rest meanwhile.
    fn draft(&mut self, pool: &Pool, drafts: &mut [Draft<'_>]) -> Result<(), Error>;

    /// Takes in what was committed.
    fn observe(&mut self, observed: &Observed<'_>) -> Result<(), Error>;

    /// The request is over.
    fn end(&mut self, request: u64);
}
