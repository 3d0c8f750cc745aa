//! Where min-p, top-k and top-p cut a row, found from a histogram over log-probabilities instead of a sort.
//!
//! The histogram says in which bucket the count (top-k) or the mass (top-p) is reached; the tokens of that bucket alone
//! are sorted. Tempered logits are at most 0, so the bits of their magnitude order them: a token's key is (magnitude,
//! id), and a cut keeps the keys up to its own.

use super::{Row, Sampling, lanes};
use crate::math::{exp, exp_lanes, log};
use crate::vector::{LANES, Simd};

/// Buckets; the last one holds the tokens that min-p excludes or that are impossible.
const BUCKETS: usize = 2048;
/// Log-probabilities further below the greatest share the last bucket but one: their mass is below 1e-14.
const RANGE: f32 = 32.0;
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

#[derive(Clone, Copy)]
struct Bucket {
    mass: f64,
    count: usize,
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
    let width = lowest(simd, row).max(floor).max(-RANGE);
    // Negative, so that products with logits are positive.
    let scale = if width < 0.0 { (BUCKETS - 2) as f32 / width } else { 0.0 };
    let buckets = histogram(simd, row, cut, scale);
    let mut mass: f64 = buckets.iter().map(|bucket| bucket.mass).sum();
    let mut last = BUCKETS - 2;
    if let Some(k) = top_k {
        let k = k.max(1);
        let mut before = Bucket { mass: 0.0, count: 0 };
        let crossing = buckets.iter().position(|bucket| {
            let reached = before.count + bucket.count >= k;
            if !reached {
                before = Bucket { mass: before.mass + bucket.mass, count: before.count + bucket.count };
            }
            reached
        });
        if let Some(crossing) = crossing {
            let keys = members(simd, row, cut, scale, crossing);
            let kept = &keys[..k - before.count];
            mass = kept.iter().fold(before.mass, |mass, &key| mass + mass_of(key));
            cut = Cut::of_key(kept[kept.len() - 1]);
            last = crossing;
        }
    }
    if sampling.top_p < 1.0 {
        let target = f64::from(sampling.top_p) * mass;
        let mut reached = 0.0;
        let whole = buckets[..last].iter().position(|bucket| {
            let crosses = bucket.count > 0 && reached + bucket.mass >= target;
            if !crosses {
                reached += bucket.mass;
            }
            crosses
        });
        for key in members(simd, row, cut, scale, whole.unwrap_or(last)) {
            cut = Cut::of_key(key);
            reached += mass_of(key);
            if reached >= target {
                break;
            }
        }
    }
    cut
}

/// Mass of a token relative to the most likely one.
fn mass_of(key: u64) -> f64 {
    f64::from(exp(-f32::from_bits((key >> 32) as u32)))
}

/// The bucket of each lane, in the low bits of a float.
#[inline(always)]
fn bucket_of<S: Simd>(simd: S, x: S::F, kept: u16, scale: f32) -> S::F {
    let y = simd.min(simd.mul(x, simd.splat(scale)), simd.splat((BUCKETS - 2) as f32));
    let y = simd.select(simd.mask(kept), y, simd.splat((BUCKETS - 1) as f32));
    simd.add(y, simd.splat(INTEGER))
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

#[inline(always)]
fn histogram<S: Simd>(simd: S, row: Row<'_>, cut: Cut, scale: f32) -> Vec<Bucket> {
    let mut buckets = vec![Bucket { mass: 0.0, count: 0 }; BUCKETS];
    for at in row.blocks() {
        let x = row.block(simd, at);
        let kept = cut.kept(simd, x, at);
        if kept == 0 {
            continue;
        }
        let (mut places, mut masses) = ([0.0f32; LANES], [0.0; LANES]);
        simd.store(bucket_of(simd, x, kept, scale), &mut places);
        simd.store(exp_lanes(simd, x), &mut masses);
        for (place, mass) in places.iter().zip(masses) {
            let bucket = &mut buckets[place.to_bits() as usize % BUCKETS];
            bucket.mass += f64::from(mass);
            bucket.count += 1;
        }
    }
    buckets[BUCKETS - 1] = Bucket { mass: 0.0, count: 0 };
    buckets
}

/// Keys of the kept tokens of one bucket, ascending: most likely first.
#[inline(always)]
fn members<S: Simd>(simd: S, row: Row<'_>, cut: Cut, scale: f32, bucket: usize) -> Vec<u64> {
    let wanted = simd.splat(bucket as f32 + INTEGER);
    let mut keys = Vec::new();
    for at in row.blocks() {
        let x = row.block(simd, at);
        let kept = cut.kept(simd, x, at);
        let places = bucket_of(simd, x, kept, scale);
        let other = simd.bits(simd.less(places, wanted)) | simd.bits(simd.less(wanted, places));
        let found = kept & !other;
        if found != 0 {
            let mut values = [0.0; LANES];
            simd.store(x, &mut values);
            keys.extend(lanes(found).map(|lane| key(values[lane], (at + lane) as u32)));
        }
    }
    keys.sort_unstable();
    keys
}
