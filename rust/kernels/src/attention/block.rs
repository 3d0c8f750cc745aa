//! A block of query rows against the key spans they see.
//!
//! Up to 12 rows (AVX-512; 6 for AVX2), padded to a size that is compiled, share each load and conversion of keys and values; the accumulators, rows × 2
//! vectors (rows × 1), stay in registers. Keys at a row's edges, which not all rows of the block see, are added row by
//! row, so that a row never depends on what it does not see.

use std::ops::Range;

use super::pages::{Element, PAGE};
use super::{Context, SPAN, Unit};
use crate::isa::Isa;
use crate::math::{exp_lanes, tanh_lanes};
use crate::vector::{Kernel, LANES, Scalar, Simd, dispatch};

const PAGES: usize = SPAN / PAGE;
/// Elements of a piece of a query: one pointer reaches those of all rows at fixed distances.
const PIECE: usize = 64;
/// Rows of the largest block of any level.
const MOST_ROWS: usize = 12;

/// Rows of the largest block of a level.
pub(super) fn block_rows(isa: Isa) -> usize {
    struct Rows;
    impl Kernel for Rows {
        type Output = usize;
        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> usize {
            S::BLOCKS[S::BLOCKS.len() - 1]
        }
    }
    dispatch(isa, Rows)
}

/// Softmax state of rows over some keys: greatest score, sum of exponentials, and their weighted sum of values.
#[derive(Default)]
pub(super) struct Partial {
    /// (rows,)
    greatest: Vec<f32>,
    /// (rows,)
    sums: Vec<f32>,
    /// (rows, `head_dim`)
    values: Vec<f32>,
}

impl Partial {
    /// Floats of a saved row.
    pub(super) fn width(head_dim: usize) -> usize {
        head_dim + 2
    }

    fn resize(&mut self, rows: usize, head_dim: usize) {
        self.greatest.resize(rows, 0.0);
        self.sums.resize(rows, 0.0);
        self.values.resize(rows * head_dim, 0.0);
    }
}

/// A thread's buffers.
#[derive(Default)]
pub(super) struct Workspace {
    /// (⌈`head_dim` / 64⌉, rows) pieces of the block's queries.
    q: Vec<[f32; PIECE]>,
    /// (rows, 256) scores, then their exponentials, of one key span.
    scores: Vec<[f32; SPAN]>,
    /// The last key span alone.
    part: Partial,
    /// All key spans so far.
    merged: Partial,
}

impl Workspace {
    /// Copies the last key span's result to `out`: (rows, `head_dim` + 2).
    pub(super) fn save(&self, out: &mut [f32]) {
        let Partial { greatest, sums, values } = &self.part;
        let head_dim = values.len() / greatest.len();
        for (row, out) in out.chunks_exact_mut(head_dim + 2).enumerate() {
            out[0] = greatest[row];
            out[1] = sums[row];
            out[2..].copy_from_slice(&values[row * head_dim..(row + 1) * head_dim]);
        }
    }
}

/// One task: a unit's rows and the key spans to visit. Whole units are written to the output, split ones only leave
/// their partial result in the workspace.
pub(super) struct Block<'a, E> {
    context: Context<'a>,
    unit: &'a Unit,
    key_spans: Range<usize>,
    workspace: &'a mut Workspace,
    element: std::marker::PhantomData<E>,
}

