//! A block of query rows against the key spans they see.
//!
//! Up to 12 rows (AVX-512; 6 for AVX2) share each load and conversion of keys and values; the accumulators, rows × 2
//! vectors (rows × 1), stay in registers. Keys at a row's edges, which not all rows of the block see, are added row by
//! row, so that a row never depends on what it does not see.

use std::array::from_fn;
use std::ops::Range;

use super::pages::{Element, PAGE};
use super::{Context, SPAN, Unit};
use crate::isa::Isa;
use crate::math::{exp_lanes, tanh_lanes};
use crate::vector::{Kernel, LANES, Scalar, Simd, dispatch};

const PAGES: usize = SPAN / PAGE;

/// Rows of the largest block of a level.
pub(super) fn block_rows(isa: Isa) -> usize {
    struct Rows;
    impl Kernel for Rows {
        type Output = usize;
        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> usize {
            S::ROWS
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
    /// (`head_dim`, rows) queries of the block.
    q: Vec<f32>,
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
        let rows = greatest.len();
        let head_dim = values.len() / rows;
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
        let (rows, head_dim) = (unit.rows.len(), context.shape.head_dim);
        workspace.q.resize(head_dim * rows, 0.0);
        workspace.scores.resize(rows, [0.0; SPAN]);
        workspace.part.resize(rows, head_dim);
        workspace.merged.resize(rows, head_dim);
        for (r, row) in unit.rows.clone().enumerate() {
            let q = &context.q[context.place(unit, row)];
            workspace.q.iter_mut().skip(r).step_by(rows).zip(q).for_each(|(place, q)| *place = *q);
        }
        Block { context, unit, key_spans, workspace, element: std::marker::PhantomData }
    }

    #[inline(always)]
    fn rows<S: Simd, const R: usize>(&mut self, simd: S) {
        let head_dim = self.context.shape.head_dim;
        for key_span in self.key_spans.clone() {
            let visible: [Range<usize>; R] = from_fn(|r| visible(self.context, self.unit, r, key_span));
            self.key_span::<S, R>(simd, key_span, &visible);
            if self.unit.split.is_some() {
                return;
            }
            let Workspace { part, merged, .. } = &mut *self.workspace;
            for (r, values) in part.values.chunks_exact(head_dim).enumerate() {
                if !visible[r].is_empty() {
                    let first = is_first(self.context, self.unit, r, key_span);
                    merge(simd, merged, r, first, part.greatest[r], part.sums[r], values);
                }
            }
        }
        finish(simd, self.context, self.unit, &self.workspace.merged);
    }

    /// The partial result of all rows over one key span.
    #[inline(always)]
    fn key_span<S: Simd, const R: usize>(&mut self, simd: S, key_span: usize, visible: &[Range<usize>; R]) {
        let Context { cache, spans, shape, .. } = self.context;
        let Workspace { q, scores, part, .. } = &mut *self.workspace;
        let scores: &mut [[f32; SPAN]; R] = (&mut scores[..R]).try_into().expect("R rows");
        let head_dim = shape.head_dim;
        // Later rows see later keys: the first row's start is the least, the last row's end the greatest.
        let table = &spans[self.unit.span].pages[key_span * PAGES..];
        let mut values: [&[E]; PAGES] = [&[]; PAGES];
        for page in visible[0].start / PAGE..visible[R - 1].end.div_ceil(PAGE) {
            let (k, v) = cache.head::<E>(table[page], self.unit.kv_head);
            values[page] = v;
            if S::VECTORS == 2 {
                page_scores::<S, E, R, 2>(simd, q, k, scores, page);
            } else {
                page_scores::<S, E, R, 1>(simd, q, k, scores, page);
            }
        }
        for r in 0..R {
            if !visible[r].is_empty() {
                let state = softmax(simd, &mut scores[r], &visible[r], shape.scale, shape.softcap);
                (part.greatest[r], part.sums[r]) = state;
            }
        }
        part.values.fill(0.0);
        // Keys that every row sees in one go; those before and after them row by row.
        let common = visible[R - 1].start..visible[0].end.max(visible[R - 1].start);
        for ((visible, scores), out) in visible.iter().zip(&*scores).zip(part.values.chunks_exact_mut(head_dim)) {
            let before = visible.start..visible.end.min(common.start);
            weighted_values::<S, E, 1>(simd, std::array::from_ref(scores), &values, before, head_dim, out);
        }
        weighted_values::<S, E, R>(simd, scores, &values, common.clone(), head_dim, &mut part.values);
        for ((visible, scores), out) in visible.iter().zip(&*scores).zip(part.values.chunks_exact_mut(head_dim)) {
            let after = visible.start.max(common.end)..visible.end;
            weighted_values::<S, E, 1>(simd, std::array::from_ref(scores), &values, after, head_dim, out);
        }
    }
}

impl<E: Element> Kernel for &mut Block<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.unit.rows.len() {
            1 => self.rows::<S, 1>(simd),
            2 => self.rows::<S, 2>(simd),
            3 => self.rows::<S, 3>(simd),
            4 => self.rows::<S, 4>(simd),
            5 if S::ROWS >= 6 => self.rows::<S, 5>(simd),
            6 if S::ROWS >= 6 => self.rows::<S, 6>(simd),
            7 if S::ROWS >= 12 => self.rows::<S, 7>(simd),
            8 if S::ROWS >= 12 => self.rows::<S, 8>(simd),
            9 if S::ROWS >= 12 => self.rows::<S, 9>(simd),
            10 if S::ROWS >= 12 => self.rows::<S, 10>(simd),
            11 if S::ROWS >= 12 => self.rows::<S, 11>(simd),
            12 if S::ROWS >= 12 => self.rows::<S, 12>(simd),
            rows => unreachable!("a block of {rows} rows"),
        }
    }
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

