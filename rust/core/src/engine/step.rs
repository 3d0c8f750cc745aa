//! One step: plan, forward pass, one token for each sequence that is ready for it.

use super::cache::Cache;
use super::lock;
use super::request::FinishReason;
use super::scheduler::{Limits, Plan, Scheduler};
use super::sequence::Sequence;
use crate::error::Error;
use crate::ledger::{EngineLedger, Pass};
use crate::model::config::BlockSpec;
use crate::model::{Batch, Model, Scratch};
use farthing_kernels::attention::{KvType, Span};
use farthing_kernels::pool::Pool;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Everything that steps: owned by the engine's thread.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) model: Model,
    pub(super) cache: Cache,
    pub(super) kv: KvType,
    pub(super) pool: Pool,
    pub(super) scratch: Scratch,
    pub(super) scheduler: Scheduler,
    pub(super) limits: Limits,
    /// Longest sequence.
    pub(super) context: usize,
    /// Shared with the handle, which shows it.
    pub(super) ledger: Arc<Mutex<EngineLedger>>,
}

impl Engine {
    /// Whether there is nothing to do.
    pub(super) fn idle(&self) -> bool {
        self.scheduler.waiting.is_empty() && self.scheduler.running.is_empty()
    }

    /// Queues a sequence.
    pub(super) fn submit(&mut self, sequence: Sequence) {
        self.scheduler.waiting.push_back(sequence);
    }

    /// Ends the sequence `id` wherever it is; its answer so far is delivered.
    pub(super) fn cancel(&mut self, id: u64) {
        let Scheduler { waiting, running } = &mut self.scheduler;
        let sequence = if let Some(at) = waiting.iter().position(|sequence| sequence.id == id) {
            waiting.remove(at)
        } else {
            running.iter().position(|sequence| sequence.id == id).map(|at| running.remove(at))
        };
        if let Some(mut sequence) = sequence {
            self.cache.truncate(&mut sequence.table, 0);
            lock(&self.ledger).requests += 1;
            sequence.finish(FinishReason::Cancelled, Instant::now());
        }
    }

    /// Ends every sequence with an error.
    pub(super) fn fail_all(&mut self, error: impl Fn() -> Error) {
        let Scheduler { waiting, running } = &mut self.scheduler;
        waiting.iter_mut().chain(running.iter_mut()).for_each(|sequence| sequence.fail(error()));
        for mut sequence in waiting.drain(..).chain(running.drain(..)) {
            self.cache.truncate(&mut sequence.table, 0);
        }
    }

    /// Computes one step; does nothing when idle.
    pub(super) fn step(&mut self) {
        let plan = self.scheduler.plan(&mut self.cache, self.limits);
        lock(&self.ledger).preemptions += plan.preempted;
        if plan.rows.is_empty() {
            return;
        }
        let begun = Instant::now();
        for &(index, _) in &plan.rows {
            self.scheduler.running[index].started.get_or_insert(begun);
        }
        match self.pass(&plan) {
            Ok((pass, wanted)) => self.settle(&plan, &pass, &wanted),
            // A batch is checked before it is queued, so a failing pass concerns everybody in it.
            Err(error) => {
                let text = error.to_string();
                self.fail_all(|| Error::Stopped { reason: text.clone() });
            }
        }
    }

    /// The forward pass over the planned rows; returns its cost and, per planned sequence, how many logit rows it has.
    fn pass(&mut self, plan: &Plan) -> Result<(Pass, Vec<usize>), Error> {
        let begun = Instant::now();
        let running = &self.scheduler.running;
        let hidden = self.model.config().hidden;
        let (mut inputs, mut positions) = (Vec::new(), Vec::new());
        let (mut spans, mut slots) = (Vec::new(), Vec::new());
        let (mut logit_rows, mut wanted) = (Vec::new(), Vec::new());
        let mut prefill = false;
        for &(index, rows) in &plan.rows {
            let sequence = &running[index];
            let (start, first_row) = (sequence.computed, inputs.len());
            prefill |= start + rows <= sequence.prompt;
            for index in start..start + rows {
                let (row, position) = sequence.row(index, hidden);
                inputs.push(row);
                positions.push(position);
            }
            spans.push(Span { first_row, rows, start, pages: sequence.table.pages() });
            slots.push(sequence.table.slot());
            let before = logit_rows.len();
            if sequence.wants_all() {
                logit_rows.extend(first_row..first_row + rows);
            } else if start + rows == sequence.tokens.len() {
                logit_rows.push(first_row + rows - 1);
            }
            wanted.push(logit_rows.len() - before);
        }
        let batch =
            Batch { rows: &inputs, positions: &positions, spans: &spans, slots: &slots, logit_rows: &logit_rows };
        self.model.forward(&self.pool, &batch, &mut self.cache, &mut self.scratch)?;
        let pass = Pass {
            rows: positions.len(),
            sequences: plan.rows.len(),
            prefill,
            weight_bytes: self.model.pass_bytes(positions.len(), logit_rows.len()) + self.scratch.take_expert_bytes(),
            elapsed: begun.elapsed(),
            threads: self.pool.threads(),
        };
        Ok((pass, wanted))
    }

    /// Draws tokens, books the pass, retires what has ended.
    fn settle(&mut self, plan: &Plan, pass: &Pass, wanted: &[usize]) {
        let vocab = self.model.config().vocab;
        let mut logits = self.scratch.logits();
        let (mut ended, mut kv_bytes, mut drawn) = (Vec::new(), 0, 0);
        for (&(index, rows), &wanted) in plan.rows.iter().zip(wanted) {
            let sequence = &mut self.scheduler.running[index];
            let bytes = kv_traffic(&self.model.config().blocks, self.kv, sequence.computed, rows);
            kv_bytes += bytes;
            drawn += u64::from(wanted > 0 && !sequence.wants_all());
            sequence.computed += rows;
            sequence.book(pass, bytes);
            let (mine, rest) = logits.split_at_mut(wanted * vocab);
            logits = rest;
            if let Some(ending) = sequence.advance(mine, self.context, Instant::now()) {
                ended.push((index, ending));
            }
        }
        // Whoever hears of an end finds it in the books.
        let mut ledger = lock(&self.ledger);
        ledger.book(pass, kv_bytes);
        ledger.note(self.model.stream_statistics());
        ledger.drawn += drawn;
        ledger.requests += ended.len() as u64;
        drop(ledger);
        for (index, ending) in ended.into_iter().rev() {
            let mut sequence = self.scheduler.running.remove(index);
            self.cache.truncate(&mut sequence.table, 0);
            sequence.end(ending, Instant::now());
        }
    }
}

/// Bytes of keys, values and states that `rows` rows behind `start` others write and read; rows of one chunk share their
/// reads.
fn kv_traffic(blocks: &[BlockSpec], kv: KvType, start: usize, rows: usize) -> u64 {
    let per_block = |block: &BlockSpec| {
        let (heads, width) = block.mixer.keys();
        let token = 2 * heads * width * kv.bytes();
        let visible = block.mixer.window().map_or(start + rows, |window| (start + rows).min(window + rows));
        ((visible + rows) * token + 2 * 4 * block.mixer.state_floats()) as u64
    };
    blocks.iter().map(per_block).sum()
}
