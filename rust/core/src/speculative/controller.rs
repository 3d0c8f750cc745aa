//! How much to draft: as many tokens as are expected to pay, none included.
//!
//! A pass over `m` rows costs `V(m)` times a pass over one. A node survives with the product of the estimates along its
//! path; each estimate is learnt per request, drafter and class of confidence. The nodes of all requests compete for the
//! rows of one pass: the likeliest `n` are kept where `(B + Σ S) / V(base + n)` is greatest, `B` the requests.

use super::tree::DraftTree;
use std::collections::HashMap;

/// Classes of confidence; higher ones count as the last.
pub const CLASSES: usize = 10;
/// Weight of what is known from other requests, in observations.
const WEIGHT: f64 = 4.0;
/// Weight of the first guess, in observations.
const FIRST_WEIGHT: f64 = 8.0;
/// What an observation loses with each later one.
const FORGET: f64 = 0.995;
/// Drafts must promise so much more than none.
const HYSTERESIS: f64 = 1.02;
/// Share of an old average that a new measurement leaves.
const SMOOTH: f64 = 0.9;
/// An expensive drafter that does not pay is tried again after so many steps.
const RETRY: u32 = 64;
/// Drafting below this share of a pass over one row is as good as free.
const FREE: f64 = 0.02;
/// Nodes that a drafter is asked for whose cost nobody knows yet.
const FIRST: usize = 2;

/// Observations of yes or no, older ones weighing less.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Belief {
    right: f64,
    seen: f64,
}

impl Belief {
    fn note(&mut self, right: bool) {
        self.right = self.right * FORGET + f64::from(u8::from(right));
        self.seen = self.seen * FORGET + 1.0;
    }

    /// The mean, with `prior` as so many observations more.
    fn mean(self, prior: f64, weight: f64) -> f64 {
        (self.right + prior * weight) / (self.seen + weight)
    }
}

type Beliefs = [Belief; CLASSES];

/// What is known about one drafter.
#[derive(Clone, Debug, Default)]
struct Known {
    /// By class, over all requests.
    classes: Beliefs,
    /// By depth, over all requests: whether it had the token, given that it had those before.
    depths: Beliefs,
    /// Seconds of each token behind the other.
    node: f64,
    /// Steps since it was asked last.
    idle: u32,
    drafted: u64,
    accepted: u64,
}

/// What a pass costs, as the engine knows it: rows of a pass to its time over that of one row.
pub trait PassCost {
    /// `V(rows)`, never falling, 1 at one row.
    fn of(&self, rows: usize) -> f64;
}

/// One request's draft.
#[derive(Debug)]
pub struct Candidate<'a> {
    /// Whose.
    pub request: u64,
    /// What is proposed; what does not pay is removed.
    pub tree: &'a mut DraftTree,
}

/// What has been learnt about a drafter, for reports.
#[derive(Clone, Debug, PartialEq)]
pub struct DrafterReport {
    /// Its name.
    pub name: String,
    /// Nodes that were verified.
    pub drafted: u64,
    /// Of which so many were right.
    pub accepted: u64,
    /// Estimated share of first tokens that are right.
    pub acceptance: f64,
    /// Seconds for each drafted node.
    pub seconds: f64,
    /// Why it is no longer asked, if so.
    pub stopped: Option<String>,
}

/// Learns how often drafts are right and chooses how many to verify.
#[derive(Debug, Default)]
pub struct Controller {
    drafters: Vec<Known>,
    requests: HashMap<u64, Vec<Beliefs>>,
    /// Seconds of a pass over one row.
    unit: f64,
}

impl Controller {
    /// A controller of `drafters` drafters.
    pub fn new(drafters: usize) -> Controller {
        Controller { drafters: vec![Known::default(); drafters], ..Controller::default() }
    }