/// Scores of all rows against the 32 keys of one page, `V` vectors of keys at a time.
#[inline(always)]
fn page_scores<S: Simd, E: Element, const R: usize, const V: usize>(
    simd: S,
    q: &[f32],
    k: &[E],
    scores: &mut [[f32; SPAN]; R],
    page: usize,
) {
    let (q, k) = (q.as_chunks::<R>().0, k.as_chunks::<PAGE>().0);
    for part in 0..PAGE / LANES / V {
        let mut sums = [[simd.splat(0.0); V]; R];
        for (q, k) in q.iter().zip(k) {
            let k = k.as_chunks::<LANES>().0;
            let mut keys = [simd.splat(0.0); V];
            for v in 0..V {
                keys[v] = E::load(simd, &k[part * V + v]);
            }
            for r in 0..R {
                let q = simd.splat(q[r]);
                for v in 0..V {
                    sums[r][v] = simd.mul_add(q, keys[v], sums[r][v]);
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

/// `out[r] += Σ_keys p[r]·v`, keys ascending; `values`: pages of (32, `head_dim`), `out`: (R, `head_dim`).
#[inline(always)]
fn weighted_values<S: Simd, E: Element, const R: usize>(
    simd: S,
    p: &[[f32; SPAN]; R],
    values: &[&[E]; PAGES],
    keys: Range<usize>,
    head_dim: usize,
    out: &mut [f32],
) {
    if keys.is_empty() {
        return;
    }
    let mut d = 0;
    if S::VECTORS == 2 {
        if R <= 6 {
            while d + 4 * LANES <= head_dim {
                weighted_columns::<S, E, R, 4>(simd, p, values, &keys, head_dim, d, out);
                d += 4 * LANES;
            }
        }
        while d + 2 * LANES <= head_dim {
            weighted_columns::<S, E, R, 2>(simd, p, values, &keys, head_dim, d, out);
            d += 2 * LANES;
        }
    }
    while d + LANES <= head_dim {
        weighted_columns::<S, E, R, 1>(simd, p, values, &keys, head_dim, d, out);
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
