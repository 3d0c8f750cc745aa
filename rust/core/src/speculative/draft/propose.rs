//! From a context that was seen before to what may follow it.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::automaton::{Automaton, State};
use super::{class_of, prior};
use crate::speculative::tree::MOST_NODES;

/// Suffixes of a context that are tried, the longest first: shorter ones are seen more often, but say less.
const SUFFIXES: usize = 8;
/// Continuations of a state that a tree looks at.
const BRANCHES: usize = 8;

/// Where a context stands in a text.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) automaton: &'a Automaton,
    pub(super) state: State,
    /// Tokens that match.
    pub(super) length: usize,
    /// Whether the automaton has the context's own text in it, so that one occurrence has no continuation yet.
    pub(super) own: bool,
}

impl Place<'_> {
    /// The same for at most the last `most` tokens of the context.
    pub(super) fn limited(self, most: usize) -> Self {
        let length = self.length.min(most);
        Place { state: self.automaton.settle(self.state, length), length, ..self }
    }
}

/// How far a proposal may go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    /// Most tokens.
    pub(super) most: usize,
    /// Most tokens for each token that matched.
    pub(super) factor: f32,
    /// Tokens beyond that.
    pub(super) offset: f32,
    /// Fewest tokens that must match.
    pub(super) least_match: usize,
    /// Proposals less likely than this, by their counts alone, are left out.
    pub(super) least_probability: f32,
    /// Whether counts are weighed by how much longer matches are right more often.
    pub(super) weighed: bool,
}

impl Rule {
    fn most(&self, matched: usize) -> usize {
        let allowed = self.factor * matched as f32 + self.offset;
        // A float beyond usize saturates, a negative one is 0.
        self.most.min(allowed as usize).min(MOST_NODES)
    }

    fn weight(&self, class: u8, ratio: f32) -> f32 {
        if self.weighed { prior(class) * ratio } else { ratio }
    }
}

/// A proposed token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Step {
    pub(super) token: u32,
    pub(super) parent: Option<u8>,
    pub(super) class: u8,
    /// Its share of the continuations seen.
    pub(super) ratio: f32,
    /// The shares up to it, multiplied.
    pub(super) probability: f32,
}

/// Proposed tokens, parents first.
#[derive(Clone, Debug, Default)]
pub(super) struct Proposal {
    pub(super) steps: Vec<Step>,
    /// How many of them may be right, by the weights of the rule.
    pub(super) score: f32,
    pub(super) matched: usize,
}

impl Proposal {
    fn clear(&mut self) {
        self.steps.clear();
        (self.score, self.matched) = (0.0, 0);
    }
}

/// A place and what was seen behind it.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    place: Place<'a>,
    /// Whether the own text's end is one of the occurrences.
    ends_here: bool,
}

impl<'a> Cursor<'a> {
    /// The longest suffix of at least `least` tokens that has continuations.
    fn settled(mut self, least: usize) -> Option<Cursor<'a>> {
        loop {
            if self.place.length < least.max(1) {
                return None;
            }
            if self.place.automaton.best(self.place.state).is_some() {
                return Some(self);
            }
            self = self.shorter()?;
        }
    }

    /// The next shorter suffix that was seen elsewhere too.
    fn shorter(self) -> Option<Cursor<'a>> {
        let Place { automaton, state, .. } = self.place;
        let state = automaton.link(state)?;
        Some(Cursor { place: Place { state, length: automaton.len(state), ..self.place }, ..self })
    }

    fn ratio(&self, count: u32) -> f32 {
        let seen = self.place.automaton.count(self.place.state).saturating_sub(u32::from(self.ends_here));
        (count as f32 / seen.max(1) as f32).min(1.0)
    }

    fn stepped(self, state: State) -> Cursor<'a> {
        Cursor { place: Place { state, length: self.place.length + 1, ..self.place }, ends_here: false }
    }
}

