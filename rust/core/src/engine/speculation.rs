//! Drafts on their way through a step: asked for, cut to what pays, verified by the model's own draws, learnt from.
//!
//! A drafted token is accepted when it is the token that the model draws there: for the same seed the text is that of
//! decoding without drafts, whatever the drafters say. Drafters only ever decide how many rows a pass has.

use super::profile::StepCost;
use super::sequence::Sequence;
use crate::error::Error;
use crate::load::Tokenizer;
use crate::model::{Head, Model};
use crate::speculative::controller::{Candidate, Controller, DrafterReport, PassCost};
use crate::speculative::draft::{Draft, Drafter, Observed, Target, Wants};
use crate::speculative::tree::{DraftTree, MOST_NODES};
use farthing_kernels::format::PackedMatrix;
use farthing_kernels::pool::Pool;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Instant;

/// Nodes that a drafter may add for one request in one step, unless a number is fixed.
const MOST: usize = 31;

/// Who drafts, and how many tokens.
#[derive(Debug, Default)]
pub struct Speculation {
    /// Asked in this order; later ones may extend what earlier ones drafted. None at all: one token a pass.
    pub drafters: Vec<Box<dyn Drafter>>,
    /// So many nodes for each request in each step, whether they pay or not; `None` leaves it to the controller.
    pub draft_tokens: Option<usize>,
}

/// What speculation has done and expects, for reports.
#[derive(Clone, Debug, PartialEq)]
pub struct SpeculationReport {
    /// `(rows, V(rows))`: a pass over so many rows takes so many times one over one row, with little context.
    pub pass_costs: Vec<(usize, f64)>,
    /// Seconds of a pass over one row; 0 before the first.
    pub pass_seconds: f64,
    /// Every drafter.
    pub drafters: Vec<DrafterReport>,
}

/// Speculation of one engine.
#[derive(Debug)]
pub(super) struct Drafting {
    drafters: Vec<Box<dyn Drafter>>,
    /// Why a drafter is no longer asked.
    stopped: Vec<Option<String>>,
    /// What all drafters together want.
    wants: Wants,
    /// Of each drafter the places of its blocks among those that are wanted.
    places: Vec<Vec<usize>>,
    hidden: usize,
    fixed: Option<usize>,
    controller: Controller,
    cost: StepCost,
    /// Requests that the drafters know, and what was drafted for them in this step, kept or not.
    known: HashMap<u64, DraftTree>,
    /// Tokens that each drafter was asked for in this step.
    asked: Vec<usize>,
    /// What users should hear.
    warnings: Vec<String>,
}

/// The model and the threads, as drafters see them.
pub(super) struct Host<'a> {
    pub(super) model: &'a Model,
    pub(super) pool: &'a Pool,
    pub(super) tokenizer: Option<&'a Tokenizer>,
}

impl Target for Host<'_> {
    fn pool(&self) -> &Pool {
        self.pool
    }

    fn vocabulary(&self) -> usize {
        self.model.config().vocab
    }

    fn hidden(&self) -> usize {
        self.model.config().hidden
    }

    fn blocks(&self) -> usize {
        self.model.config().blocks.len()
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer
    }

    fn embed(&self, token: u32, out: &mut [f32]) {
        self.model.embed(token, out);
    }

    fn logits(&self, states: &[f32], out: &mut [f32]) {
        Head::default().logits(self.model, self.pool, states, out);
    }

    fn head_rows(&self, tokens: &[u32]) -> Result<PackedMatrix, Error> {
        self.model.head_rows(tokens)
    }
}

/// A sequence that may be drafted for.
pub(super) struct Wanted<'a> {
    pub(super) sequence: &'a mut Sequence,
    /// Longest branch that is of use.
    pub(super) depth: usize,
    /// Whether rows of branches beside each other can be verified in one pass.
    pub(super) branches: bool,
}

impl Drafting {
    pub(super) fn new(speculation: Speculation, cost: StepCost, target: &dyn Target) -> Result<Drafting, Error> {
        let Speculation { mut drafters, draft_tokens } = speculation;
        let mut wants = Wants::default();
        let mut blocks = Vec::new();
        for drafter in &mut drafters {
            drafter.attach(target)?;
            let Wants { hidden, top } = drafter.wants();
            wants.hidden.extend(&hidden);
            wants.top = wants.top.max(top);
            blocks.push(hidden);
        }
        wants.hidden.sort_unstable();
        wants.hidden.dedup();
        let place = |block: usize| wants.hidden.binary_search(&block).unwrap_or(0);
        let places = blocks.into_iter().map(|blocks| blocks.into_iter().map(place).collect()).collect();
        Ok(Drafting {
            places,
            hidden: target.hidden(),
            controller: Controller::new(drafters.len()),
            asked: vec![0; drafters.len()],
            stopped: vec![None; drafters.len()],
            fixed: draft_tokens,
            drafters,
            wants,
            cost,
            known: HashMap::new(),
            warnings: Vec::new(),
        })
    }

