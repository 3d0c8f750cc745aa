//! The three inner loops of attention: scores of a page, the softmax of a row, and the weighted sum of values.
//!
//! Up to 12 rows (AVX-512; 6 for AVX2) share each load and conversion of keys and values; the accumulators, rows × 2
//! vectors (rows × 1), stay in registers. Each loop is a kernel of its own, so that none takes the others' registers.

use std::ops::Range;

use super::SPAN;
use super::pages::{Element, PAGE};
use crate::math::{exp_lanes, tanh_lanes};
use crate::vector::{Kernel, LANES, Simd};

pub(super) const PAGES: usize = SPAN / PAGE;
/// Elements of a piece of a query: one pointer reaches those of all rows at fixed distances.
pub(super) const PIECE: usize = 64;

/// Evaluates `$body` with the constant `$R` equal to `$rows`, one of the level's [`Simd::BLOCKS`].
macro_rules! with_rows {
    ($S:ident, $rows:expr, $R:ident => $body:expr) => {
        with_rows!($S, $rows, $R => $body, 1 4, 2 3 6, 7 8 12)
    };
    ($S:ident, $rows:expr, $R:ident => $body:expr, $($scalar:literal)*, $($avx2:literal)*, $($avx512:literal)*) => {
        match $rows {
            $($scalar => { const $R: usize = $scalar; $body })*
            $($avx2 if $S::BLOCKS.len() > 2 => { const $R: usize = $avx2; $body })*
            $($avx512 if $S::BLOCKS.len() > 5 => { const $R: usize = $avx512; $body })*
            rows => unreachable!("a block of {rows} rows"),
        }
    };
}

/// Scores of rows against the keys of some pages.
pub(super) struct Scores<'a, E> {
    /// (⌈`head_dim` / 64⌉, rows) pieces of queries.
    pub(super) q: &'a [[f32; PIECE]],
    /// Pages of (`head_dim`, 32) keys.
    pub(super) keys: &'a [&'a [E]; PAGES],
    /// Which of the pages.
    pub(super) pages: Range<usize>,
    /// (rows, 256)
    pub(super) out: &'a mut [[f32; SPAN]],
}

impl<E: Element> Kernel for Scores<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Scores { q, keys, pages, out } = self;
        with_rows!(S, out.len(), R => for page in pages {
            if S::VECTORS == 2 {
                page_scores::<S, E, R, 2>(simd, q, keys[page], out, page);
            } else {
                page_scores::<S, E, R, 1>(simd, q, keys[page], out, page);
            }
        });
    }
}

/// [`Scores`] of `R` rows against one page, `V` vectors of keys at a time.
#[inline(always)]
fn page_scores<S: Simd, E: Element, const R: usize, const V: usize>(
    simd: S,
    q: &[[f32; PIECE]],
    k: &[E],
    scores: &mut [[f32; SPAN]],
    page: usize,
) {
    let (q, k) = (q.as_chunks::<R>().0, k.as_chunks::<PAGE>().0);
    for part in 0..PAGE / LANES / V {
        let mut sums = [[simd.splat(0.0); V]; R];
        for (q, k) in q.iter().zip(k.chunks(PIECE)) {
            for (d, k) in k.iter().enumerate() {
                let k = k.as_chunks::<LANES>().0;
                let mut keys = [simd.splat(0.0); V];
                for v in 0..V {
                    keys[v] = E::load(simd, &k[part * V + v]);
                }
                for r in 0..R {
                    let q = simd.splat(q[r][d % PIECE]);
                    for v in 0..V {
                        sums[r][v] = simd.mul_add(q, keys[v], sums[r][v]);
                    }
                }
            }
        }
        for r in 0..R {
            let scores = scores[r].as_chunks_mut::<LANES>().0;
            for v in 0..V {
                simd.store(sums[r][v], &mut scores[page * (PAGE / LANES) + part * V + v]);
            }
        }
    }
}

/// Turns the visible scores of each row into `exp(s - m)`; rows that see nothing stay as they are.
pub(super) struct Softmax<'a> {
    /// (rows, 256), or more rows than `visible` has.
    pub(super) scores: &'a mut [[f32; SPAN]],
    /// (rows,)
    pub(super) visible: &'a [Range<usize>],
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    /// (rows,) `m`
    pub(super) greatest: &'a mut [f32],
    /// (rows,) sums of the exponentials.
    pub(super) sums: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (r, visible) in self.visible.iter().enumerate().filter(|(_, visible)| !visible.is_empty()) {
            let state = softmax(simd, &mut self.scores[r], visible, self.scale, self.softcap);
            (self.greatest[r], self.sums[r]) = state;
        }
    }
}

