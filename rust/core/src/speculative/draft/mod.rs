//! Who proposes tokens: one trait for all.

mod automaton;
mod block;
mod cache;
mod composed;
mod eagle3;
mod head;
mod medusa;
mod mtp;
mod ngram;
mod propose;
mod recycling;
mod store;
mod store_file;
mod suffix;
mod weights;

pub use cache::{SpeculateOptions, Speculated, SuffixCache};
pub use composed::Composed;
pub use eagle3::{Eagle3, Eagle3Options};
pub use medusa::{Medusa, MedusaOptions};
pub use mtp::{Mtp, MtpOptions};
pub use ngram::{NGram, NGramMode, NGramOptions};
pub use recycling::TokenRecycling;
pub use store::{SuffixStore, TextId};
pub use suffix::{Suffix, SuffixOptions};

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

/// No model at all, for drafters that need none.
#[derive(Debug)]
pub struct NoTarget {
    pool: Pool,
}

impl Default for NoTarget {
    fn default() -> Self {
        NoTarget { pool: Pool::new(1) }
    }
}

impl Target for NoTarget {
    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn vocabulary(&self) -> usize {
        0
    }

    fn hidden(&self) -> usize {
        0
    }

    fn blocks(&self) -> usize {
        0
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        None
    }

    fn head_rows(&self, _: &[u32]) -> Result<PackedMatrix, Error> {
        Err(Error::unsupported("rows of the head of no model", "drafters that need none"))
    }

    fn embed(&self, _: u32, _: &mut [f32]) {}

    fn logits(&self, _: &[f32], _: &mut [f32]) {}
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

    /// Called before [`Drafter::draft`] with the same drafts: the time for what has to be done but once, however much is
    /// drafted and however often, such as reading the prompt.
    fn catch_up(&mut self, _target: &dyn Target, _drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        Ok(())
    }

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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use proptest::prelude::*;

    fn all() -> Vec<Box<dyn Drafter>> {
        let store = Arc::new(SuffixStore::new(SuffixStore::LEAST_BYTES).unwrap());
        let suffix = |store: Option<&Arc<SuffixStore>>, tree: bool, min_match: usize| -> Box<dyn Drafter> {
            let options = SuffixOptions { min_match, tree, ..SuffixOptions::default() };
            Box::new(Suffix::new(store.cloned(), options).unwrap())
        };
        let mut drafters: Vec<Box<dyn Drafter>> = vec![
            suffix(None, false, 1),
            suffix(Some(&store), false, 1),
            suffix(Some(&store), true, 2),
            Box::new(TokenRecycling::default()),
        ];
        for mode in NGramMode::ALL {
            let options =
                NGramOptions { min_n: if mode == NGramMode::LlamaCpp { 2 } else { 1 }, max_n: 2, max_tokens: 9, mode };
            drafters.push(Box::new(NGram::new(options).unwrap()));
        }
        let members = |drafters: [Box<dyn Drafter>; 2]| Box::new(Composed::new(drafters.into()).unwrap());
        drafters.push(members([suffix(Some(&store), false, 3), Box::new(TokenRecycling::default())]));
        drafters.push(members([Box::new(TokenRecycling::default()), suffix(None, true, 1)]));
        drafters
    }

    proptest! {
        #[test]
        fn any_ids_behind_any_tree(
            tokens in prop::collection::vec(prop_oneof![0u32..3, any::<u32>()], 2..60),
            others in prop::collection::vec((any::<prop::sample::Index>(), 0u32..3), 0..9),
            budget in 0usize..70,
        ) {
            let (sampling, counts) = (Sampling::default(), TokenCounts::default());
            let target = NoTarget::default();
            for mut drafter in all() {
                drafter.begin(3, &tokens[..1]).unwrap();
                let wanted = drafter.wants().top;
                for end in 1..tokens.len() {
                    let (now, rows) = (&tokens[end..=end], &tokens[end - 1..=end]);
                    let top: Vec<u32> = rows.iter().flat_map(|row| (0..wanted as u32).map(|i| row.wrapping_add(i))).collect();
                    drafter.observe(&Observed { request: 3, tokens: now, rows, top: &top, ..Observed::default() }).unwrap();
                    let mut tree = DraftTree::default();
                    for (parent, token) in &others {
                        let parent = (!tree.is_empty()).then(|| parent.index(tree.len()) as u8);
                        tree.push(parent, *token, 3, 1.0);
                    }
                    let before = tree.nodes().to_vec();
                    let tokens = &tokens[..=end];
                    drafter.draft(&target, &mut [Draft { request: 3, tokens, budget, least: 0.0, sampling: &sampling, counts: &counts, tree: &mut tree }]).unwrap();
                    prop_assert!(tree.len() <= before.len() + budget, "{}", drafter.name());
                    prop_assert_eq!(&tree.nodes()[..before.len()], &before[..]);
                    for (index, node) in tree.nodes().iter().enumerate() {
                        prop_assert!(node.parent.is_none_or(|parent| (parent as usize) < index));
                        prop_assert!(node.ratio > 0.0 && node.ratio <= 1.0 && node.class <= MOST_CLASS);
                    }
                }
                drafter.end(3);
                let unknown = drafter.observe(&Observed { request: 3, tokens: &[1], ..Observed::default() });
                prop_assert!(unknown.is_err());
            }
        }
    }
}
