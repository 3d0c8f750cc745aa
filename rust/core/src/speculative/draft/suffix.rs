//! Drafts from what the request and others said before: `SuffixDecoding` (Oliaro et al., arXiv:2411.04975), with suffix
//! automata for trees.

use std::collections::HashMap;
use std::sync::Arc;

use super::automaton::{Automaton, ROOT, State};
use super::propose::{self, Place, Proposal, Rule};
use super::store::{SuffixStore, TextId};
use super::{Draft, Drafter, Observed, Target, first_path, unknown_request};
use crate::error::Error;
use crate::speculative::tree::DraftTree;

/// Tokens of a request that are indexed at most; then the older ones are forgotten.
const MOST_INDEXED: usize = 1 << 16;
/// Tokens that stay indexed.
const KEPT: usize = 3 << 14;
/// Last tokens of a prompt that go into the store before the answer, so that the same question finds it at once.
const PROMPT_TAIL: usize = 32;

/// How a [`Suffix`] drafts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SuffixOptions {
    /// Fewest tokens that must match.
    pub min_match: usize,
    /// Drafts whose counts make them less likely than this are left out.
    pub min_probability: f32,
    /// Whether it drafts trees.
    pub tree: bool,
}

impl Default for SuffixOptions {
    fn default() -> SuffixOptions {
        SuffixOptions { min_match: 1, min_probability: 0.1, tree: false }
    }
}

/// Looks up ever longer suffixes of the text, in the text itself and in a store of other answers.
///
/// The class of a node is the number of tokens before it that match, at most 9; its ratio is the node's share of the
/// continuations seen.
///
/// ```
/// use farthing::speculative::draft::{Draft, Drafter, NoTarget, Suffix, SuffixOptions};
/// use farthing::speculative::tree::DraftTree;
/// let mut drafter = Suffix::new(None, SuffixOptions::default())?;
/// let (tokens, mut tree) = ([1, 2, 3, 4, 1, 2], DraftTree::default());
/// drafter.begin(0, &tokens)?;
/// let sampling = Default::default();
/// let counts = Default::default();
/// drafter.draft(&NoTarget::default(), &mut [Draft { request: 0, tokens: &tokens, budget: 3, least: 0.0, sampling: &sampling, counts: &counts, tree: &mut tree }])?;
/// assert_eq!(tree.nodes().iter().map(|node| (node.token, node.class)).collect::<Vec<_>>(), [(3, 3), (4, 4), (1, 5)]);
/// # Ok::<(), farthing::error::Error>(())
/// ```
#[derive(Debug)]
pub struct Suffix {
    store: Option<Arc<SuffixStore>>,
    options: SuffixOptions,
    requests: HashMap<u64, Request>,
    proposal: Proposal,
}

/// What a request said.
#[derive(Debug, Default)]
pub(super) struct Own {
    automaton: Automaton,
    last: State,
}

impl Own {
    pub(super) fn extend(&mut self, tokens: &[u32]) {
        for &token in tokens {
            self.last = self.automaton.push(self.last, token, 0);
        }
    }

    /// The longest suffix of the text that stands in it before.
    pub(super) fn place(&self) -> Option<Place<'_>> {
        let state = self.automaton.link(self.last)?;
        Some(Place { automaton: &self.automaton, state, length: self.automaton.len(state), own: true })
    }

    /// The longest suffix of a context that stands in it.
    pub(super) fn find(&self, context: &[u32]) -> Place<'_> {
        let follow = |(state, length), &token: &u32| self.automaton.follow(state, length, token);
        let (state, length) = context.iter().fold((ROOT, 0), follow);
        Place { automaton: &self.automaton, state, length, own: false }
    }

    pub(super) fn bytes(&self) -> usize {
        self.automaton.bytes()
    }

    pub(super) fn tokens(&self) -> usize {
        self.automaton.tokens()
    }
}

#[derive(Debug)]
struct Request {
    own: Own,
    text: Option<TextId>,
}

