//! Causal attention over paged keys and values, with grouped heads, sliding windows and soft caps.
//!
//! Every query row (a token's head) is computed alone: the key axis is cut into spans of [`SPAN`] positions from
//! position 0; within a span `s = (Σ_d q·k)·scale`, d ascending, `m = max s`, `p = exp(s - m)`, `l = Σ p` by 16
//! interleaved partial sums and the fixed tree, `o = Σ p·v`, keys ascending; spans are merged ascending by one formula
//! (the online softmax of Milakov & Gimelshein 2018), a sink last of all. So chunks, batch-mates, threads and levels never change its bits.
//! Keys outside a row's reach are never multiplied, whatever a recycled page still holds. Rows of a tree of drafts see
//! their ancestors' keys in order of position, so a branch has the bits of the same tokens alone.

mod block;
mod pages;
mod tiles;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

use crate::isa::Isa;
use crate::pool::{Disjoint, Pool, share};
use crate::selftest::float_level;
use crate::vector::dispatch;
use block::{Block, Partial, Workspace, block_rows};
use pages::Element;
pub use pages::{KvPages, KvType, PAGE};

/// Positions of a key span: the unit in which the softmax is split and merged.
pub const SPAN: usize = 256;

/// One sequence's rows in a step: its tokens `start..start + rows`, each of which sees the keys up to its own.
///
/// A tree of drafted tokens is a span as well: row `r` lies in the pages where position `start + r` would, and stands for
/// the position of its depth.
#[derive(Clone, Copy, Debug, Default)]
pub struct Span<'a> {
    /// Index of its first row in the step.
    pub first_row: usize,
    /// Number of its rows.
    pub rows: usize,
    /// Position of its first row.
    pub start: usize,
    /// Pages of the sequence, position `32·i` at the start of page `pages[i]`. Those outside every row's window are
    /// never looked at.
    pub pages: &'a [u32],
    /// Empty, or for each row of a tree (at most 64) the rows it sees besides those before the span: bit `i` for row `i`,
    /// bit 0 and its own included.
    pub ancestors: &'a [u64],
}

impl Span<'_> {
    /// Position that row `row` of the span stands for.
    #[inline(always)]
    pub fn position(&self, row: usize) -> usize {
        self.start + self.ancestors.get(row).map_or(row, |mask| mask.count_ones() as usize - 1)
    }

    /// Whether all of row `row`'s ancestors lie where their positions say.
    #[inline(always)]
    fn in_order(&self, row: usize) -> bool {
        self.ancestors.get(row).is_none_or(|mask| mask & mask.wrapping_add(1) == 0)
    }
}

/// What the heads of a layer look like.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape<'a> {
    /// Query heads: a multiple of `kv_heads`; neighbours share a key-value head.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the scores, usually `1/√head_dim`.
    pub scale: f32,
    /// A token sees this many keys, its own included; `None` sees all before it.
    pub window: Option<usize>,
    /// Scores become `cap·tanh(score/cap)` after scaling.
    pub softcap: Option<f32>,
    /// (heads,) scores of one more key for each head, which has no value (gpt-oss).
    pub sinks: Option<&'a [f32]>,
}

/// Everything that is the same for all rows of a call.
#[derive(Clone, Copy)]
struct Context<'a> {
    q: &'a [f32],
    spans: &'a [Span<'a>],
    cache: &'a KvPages,
    shape: &'a AttentionShape<'a>,
    out: Disjoint<'a, f32>,
}

/// Up to a register block of one sequence's rows for one key-value head; row `r` is token `r / group`, head `r % group`.
#[derive(Clone, Debug)]
struct Unit {
    span: usize,
    kv_head: usize,
    rows: Range<usize>,
    /// Key spans that some row sees.
    key_spans: Range<usize>,
    /// Where the partial results lie when the key spans are separate tasks.
    split: Option<usize>,
}

/// A unit, or one key span of a split unit.
struct Task {
    unit: usize,
    key_spans: Range<usize>,
    cost: usize,
}

impl Context<'_> {
    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// Keys that row `row` of a span of rows sees.
    #[inline(always)]
    fn visible(&self, span: &Span<'_>, row: usize) -> Range<usize> {
        let end = span.position(row / self.group()) + 1;
        self.shape.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// The score of a row's sink.
    #[inline(always)]
    fn sink(&self, unit: &Unit, row: usize) -> Option<f32> {
        let group = self.group();
        self.shape.sinks.map(|sinks| sinks[unit.kv_head * group + row % group])
    }

    /// Where the query and the output of a unit's row lie in `q` and `out`.
    #[inline(always)]
    fn place(&self, unit: &Unit, row: usize) -> Range<usize> {
        let group = self.group();
        let token = self.spans[unit.span].first_row + row / group;
        let head = unit.kv_head * group + row % group;
        let at = (token * self.shape.heads + head) * self.shape.head_dim;
        at..at + self.shape.head_dim
    }
}

