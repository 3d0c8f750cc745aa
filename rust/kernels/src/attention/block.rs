//! A block of query rows against the key spans they see.

use std::ops::Range;

use super::pages::{Element, PAGE};
use super::tiles::{PAGES, PIECE, Scores, Softmax, WeightedValues};
use super::{Context, SPAN, Unit};
use crate::isa::Isa;
use crate::math::{exp, exp_lanes};
use crate::vector::{Kernel, LANES, Simd, dispatch};

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
    greatest: [f32; LANES],
    /// (rows,)
    sums: [f32; LANES],
    /// (rows, `head_dim`)
    values: Vec<f32>,
}

impl Partial {
    /// Floats of a saved state: those of [`Partial`] in its order.
    pub(super) fn length(rows: usize, head_dim: usize) -> usize {
        2 * LANES + rows * head_dim
    }

    /// The state over no keys at all.
    fn reset(&mut self, rows: usize, head_dim: usize) {
        self.greatest = [f32::NEG_INFINITY; LANES];
        self.sums = [0.0; LANES];
        self.values.clear();
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
    /// Copies the last key span's state to `out`: [`Partial::length`] floats.
    pub(super) fn save(&self, out: &mut [f32]) {
        let (greatest, rest) = out.split_at_mut(LANES);
        let (sums, values) = rest.split_at_mut(LANES);
        greatest.copy_from_slice(&self.part.greatest);
        sums.copy_from_slice(&self.part.sums);
        values.copy_from_slice(&self.part.values[..values.len()]);
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
        part.reset(padded, head_dim);
        merged.reset(rows.len(), head_dim);
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
        let rows = visible.len();
        // Later rows see later keys: the first row's start is the least, the last row's end the greatest.
        let pages = visible[0].start / PAGE..visible[rows - 1].end.div_ceil(PAGE);
        let table = &spans[self.unit.span].pages[key_span * PAGES..];
        let (mut keys, mut values): ([&[E]; PAGES], [&[E]; PAGES]) = ([&[]; PAGES], [&[]; PAGES]);
        for page in pages.clone() {
            (keys[page], values[page]) = cache.head::<E>(table[page], self.unit.kv_head);
        }
        simd.call(Scores { q, keys: &keys, pages, out: scores });
        let (scale, softcap) = (shape.scale, shape.softcap);
        simd.call(Softmax { scores, visible, scale, softcap, greatest: &mut part.greatest, sums: &mut part.sums });
        part.values.fill(0.0);
        simd.call(WeightedValues {
            p: scores,
            values: &values,
            visible,
            head_dim: shape.head_dim,
            out: &mut part.values,
        });
    }
}

impl<E: Element> Kernel for &mut Block<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.load_queries::<S>();
        for key_span in self.key_spans.clone() {
            let (visible, rows) = (visible(self.context, self.unit, key_span), self.unit.rows.len());
            self.key_span(simd, key_span, &visible[..rows]);
            if self.unit.split.is_some() {
                return;
            }
            let Workspace { part: Partial { greatest, sums, values }, merged, .. } = &mut *self.workspace;
            merge(simd, merged, &visible[..rows], greatest, sums, values);
        }
        finish(simd, self.context, self.unit, &self.workspace.merged);
    }
}

/// Keys of `key_span` that each row of the unit sees, counted from the start of the key span.
#[inline(always)]
fn visible(context: Context<'_>, unit: &Unit, key_span: usize) -> [Range<usize>; LANES] {
    let mut visible = [const { 0..0 }; LANES];
    for (row, visible) in unit.rows.clone().zip(&mut visible) {
        let keys = context.visible(&context.spans[unit.span], row);
        let within = |position: usize| position.saturating_sub(key_span * SPAN).min(SPAN);
        *visible = within(keys.start)..within(keys.end);
    }
    visible
}