impl<'a, E: Element> Block<'a, E> {
    pub(super) fn new(
        context: Context<'a>,
        unit: &'a Unit,
        key_spans: Range<usize>,
        workspace: &'a mut Workspace,
    ) -> Block<'a, E> {
        Block { context, unit, key_spans, workspace, element: std::marker::PhantomData }
    }

    /// Prepares the buffers for the next larger block that the level has, whose other rows stay zero.
    #[inline(always)]
    fn load_queries<S: Simd>(&mut self) {
        let (head_dim, rows) = (self.context.shape.head_dim, self.unit.rows.clone());
        let padded = S::BLOCKS.iter().copied().find(|&block| block >= rows.len()).unwrap_or(rows.len());
        let Workspace { q, scores, part, merged } = &mut *self.workspace;
        q.clear();
        q.resize(head_dim.div_ceil(PIECE) * padded, [0.0; PIECE]);
        scores.resize(padded, [0.0; SPAN]);
        part.resize(padded, head_dim);
        merged.resize(rows.len(), head_dim);
        for (r, row) in rows.enumerate() {
            let query = &self.context.q[self.context.place(self.unit, row)];
            for (place, piece) in q[r..].iter_mut().step_by(padded).zip(query.chunks(PIECE)) {
                place[..piece.len()].copy_from_slice(piece);
            }
        }
    }

    /// The partial result of all rows over one key span, of which each sees its `visible` keys.
    #[inline(always)]
    fn key_span<S: Simd>(&mut self, simd: S, key_span: usize, visible: &[Range<usize>]) {
        let Context { cache, spans, shape, .. } = self.context;
        let Workspace { q, scores, part, .. } = &mut *self.workspace;
        let (head_dim, rows) = (shape.head_dim, visible.len());
        // Later rows see later keys: the first row's start is the least, the last row's end the greatest.
        let table = &spans[self.unit.span].pages[key_span * PAGES..];
        let mut values: [&[E]; PAGES] = [&[]; PAGES];
        for page in visible[0].start / PAGE..visible[rows - 1].end.div_ceil(PAGE) {
            let (k, v) = cache.head::<E>(table[page], self.unit.kv_head);
            values[page] = v;
            page_scores(simd, q, k, scores, page);
        }
        for (r, visible) in visible.iter().enumerate() {
            if !visible.is_empty() {
                let state = softmax(simd, &mut scores[r], visible, shape.scale, shape.softcap);
                (part.greatest[r], part.sums[r]) = state;
            }
        }
        part.values.fill(0.0);
        // Keys that every row sees in one go; those before and after them row by row.
        let common = visible[rows - 1].start..visible[0].end.max(visible[rows - 1].start);
        let edges = |r: usize| {
            [visible[r].start..visible[r].end.min(common.start), visible[r].start.max(common.end)..visible[r].end]
        };
        for (r, out) in part.values.chunks_exact_mut(head_dim).enumerate().take(rows) {
            weighted_values_of::<S, E, 1>(simd, &scores[r..=r], &values, &edges(r)[0], head_dim, out);
        }
        weighted_values(simd, scores, &values, &common, head_dim, &mut part.values);
        for (r, out) in part.values.chunks_exact_mut(head_dim).enumerate().take(rows) {
            weighted_values_of::<S, E, 1>(simd, &scores[r..=r], &values, &edges(r)[1], head_dim, out);
        }
    }
}

impl<E: Element> Kernel for &mut Block<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.load_queries::<S>();
        let head_dim = self.context.shape.head_dim;
        let mut ranges = [const { 0..0 }; MOST_ROWS];
        let ranges = &mut ranges[..self.unit.rows.len()];
        for key_span in self.key_spans.clone() {
            for (r, range) in ranges.iter_mut().enumerate() {
                *range = visible(self.context, self.unit, r, key_span);
            }
            self.key_span(simd, key_span, ranges);
            if self.unit.split.is_some() {
                return;
            }
            let Workspace { part, merged, .. } = &mut *self.workspace;
            for (r, values) in part.values.chunks_exact(head_dim).enumerate().take(ranges.len()) {
                if !ranges[r].is_empty() {
                    let first = is_first(self.context, self.unit, r, key_span);
                    merge(simd, merged, r, first, part.greatest[r], part.sums[r], values);
                }
            }
        }
        finish(simd, self.context, self.unit, &self.workspace.merged);
    }
}

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

/// Keys of `key_span` that the unit's `r`-th row sees, counted from the start of the key span.
#[inline(always)]
fn visible(context: Context<'_>, unit: &Unit, r: usize, key_span: usize) -> Range<usize> {
    let keys = context.visible(&context.spans[unit.span], unit.rows.start + r);
    let start = key_span * SPAN;
    keys.start.saturating_sub(start).min(SPAN)..keys.end.saturating_sub(start).min(SPAN)
}

/// Whether `key_span` is the first that the unit's `r`-th row sees.
#[inline(always)]
fn is_first(context: Context<'_>, unit: &Unit, r: usize, key_span: usize) -> bool {
    context.visible(&context.spans[unit.span], unit.rows.start + r).start / SPAN == key_span
}

/// Scores of all rows against the 32 keys of one page: `q`: (⌈`head_dim` / 64⌉, rows) pieces, `k`: (`head_dim`, 32).
#[inline(always)]
fn page_scores<S: Simd, E: Element>(simd: S, q: &[[f32; PIECE]], k: &[E], scores: &mut [[f32; SPAN]], page: usize) {
    with_rows!(S, scores.len(), R => if S::VECTORS == 2 {
        page_scores_of::<S, E, R, 2>(simd, q, k, scores, page);
    } else {
        page_scores_of::<S, E, R, 1>(simd, q, k, scores, page);
    });
}