/// `out = softmax(mask(softcap(q·kᵀ·scale)))·v` for all rows of all `spans`; rows in no span stay as they are.
///
/// `q`, `out`: (t, heads · `head_dim`). The keys and values of the rows themselves are already in `cache`.
///
/// # Panics
/// When shapes, rows or pages don't fit, spans of rows overlap, or the window is 0.
///
/// ```
/// use farthing_kernels::attention::{AttentionShape, KvPages, KvType, Span, attention};
/// use farthing_kernels::pool::Pool;
/// let mut cache = KvPages::new(1, 1, 2, KvType::F32)?;
/// cache.write(0, 0, &[0.0, 0.0], &[1.0, 2.0]);
/// cache.write(0, 1, &[0.0, 0.0], &[3.0, 4.0]);
/// let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 2, scale: 1.0, window: None, softcap: None, sinks: None };
/// let mut out = [0.0; 4];
/// let span = Span { first_row: 0, rows: 2, start: 0, pages: &[0], ancestors: &[] };
/// attention(&Pool::new(1), &[1.0; 4], &[span], &cache, &shape, &mut out);
/// assert_eq!(out, [1.0, 2.0, 2.0, 3.0]);
/// # Ok::<(), farthing_kernels::memory::OutOfMemory>(())
/// ```
pub fn attention(
    pool: &Pool,
    q: &[f32],
    spans: &[Span<'_>],
    cache: &KvPages,
    shape: &AttentionShape<'_>,
    out: &mut [f32],
) {
    attention_with(float_level(), pool, q, spans, cache, shape, out);
}

/// [`attention`] on a given level.
#[doc(hidden)]
pub fn attention_with(
    isa: Isa,
    pool: &Pool,
    q: &[f32],
    spans: &[Span<'_>],
    cache: &KvPages,
    shape: &AttentionShape<'_>,
    out: &mut [f32],
) {
    let AttentionShape { heads, kv_heads, head_dim, window, .. } = *shape;
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads) && head_dim > 0, "attention: {shape:?}");
    assert!(window != Some(0), "attention: a window of 0 keys");
    assert!(shape.sinks.is_none_or(|sinks| sinks.len() == heads), "attention: sinks for {heads} heads");
    assert!(cache.kv_heads() == kv_heads && cache.head_dim() == head_dim, "attention: {shape:?} over {cache:?}");
    assert_eq!(q.len(), out.len(), "attention: q and out differ in length");
    assert!(q.len().is_multiple_of(heads * head_dim), "attention: {} queries for {shape:?}", q.len());
    check_spans(spans, q.len() / (heads * head_dim));
    let context = Context { q, spans, cache, shape, out: Disjoint::new(out) };
    match cache.kind() {
        KvType::F32 => run::<f32>(isa, pool, context),
        KvType::F16 => run::<f16>(isa, pool, context),
        KvType::Bf16 => run::<bf16>(isa, pool, context),
    }
}