/// Adds the next key span's state: with `m` the greater of both, `Σ = Σ·e^(m₀ - m) + Σ₁·e^(m₁ - m)` for the sums and
/// the values. Rows that see nothing of the key span stay as they are.
#[inline(always)]
fn merge<S: Simd>(
    simd: S,
    into: &mut Partial,
    visible: &[Range<usize>],
    greatest: &[f32; LANES],
    sums: &[f32; LANES],
    values: &[f32],
) {
    let (before, next) = (simd.load(&into.greatest), simd.load(greatest));
    let top = simd.max(before, next);
    let (keep, add) = (exp_lanes(simd, simd.sub(before, top)), exp_lanes(simd, simd.sub(next, top)));
    let total = simd.mul_add(simd.load(&into.sums), keep, simd.mul(simd.load(sums), add));
    let (mut tops, mut totals, mut keeps, mut adds) = ([0.0; LANES], [0.0; LANES], [0.0; LANES], [0.0; LANES]);
    simd.store(top, &mut tops);
    simd.store(total, &mut totals);
    simd.store(keep, &mut keeps);
    simd.store(add, &mut adds);
    let head_dim = into.values.len() / visible.len();
    let rows = into.values.chunks_exact_mut(head_dim).zip(values.chunks_exact(head_dim));
    for (r, (merged, values)) in rows.enumerate() {
        if visible[r].is_empty() {
            continue;
        }
        (into.greatest[r], into.sums[r]) = (tops[r], totals[r]);
        let (keep, add) = (simd.splat(keeps[r]), simd.splat(adds[r]));
        let (merged, merged_tail) = merged.as_chunks_mut::<LANES>();
        let (values, values_tail) = values.as_chunks::<LANES>();
        for (merged, values) in merged.iter_mut().zip(values) {
            simd.store(simd.mul_add(simd.load(merged), keep, simd.mul(simd.load(values), add)), merged);
        }
        if !merged_tail.is_empty() {
            let tail = simd.mul(simd.load_part(values_tail), add);
            simd.store_part(simd.mul_add(simd.load_part(merged_tail), keep, tail), merged_tail);
        }
    }
}

/// Writes `values / sum` of all rows to the output; a sink adds to the sum alone.
#[inline(always)]
fn finish<S: Simd>(simd: S, context: Context<'_>, unit: &Unit, merged: &Partial) {
    for (r, values) in merged.values.chunks_exact(context.shape.head_dim).enumerate() {
        let place = context.place(unit, unit.rows.start + r);
        // SAFETY: rows of the step belong to one span each (checked), heads to one unit, and a unit is finished once.
        let out = unsafe { context.out.slice(place) };
        let (greatest, sum) = (merged.greatest[r], merged.sums[r]);
        let inverse = simd.splat(context.sink(unit, unit.rows.start + r).map_or(1.0 / sum, |sink| {
            let top = greatest.max(sink);
            let keep = exp(greatest - top);
            keep / sum.mul_add(keep, exp(sink - top))
        }));
        let (out, out_tail) = out.as_chunks_mut::<LANES>();
        let (values, values_tail) = values.as_chunks::<LANES>();
        for (out, values) in out.iter_mut().zip(values) {
            simd.store(simd.mul(simd.load(values), inverse), out);
        }
        if !out_tail.is_empty() {
            simd.store_part(simd.mul(simd.load_part(values_tail), inverse), out_tail);
        }
    }
}

/// Merges the saved key spans of a split unit and writes its output.
pub(super) struct Merge<'a> {
    pub(super) context: Context<'a>,
    pub(super) unit: &'a Unit,
    /// The state of each key span, ascending.
    pub(super) saved: &'a [f32],
    pub(super) workspace: &'a mut Workspace,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Merge { context, unit, saved, workspace: Workspace { merged, .. } } = self;
        let (rows, head_dim) = (unit.rows.len(), context.shape.head_dim);
        merged.reset(rows, head_dim);
        for (key_span, saved) in unit.key_spans.clone().zip(saved.chunks_exact(Partial::length(rows, head_dim))) {
            let (heads, values) = saved.split_at(2 * LANES);
            let [greatest, sums] = heads.as_chunks().0 else { unreachable!("two vectors") };
            merge(simd, merged, &visible(context, unit, key_span)[..rows], greatest, sums, values);
        }
        finish(simd, context, unit, merged);
    }
}
