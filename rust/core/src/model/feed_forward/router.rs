//! One router for every family: scores of all experts, a choice among them, and weights of the chosen.
//!
//! Row by row, with `e` experts of which `k` are chosen:
//!
//! ```text
//! l = x · Wᵀ + logit bias             (e,)
//! s = score(l)
//! c = s + selection bias              those outside the kept groups get `masked_fill`
//! ids = the k greatest of c           lower ids among equals; or given, by a table of token ids
//! w = post(s[ids])                    the selection bias chooses, it never weighs
//! w = w / (Σ w + epsilon) · scale     if renormalised
//! ```
//!
//! All of it in f32. A row depends on its own logits alone, and has the same bits on every instruction set. A
//! [`Selection`] may choose otherwise.

use farthing_kernels::format::{Format, PackedMatrix};
use farthing_kernels::matmul::{Input, Job, matmul};
use farthing_kernels::pool::Pool;
use farthing_kernels::score::{Score, renormalize, score};
use farthing_kernels::topk::top_k;

use super::levers::{Departures, Selection};
use crate::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How logits become experts and weights; the weights of a layer's router are not part of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterSpec {
    /// e.
    pub experts: usize,
    /// k: experts that each token goes to.
    pub top_k: usize,
    /// Makes scores of logits, over all experts.
    pub score: Score,
    /// Experts are first chosen by the group.
    pub groups: Option<Groups>,
    /// Makes weights of the chosen scores.
    pub post: Score,
    /// Weights are divided by their sum plus this.
    pub renormalize: Option<f32>,
    /// Multiplies the weights at the end.
    pub scale: f32,
    /// Weights multiply what the experts read, not what they give (Llama 4).
    pub apply_to_input: bool,
}

/// Groups of equally many experts with consecutive ids (DeepSeek-V2 and V3).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Groups {
    /// Number of groups.
    pub count: usize,
    /// Groups whose experts can be chosen.
    pub kept: usize,
    /// What says which groups are kept.
    pub score: GroupScore,
    /// What experts of the other groups get in place of their score; minus infinity or 0.
    pub masked_fill: f32,
}

/// The score of a group of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The sum of its two best (DeepSeek-V3).
    TopTwo,
    /// Its best (DeepSeek-V2).
    Maximum,
}

/// What a router adds to each expert.
#[derive(Clone, Copy, Debug, Default)]
pub struct Biases<'a> {
    /// (e,) added to the logits.
    pub logit: Option<&'a [f32]>,
    /// (e,) added to the scores while experts are chosen.
    pub selection: Option<&'a [f32]>,
}

/// Who chooses the experts of each row.
#[derive(Clone, Copy, Debug, Default)]
pub enum Choice<'a> {
    /// The router: the best scores.
    #[default]
    Best,
    /// Nobody: these are the ids, `(t, k)`.
    Given(&'a [u32]),
    /// Somebody who knows which experts are in memory, `(e,)`; nothing where all are.
    By(&'a dyn Selection, &'a [bool]),
}

/// The id of an expert that was chosen and is left out; its weight is 0.
pub const LEFT_OUT: u32 = u32::MAX;

fn within(name: &'static str, got: usize, expected: std::ops::RangeInclusive<usize>, what: &str) -> Result<(), Error> {
    if expected.contains(&got) {
        return Ok(());
    }
    Err(Error::argument(name, got, format!("{} to {}{what}", expected.start(), expected.end())))
}

fn length(name: &'static str, got: usize, expected: usize) -> Result<(), Error> {
    if got == expected { Ok(()) } else { Err(Error::argument(name, format!("{got} numbers"), expected)) }
}

impl RouterSpec {
    /// Softmax over all experts, the best `top_k` of them with their weights as they are.
    ///
    /// ```
    /// use farthing::model::feed_forward::router::{Biases, Choice, RouterSpec};
    /// use farthing_kernels::pool::Pool;
    ///
    /// let spec = RouterSpec { renormalize: Some(0.0), ..RouterSpec::softmax(4, 2) };
    /// let (mut logits, mut ids, mut weights) = ([0.0, 1.0, -1.0, 1.0], [0; 2], [0.0; 2]);
    /// spec.select(&Pool::new(1), &mut logits, Biases::default(), Choice::Best, &mut ids, &mut weights)?;
    /// assert_eq!((ids, weights), ([1, 3], [0.5, 0.5]));
    /// # Ok::<(), farthing::error::Error>(())
    /// ```
    pub fn softmax(experts: usize, top_k: usize) -> RouterSpec {
        RouterSpec {
            experts,
            top_k,
            score: Score::Softmax,
            groups: None,
            post: Score::Identity,
            renormalize: None,
            scale: 1.0,
            apply_to_input: false,
        }
    }