/// Panics unless the rows of the spans are disjoint, exist, and have pages up to their own position.
fn check_spans(spans: &[Span<'_>], rows: usize) {
    let mut order: Vec<Range<usize>> = spans.iter().map(|span| span.first_row..span.first_row + span.rows).collect();
    order.retain(|range| !range.is_empty());
    order.sort_unstable_by_key(|range| range.start);
    let ends = order.iter().map(|range| range.end);
    let starts = order.iter().map(|range| range.start).skip(1).chain([rows]);
    assert!(ends.zip(starts).all(|(end, start)| end <= start), "attention: spans {order:?} of {rows} rows");
    for span in spans {
        let keys = if span.rows == 0 { 0 } else { span.start + span.rows };
        assert!(span.pages.len() * PAGE >= keys, "attention: {} pages for {keys} keys", span.pages.len());
        assert!(
            span.ancestors.is_empty() || span.ancestors.len() == span.rows && span.rows <= 64,
            "attention: ancestors of {} rows for {} rows",
            span.ancestors.len(),
            span.rows
        );
        let fits = |(row, mask): (usize, &u64)| mask & 1 == 1 && mask >> row == 1;
        assert!(span.ancestors.iter().enumerate().all(fits), "attention: ancestors {:x?}", span.ancestors);
    }
}

/// Below this many multiplications a parallel region costs more than it saves.
const PARALLEL: usize = 1 << 16;
/// Units that cost more than this share of a thread's work are split by key spans.
const SHARE: usize = 4;

fn run<E: Element>(isa: Isa, pool: &Pool, context: Context<'_>) {
    let mut units = units(context, block_rows(isa));
    let costs: Vec<usize> = units.iter().map(|unit| cost(context, unit)).collect();
    let total: usize = costs.iter().sum();
    let alone = pool.threads() == 1 || total < PARALLEL;
    let mut tasks = Vec::with_capacity(units.len());
    let mut partials = 0;
    let length = |unit: &Unit| Partial::length(unit.rows.len(), context.shape.head_dim);
    for (index, (unit, &cost)) in units.iter_mut().zip(&costs).enumerate() {
        let count = unit.key_spans.len();
        if alone || count == 1 || cost <= total / (SHARE * pool.threads()) {
            tasks.push(Task { unit: index, key_spans: unit.key_spans.clone(), cost });
        } else {
            unit.split = Some(partials);
            partials += count * length(unit);
            tasks.extend(unit.key_spans.clone().map(|i| Task { unit: index, key_spans: i..i + 1, cost: cost / count }));
        }
    }
    let (units, mut partials) = (units, vec![0.0; partials]);
    let remaining: Vec<AtomicUsize> = units.iter().map(|unit| AtomicUsize::new(unit.key_spans.len())).collect();
    let partials = Disjoint::new(&mut partials);
    // Longest first, so that no thread starts a long one last; who takes which does not matter to the bits.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.cost));
    let next = AtomicUsize::new(0);
    let work = |_| {
        WORKSPACE.with_borrow_mut(|workspace| {
            while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                let unit = &units[task.unit];
                let key_spans = task.key_spans.clone();
                let mut block = Block::<E>::new(context, unit, key_spans.clone(), workspace);
                dispatch(isa, &mut block);
                let Some(base) = unit.split else { continue };
                let length = length(unit);
                let range = |i: usize| base + i * length..base + (i + 1) * length;
                // SAFETY: this key span's own part of the unit's partial results, which no other task writes.
                workspace.save(unsafe { partials.slice(range(key_spans.start - unit.key_spans.start)) });
                if remaining[task.unit].fetch_sub(1, Ordering::AcqRel) == 1 {
                    let whole = base..range(unit.key_spans.len() - 1).end;
                    // SAFETY: the last task of the unit: the others have written and let go of their parts, which
                    // the counter's acquisition makes visible.
                    let saved = unsafe { partials.slice(whole) };
                    dispatch(isa, block::Merge { context, unit, saved, workspace });
                }
            }
        });
    };
    if alone { work(0) } else { pool.run(work) }
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// The rows of all sequences in blocks of nearly equal size, at most `most` rows each.
fn units(context: Context<'_>, most: usize) -> Vec<Unit> {
    let mut units = Vec::new();
    for (index, span) in context.spans.iter().enumerate() {
        let rows = span.rows * context.group();
        let blocks = rows.div_ceil(most);
        for kv_head in 0..context.shape.kv_heads {
            for block in 0..blocks {
                let rows = share(rows, block, blocks);
                let key_spans = key_spans(context, span, &rows);
                units.push(Unit { span: index, kv_head, rows, key_spans, split: None });
            }
        }
    }
    units
}

/// Key spans that some of the rows see: later rows see later keys, but for trees.
fn key_spans(context: Context<'_>, span: &Span<'_>, rows: &Range<usize>) -> Range<usize> {
    let (mut first, mut last) = (context.visible(span, rows.start).start, context.visible(span, rows.end - 1).end);
    if !span.ancestors.is_empty() {
        for visible in rows.clone().map(|row| context.visible(span, row)) {
            (first, last) = (first.min(visible.start), last.max(visible.end));
        }
    }
    first / SPAN..last.div_ceil(SPAN)
}

/// Multiplications of a unit, roughly.
fn cost(context: Context<'_>, unit: &Unit) -> usize {
    let keys = context.visible(&context.spans[unit.span], unit.rows.end - 1).len();
    2 * unit.rows.len() * keys * context.shape.head_dim
}

#[cfg(test)]
mod tests;
