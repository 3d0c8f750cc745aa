//! Token Recycling (Luo et al., arXiv:2408.08696): what the model thought likely behind a token when it last met it.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Draft, Drafter, Observed, Target, Wants, prior, unknown_request};
use crate::error::Error;
use crate::speculative::tree::MOST_NODES;

/// Tokens kept behind each token.
const WIDTH: usize = 8;
/// Nobody's id: a rank without a token.
const NONE: u32 = u32::MAX;
/// How often each rank is right, before anything was observed, and how many observations that counts for.
const RATES: [f32; WIDTH] = [0.3, 0.1, 0.06, 0.04, 0.03, 0.025, 0.02, 0.015];
const RATES_COUNT: f32 = 20.0;

#[derive(Debug, Default)]
struct Table {
    rows: HashMap<u32, [u32; WIDTH]>,
    /// How often the token of each rank came next.
    hits: [u32; WIDTH],
    seen: u32,
}

impl Table {
    fn rates(&self) -> [f32; WIDTH] {
        let seen = self.seen as f32 + RATES_COUNT;
        std::array::from_fn(|rank| (self.hits[rank] as f32 + RATES_COUNT * RATES[rank]) / seen)
    }

    /// What stands behind a token in a prompt is likely too: the model's rows of prompts are not computed.
    fn follow(&mut self, token: u32, next: u32) {
        let row = self.rows.entry(token).or_insert([NONE; WIDTH]);
        let place = row.iter().position(|&likely| likely == next).unwrap_or(WIDTH - 1);
        row[..=place].rotate_right(1);
        row[0] = next;
    }

    fn score(&mut self, token: u32, next: u32) {
        let Some(row) = self.rows.get(&token) else { return };
        if self.seen == u32::MAX {
            return;
        }
        self.seen += 1;
        if let Some(rank) = row.iter().position(|&likely| likely == next) {
            self.hits[rank] += 1;
        }
    }
}

/// A table of the likeliest tokens behind each token, filled by every verified row and kept across requests; copies
/// share it. The class of a node is its rank.
///
/// ```
/// use farthing::speculative::draft::{Draft, Drafter, NoTarget, Observed, TokenRecycling};
/// use farthing::speculative::tree::DraftTree;
/// let mut drafter = TokenRecycling::default();
/// drafter.begin(0, &[5])?;
/// let top = [6, 7, 8, 9, 10, 11, 12, 13];
/// drafter.observe(&Observed { request: 0, tokens: &[5], rows: &[5], top: &top, ..Observed::default() })?;
/// let mut tree = DraftTree::default();
/// let sampling = Default::default();
/// let counts = Default::default();
/// drafter.draft(&NoTarget::default(), &mut [Draft { request: 0, tokens: &[5, 5], budget: 2, least: 0.0, sampling: &sampling, counts: &counts, tree: &mut tree }])?;
/// assert_eq!(tree.nodes().iter().map(|node| node.token).collect::<Vec<_>>(), [6, 7]);
/// # Ok::<(), farthing::error::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct TokenRecycling {
    table: Arc<Mutex<Table>>,
    /// The last token of each request.
    requests: HashMap<u64, Option<u32>>,
}

impl TokenRecycling {
    /// Another drafter with the same table and no requests.
    #[must_use]
    pub fn sharing(&self) -> TokenRecycling {
        TokenRecycling { table: Arc::clone(&self.table), requests: HashMap::new() }
    }

    /// Tokens that have a row.
    pub fn rows(&self) -> usize {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).rows.len()
    }

    /// How often the token of each rank came next, given that its row was there; the prior where little was seen.
    pub fn rates(&self) -> [f32; 8] {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).rates()
    }
}

struct Candidate {
    survival: f32,
    parent: Option<u8>,
    token: u32,
    rank: u8,
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        let order = self.survival.total_cmp(&other.survival);
        order.then_with(|| (other.parent, other.rank, other.token).cmp(&(self.parent, self.rank, self.token)))
    }
}

impl Drafter for TokenRecycling {
    fn name(&self) -> &'static str {
        "token recycling"
    }

    fn wants(&self) -> Wants {
        Wants { top: WIDTH, ..Wants::default() }
    }

    fn begin(&mut self, request: u64, prompt: &[u32]) -> Result<(), Error> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        for pair in prompt.windows(2) {
            table.follow(pair[0], pair[1]);
        }
        self.requests.insert(request, prompt.last().copied());
        Ok(())
    }

    fn draft(&mut self, _: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let rates = table.rates();
        for Draft { tokens, budget, tree, .. } in drafts {
            let Some(&last) = tokens.last() else { continue };
            let mut heap = BinaryHeap::new();
            let expand = |parent: Option<u8>, token: u32, survival: f32, heap: &mut BinaryHeap<Candidate>| {
                for (rank, &next) in table.rows.get(&token).into_iter().flatten().enumerate() {
                    if next != NONE {
                        let survival = survival * rates[rank];
                        heap.push(Candidate { survival, parent, token: next, rank: rank as u8 });
                    }
                }
            };
            expand(None, last, 1.0, &mut heap);
            // Others' nodes are branched from too; what is known of them is their class.
            let mut survivals: Vec<f32> = Vec::with_capacity(MOST_NODES);
            for (index, node) in tree.nodes().iter().enumerate() {
                let before = node.parent.map_or(1.0, |parent| survivals[parent as usize]);
                survivals.push(before * prior(node.class) * node.ratio);
                expand(Some(index as u8), node.token, survivals[index], &mut heap);
            }
            let start = tree.len();
            while tree.len() - start < *budget
                && let Some(Candidate { survival, parent, token, rank }) = heap.pop()
            {
                if tree.child(parent, token).is_some() {
                    continue;
                }
                let Some(node) = tree.push(parent, token, rank, 1.0) else { break };
                expand(Some(node), token, survival, &mut heap);
            }
        }
        Ok(())
    }

    fn observe(&mut self, observed: &Observed<'_>) -> Result<(), Error> {
        let Observed { request, tokens, rows, top, .. } = *observed;
        let last = self.requests.get_mut(&request).ok_or_else(|| unknown_request(request))?;
        let width = top.len() / rows.len().max(1);
        if width > WIDTH || width * rows.len() != top.len() {
            return Err(Error::argument("top", top.len(), format!("{} rows of at most {WIDTH}", rows.len())));
        }
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        // What the rows were before this pass is what drafts were made from.
        for &token in tokens {
            if let Some(before) = last.replace(token) {
                table.score(before, token);
            }
        }
        if width > 0 {
            for (&token, likely) in rows.iter().zip(top.chunks_exact(width)) {
                let row = table.rows.entry(token).or_insert([NONE; WIDTH]);
                row[..width].copy_from_slice(likely);
            }
        }
        Ok(())
    }

    fn end(&mut self, request: u64) {
        self.requests.remove(&request);
    }
}