    /// Whether any row can be routed this way.
    pub fn check(&self) -> Result<(), Error> {
        within("num_experts", self.experts, 1..=u32::MAX as usize, "")?;
        within("top_k", self.top_k, 1..=self.experts, " experts")?;
        if let Some(groups) = self.groups {
            within("n_group", groups.count, 1..=self.experts, " experts")?;
            if !self.experts.is_multiple_of(groups.count) {
                let expected = format!("a divisor of {} experts", self.experts);
                return Err(Error::argument("n_group", groups.count, expected));
            }
            within("topk_group", groups.kept, 1..=groups.count, " groups")?;
            let each = self.experts / groups.count;
            if groups.score == GroupScore::TopTwo && each < 2 {
                let expected = "groups of at least 2 experts where the best two are summed";
                return Err(Error::argument("n_group", groups.count, expected));
            }
            within("top_k", self.top_k, 1..=groups.kept * each, " experts in the kept groups")?;
            if groups.masked_fill != 0.0 && groups.masked_fill != f32::NEG_INFINITY {
                return Err(Error::argument("masked_fill", groups.masked_fill, "minus infinity or 0"));
            }
        }
        let epsilon = self.renormalize.unwrap_or(0.0);
        if !(epsilon >= 0.0 && epsilon.is_finite()) {
            return Err(Error::argument("norm_eps", epsilon, "a finite number, 0 or above"));
        }
        if !self.scale.is_finite() {
            return Err(Error::argument("routed_scaling_factor", self.scale, "a finite number"));
        }
        Ok(())
    }

    /// Whether `weight` can be a router's: (e, h) floats.
    pub fn check_weight(&self, weight: &PackedMatrix) -> Result<(), Error> {
        if weight.rows() != self.experts {
            let expected = format!("{} rows, one for each expert", self.experts);
            return Err(Error::argument("weight", format!("{} rows", weight.rows()), expected));
        }
        if !matches!(weight.format(), Format::Float(_)) {
            return Err(Error::argument("weight", weight.format(), "f32, f16 or bf16: routers are not quantised"));
        }
        Ok(())
    }

    /// `ids` and `weights`: (t, k) for `logits`: (t, e), which become scores. The ids of a row descend by what chose
    /// them.
    ///
    /// The ids of a row that are not given are distinct whatever its logits are. A NaN among them makes the row's
    /// weights NaN under softmax; under other scores its expert is chosen last, with a weight of NaN.
    pub fn select(
        &self,
        pool: &Pool,
        logits: &mut [f32],
        biases: Biases<'_>,
        choice: Choice<'_>,
        ids: &mut [u32],
        weights: &mut [f32],
    ) -> Result<Departures, Error> {
        self.check()?;
        let (e, k) = (self.experts, self.top_k);
        if !logits.len().is_multiple_of(e) {
            return Err(Error::argument("logits", format!("{} numbers", logits.len()), format!("rows of {e} experts")));
        }
        let rows = logits.len() / e;
        length("logit_bias", biases.logit.map_or(e, <[f32]>::len), e)?;
        length("selection_bias", biases.selection.map_or(e, <[f32]>::len), e)?;
        length("ids", ids.len(), rows * k)?;
        length("weights", weights.len(), rows * k)?;
        if let Choice::Given(chosen) = choice {
            length("chosen", chosen.len(), rows * k)?;
            if let Some(id) = chosen.iter().find(|id| **id as usize >= e) {
                return Err(Error::argument("chosen", format!("expert {id}"), format!("0 to {}", e - 1)));
            }
        }
        let (skipped, substituted) = (AtomicU64::new(0), AtomicU64::new(0));
        pool.rows_of_three((logits, e), (ids, k), (weights, k), |first, scores, ids, weights| {
            if let Some(bias) = biases.logit {
                for row in scores.chunks_exact_mut(e) {
                    row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
                }
            }
            score(self.score, scores, e);
            let mut selection = None;
            match choice {
                Choice::Given(chosen) => ids.copy_from_slice(&chosen[first * k..first * k + ids.len()]),
                Choice::Best => self.choose(scores, biases.selection, ids),
                Choice::By(by, resident) => {
                    let best = |scores: &[f32], ids: &mut [u32]| self.choose(scores, biases.selection, ids);
                    let rows = scores.chunks_exact(e).zip(ids.chunks_exact_mut(k));
                    let count = rows.map(|(scores, ids)| by.choose(self.score, scores, resident, ids, &best)).sum();
                    substituted.fetch_add(count, Ordering::Relaxed);
                    selection = Some(by);
                }
            }
            skipped.fetch_add(self.weigh(scores, ids, weights, selection), Ordering::Relaxed);
        });
        Ok(Departures { skipped: skipped.into_inner(), substituted: substituted.into_inner() })
    }