/// [`Softmax`] of one row.
#[inline(always)]
fn softmax<S: Simd>(
    simd: S,
    scores: &mut [f32; SPAN],
    visible: &Range<usize>,
    scale: f32,
    softcap: Option<f32>,
) -> (f32, f32) {
    let vectors = visible.start / LANES..visible.end.div_ceil(LANES);
    let first = vectors.start * LANES;
    let scores = &mut scores.as_chunks_mut::<LANES>().0[vectors];
    let nothing = simd.splat(f32::NEG_INFINITY);
    let mut greatest = nothing;
    for (i, scores) in scores.iter_mut().enumerate() {
        let mut s = simd.mul(simd.load(scores), simd.splat(scale));
        if let Some(cap) = softcap {
            let cap = simd.splat(cap);
            s = simd.mul(cap, tanh_lanes(simd, simd.div(s, cap)));
        }
        let at = first + i * LANES;
        if at < visible.start || at + LANES > visible.end {
            let (start, end) = (visible.start.saturating_sub(at), (visible.end - at).min(LANES));
            let bits = ((1u32 << end) - 1) & !((1u32 << start) - 1);
            s = simd.select(simd.mask(bits as u16), s, nothing);
        }
        greatest = simd.max(greatest, s);
        simd.store(s, scores);
    }
    let greatest = simd.maximum(greatest);
    let mut sums = simd.splat(0.0);
    for scores in scores {
        let p = exp_lanes(simd, simd.sub(simd.load(scores), simd.splat(greatest)));
        sums = simd.add(sums, p);
        simd.store(p, scores);
    }
    (greatest, simd.sum(sums))
}

/// `out[r] += Σ_keys p[r]·v` over the visible keys of each row, ascending.
pub(super) struct WeightedValues<'a, E> {
    /// (rows, 256)
    pub(super) p: &'a [[f32; SPAN]],
    /// Pages of (32, `head_dim`) values.
    pub(super) values: &'a [&'a [E]; PAGES],
    /// (rows,); the rows beyond may be given anything.
    pub(super) visible: &'a [Range<usize>],
    pub(super) head_dim: usize,
    /// (rows, `head_dim`)
    pub(super) out: &'a mut [f32],
}

impl<E: Element> Kernel for WeightedValues<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let WeightedValues { p, values, visible, head_dim, out } = self;
        // Keys that every row sees in one go; those before and after them row by row, since a row must not even
        // multiply by zero what it does not see.
        let start = visible.iter().fold(0, |start, visible| start.max(visible.start));
        let common = start..visible.iter().fold(SPAN, |end, visible| end.min(visible.end)).max(start);
        for ((p, visible), out) in p.iter().zip(visible).zip(out.chunks_exact_mut(head_dim)) {
            let before = visible.start..visible.end.min(common.start);
            weighted_values::<S, E, 1>(simd, std::slice::from_ref(p), values, &before, head_dim, out);
        }
        with_rows!(S, p.len(), R => weighted_values::<S, E, R>(simd, p, values, &common, head_dim, out));
        for ((p, visible), out) in p.iter().zip(visible).zip(out.chunks_exact_mut(head_dim)) {
            let after = visible.start.max(common.end)..visible.end;
            weighted_values::<S, E, 1>(simd, std::slice::from_ref(p), values, &after, head_dim, out);
        }
    }
}

/// `out[r] += Σ_keys p[r]·v` for `R` rows.
#[inline(always)]
fn weighted_values<S: Simd, E: Element, const R: usize>(
    simd: S,
    p: &[[f32; SPAN]],
    values: &[&[E]; PAGES],
    keys: &Range<usize>,
    head_dim: usize,
    out: &mut [f32],
) {
    let Some(p) = p.first_chunk::<R>().filter(|_| !keys.is_empty()) else { return };
    let mut d = 0;
    if S::VECTORS == 2 {
        if R <= 6 {
            while d + 4 * LANES <= head_dim {
                weighted_columns::<S, E, R, 4>(simd, p, values, keys, head_dim, d, out);
                d += 4 * LANES;
            }
        }
        while d + 2 * LANES <= head_dim {
            weighted_columns::<S, E, R, 2>(simd, p, values, keys, head_dim, d, out);
            d += 2 * LANES;
        }
    }
    while d + LANES <= head_dim {
        weighted_columns::<S, E, R, 1>(simd, p, values, keys, head_dim, d, out);
        d += LANES;
    }
    for d in d..head_dim {
        for (p, out) in p.iter().zip(out.chunks_exact_mut(head_dim)) {
            for key in keys.clone() {
                out[d] = p[key].mul_add(values[key / PAGE][key % PAGE * head_dim + d].to_f32(), out[d]);
            }
        }
    }
}

/// [`weighted_values`] of the columns `d..d + 16·V`.
#[inline(always)]
fn weighted_columns<S: Simd, E: Element, const R: usize, const V: usize>(
    simd: S,
    p: &[[f32; SPAN]; R],
    values: &[&[E]; PAGES],
    keys: &Range<usize>,
    head_dim: usize,
    d: usize,
    out: &mut [f32],
) {
    let mut sums = [[simd.splat(0.0); V]; R];
    for r in 0..R {
        let out = out[r * head_dim + d..][..V * LANES].as_chunks::<LANES>().0;
        for v in 0..V {
            sums[r][v] = simd.load(&out[v]);
        }
    }
    let mut key = keys.start;
    while key < keys.end {
        let page = values[key / PAGE];
        let end = keys.end.min((key / PAGE + 1) * PAGE);
        for key in key..end {
            let row = page[key % PAGE * head_dim + d..][..V * LANES].as_chunks::<LANES>().0;
            let mut value = [simd.splat(0.0); V];
            for v in 0..V {
                value[v] = E::load(simd, &row[v]);
            }
            for r in 0..R {
                let p = simd.splat(p[r][key % SPAN]);
                for v in 0..V {
                    sums[r][v] = simd.mul_add(p, value[v], sums[r][v]);
                }
            }
        }
        key = end;
    }
    for r in 0..R {
        let out = out[r * head_dim + d..][..V * LANES].as_chunks_mut::<LANES>().0;
        for v in 0..V {
            simd.store(sums[r][v], &mut out[v]);
        }
    }
}
