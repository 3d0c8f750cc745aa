//! The greatest of each row: ids, greatest first, lower ids among equals.
//!
//! As often as ids are wanted, one sweep of vectors finds where the greatest number that is left stands, and the greatest
//! below it. Rows are as long as a layer has experts, and few of them are wanted.

use crate::isa::Isa;
use crate::selftest::float_level;
use crate::vector::{Kernel, LANES, Simd, dispatch};

/// The `k` greatest of each row of `scores`: (rows, `width`), as `ids`: (rows, `k`), descending, lower ids among equals.
///
/// The ids of a row are distinct whatever it holds: a NaN counts as less than every number.
///
/// ```
/// let mut ids = [0; 4];
/// farthing_kernels::topk::top_k(&[0.5, 2.0, 0.5, f32::NAN, 7.0, 7.0], 3, 2, &mut ids);
/// assert_eq!(ids, [1, 0, 1, 2]);
/// ```
///
/// # Panics
/// When `scores` is no whole number of rows, `k` exceeds `width`, or `ids` is not `k` a row.
pub fn top_k(scores: &[f32], width: usize, k: usize, ids: &mut [u32]) {
    top_k_with(float_level(), scores, width, k, ids);
}

/// [`top_k`] on a given level.
#[doc(hidden)]
pub fn top_k_with(isa: Isa, scores: &[f32], width: usize, k: usize, ids: &mut [u32]) {
    assert!(k <= width, "top_k: {k} of {width}");
    if scores.is_empty() || k == 0 {
        assert!(ids.is_empty(), "top_k: {} ids of nothing", ids.len());
        return;
    }
    assert!(scores.len().is_multiple_of(width), "top_k: {} scores in rows of {width}", scores.len());
    assert_eq!(ids.len(), scores.len() / width * k, "top_k: ids and scores differ in rows");
    dispatch(isa, TopK { scores, width, k, ids });
}

struct TopK<'a> {
    scores: &'a [f32],
    width: usize,
    k: usize,
    ids: &'a mut [u32],
}

impl Kernel for TopK<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let lowest = simd.splat(f32::NEG_INFINITY);
        // The row in pairs of vectors; minus infinity stands for NaN, and for what fills the last pair.
        let mut row = vec![[[f32::NEG_INFINITY; LANES]; 2]; self.width.div_ceil(2 * LANES)];
        for (scores, ids) in self.scores.chunks_exact(self.width).zip(self.ids.chunks_exact_mut(self.k)) {
            row.as_flattened_mut().as_flattened_mut()[..self.width].copy_from_slice(scores);
            let mut greatest = lowest;
            for block in row.as_flattened_mut() {
                // A NaN on either side gives the second.
                let x = simd.max(simd.load(block), lowest);
                greatest = simd.max(x, greatest);
                simd.store(x, block);
            }
            let mut value = simd.maximum(greatest);
            let mut chosen = 0;
            while chosen < ids.len() && value > f32::NEG_INFINITY {
                let (hit, next) = sweep(simd, &row, value);
                if let Some(id) = hit {
                    ids[chosen] = id as u32;
                    chosen += 1;
                } else {
                    for (slot, (id, _)) in ids[chosen..].iter_mut().zip(equals(scores, value)) {
                        *slot = id as u32;
                        chosen += 1;
                    }
                }
                value = next;
            }
            // Numbers above minus infinity have run out.
            let unknown = scores.iter().enumerate().filter(|(_, x)| x.is_nan());
            for (slot, (id, _)) in ids[chosen..].iter_mut().zip(equals(scores, f32::NEG_INFINITY).chain(unknown)) {
                *slot = id as u32;
            }
        }
    }
}

/// Where `value`, the greatest that is left, stands, if it does so once; and the greatest below it.
#[inline(always)]
fn sweep<S: Simd>(simd: S, row: &[[[f32; LANES]; 2]], value: f32) -> (Option<usize>, f32) {
    let (value, lowest) = (simd.splat(value), simd.splat(f32::NEG_INFINITY));
    let mut next = [lowest; 2];
    // Of the last pair with a hit; selected without a branch, since where it is can't be foretold.
    let (mut pair, mut bits, mut pairs) = (0, 0, 0);
    for (i, [first, second]) in row.iter().enumerate() {
        let (x, y) = (simd.load(first), simd.load(second));
        let (below_x, below_y) = (simd.less(x, value), simd.less(y, value));
        next[0] = simd.max(next[0], simd.select(below_x, x, lowest));
        next[1] = simd.max(next[1], simd.select(below_y, y, lowest));
        let low = !(simd.bits(below_x) | simd.bits(simd.less(value, x)));
        let high = !(simd.bits(below_y) | simd.bits(simd.less(value, y)));
        let equal = u32::from(high) << LANES | u32::from(low);
        pair = if equal == 0 { pair } else { i };
        bits |= equal;
        pairs += u32::from(equal != 0);
    }
    let once = pairs == 1 && bits.is_power_of_two();
    let id = pair * 2 * LANES + bits.trailing_zeros() as usize;
    (once.then_some(id), simd.maximum(simd.max(next[0], next[1])))
}

/// Those of `scores` that equal `value`.
fn equals(scores: &[f32], value: f32) -> impl Iterator<Item = (usize, &f32)> {
    scores.iter().enumerate().filter(move |(_, x)| **x == value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::uniforms;
    use proptest::prelude::*;

    /// The definition: a stable sort, descending, NaN last.
    fn sorted(scores: &[f32], k: usize) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..scores.len() as u32).collect();
        ids.sort_by(|&a, &b| {
            let (a, b) = (scores[a as usize], scores[b as usize]);
            b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
        });
        ids.truncate(k);
        ids
    }

    fn check(scores: &[f32], width: usize, k: usize) {
        let expected: Vec<u32> = scores.chunks(width).flat_map(|row| sorted(row, k)).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            let mut ids = vec![u32::MAX; expected.len()];
            top_k_with(isa, scores, width, k, &mut ids);
            assert_eq!(ids, expected, "{} {width} {k}", isa.name());
        }
    }

    #[test]
    fn random_rows_are_those_of_a_sort() {
        for (width, k) in [(1, 1), (8, 2), (15, 15), (16, 4), (33, 6), (60, 4), (128, 8), (256, 8), (1024, 1024)] {
            check(&uniforms(width as u64, 9 * width), width, k);
        }
    }

    #[test]
    fn equals_go_to_the_lower_id() {
        for value in [0.0, -0.0, 1.0, f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 1e-45] {
            check(&[value; 40], 40, 40);
            check(&[value; 40], 20, 7);
        }
    }

    #[test]
    fn nothing_is_chosen_of_nothing() {
        top_k(&[], 5, 3, &mut []);
        top_k(&[1.0, 2.0], 2, 0, &mut []);
    }

    proptest! {
        #[test]
        fn any_row_has_distinct_ids_in_order(
            rows in prop::collection::vec(
                prop_oneof![
                    4 => (-3i8..3).prop_map(f32::from),
                    1 => Just(f32::NAN),
                    1 => Just(f32::NEG_INFINITY),
                    1 => Just(-0.0f32),
                    1 => any::<u32>().prop_map(f32::from_bits),
                ],
                1..70,
            ),
            k in 0usize..70,
        ) {
            let k = k % rows.len() + 1;
            check(&rows, rows.len(), k);
        }
    }
}