/// [`page_scores`] of `R` rows, `V` vectors of keys at a time.
#[inline(always)]
fn page_scores_of<S: Simd, E: Element, const R: usize, const V: usize>(
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

/// Turns the visible scores of a row into `exp(s - m)`; returns `m` and the sum.
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

/// `out[r] += Σ_keys p[r]·v`, keys ascending; `values`: pages of (32, `head_dim`), `out`: (rows, `head_dim`).
#[inline(always)]
fn weighted_values<S: Simd, E: Element>(
    simd: S,
    p: &[[f32; SPAN]],
    values: &[&[E]; PAGES],
    keys: &Range<usize>,
    head_dim: usize,
    out: &mut [f32],
) {
    with_rows!(S, p.len(), R => weighted_values_of::<S, E, R>(simd, p, values, keys, head_dim, out));
}

/// [`weighted_values`] of `R` rows.
#[inline(always)]
fn weighted_values_of<S: Simd, E: Element, const R: usize>(
    simd: S,
    p: &[[f32; SPAN]],
    values: &[&[E]; PAGES],
    keys: &Range<usize>,
    head_dim: usize,
    out: &mut [f32],
) {
    let Some(p) = p.first_chunk::<R>() else { return };
    if keys.is_empty() {
        return;
    }
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

/// [`weighted_values`] for the columns `d..d + 16·V`.
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

/// Adds the next key span's state to row `r`; `first`: there is none before it.
#[inline(always)]
fn merge<S: Simd>(simd: S, into: &mut Partial, r: usize, first: bool, greatest: f32, sum: f32, values: &[f32]) {
    let merged = &mut into.values[r * values.len()..(r + 1) * values.len()];
    if first {
        (into.greatest[r], into.sums[r]) = (greatest, sum);
        merged.copy_from_slice(values);
        return;
    }
    let top = if into.greatest[r] > greatest { into.greatest[r] } else { greatest };
    let exp = |x: f32| exp_lanes(Scalar::<1>, [x])[0];
    let (old, new) = (exp(into.greatest[r] - top), exp(greatest - top));
    into.sums[r] = into.sums[r].mul_add(old, sum * new);
    into.greatest[r] = top;
    let (old, new) = (simd.splat(old), simd.splat(new));
    let (merged, merged_tail) = merged.as_chunks_mut::<LANES>();
    let (values, values_tail) = values.as_chunks::<LANES>();
    for (merged, values) in merged.iter_mut().zip(values) {
        simd.store(simd.mul_add(simd.load(merged), old, simd.mul(simd.load(values), new)), merged);
    }
    let tail = simd.mul(simd.load_part(values_tail), new);
    simd.store_part(simd.mul_add(simd.load_part(merged_tail), old, tail), merged_tail);
}

/// Writes `values / sum` of all rows to the output.
#[inline(always)]
fn finish<S: Simd>(simd: S, context: Context<'_>, unit: &Unit, merged: &Partial) {
    for (r, values) in merged.values.chunks_exact(context.shape.head_dim).enumerate() {
        let place = context.place(unit, unit.rows.start + r);
        // SAFETY: rows of the step belong to one span each (checked), heads to one unit, and a unit is finished once.
        let out = unsafe { context.out.slice(place) };
        let inverse = simd.splat(1.0 / merged.sums[r]);
        let (out, out_tail) = out.as_chunks_mut::<LANES>();
        let (values, values_tail) = values.as_chunks::<LANES>();
        for (out, values) in out.iter_mut().zip(values) {
            simd.store(simd.mul(simd.load(values), inverse), out);
        }
        simd.store_part(simd.mul(simd.load_part(values_tail), inverse), out_tail);
    }
}

/// Merges the saved key spans of a split unit and writes its output.
pub(super) struct Merge<'a> {
    pub(super) context: Context<'a>,
    pub(super) unit: &'a Unit,
    /// (key spans, rows, `head_dim` + 2)
    pub(super) saved: &'a [f32],
    pub(super) workspace: &'a mut Workspace,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Merge { context, unit, saved, workspace } = self;
        let width = Partial::width(context.shape.head_dim);
        for (key_span, saved) in unit.key_spans.clone().zip(saved.chunks_exact(unit.rows.len() * width)) {
            for (r, saved) in saved.chunks_exact(width).enumerate() {
                if !visible(context, unit, r, key_span).is_empty() {
                    let first = is_first(context, unit, r, key_span);
                    merge(simd, &mut workspace.merged, r, first, saved[0], saved[1], &saved[2..]);
                }
            }
        }
        finish(simd, context, unit, &workspace.merged);
    }
}
