//! Who proposes tokens: one trait for all.

mod automaton;
mod cache;
mod composed;
mod ngram;
mod propose;
mod recycling;
mod store;
mod store_file;
mod suffix;

pub use cache::{SpeculateOptions, Speculated, SuffixCache};
pub use composed::Composed;
pub use ngram::{NGram, NGramMode, NGramOptions};
pub use recycling::TokenRecycling;
pub use store::{SuffixStore, TextId};
pub use suffix::{Suffix, SuffixOptions};

use super::tree::DraftTree;
use crate::error::Error;
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
#[derive(Clone, Copy, Debug)]
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

    /// Adds nodes to each tree, at most its budget.
    fn draft(&mut self, drafts: &mut [Draft<'_>]) -> Result<(), Error>;

    /// Takes in what was committed.
    fn observe(&mut self, observed: &Observed<'_>) -> Result<(), Error>;

    /// The request is over.
    fn end(&mut self, request: u64);
}

/// Classes of confidence by the tokens that match before a node, the node included.
const MOST_CLASS: u8 = 9;

/// The class of a node with `matched` tokens, its own included, that were seen in a row.
fn class_of(matched: usize) -> u8 {
    matched.min(MOST_CLASS as usize) as u8
}

/// How likely a node of a class is, before the controller has learnt it: 0.3 to 0.9.
fn prior(class: u8) -> f32 {
    0.3 + 0.6 / f32::from(MOST_CLASS - 1) * f32::from(class.clamp(1, MOST_CLASS) - 1)
}

/// From the root down, always the child that was proposed first.
fn first_path(tree: &DraftTree) -> Vec<u8> {
    let child = |parent| tree.nodes().iter().position(|node| node.parent == parent).map(|index| index as u8);
    std::iter::successors(child(None), |&node| child(Some(node))).collect()
}

fn unknown_request(request: u64) -> Error {
    Error::argument("request", request, "one that has begun")
}