impl Suffix {
    /// A drafter that looks into `store` too, and adds to it.
    pub fn new(store: Option<Arc<SuffixStore>>, options: SuffixOptions) -> Result<Suffix, Error> {
        if options.min_match == 0 {
            return Err(Error::argument("min_match", 0, "at least 1"));
        }
        if !(0.0..=1.0).contains(&options.min_probability) {
            return Err(Error::argument("min_probability", options.min_probability, "0 to 1"));
        }
        Ok(Suffix { store, options, requests: HashMap::new(), proposal: Proposal::default() })
    }

    /// The store it looks into.
    pub fn store(&self) -> Option<&Arc<SuffixStore>> {
        self.store.as_ref()
    }
}

/// Adds the proposal behind `root`.
fn graft(proposal: &Proposal, root: Option<u8>, budget: usize, tree: &mut DraftTree) {
    let start = tree.len();
    let mut nodes: Vec<Option<u8>> = Vec::with_capacity(proposal.steps.len());
    for step in &proposal.steps {
        let parent = match step.parent {
            None => Some(root),
            Some(parent) => nodes[parent as usize].map(Some),
        };
        let node = parent.and_then(|parent| match tree.child(parent, step.token) {
            Some(same) => Some(same),
            None if tree.len() - start < budget => tree.push(parent, step.token, step.class, step.ratio),
            None => None,
        });
        nodes.push(node);
    }
}

impl Drafter for Suffix {
    fn name(&self) -> &'static str {
        "suffix"
    }

    fn begin(&mut self, request: u64, prompt: &[u32]) -> Result<(), Error> {
        let mut own = Own::default();
        own.extend(&prompt[prompt.len().saturating_sub(KEPT)..]);
        let text = self.store.as_ref().map(|store| {
            let text = store.open();
            store.append(text, &prompt[prompt.len().saturating_sub(PROMPT_TAIL)..]);
            text
        });
        self.requests.insert(request, Request { own, text });
        Ok(())
    }

    fn draft(&mut self, _: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        let Suffix { store, options, requests, proposal } = self;
        for draft in drafts {
            let request = requests.get_mut(&draft.request).ok_or_else(|| unknown_request(draft.request))?;
            if request.own.tokens() > MOST_INDEXED {
                request.own = Own::default();
                request.own.extend(&draft.tokens[draft.tokens.len().saturating_sub(KEPT)..]);
            }
            let generations = store.as_ref().map(|store| store.read());
            let stored = generations.iter().flat_map(|generations| generations.all());
            let stored = stored.map(|generation| generation.place(request.text, draft.tokens));
            let mut places: Vec<Place<'_>> = request.own.place().into_iter().chain(stored).collect();
            let path = first_path(draft.tree);
            for place in &mut places {
                for &node in &path {
                    let token = draft.tree.nodes()[node as usize].token;
                    (place.state, place.length) = place.automaton.follow(place.state, place.length, token);
                    place.own = false;
                }
            }
            let rule = Rule {
                most: draft.budget,
                factor: f32::INFINITY,
                offset: 0.0,
                least_match: options.min_match,
                least_probability: options.min_probability,
                weighed: true,
            };
            if options.tree {
                propose::tree(&places, &rule, proposal);
            } else {
                propose::chain(&places, &rule, proposal);
            }
            graft(proposal, path.last().copied(), draft.budget, draft.tree);
        }
        Ok(())
    }

    fn observe(&mut self, observed: &Observed<'_>) -> Result<(), Error> {
        let request = self.requests.get_mut(&observed.request).ok_or_else(|| unknown_request(observed.request))?;
        request.own.extend(observed.tokens);
        if let (Some(store), Some(text)) = (&self.store, request.text) {
            store.append(text, observed.tokens);
        }
        Ok(())
    }

    fn end(&mut self, request: u64) {
        self.requests.remove(&request);
    }
}