    /// The experts of each row of `scores`: (t, e).
    fn choose(&self, scores: &[f32], bias: Option<&[f32]>, ids: &mut [u32]) {
        let (e, k) = (self.experts, self.top_k);
        if bias.is_none() && self.groups.is_none() {
            return top_k(scores, e, k, ids);
        }
        let mut choice = scores.to_vec();
        for row in choice.chunks_exact_mut(e) {
            if let Some(bias) = bias {
                row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
            }
            if let Some(groups) = self.groups.filter(|groups| groups.kept < groups.count) {
                groups.mask(row);
            }
        }
        top_k(&choice, e, k, ids);
    }

    /// The weights of the experts of each row; returns how many were left out.
    fn weigh(&self, scores: &[f32], ids: &mut [u32], weights: &mut [f32], selection: Option<&dyn Selection>) -> u64 {
        let (e, k) = (self.experts, self.top_k);
        for ((scores, ids), weights) in scores.chunks_exact(e).zip(ids.chunks_exact(k)).zip(weights.chunks_exact_mut(k))
        {
            weights.iter_mut().zip(ids).for_each(|(weight, id)| *weight = scores[*id as usize]);
        }
        score(self.post, weights, k);
        let mut skipped = 0;
        if let Some(selection) = selection {
            for (ids, weights) in ids.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k)) {
                let count = selection.leave_out(ids, weights);
                // A softmax over the chosen is one over those that stay.
                if count > 0 && self.post == Score::Softmax {
                    renormalize(weights, k, 0.0);
                }
                skipped += count;
            }
        }
        if let Some(epsilon) = self.renormalize {
            renormalize(weights, k, epsilon);
        }
        if self.scale != 1.0 {
            for weight in weights {
                *weight *= self.scale;
            }
        }
        skipped
    }

    /// The share of all experts' scores that the chosen ones have, for each row of `scores`: (t, e), as
    /// [`RouterSpec::select`] left them; of the softmax where scores are the logits themselves.
    pub fn selected_mass<'a>(&self, scores: &'a [f32], ids: &'a [u32]) -> impl Iterator<Item = f32> + 'a {
        let (kind, mut row) = (self.score, vec![0.0; self.experts]);
        scores.chunks_exact(self.experts).zip(ids.chunks_exact(self.top_k)).map(move |(scores, ids)| {
            row.copy_from_slice(scores);
            match kind {
                Score::Softmax => {}
                Score::Identity => score(Score::Softmax, &mut row, scores.len()),
                Score::Sigmoid | Score::SqrtSoftplus => renormalize(&mut row, scores.len(), 0.0),
            }
            ids.iter().map(|id| row[*id as usize]).sum()
        })
    }
}

impl Groups {
    /// Fills what `row`: (e,) holds outside the kept groups.
    fn mask(self, row: &mut [f32]) {
        let each = row.len() / self.count;
        let scores: Vec<f32> = row.chunks_exact(each).map(|group| self.score.of(group)).collect();
        let mut kept = vec![0; self.kept];
        top_k(&scores, self.count, self.kept, &mut kept);
        for (id, group) in row.chunks_exact_mut(each).enumerate() {
            let kept = kept.contains(&(id as u32));
            if self.masked_fill == 0.0 {
                if !kept {
                    group.fill(0.0);
                }
                continue;
            }
            // NaNs of the kept groups come before what is masked, so that no expert outside is ever chosen.
            for x in group {
                if !kept {
                    *x = f32::NAN;
                } else if x.is_nan() {
                    *x = f32::NEG_INFINITY;
                }
            }
        }
    }
}

impl GroupScore {
    /// NaNs count for nothing.
    fn of(self, group: &[f32]) -> f32 {
        let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &x in group {
            if x > best {
                (best, second) = (x, best);
            } else if x > second {
                second = x;
            }
        }
        match self {
            GroupScore::TopTwo => best + second,
            GroupScore::Maximum => best,
        }
    }
}

/// A layer's router.
#[derive(Debug)]
pub struct Router {
    spec: RouterSpec,
    weight: PackedMatrix,
    logit_bias: Option<Vec<f32>>,
    selection_bias: Option<Vec<f32>>,
    /// (vocabulary, k)
    table: Option<Vec<u32>>,
    /// Who chooses in its place.
    selection: Option<Arc<dyn Selection>>,
}

