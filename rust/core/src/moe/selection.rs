//! Fewer experts, and those that are at hand: what a token reads, against what the model would have said.
//!
//! An expert that weighs little changes little: it is left out where its weight is below a part of the token's largest
//! (as `ik_llama.cpp`'s smart expert reduction does). Where experts come and go, one in memory is taken before one on disk
//! of about the same score (cache-aware routing, arXiv 2412.00099); its weight stays the router's.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::ledger::ExpertCounts;
use crate::model::feed_forward::levers::{Departures, Selection};
use crate::model::feed_forward::router::LEFT_OUT;
use farthing_kernels::math::log;
use farthing_kernels::score::Score;

/// Both, with counts of what they did.
#[derive(Debug)]
pub(super) struct LossySelection {
    /// 0 leaves nothing out.
    skip: f32,
    /// On the scores of experts in memory; on logits, its logarithm is added.
    bonus: f32,
    choices: AtomicU64,
    skipped: AtomicU64,
    substituted: AtomicU64,
}

impl LossySelection {
    /// `skip` and `margin` as [`super::Levers`] has them.
    pub(super) fn new(skip: Option<f32>, margin: Option<f32>) -> LossySelection {
        LossySelection {
            skip: skip.unwrap_or(0.0),
            bonus: 1.0 / (1.0 - margin.unwrap_or(0.0)),
            choices: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            substituted: AtomicU64::new(0),
        }
    }
}

impl Selection for LossySelection {
    fn asks_residency(&self) -> bool {
        self.bonus > 1.0
    }

    fn choose(
        &self,
        kind: Score,
        scores: &[f32],
        resident: &[bool],
        ids: &mut [u32],
        best: &dyn Fn(&[f32], &mut [u32]),
    ) -> u64 {
        best(scores, ids);
        if resident.iter().all(|here| *here) {
            return 0;
        }
        let (own, mut raised) = (ids.to_vec(), scores.to_vec());
        for (score, _) in raised.iter_mut().zip(resident).filter(|(_, here)| **here) {
            *score = if kind == Score::Identity { *score + log(self.bonus) } else { *score * self.bonus };
        }
        best(&raised, ids);
        ids.iter().filter(|id| !own.contains(id)).count() as u64
    }

    fn leave_out(&self, ids: &mut [u32], weights: &mut [f32]) -> u64 {
        if self.skip == 0.0 {
            return 0;
        }
        let least = self.skip * weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut count = 0;
        for (id, weight) in ids.iter_mut().zip(weights).filter(|(_, weight)| **weight < least) {
            (*id, *weight) = (LEFT_OUT, 0.0);
            count += 1;
        }
        count
    }

    fn note(&self, choices: u64, departures: Departures) {
        self.choices.fetch_add(choices, Ordering::Relaxed);
        self.skipped.fetch_add(departures.skipped, Ordering::Relaxed);
        self.substituted.fetch_add(departures.substituted, Ordering::Relaxed);
    }

    fn counts(&self) -> ExpertCounts {
        ExpertCounts {
            choices: self.choices.load(Ordering::Relaxed),
            skipped: self.skipped.load(Ordering::Relaxed),
            substituted: self.substituted.load(Ordering::Relaxed),
            ..ExpertCounts::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::feed_forward::router::{Biases, Choice, RouterSpec};
    use farthing_kernels::pool::Pool;

    /// Ids and weights of one row, and what departed.
    fn route(
        spec: &RouterSpec,
        logits: &[f32],
        by: &LossySelection,
        resident: &[bool],
    ) -> (Vec<u32>, Vec<f32>, Departures) {
        let (mut ids, mut weights) = (vec![0; spec.top_k], vec![0.0; spec.top_k]);
        let choice = Choice::By(by, resident);
        let departures = spec
            .select(&Pool::new(1), &mut logits.to_vec(), Biases::default(), choice, &mut ids, &mut weights)
            .unwrap();
        (ids, weights, departures)
    }

    #[test]
    fn light_experts_are_left_out_and_the_rest_weighs_as_the_family_has_it() {
        // Scores 8/15, 4/15, 2/15 and 1/15.
        let logits: Vec<f32> = [8.0_f32, 4.0, 2.0, 1.0].iter().map(|x| x.ln()).collect();
        let plain = RouterSpec::softmax(4, 4);
        let by = LossySelection::new(Some(0.2), None);
        let (ids, weights, departures) = route(&plain, &logits, &by, &[]);
        assert_eq!((ids, departures.skipped), (vec![0, 1, 2, LEFT_OUT], 1));
        assert!((weights[0] - 8.0 / 15.0).abs() < 1e-6 && weights[3] == 0.0);
        let logit = RouterSpec { score: Score::Identity, post: Score::Softmax, ..plain };
        for spec in [RouterSpec { renormalize: Some(0.0), ..plain }, logit] {
            let (ids, weights, _) = route(&spec, &logits, &by, &[]);
            assert_eq!(ids, [0, 1, 2, LEFT_OUT]);
            assert!((weights[0] - 8.0 / 14.0).abs() < 1e-6 && (weights[2] - 2.0 / 14.0).abs() < 1e-6);
        }
        let (ids, ..) = route(&plain, &logits, &LossySelection::new(Some(1.0), None), &[]);
        assert_eq!(ids, [0, LEFT_OUT, LEFT_OUT, LEFT_OUT]);
        let (ids, weights, departures) = route(&plain, &[0.0; 4], &LossySelection::new(Some(1.0), None), &[]);
        assert_eq!((ids, weights, departures.skipped), (vec![0, 1, 2, 3], vec![0.25; 4], 0));
    }

    #[test]
    fn experts_in_memory_are_preferred_within_the_margin_and_weigh_what_they_weigh() {
        let logits: Vec<f32> = [8.0_f32, 4.0, 3.0, 1.0].iter().map(|x| x.ln()).collect();
        let resident = [true, false, true, true];
        for spec in [
            RouterSpec::softmax(4, 2),
            RouterSpec { score: Score::Identity, post: Score::Softmax, ..RouterSpec::softmax(4, 2) },
        ] {
            let near = LossySelection::new(None, Some(0.2));
            assert_eq!(route(&spec, &logits, &near, &resident).0, [0, 1]);
            let far = LossySelection::new(None, Some(0.3));
            let (ids, weights, departures) = route(&spec, &logits, &far, &resident);
            assert_eq!((ids, departures.substituted), (vec![0, 2], 1));
            let total = if spec.post == Score::Softmax { 11.0 } else { 16.0 };
            assert!((weights[0] - 8.0 / total).abs() < 1e-6 && (weights[1] - 3.0 / total).abs() < 1e-6);
            assert_eq!(route(&spec, &logits, &far, &[true; 4]).0, [0, 1]);
            assert_eq!(route(&spec, &logits, &far, &[false; 4]).0, [0, 1]);
        }
    }

    #[test]
    fn odd_weights_leave_nothing_out_of_range() {
        let by = LossySelection::new(Some(0.5), Some(0.9));
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (ids, ..) = route(&RouterSpec::softmax(3, 2), &[value; 3], &by, &[true, false, false]);
            assert!(ids.iter().all(|&id| id < 3 || id == LEFT_OUT), "{ids:?}");
        }
    }
}
