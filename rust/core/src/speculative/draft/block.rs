//! A block that drafts: its keys and values for every request, and passes over rows of many of them.

use super::Target;
use crate::engine::Weights;
use crate::engine::cache::{Cache, Table};
use crate::error::Error;
use crate::model::{Part, PartRows};
use crate::speculative::tree::MOST_NODES;
use farthing_kernels::attention::{KvType, PAGE, Span};
use std::collections::HashMap;

/// Most rows of one pass.
const CHUNK: usize = 512;
/// Most bytes of keys and values.
const MOST_BYTES: usize = 4 << 30;

/// The block and what it remembers.
#[derive(Debug)]
pub(super) struct DraftBlock {
    pub(super) part: Part,
    cache: Cache,
    tables: HashMap<u64, Table>,
}

/// Rows of one request, for one pass or more.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) request: u64,
    /// Where their keys and values lie.
    pub(super) start: usize,
    /// `(t,)` rotary positions.
    pub(super) positions: Vec<u32>,
    /// `(t, hidden)`: what the block adds to.
    pub(super) stream: Vec<f32>,
    /// `(t, inputs)`: what its mixer reads, if that is not the norm of the stream.
    pub(super) normed: Vec<f32>,
    /// As in [`Span`].
    pub(super) ancestors: Vec<u64>,
}

impl DraftBlock {
    /// `sequences`, `context`: those of the engine.
    pub(super) fn new(part: Part, weights: Weights, sequences: usize, context: usize) -> Result<DraftBlock, Error> {
        // As the engine's own keys and values.
        let kv = if weights == Weights::F32 { KvType::F32 } else { KvType::F16 };
        let context = context.min(part.config().context);
        let most = MOST_BYTES / Cache::page_bytes(part.config(), kv).max(1) as usize + 1;
        let pages = (sequences * (context + MOST_NODES + 1).div_ceil(PAGE)).min(most);
        let cache = Cache::new(part.config(), pages, kv, sequences)?;
        Ok(DraftBlock { part, cache, tables: HashMap::new() })
    }

    /// Keeps the first `rows` rows of a request; gives back what the others took.
    pub(super) fn truncate(&mut self, request: u64, rows: usize) {
        if let Some(table) = self.tables.get_mut(&request) {
            self.cache.truncate(table, rows);
        }
    }

    /// Makes room for `rows` rows of a request; false when there is none.
    pub(super) fn reserve(&mut self, request: u64, rows: usize) -> bool {
        rows <= self.part.config().context && self.cache.reserve(self.tables.entry(request).or_default(), rows)
    }

    /// Forgets a request.
    pub(super) fn end(&mut self, request: u64) {
        self.truncate(request, 0);
        self.tables.remove(&request);
    }

    /// Sends rows through the block, those of a request after each other; room has been made for them. Returns the stream
    /// `(all rows, hidden)`.
    pub(super) fn run(&mut self, target: &dyn Target, all: &[Rows]) -> Result<Vec<f32>, Error> {
        let mut out = Vec::new();
        let mut pass = Pass::default();
        let hidden = self.part.config().hidden;
        for rows in all {
            let count = rows.positions.len();
            let mut done = 0;
            while done < count {
                let piece = (count - done).min(CHUNK);
                if pass.positions.len() + piece > CHUNK {
                    pass.flush(self, target, &mut out)?;
                }
                pass.spans.push((rows.request, rows.start + done, piece, &rows.ancestors));
                pass.positions.extend_from_slice(&rows.positions[done..done + piece]);
                pass.stream.extend_from_slice(&rows.stream[done * hidden..(done + piece) * hidden]);
                let inputs = rows.normed.len() / count;
                pass.normed.extend_from_slice(&rows.normed[done * inputs..(done + piece) * inputs]);
                done += piece;
            }
        }
        pass.flush(self, target, &mut out)?;
        Ok(out)
    }
}

/// Rows that go together.
#[derive(Default)]
struct Pass<'a> {
    spans: Vec<(u64, usize, usize, &'a [u64])>,
    positions: Vec<u32>,
    stream: Vec<f32>,
    normed: Vec<f32>,
}

impl Pass<'_> {
    fn flush(&mut self, block: &mut DraftBlock, target: &dyn Target, out: &mut Vec<f32>) -> Result<(), Error> {
        if self.positions.is_empty() {
            return Ok(());
        }
        let mut first_row = 0;
        let mut spans = Vec::with_capacity(self.spans.len());
        for &(request, start, rows, ancestors) in &self.spans {
            let pages = block.tables.get(&request).map_or(&[][..], Table::pages);
            spans.push(Span { first_row, rows, start, pages, ancestors });
            first_row += rows;
        }
        let rows = PartRows {
            stream: &self.stream,
            normed: (!self.normed.is_empty()).then_some(&self.normed[..]),
            positions: &self.positions,
            spans: &spans,
        };
        out.extend_from_slice(block.part.forward(target.pool(), rows, &mut block.cache)?);
        *self = Pass::default();
        Ok(())
    }
}
