//! Where min-p, top-k and top-p cut a row, found from a histogram over log-probabilities instead of a sort.
//!
//! The histogram says in which bucket the count (top-k) or the mass (top-p) is reached; the tokens of that bucket alone
//! are sorted. Tempered logits are at most 0, so the bits of their magnitude order them: a token's key is (magnitude,
//! id), and a cut keeps the keys up to its own.

use super::{Row, Sampling, lanes};
use crate::math::{exp, exp_lanes, log};
use crate::vector::{LANES, Simd};

/// Buckets; the last one gathers the tokens that are no candidates.
const BUCKETS: usize = 2048;
/// Where top-k looks first: far fewer tokens are less likely than the greatest by `e^16` than `k` asks for.
const NEAR: f32 = 16.0;
/// Tokens further below the greatest than this share a bucket.
const FAR: f32 = 64.0;
/// 2^23: adding it leaves the nearest integer in the low bits of the sum.
const INTEGER: f32 = 8_388_608.0;

/// Keeps tokens with a greater logit than `value`, and those equal to it up to id `token`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    value: f32,
    token: u32,
}

impl Cut {
    fn of_key(key: u64) -> Cut {
        Cut { value: -f32::from_bits((key >> 32) as u32), token: key as u32 }
    }

    /// Which of the tokens `at..at + 16` with logits `x` are kept.
    #[inline(always)]
    pub(super) fn kept<S: Simd>(self, simd: S, x: S::F, at: usize) -> u16 {
        let value = simd.splat(self.value);
        let above = simd.bits(simd.less(value, x));
        let equal = !above & !simd.bits(simd.less(x, value));
        match (self.token as usize).checked_sub(at) {
            Some(last) if last >= LANES => above | equal,
            Some(last) => above | (equal & (u16::MAX >> (LANES - 1 - last))),
            None => above,
        }
    }
}

fn key(x: f32, token: u32) -> u64 {
    u64::from(x.abs().to_bits()) << 32 | u64::from(token)
}

/// `min_p`, then `top_k`, then `top_p`.
#[inline(always)]
pub(super) fn cut<S: Simd>(simd: S, row: Row<'_>, sampling: &Sampling<'_>) -> Cut {
    // Minus infinity itself never passes.
    let floor = if sampling.min_p > 0.0 { log(sampling.min_p) } else { f32::MIN }.min(0.0);
    let mut cut = Cut { value: floor, token: u32::MAX };
    let top_k = sampling.top_k.filter(|&k| k < row.logits.len());
    if top_k.is_none() && sampling.top_p >= 1.0 {
        return cut;
    }
    let lowest = lowest(simd, row).max(floor);
    if let Some(k) = top_k {
        let k = k.max(1) as f64;
        let near = Histogram::new(simd, row, cut, Weight::Count, lowest.max(-NEAR), -NEAR);
        if near.total() >= k {
            cut = near.reach(simd, row, cut, k);
        } else {
            let all = Histogram::new(simd, row, cut, Weight::Count, lowest.max(-FAR), f32::MIN);
            cut = all.reach(simd, row, cut, k);
        }
    }
    if sampling.top_p < 1.0 {
        // Were all tokens below this, together they would weigh less than the share that top-p drops.
        let negligible = log((1.0 - sampling.top_p.max(0.0)) / row.logits.len() as f32) - 1.0;
        let histogram = Histogram::new(simd, row, cut, Weight::Mass, lowest.max(negligible), negligible);
        cut = histogram.reach(simd, row, cut, f64::from(sampling.top_p) * (histogram.total() + histogram.rest));
    }
    cut
}

/// What is added up from the most likely token on.
#[derive(Clone, Copy, PartialEq)]
enum Weight {
    /// Tokens.
    Count,
    /// Probability relative to the most likely token's.
    Mass,
}

impl Weight {
    fn of(self, key: u64) -> f64 {
        match self {
            Weight::Count => 1.0,
            Weight::Mass => f64::from(exp(-f32::from_bits((key >> 32) as u32))),
        }
    }
}

/// Weights of the candidates, those kept so far whose logits are at least `floor`, by buckets of logits.
struct Histogram {
    weight: Weight,
    floor: f32,
    /// Buckets to a unit of the logits; negative, as these are.
    scale: f32,
    /// The greatest logits first; the last bucket is no candidates.
    buckets: Vec<f64>,
    /// Mass of the kept tokens that are no candidates.
    rest: f64,
}