    /// Most nodes that `drafter` should be asked for beside `rows` other rows: `most` when it costs next to nothing,
    /// else the number that pays best, 0 included. `speedup`: what is expected of the drafts that are there already.
    pub fn budget(&mut self, drafter: usize, rows: usize, most: usize, speedup: f64, cost: &impl PassCost) -> usize {
        let (unit, known) = (self.unit, &mut self.drafters[drafter]);
        known.idle += 1;
        let share = known.node / unit.max(f64::MIN_POSITIVE);
        if unit == 0.0 || known.node == 0.0 {
            known.idle = 0;
            return most.min(FIRST);
        }
        if share < FREE {
            known.idle = 0;
            return most;
        }
        let (mut best, mut value, mut survival, mut gain) = (0, speedup, 1.0, 0.0);
        let before = cost.of(rows);
        for count in 1..=most {
            let depth = (count - 1).min(CLASSES - 1);
            survival *= known.depths[depth].mean(0.6, FIRST_WEIGHT);
            gain += survival;
            let drafted = (1.0 + gain) * before / (cost.of(rows + count) + count as f64 * share);
            if drafted > value * if best == 0 { HYSTERESIS } else { 1.0 } {
                (best, value) = (count, drafted);
            }
        }
        if best == 0 && speedup <= 1.0 && known.idle >= RETRY {
            best = 1;
        }
        if best > 0 {
            known.idle = 0;
        }
        best
    }

    /// How likely a node of `drafter` must be, all before it considered, to be worth drafting beside `rows` rows.
    pub fn least(&self, drafter: usize, rows: usize, cost: &impl PassCost) -> f64 {
        if self.unit == 0.0 {
            return 0.0;
        }
        // A row more, and its drafting, over what a token costs without.
        let share = self.drafters[drafter].node / self.unit;
        (cost.of(rows + 4) - cost.of(rows)) / (4.0 * cost.of(rows)) + share / cost.of(rows)
    }

