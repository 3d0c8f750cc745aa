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
    /// Keys or values of some pages, in the order in which a row of a tree sees them.
    path: Vec<u32>,
    /// (⌈`head_dim` / 64⌉,) one row's query.
    query: Vec<[f32; PIECE]>,
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
        let Workspace { q, scores, part, merged, .. } = &mut *self.workspace;
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
        let (Context { cache, shape, .. }, span) = (self.context, &self.context.spans[self.unit.span]);
        let Workspace { q, scores, .. } = &mut *self.workspace;
        let start = visible.iter().fold(SPAN, |start, visible| start.min(visible.start));
        let end = visible.iter().fold(0, |end, visible| end.max(visible.end));
        let pages = start / PAGE..end.div_ceil(PAGE);
        // Pages that hold rows of a tree look different to each of its rows.
        let tail = if span.ancestors.is_empty() { PAGES } else { (span.start / PAGE).saturating_sub(key_span * PAGES) };
        let shared = pages.start..pages.end.min(tail).max(pages.start);
        let table = &span.pages[key_span * PAGES..];
        let (mut keys, mut values): ([&[E]; PAGES], [&[E]; PAGES]) = ([&[]; PAGES], [&[]; PAGES]);
        for page in shared.clone() {
            (keys[page], values[page]) = cache.head::<E>(table[page], self.unit.kv_head);
        }
        simd.call(Scores { q, keys: &keys, pages: shared.clone(), out: scores });
        if tail < pages.end {
            self.tail_scores(simd, key_span, visible, shared.end);
        }
        let Workspace { scores, part, .. } = &mut *self.workspace;
        let (scale, softcap) = (shape.scale, shape.softcap);
        simd.call(Softmax { scores, visible, scale, softcap, greatest: &mut part.greatest, sums: &mut part.sums });
        part.values.fill(0.0);
        let head_dim = shape.head_dim;
        if tail >= pages.end {
            return simd.call(WeightedValues { p: scores, values: &values, visible, head_dim, out: &mut part.values });
        }
        let most = shared.end * PAGE;
        let before = |visible: &Range<usize>| visible.start.min(most)..visible.end.min(most);
        let mut clipped = [const { 0..0 }; LANES];
        clipped.iter_mut().zip(visible).for_each(|(clipped, visible)| *clipped = before(visible));
        simd.call(WeightedValues {
            p: scores,
            values: &values,
            visible: &clipped[..visible.len()],
            head_dim,
            out: &mut part.values,
        });
        self.tail_values(simd, key_span, visible, shared.end);
    }

    /// Scores of the visible keys in pages from `first` on, row by row along its path through the tree.
    #[inline(always)]
    fn tail_scores<S: Simd>(&mut self, simd: S, key_span: usize, visible: &[Range<usize>], first: usize) {
        let (unit, group) = (self.unit, self.context.group());
        let Workspace { q, scores, path, query, .. } = &mut *self.workspace;
        let padded = scores.len();
        for (r, visible) in visible.iter().enumerate() {
            let pages = first.max(visible.start / PAGE)..visible.end.div_ceil(PAGE);
            let keys = self.context.along::<E>(unit, (unit.rows.start + r) / group, key_span, &pages, Part::Keys, path);
            query.clear();
            query.extend(q[r..].iter().step_by(padded));
            let row = &mut scores[r..=r];
            simd.call(Scores { q: query, keys: &keys, pages, out: row });
        }
    }

    /// Adds the values of the visible keys in pages from `first` on, row by row along its path through the tree.
    #[inline(always)]
    fn tail_values<S: Simd>(&mut self, simd: S, key_span: usize, visible: &[Range<usize>], first: usize) {
        let (unit, group, head_dim) = (self.unit, self.context.group(), self.context.shape.head_dim);
        let Workspace { scores, path, part, .. } = &mut *self.workspace;
        for (r, (visible, out)) in visible.iter().zip(part.values.chunks_exact_mut(head_dim)).enumerate() {
            let visible = visible.start.max(first * PAGE)..visible.end.max(first * PAGE);
            let pages = visible.start / PAGE..visible.end.div_ceil(PAGE);
            let values =
                self.context.along::<E>(unit, (unit.rows.start + r) / group, key_span, &pages, Part::Values, path);
            simd.call(WeightedValues {
                p: &scores[r..=r],
                values: &values,
                visible: std::slice::from_ref(&visible),
                head_dim,
                out,
            });
        }
    }
}

/// Which half of a page.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    /// (`head_dim`, 32)
    Keys,
    /// (32, `head_dim`)
    Values,
}

impl Context<'_> {
    /// One head's keys or values in `pages` of a key span, as row `row` of the unit's tree sees them; those of other
    /// rows are copied to `path` in order of position.
    fn along<'a, E: Element>(
        &'a self,
        unit: &Unit,
        row: usize,
        key_span: usize,
        pages: &Range<usize>,
        part: Part,
        path: &'a mut Vec<u32>,
    ) -> [&'a [E]; PAGES] {
        let (span, head_dim) = (&self.spans[unit.span], self.shape.head_dim);
        let of_page = |page: usize| {
            let (keys, values) = self.cache.head::<E>(span.pages[page], unit.kv_head);
            if part == Part::Keys { keys } else { values }
        };
        let mut found: [&[E]; PAGES] = [&[]; PAGES];
        if span.in_order(row) {
            for page in pages.clone() {
                found[page] = of_page(key_span * PAGES + page);
            }
            return found;
        }
        let length = PAGE * head_dim;
        path.resize((pages.len() * length * size_of::<E>()).div_ceil(4), 0);
        let copies: &mut [E] = &mut bytemuck::cast_slice_mut(path)[..pages.len() * length];
        for (page, copy) in pages.clone().zip(copies.chunks_exact_mut(length)) {
            copy.copy_from_slice(of_page(key_span * PAGES + page));
        }
        let mut ancestors = span.ancestors[row];
        let first = (key_span * PAGES + pages.start) * PAGE;
        for position in span.start.. {
            if ancestors == 0 {
                break;
            }
            let at = span.start + ancestors.trailing_zeros() as usize;
            ancestors &= ancestors - 1;
            if at == position || position < first || position >= first + pages.len() * PAGE {
                continue;
            }
            let (from, slot, place) = (of_page(at / PAGE), at % PAGE, (position - first) % PAGE);
            let copy = &mut copies[(position - first) / PAGE * length..][..length];
            if part == Part::Keys {
                for (copy, from) in copy.chunks_exact_mut(PAGE).zip(from.chunks_exact(PAGE)) {
                    copy[place] = from[slot];
                }
            } else {
                copy[place * head_dim..][..head_dim].copy_from_slice(&from[slot * head_dim..][..head_dim]);
            }
        }
        for (page, copy) in pages.clone().zip(copies.chunks_exact(length)) {
            found[page] = copy;
        }
        found
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