/// What routing needs beside its inputs, kept between calls.
#[derive(Default)]
pub struct RouterScratch {
    input: Input,
    logits: Vec<f32>,
    chosen: Vec<u32>,
    /// `(e,)` experts that are in memory, for whoever chooses by that; nothing where all are.
    pub(super) resident: Vec<bool>,
}

impl RouterScratch {
    /// (t, e) scores of the last rows that were routed, for [`RouterSpec::selected_mass`].
    pub fn scores(&self) -> &[f32] {
        &self.logits
    }
}

impl Router {
    /// A router of `weight`: (e, h) floats, never quantised, biases of (e,) and, where experts follow from the token's
    /// id (DeepSeek-V4's hash layers), `table`: (vocabulary, k).
    pub fn new(
        spec: RouterSpec,
        weight: PackedMatrix,
        logit_bias: Option<Vec<f32>>,
        selection_bias: Option<Vec<f32>>,
        table: Option<Vec<u32>>,
    ) -> Result<Router, Error> {
        spec.check()?;
        spec.check_weight(&weight)?;
        length("logit_bias", logit_bias.as_ref().map_or(spec.experts, Vec::len), spec.experts)?;
        length("selection_bias", selection_bias.as_ref().map_or(spec.experts, Vec::len), spec.experts)?;
        if let Some(table) = &table {
            if table.is_empty() || !table.len().is_multiple_of(spec.top_k) {
                let got = format!("{} numbers", table.len());
                return Err(Error::argument("table", got, format!("rows of {} experts", spec.top_k)));
            }
            if let Some(at) = table.iter().position(|id| *id as usize >= spec.experts) {
                let got = format!("expert {} for token {}", table[at], at / spec.top_k);
                return Err(Error::argument("table", got, format!("0 to {}", spec.experts - 1)));
            }
        }
        Ok(Router { spec, weight, logit_bias, selection_bias, table, selection: None })
    }

    /// The same, with somebody else choosing; where experts follow from the token's id, nobody can.
    #[must_use]
    pub fn selected_by(self, selection: Option<Arc<dyn Selection>>) -> Router {
        Router { selection, ..self }
    }

    /// Who chooses in its place.
    pub(super) fn selection(&self) -> Option<&dyn Selection> {
        self.selection.as_deref()
    }

    /// How it routes.
    pub fn spec(&self) -> &RouterSpec {
        &self.spec
    }

    /// (e, h).
    pub fn weight(&self) -> &PackedMatrix {
        &self.weight
    }

    /// Bytes of its weights.
    pub fn nbytes(&self) -> usize {
        self.weight.nbytes()
    }

    /// `ids` and `weights`: (t, k) for `x`: (t, h); `tokens`: (t,) are read by routers with a table alone.
    pub fn route(
        &self,
        pool: &Pool,
        x: &[f32],
        tokens: &[u32],
        scratch: &mut RouterScratch,
        ids: &mut [u32],
        weights: &mut [f32],
    ) -> Result<Departures, Error> {
        let h = self.weight.columns();
        if !x.len().is_multiple_of(h) {
            return Err(Error::argument("x", format!("{} numbers", x.len()), format!("rows of {h}")));
        }
        let rows = x.len() / h;
        let choice = match (&self.table, &self.selection) {
            (None, None) => Choice::Best,
            (None, Some(selection)) => Choice::By(&**selection, &scratch.resident),
            (Some(table), _) => {
                length("token_ids", tokens.len(), rows)?;
                look_up(table, self.spec.top_k, tokens, &mut scratch.chosen)?;
                Choice::Given(&scratch.chosen)
            }
        };
        scratch.logits.resize(rows * self.spec.experts, 0.0);
        scratch.input.prepare(pool, x, rows, h, &[&self.weight]);
        let job = Job { matrix: &self.weight, bias: None, add: false, out: &mut scratch.logits };
        matmul(pool, x, rows, &scratch.input, &mut [job]);
        let biases = Biases { logit: self.logit_bias.as_deref(), selection: self.selection_bias.as_deref() };
        self.spec.select(pool, &mut scratch.logits, biases, choice, ids, weights)
    }
}

/// The rows of `table`: (vocabulary, k) for `tokens`: (t,), as `chosen`: (t, k).
fn look_up(table: &[u32], k: usize, tokens: &[u32], chosen: &mut Vec<u32>) -> Result<(), Error> {
    chosen.clear();
    for &token in tokens {
        let Some(row) = table.chunks_exact(k).nth(token as usize) else {
            let expected = format!("0 to {}, the rows of the table", table.len() / k - 1);
            return Err(Error::argument("token_ids", token, expected));
        };
        chosen.extend_from_slice(row);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
