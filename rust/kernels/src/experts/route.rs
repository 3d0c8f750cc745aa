//! Which rows meet which expert.

use std::ops::Range;

use super::PackedExperts;
use crate::isa::Isa;
use crate::matmul::{Planes, most_tokens};
use crate::pool::share;

/// The rows of one expert, which lie together.
pub(super) struct Segment {
    pub(super) expert: usize,
    /// First row in the order of experts.
    pub(super) first: usize,
    pub(super) tokens: usize,
    /// First element of what stands between the products.
    pub(super) inner: usize,
}

impl Segment {
    pub(super) fn rows(&self) -> Range<usize> {
        self.first..self.first + self.tokens
    }
}

/// Rows of a segment that the kernels take together.
pub(super) struct Block {
    pub(super) segment: usize,
    /// In the order of experts.
    pub(super) rows: Range<usize>,
}

/// Counts of one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// `(experts,)` rows that each expert computed.
    pub tokens: Vec<u32>,
    /// Experts with at least one row.
    pub distinct: usize,
    /// Bytes of weights that were read: those of an expert once for each 512 tokens of the step that have chosen it.
    pub weight_bytes: usize,
}

/// Reusable buffers of [`PackedExperts::run`]; they grow on demand and are kept.
#[derive(Default)]
pub struct ExpertScratch {
    statistics: Statistics,
    /// `(experts,)`: the next free row.
    next: Vec<usize>,
    pub(super) segments: Vec<Segment>,
    pub(super) blocks: Vec<Block>,
    /// Token and weight of each row, in the order of experts, then of tokens and choices.
    pub(super) tokens: Vec<u32>,
    pub(super) weights: Vec<f32>,
    /// The tokens, each a block of its own.
    pub(super) single: Planes,
    /// The rows of segments of several tokens.
    pub(super) gathered: Planes,
    pub(super) gathered_floats: Vec<f32>,
    /// `(tokens, width)` of each segment.
    pub(super) inner: Vec<f32>,
    pub(super) inner_planes: Planes,
}

impl ExpertScratch {
    /// Counts of the last run.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Starts counting for `experts`.
    pub(super) fn begin(&mut self, experts: usize) {
        self.statistics.tokens.clear();
        self.statistics.tokens.resize(experts, 0);
        (self.statistics.distinct, self.statistics.weight_bytes) = (0, 0);
    }

    /// Sorts the choices of `t` tokens by expert: `ids: (t, k)`, `weights: (t, k)`.
    pub(super) fn route(&mut self, isa: Isa, experts: &PackedExperts, t: usize, ids: &[u32], weights: &[f32]) {
        let count = experts.experts.len();
        let (k, known) = (ids.len() / t, |id: u32| Some(id as usize).filter(|&id| id < count));
        self.next.clear();
        self.next.resize(count, 0);
        ids.iter().filter_map(|&id| known(id)).for_each(|id| self.next[id] += 1);
        self.segments.clear();
        self.blocks.clear();
        let (mut first, mut inner) = (0, 0);
        for (expert, next) in self.next.iter_mut().enumerate() {
            let tokens = std::mem::replace(next, first);
            if tokens == 0 {
                continue;
            }
            let of = &experts.experts[expert];
            let blocks = tokens.div_ceil(most_tokens(isa));
            self.blocks.extend((0..blocks).map(|block| {
                let rows = share(tokens, block, blocks);
                Block { segment: self.segments.len(), rows: first + rows.start..first + rows.end }
            }));
            self.segments.push(Segment { expert, first, tokens, inner });
            first += tokens;
            inner += tokens * of.width();
            let seen = &mut self.statistics.tokens[expert];
            self.statistics.distinct += usize::from(*seen == 0);
            *seen += tokens as u32;
            self.statistics.weight_bytes += of.nbytes();
        }
        self.tokens.resize(first, 0);
        self.weights.resize(first, 0.0);
        self.inner.resize(inner, 0.0);
        for (choice, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
            if let Some(id) = known(id) {
                let row = self.next[id];
                self.next[id] += 1;
                (self.tokens[row], self.weights[row]) = ((choice / k) as u32, weight);
            }
        }
    }
}