fn suffixes(place: Place<'_>, least: usize) -> impl Iterator<Item = Cursor<'_>> {
    let first = Cursor { place, ends_here: place.own }.settled(least);
    std::iter::successors(first, move |cursor| cursor.shorter()?.settled(least)).take(SUFFIXES)
}

/// The chain that promises most, into `best`; earlier places and longer matches among equals.
pub(super) fn chain(places: &[Place<'_>], rule: &Rule, best: &mut Proposal) {
    best.clear();
    let mut tried = Proposal::default();
    for &place in places {
        for cursor in suffixes(place, rule.least_match) {
            tried.clear();
            follow_best(cursor, rule, &mut tried);
            if tried.score > best.score {
                std::mem::swap(best, &mut tried);
            }
        }
    }
}

fn follow_best(mut cursor: Cursor<'_>, rule: &Rule, chain: &mut Proposal) {
    chain.matched = cursor.place.length;
    let (mut probability, mut survival) = (1.0, 1.0);
    for index in 0..rule.most(chain.matched) {
        let Some(next) = cursor.place.automaton.best(cursor.place.state) else { return };
        let ratio = cursor.ratio(next.count);
        probability *= ratio;
        if probability < rule.least_probability {
            return;
        }
        cursor = cursor.stepped(next.state);
        let class = class_of(cursor.place.length);
        survival *= rule.weight(class, ratio);
        chain.score += survival;
        let parent = index.checked_sub(1).map(|index| index as u8);
        chain.steps.push(Step { token: next.token, parent, class, ratio, probability });
    }
}

struct Candidate<'a> {
    survival: f32,
    step: Step,
    behind: Cursor<'a>,
    matched: usize,
    depth: usize,
}

impl PartialEq for Candidate<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate<'_> {}

impl PartialOrd for Candidate<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Candidate<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        let tie = || (self.matched, other.step.token).cmp(&(other.matched, self.step.token));
        self.survival.total_cmp(&other.survival).then_with(tie)
    }
}

/// The tree that promises most, likeliest nodes first, into `tree`; suffixes of all lengths put in their branches.
pub(super) fn tree(places: &[Place<'_>], rule: &Rule, tree: &mut Proposal) {
    tree.clear();
    let mut heap = BinaryHeap::new();
    for &place in places {
        for cursor in suffixes(place, rule.least_match) {
            branch(cursor, (None, 1.0, 1.0, cursor.place.length, 0), rule, &mut heap);
        }
    }
    // Suffixes of several lengths say the same: each candidate is taken from the heap once.
    for _ in 0..4 * rule.most {
        let Some(Candidate { survival, step, behind, matched, depth }) = heap.pop() else { return };
        if depth > rule.most(matched) {
            continue;
        }
        let same = tree.steps.iter().position(|old| old.parent == step.parent && old.token == step.token);
        let node = if let Some(same) = same {
            same
        } else {
            if tree.steps.len() == rule.most.min(MOST_NODES) {
                return;
            }
            tree.steps.push(step);
            tree.score += survival;
            tree.matched = tree.matched.max(matched);
            tree.steps.len() - 1
        };
        branch(behind, (Some(node as u8), survival, step.probability, matched, depth), rule, &mut heap);
    }
}

fn branch<'a>(
    cursor: Cursor<'a>,
    (parent, survival, probability, matched, depth): (Option<u8>, f32, f32, usize, usize),
    rule: &Rule,
    heap: &mut BinaryHeap<Candidate<'a>>,
) {
    let Place { automaton, state, length, .. } = cursor.place;
    let best = automaton.best(state);
    let others = automaton.continuations(state).filter(|next| Some(*next) != best).take(BRANCHES - 1);
    for next in best.into_iter().chain(others) {
        let ratio = cursor.ratio(next.count);
        let probability = probability * ratio;
        if probability < rule.least_probability {
            continue;
        }
        let class = class_of(length + 1);
        heap.push(Candidate {
            survival: survival * rule.weight(class, ratio),
            step: Step { token: next.token, parent, class, ratio, probability },
            behind: cursor.stepped(next.state),
            matched,
            depth: depth + 1,
        });
    }
}
