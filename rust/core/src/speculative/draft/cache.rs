//! The suffix trees of other engines' plug-ins, on automata: requests by id, proposals for a given context.

use std::collections::HashMap;

use super::propose::{self, Place, Proposal, Rule};
use super::store::{SuffixStore, TextId};
use super::suffix::Own;
use super::unknown_request;
use crate::error::Error;
use crate::speculative::tree::MOST_NODES;

/// A proposal of a [`SuffixCache`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Speculated {
    /// `(n,)` the tokens, parents first.
    pub tokens: Vec<u32>,
    /// `(n,)` index of the node before each; `None` follows the context.
    pub parents: Vec<Option<u8>>,
    /// `(n,)` how likely each is by the counts, its parents included.
    pub probabilities: Vec<f32>,
    /// Sum of the probabilities.
    pub score: f32,
    /// Tokens of the context that matched.
    pub matched: usize,
}

/// What to propose for a context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SpeculateOptions {
    /// Most tokens, at most 63.
    pub max_tokens: usize,
    /// Most tokens for each token that matched.
    pub max_factor: f32,
    /// Tokens beyond that.
    pub max_offset: f32,
    /// Least probability of a token.
    pub min_probability: f32,
    /// Whether to propose a tree.
    pub tree: bool,
}

/// Texts of requests, each of its own and the answers of all.
///
/// ```
/// use farthing::speculative::draft::{SpeculateOptions, SuffixCache};
/// let mut cache = SuffixCache::new(64, None);
/// cache.start(0, &[1, 2, 3, 1, 2])?;
/// let options = SpeculateOptions { max_tokens: 8, max_factor: 1.0, max_offset: 0.0, min_probability: 0.1, tree: false };
/// let found = cache.speculate(0, &[1, 2], &options)?;
/// assert_eq!((found.tokens, found.matched), (vec![3, 1], 2));
/// # Ok::<(), farthing::error::Error>(())
/// ```
#[derive(Debug)]
pub struct SuffixCache {
    depth: usize,
    active: HashMap<u64, Active>,
    answers: Option<SuffixStore>,
}

#[derive(Debug)]
struct Active {
    own: Own,
    /// The last tokens, to see whether a context is the text's end.
    tail: Vec<u32>,
    answer: Option<TextId>,
}

impl SuffixCache {
    /// Contexts, and proposals, are at most `depth` tokens; answers of `max_answers` requests are kept, of all
    /// for `None`.
    pub fn new(depth: usize, max_answers: Option<usize>) -> SuffixCache {
        let answers = (max_answers != Some(0)).then(|| SuffixStore::unbounded(max_answers.unwrap_or(usize::MAX)));
        SuffixCache { depth, active: HashMap::new(), answers }
    }

    /// A request begins.
    pub fn start(&mut self, request: u64, prompt: &[u32]) -> Result<(), Error> {
        if self.active.contains_key(&request) {
            return Err(Error::argument("request", request, "one that is not active"));
        }
        let mut own = Own::default();
        own.extend(prompt);
        let mut active = Active { own, tail: Vec::new(), answer: self.answers.as_ref().map(SuffixStore::open) };
        active.keep_tail(prompt, self.depth);
        self.active.insert(request, active);
        Ok(())
    }

    /// A request ends; its answer stays.
    pub fn stop(&mut self, request: u64) -> Result<(), Error> {
        self.active.remove(&request).map(|_| ()).ok_or_else(|| unknown_request(request))
    }

    /// Adds to a request's answer.
    pub fn append(&mut self, request: u64, tokens: &[u32]) -> Result<(), Error> {
        let active = self.active.get_mut(&request).ok_or_else(|| unknown_request(request))?;
        active.own.extend(tokens);
        active.keep_tail(tokens, self.depth);
        if let (Some(answers), Some(answer)) = (&self.answers, active.answer) {
            answers.append(answer, tokens);
        }
        Ok(())
    }

    /// Id of an active request's answer; none when answers are not kept, or this one is forgotten.
    pub fn answer(&self, request: u64) -> Option<TextId> {
        self.active.get(&request).and_then(|active| active.answer)
    }

    /// Adds no more to an answer; what it has said goes with those of its age.
    pub fn retire(&mut self, answer: TextId) {
        for active in self.active.values_mut().filter(|active| active.answer == Some(answer)) {
            active.answer = None;
        }
    }

    /// Forgets an answer at once.
    pub fn forget(&mut self, answer: TextId) {
        self.retire(answer);
        if let Some(answers) = &self.answers {
            answers.forget(answer);
        }
    }

    /// What may follow `context` in the request's own text or in the answers of all, whichever scores more.
    pub fn speculate(&self, request: u64, context: &[u32], options: &SpeculateOptions) -> Result<Speculated, Error> {
        let active = self.active.get(&request).ok_or_else(|| unknown_request(request))?;
        let context = &context[context.len().saturating_sub(self.depth)..];
        let own = if active.tail.ends_with(context) { active.own.place() } else { Some(active.own.find(context)) };
        let generations = self.answers.as_ref().map(SuffixStore::read);
        let stored = generations.iter().flat_map(|generations| generations.all());
        let stored = stored.map(|generation| generation.place(active.answer, context));
        let places: Vec<Place<'_>> = own.into_iter().chain(stored).map(|place| place.limited(context.len())).collect();
        let rule = Rule {
            most: options.max_tokens.min(self.depth).min(MOST_NODES),
            factor: options.max_factor,
            offset: options.max_offset,
            least_match: 1,
            least_probability: options.min_probability,
            weighed: false,
        };
        let mut proposal = Proposal::default();
        if options.tree {
            propose::tree(&places, &rule, &mut proposal);
        } else {
            propose::chain(&places, &rule, &mut proposal);
        }
        Ok(Speculated {
            tokens: proposal.steps.iter().map(|step| step.token).collect(),
            parents: proposal.steps.iter().map(|step| step.parent).collect(),
            probabilities: proposal.steps.iter().map(|step| step.probability).collect(),
            score: proposal.score,
            matched: proposal.matched,
        })
    }

    /// Tokens in it.
    pub fn tokens(&self) -> usize {
        let own: usize = self.active.values().map(|active| active.own.tokens()).sum();
        own + self.answers.as_ref().map_or(0, SuffixStore::tokens)
    }

    /// Bytes of memory it takes.
    pub fn bytes(&self) -> usize {
        let own: usize = self.active.values().map(|active| active.own.bytes()).sum();
        own + self.answers.as_ref().map_or(0, SuffixStore::bytes)
    }
}

impl Active {
    fn keep_tail(&mut self, tokens: &[u32], depth: usize) {
        self.tail.extend_from_slice(tokens);
        if self.tail.len() >= 2 * depth.max(64) {
            self.tail.drain(..self.tail.len() - depth);
        }
    }
}