    /// Whether anybody drafts.
    pub(super) fn active(&self) -> bool {
        self.fixed != Some(0) && self.stopped.iter().any(Option::is_none)
    }

    /// Whether `request` has been drafted for.
    pub(super) fn knows(&self, request: u64) -> bool {
        self.known.contains_key(&request)
    }

    /// What drafters want to see of passes.
    pub(super) fn wants(&self) -> &Wants {
        &self.wants
    }

    /// Tells drafters of a request that they do not know yet.
    pub(super) fn begin(&mut self, request: u64, prompt: &[u32]) {
        if let Entry::Vacant(entry) = self.known.entry(request) {
            entry.insert(DraftTree::default());
            self.each(|drafter| drafter.begin(request, prompt));
        }
    }

    /// Drafts for all `wanted` in a pass that has `rows` rows besides; each sequence is left with the tree to verify.
    pub(super) fn draft(&mut self, target: &dyn Target, wanted: &mut [Wanted<'_>], rows: usize) {
        let context = wanted.iter().map(|wanted| wanted.sequence.computed).max().unwrap_or(0);
        let cost = self.cost.clone();
        let cost = cost.at(context);
        let mut trees: Vec<DraftTree> = wanted.iter().map(|_| DraftTree::default()).collect();
        self.asked.fill(0);
        for index in 0..self.drafters.len() {
            let before: Vec<usize> = trees.iter().map(DraftTree::len).collect();
            let budget = match self.fixed {
                _ if self.stopped[index].is_some() => 0,
                Some(fixed) => fixed,
                None => {
                    let candidates = candidates(wanted, &mut trees);
                    let speedup = self.controller.speedup(&candidates, rows, &cost);
                    self.controller.budget(index, rows, MOST, speedup, &cost)
                }
            };
            if budget == 0 {
                continue;
            }
            let least = if self.fixed.is_some() { 0.0 } else { self.controller.least(index, rows, &cost) as f32 };
            let samplings: Vec<_> = wanted.iter().map(|wanted| wanted.sequence.sampling()).collect();
            let mut drafts: Vec<Draft<'_>> = Vec::new();
            for ((wanted, tree), sampling) in wanted.iter().zip(&mut trees).zip(&samplings) {
                let budget = self.fixed.map_or(budget, |fixed| fixed.saturating_sub(tree.len()));
                let Some((sampling, counts)) = sampling else { continue };
                let Sequence { id: request, ref tokens, .. } = *wanted.sequence;
                drafts.push(Draft { request, tokens, budget: budget.min(MOST_NODES), least, sampling, counts, tree });
            }
            let caught_up = self.drafters[index].catch_up(target, &mut drafts);
            let begin = Instant::now();
            let result = caught_up.and_then(|()| self.drafters[index].draft(target, &mut drafts));
            drop(drafts);
            self.judge(index, result);
            // A chain that ends early has taken a step more than it has nodes.
            let added = trees.iter().zip(&before).map(|(tree, before)| tree.len().saturating_sub(*before));
            let longest = added.max().unwrap_or(0);
            // A drafter made of others numbers its own.
            trees.iter_mut().zip(&before).for_each(|(tree, &before)| tree.claim(before, index as u8));
            self.controller.drafting_took(index, begin.elapsed().as_secs_f64(), budget.min(longest + 1));
            self.asked[index] = budget;
            self.refuse_strangers(index, &mut trees, target.vocabulary());
        }
        for (wanted, tree) in wanted.iter().zip(&mut trees) {
            let (depth, branches) = (wanted.depth, wanted.branches);
            let first_child = first_children(tree);
            let fits: Vec<bool> = tree
                .nodes()
                .iter()
                .zip(first_child)
                .map(|(node, first)| node.depth as usize <= depth && (branches || first))
                .collect();
            tree.retain(|node| fits[node]);
            self.known.insert(wanted.sequence.id, tree.clone());
        }
        if self.fixed.is_none() {
            self.controller.choose(&mut candidates(wanted, &mut trees), rows, &cost);
        }
        for (wanted, tree) in wanted.iter_mut().zip(trees) {
            wanted.sequence.tree = tree;
        }
    }

    /// Calls every drafter that is still asked; one that fails is asked no more.
    fn each(&mut self, call: impl Fn(&mut dyn Drafter) -> Result<(), Error>) {
        for index in 0..self.drafters.len() {
            if self.stopped[index].is_none() {
                let result = call(&mut *self.drafters[index]);
                self.judge(index, result);
            }
        }
    }

    fn judge(&mut self, index: usize, result: Result<(), Error>) {
        if let Err(error) = result {
            self.stop(index, error.to_string());
        }
    }

    fn stop(&mut self, index: usize, reason: String) {
        let name = self.drafters[index].name();
        self.warnings.push(format!("drafter {name} is no longer asked: {reason}"));
        self.stopped[index] = Some(reason);
    }

    /// Removes ids outside the vocabulary, and never asks again who gave them.
    fn refuse_strangers(&mut self, index: usize, trees: &mut [DraftTree], vocab: usize) {
        let stranger =
            |tree: &DraftTree| tree.nodes().iter().map(|node| node.token).find(|&token| token as usize >= vocab);
        let Some(token) = trees.iter().find_map(stranger) else { return };
        for tree in trees {
            let fits: Vec<bool> = tree.nodes().iter().map(|node| (node.token as usize) < vocab).collect();
            tree.retain(|node| fits[node]);
        }
        self.stop(index, format!("it drafted token {token}, expected ids below {vocab}"));
    }

    /// Learns what became of a request in a pass.
    ///
    /// `tree` is what was verified, `path` the rows of its nodes that were right, the root's row 0 first.
    pub(super) fn observe(&mut self, tree: &DraftTree, path: &[usize], observed: &Observed<'_>) {
        // What was drafted for another pass says nothing about this one.
        let Some(drafted) = self.known.get_mut(&observed.request).map(std::mem::take) else { return };
        if !observed.tokens.is_empty() {
            self.controller.learn(observed.request, &drafted, &self.asked, observed.tokens);
            self.controller.count(tree, |node| path.contains(&(node + 1)));
        }
        let width = self.hidden * self.wants.hidden.len();
        for index in 0..self.drafters.len() {
            if self.stopped[index].is_some() {
                continue;
            }
            let places = &self.places[index];
            let result = if places.iter().copied().eq(0..self.wants.hidden.len()) {
                self.drafters[index].observe(observed)
            } else {
                let rows = observed.hidden.chunks_exact(width.max(1));
                let block = |row: &'_ [f32], place: usize| row[place * self.hidden..][..self.hidden].to_vec();
                let own: Vec<f32> =
                    rows.flat_map(|row| places.iter().flat_map(move |&place| block(row, place))).collect();
                self.drafters[index].observe(&Observed { hidden: &own, ..*observed })
            };
            self.judge(index, result);
        }
    }

    /// Notes what a pass of decode rows took.
    pub(super) fn pass_took(&mut self, seconds: f64, rows: usize, context: usize) {
        let relative = self.cost.at(context).of(rows);
        self.controller.pass_took(seconds, relative);
    }

    /// A request has ended.
    pub(super) fn end(&mut self, request: u64) {
        if self.known.remove(&request).is_some() {
            self.drafters.iter_mut().for_each(|drafter| drafter.end(request));
            self.controller.end(request);
        }
    }

    /// What users should hear, once.
    pub(super) fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// What speculation has done and expects.
    pub(super) fn report(&self) -> SpeculationReport {
        SpeculationReport {
            pass_costs: [1, 2, 3, 4, 6, 8, 12, 16, 32].map(|rows| (rows, self.cost.at(0).of(rows))).to_vec(),
            pass_seconds: self.controller.unit(),
            drafters: (0..self.drafters.len())
                .map(|index| self.controller.report(index, self.drafters[index].name(), self.stopped[index].clone()))
                .collect(),
        }
    }
}

/// Every request with what is drafted for it.
fn candidates<'a>(wanted: &[Wanted<'_>], trees: &'a mut [DraftTree]) -> Vec<Candidate<'a>> {
    let candidate = |(wanted, tree): (&Wanted<'_>, _)| Candidate { request: wanted.sequence.id, tree };
    wanted.iter().zip(trees).map(candidate).collect()
}

/// For each node whether it and all before it are first children.
fn first_children(tree: &DraftTree) -> Vec<bool> {
    let mut first: Vec<bool> = Vec::with_capacity(tree.len());
    for (index, node) in tree.nodes().iter().enumerate() {
        let before = node.parent.is_none_or(|parent| first[parent as usize]);
        first.push(before && !tree.nodes()[..index].iter().any(|other| other.parent == node.parent));
    }
    first
}