impl Histogram {
    /// The buckets divide the logits from 0 down to `lowest`; candidates below share the last.
    #[inline(always)]
    fn new<S: Simd>(simd: S, row: Row<'_>, cut: Cut, weight: Weight, lowest: f32, floor: f32) -> Histogram {
        let scale = if lowest < 0.0 { (BUCKETS - 2) as f32 / lowest } else { 0.0 };
        let mut histogram = Histogram { weight, floor, scale, buckets: vec![0.0; BUCKETS], rest: 0.0 };
        let (zero, one) = (simd.splat(0.0), simd.splat(1.0));
        let mut rest = zero;
        for at in row.blocks() {
            let x = row.block(simd, at);
            let kept = cut.kept(simd, x, at);
            if kept == 0 {
                continue;
            }
            let below = simd.bits(simd.less(x, simd.splat(floor)));
            let mut weights = one;
            if weight == Weight::Mass {
                weights = exp_lanes(simd, x);
                rest = simd.add(rest, simd.select(simd.mask(kept & below), weights, zero));
            }
            if kept & !below != 0 {
                let (mut places, mut values) = ([0.0f32; LANES], [0.0; LANES]);
                simd.store(histogram.places(simd, x, kept & !below), &mut places);
                simd.store(weights, &mut values);
                let buckets: &mut [f64; BUCKETS] = (&mut histogram.buckets[..]).try_into().expect("all buckets");
                for (place, weight) in places.iter().zip(values) {
                    buckets[place.to_bits() as usize % BUCKETS] += f64::from(weight);
                }
            }
        }
        histogram.buckets.truncate(BUCKETS - 1);
        histogram.rest = f64::from(simd.sum(rest));
        histogram
    }

    /// Weight of all candidates.
    fn total(&self) -> f64 {
        self.buckets.iter().sum()
    }

    /// The bucket of each lane, in the low bits of a float.
    #[inline(always)]
    fn places<S: Simd>(&self, simd: S, x: S::F, candidates: u16) -> S::F {
        let place = simd.min(simd.mul(x, simd.splat(self.scale)), simd.splat((BUCKETS - 2) as f32));
        let place = simd.select(simd.mask(candidates), place, simd.splat((BUCKETS - 1) as f32));
        simd.add(place, simd.splat(INTEGER))
    }

    /// Where the most likely candidates together first weigh `target`; `cut` when all of them don't.
    #[inline(always)]
    fn reach<S: Simd>(&self, simd: S, row: Row<'_>, cut: Cut, target: f64) -> Cut {
        let mut reached = 0.0;
        for (bucket, weight) in self.buckets.iter().enumerate() {
            if *weight > 0.0 && reached + weight >= target {
                for key in self.members(simd, row, cut, bucket) {
                    reached += self.weight.of(key);
                    if reached >= target {
                        return Cut::of_key(key);
                    }
                }
            } else {
                reached += weight;
            }
        }
        cut
    }

    /// Keys of the candidates of one bucket, ascending: most likely first.
    #[inline(always)]
    fn members<S: Simd>(&self, simd: S, row: Row<'_>, cut: Cut, bucket: usize) -> Vec<u64> {
        let wanted = simd.splat(bucket as f32 + INTEGER);
        let mut keys = Vec::new();
        for at in row.blocks() {
            let x = row.block(simd, at);
            let candidates = cut.kept(simd, x, at) & !simd.bits(simd.less(x, simd.splat(self.floor)));
            let places = self.places(simd, x, candidates);
            let other = simd.bits(simd.less(places, wanted)) | simd.bits(simd.less(wanted, places));
            let found = candidates & !other;
            if found != 0 {
                let mut values = [0.0; LANES];
                simd.store(x, &mut values);
                keys.extend(lanes(found).map(|lane| key(values[lane], (at + lane) as u32)));
            }
        }
        keys.sort_unstable();
        keys
    }
}

/// The least tempered logit above minus infinity.
#[inline(always)]
fn lowest<S: Simd>(simd: S, row: Row<'_>) -> f32 {
    let (zero, nothing) = (simd.splat(0.0), simd.splat(f32::NEG_INFINITY));
    let mut depth = zero;
    for at in row.blocks() {
        let x = row.block(simd, at);
        depth = simd.max(depth, simd.select(simd.less(nothing, x), simd.sub(zero, x), zero));
    }
    -simd.maximum(depth)
}