    /// Tokens a second, over those without drafts, that `candidates` promise in a pass with `rows` rows besides.
    pub fn speedup(&self, candidates: &[Candidate<'_>], rows: usize, cost: &impl PassCost) -> f64 {
        let (nodes, keep) = self.best(candidates, rows, cost);
        let (tokens, sum) = (candidates.len() as f64, nodes[..keep].iter().map(|(survival, ..)| survival).sum::<f64>());
        (1.0 + sum / tokens.max(1.0)) * cost.of(rows) / cost.of(rows + keep)
    }

    /// Keeps of all trees the nodes that pay in a pass with `rows` rows besides.
    pub fn choose(&self, candidates: &mut [Candidate<'_>], rows: usize, cost: &impl PassCost) {
        let (nodes, keep) = self.best(candidates, rows, cost);
        let mut kept: Vec<Vec<bool>> = candidates.iter().map(|candidate| vec![false; candidate.tree.len()]).collect();
        for &(_, index, node) in &nodes[..keep] {
            kept[index][node] = true;
        }
        for (candidate, kept) in candidates.iter_mut().zip(&kept) {
            candidate.tree.retain(|node| kept[node]);
        }
    }

    /// All nodes as (survival, candidate, node), likeliest first, and how many of them pay.
    fn best(
        &self,
        candidates: &[Candidate<'_>],
        rows: usize,
        cost: &impl PassCost,
    ) -> (Vec<(f64, usize, usize)>, usize) {
        let mut nodes = Vec::new();
        for (index, candidate) in candidates.iter().enumerate() {
            let survivals = self.survivals(candidate.request, candidate.tree);
            nodes.extend(survivals.into_iter().enumerate().map(|(node, survival)| (survival, index, node)));
        }
        // Stable, so that parents stay before their children, which are no likelier.
        nodes.sort_by(|a, b| b.0.total_cmp(&a.0));
        let tokens = candidates.len() as f64;
        let (mut keep, mut sum) = (0, 0.0);
        let mut best = HYSTERESIS * tokens / cost.of(rows);
        for (count, &(survival, ..)) in nodes.iter().enumerate() {
            sum += survival;
            let value = (tokens + sum) / cost.of(rows + count + 1);
            if value > best {
                (keep, best) = (count + 1, value);
            }
        }
        (nodes, keep)
    }

    /// How likely each node is to be accepted.
    fn survivals(&self, request: u64, tree: &DraftTree) -> Vec<f64> {
        let own = self.requests.get(&request);
        let mut survivals: Vec<f64> = Vec::with_capacity(tree.len());
        for node in tree.nodes() {
            let (drafter, class) = (node.drafter as usize, (node.class as usize).min(CLASSES - 1));
            let first = 0.3 + 0.6 * class as f64 / (CLASSES - 1) as f64;
            let known = self.drafters[drafter].classes[class].mean(first, FIRST_WEIGHT);
            let mean = own.map_or(known, |own| own[drafter][class].mean(known, WEIGHT));
            let before = node.parent.map_or(1.0, |parent| survivals[parent as usize]);
            survivals.push(before * mean * f64::from(node.ratio).clamp(0.0, 1.0));
        }
        survivals
    }

    /// Learns from what was committed after `tree` was drafted: nodes whose parent was right are right or wrong.
    ///
    /// `tree` may hold more than was verified: where the text went is known all the same. `asked`: for each drafter the
    /// most nodes it was asked for one behind the other, 0 if it was not.
    pub fn learn(&mut self, request: u64, tree: &DraftTree, asked: &[usize], committed: &[u32]) {
        let count = self.drafters.len();
        let own = self.requests.entry(request).or_insert_with(|| vec![Beliefs::default(); count]);
        // Of each drafter the tokens it had right from the first on.
        let mut right = vec![0; count];
        let mut parent = None;
        for (depth, &token) in committed.iter().enumerate() {
            let mut next = None;
            for (index, node) in tree.nodes().iter().enumerate().filter(|(_, node)| node.parent == parent) {
                let (drafter, class) = (node.drafter as usize, (node.class as usize).min(CLASSES - 1));
                own[drafter][class].note(node.token == token);
                self.drafters[drafter].classes[class].note(node.token == token);
                if node.token == token {
                    next = Some(index as u8);
                    right[drafter] += usize::from(right[drafter] == depth);
                }
            }
            if next.is_none() {
                break;
            }
            parent = next;
        }
        for ((known, &right), &asked) in self.drafters.iter_mut().zip(&right).zip(asked) {
            for depth in 0..asked.min(right + 1).min(committed.len()) {
                // Nothing drafted is as bad as the wrong token: it took the same time.
                known.depths[depth.min(CLASSES - 1)].note(depth < right);
            }
        }
    }

    /// Counts verified nodes and right ones, for reports.
    pub fn count(&mut self, tree: &DraftTree, accepted: impl Fn(usize) -> bool) {
        for (index, node) in tree.nodes().iter().enumerate() {
            let known = &mut self.drafters[node.drafter as usize];
            known.drafted += 1;
            known.accepted += u64::from(accepted(index));
        }
    }

    /// Takes note of the time a pass took over what `V` says it takes in passes over one row.
    pub fn pass_took(&mut self, seconds: f64, relative: f64) {
        smooth(&mut self.unit, seconds / relative);
    }

    /// Takes note of the time drafting took in so many steps, one token behind the other in each.
    pub fn drafting_took(&mut self, drafter: usize, seconds: f64, steps: usize) {
        smooth(&mut self.drafters[drafter].node, seconds / steps.max(1) as f64);
    }

    /// Forgets what is particular to a request.
    pub fn end(&mut self, request: u64) {
        self.requests.remove(&request);
    }

    /// Seconds of a pass over one row; 0 before the first.
    pub fn unit(&self) -> f64 {
        self.unit
    }

    /// What is known about a drafter.
    pub fn report(&self, drafter: usize, name: &str, stopped: Option<String>) -> DrafterReport {
        let known = &self.drafters[drafter];
        DrafterReport {
            name: name.to_owned(),
            drafted: known.drafted,
            accepted: known.accepted,
            acceptance: known.depths[0].mean(0.0, f64::MIN_POSITIVE),
            seconds: known.node,
            stopped,
        }
    }
}

fn smooth(average: &mut f64, measured: f64) {
    *average = if *average == 0.0 { measured } else { SMOOTH * *average + (1.0 - SMOOTH) * measured };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `1 + slope · (rows - 1)`.
    struct Line(f64);

    impl PassCost for Line {
        fn of(&self, rows: usize) -> f64 {
            1.0 + self.0 * (rows - 1) as f64
        }
    }

    fn chain(tokens: std::ops::Range<u32>) -> DraftTree {
        let mut tree = DraftTree::default();
        tree.push_chain(tokens, |_| 3);
        tree
    }

    fn kept(controller: &Controller, tree: &DraftTree, slope: f64) -> usize {
        let mut tree = tree.clone();
        controller.choose(&mut [Candidate { request: 1, tree: &mut tree }], 1, &Line(slope));
        tree.len()
    }

    #[test]
    fn what_is_always_right_is_verified_whole_and_what_never_is_not_at_all() {
        let (tree, mut controller) = (chain(0..8), Controller::new(1));
        for _ in 0..100 {
            controller.learn(1, &tree, &[8], &[0, 1, 2, 3, 4, 5, 6, 7]);
        }
        assert_eq!(kept(&controller, &tree, 0.06), 8);
        assert_eq!(kept(&controller, &tree, 1.0), 0, "a row that costs as much as a pass never pays");
        for _ in 0..2000 {
            controller.learn(1, &tree, &[8], &[9]);
        }
        assert_eq!(kept(&controller, &tree, 0.06), 0);
        controller.end(1);
        for _ in 0..2000 {
            controller.learn(2, &tree, &[8], &[0, 1, 2, 3, 4, 5, 6, 7]);
        }
        assert_eq!(kept(&controller, &tree, 0.06), 8, "a new request begins with what others taught");
    }

    #[test]
    fn requests_compete_for_rows() {
        let (likely, unlikely, mut controller) = (chain(0..8), chain(10..18), Controller::new(1));
        for _ in 0..200 {
            controller.learn(1, &likely, &[8], &[0, 1, 2, 3, 4, 5, 6, 7]);
            controller.learn(2, &unlikely, &[8], &[99]);
        }
        let (mut first, mut second) = (likely.clone(), unlikely.clone());
        let mut candidates = [Candidate { request: 1, tree: &mut first }, Candidate { request: 2, tree: &mut second }];
        controller.choose(&mut candidates, 2, &Line(0.1));
        assert_eq!((first.len(), second.len()), (8, 0));
    }

    #[test]
    fn an_expensive_drafter_is_asked_for_what_pays() {
        let mut controller = Controller::new(1);
        assert_eq!(controller.budget(0, 1, 8, 1.0, &Line(0.06)), FIRST, "nothing is known yet");
        controller.pass_took(0.010, 1.0);
        controller.drafting_took(0, 0.004 * 8.0, 8);
        let tree = chain(0..8);
        for _ in 0..300 {
            controller.learn(1, &tree, &[8], &[0, 1, 2, 3, 4, 5, 6, 7]);
        }
        assert_eq!(controller.budget(0, 1, 8, 1.0, &Line(0.06)), 8);
        assert_eq!(controller.budget(0, 1, 8, 5.0, &Line(0.06)), 0, "what is there already promises more");
        for _ in 0..600 {
            controller.learn(1, &tree, &[8], &[0, 9]);
            controller.learn(1, &tree, &[8], &[9]);
        }
        assert_eq!(controller.budget(0, 1, 8, 1.0, &Line(0.06)), 1, "half of the first tokens are right");
        for _ in 0..600 {
            controller.learn(1, &tree, &[8], &[9]);
        }
        let asked: Vec<usize> = (0..2 * RETRY).map(|_| controller.budget(0, 1, 8, 1.0, &Line(0.06))).collect();
        assert_eq!(asked.iter().sum::<usize>(), 2, "tried again from time to time");
    }
}
