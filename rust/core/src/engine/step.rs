//! One step: plan, drafts, forward pass, one token and the drafts that agree for each sequence that is ready.

use super::cache::{Cache, Snapshot};
use super::lock;
use super::request::FinishReason;
use super::scheduler::{Limits, Plan, Scheduler};
use super::sequence::Sequence;
use super::speculation::{Drafting, Host, SpeculationReport, Wanted};
use crate::error::Error;
use crate::ledger::{EngineLedger, ExpertCounts, Pass};
use crate::load::Tokenizer;
use crate::model::config::BlockSpec;
use crate::model::{Batch, Model, Row, Scratch};
use crate::speculative::draft::Observed;
use crate::speculative::tree::DraftTree;
use farthing_kernels::attention::{KvType, Span};
use farthing_kernels::pool::Pool;
use farthing_kernels::topk::top_k;
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
    pub(super) drafting: Drafting,
    /// What was done with experts before the first request: to measure passes.
    pub(super) counted: ExpertCounts,
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    /// Shared with the handle, which shows it.
    pub(super) ledger: Arc<Mutex<EngineLedger>>,
    /// Likewise.
    pub(super) notices: Arc<Mutex<Notices>>,
}

/// What the engine's thread tells about speculation.
#[derive(Debug, Default)]
pub(super) struct Notices {
    pub(super) speculation: Option<SpeculationReport>,
    /// For users, not yet read.
    pub(super) warnings: Vec<String>,
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
            self.drafting.end(id);
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
            self.drafting.end(sequence.id);
        }
    }

    /// Computes one step; does nothing when idle.
    pub(super) fn step(&mut self) {
        let Scheduler { waiting, running } = &mut self.scheduler;
        for sequence in running.iter_mut().chain(waiting) {
            sequence.look_ahead(&self.cache, self.context);
        }
        let plan = self.scheduler.plan(&mut self.cache, self.limits);
        lock(&self.ledger).preemptions += plan.preempted;
        if plan.rows.is_empty() {
            return;
        }
        let begun = Instant::now();
        for &(index, _) in &plan.rows {
            self.scheduler.running[index].started.get_or_insert(begun);
        }
        self.draft(&plan);
        let snapshots = self.snapshots(&plan);
        match self.pass(&plan) {
            Ok((pass, wanted)) => self.settle(&plan, &pass, &wanted, snapshots),
            // A batch is checked before it is queued, so a failing pass concerns everybody in it.
            Err(error) => {
                let text = error.to_string();
                self.fail_all(|| Error::Stopped { reason: text.clone() });
            }
        }
    }

    /// Drafts for the planned sequences that only need their next token, as far as pages are free.
    fn draft(&mut self, plan: &Plan) {
        let Engine { scheduler, drafting, cache, pool, model, tokenizer, .. } = self;
        let mut planned = plan.rows.iter().peekable();
        let mut wanted = Vec::new();
        for (index, sequence) in scheduler.running.iter_mut().enumerate() {
            sequence.tree.clear();
            let Some(&(_, rows)) = planned.next_if(|(planned, _)| *planned == index) else { continue };
            if !drafting.active()
                || sequence.sampling().is_none()
                || sequence.embeddings.is_some()
                || sequence.looking()
            {
                continue;
            }
            drafting.begin(sequence.id, &sequence.tokens);
            // States go back by whole passes, so the rows of the last one may have to be computed again.
            let ready = rows == sequence.remaining() && (rows == 1 || cache.stateful());
            let depth = sequence.room(self.context);
            if ready && depth > 0 {
                wanted.push(Wanted { sequence, depth, branches: !cache.stateful() });
            }
        }
        if wanted.is_empty() {
            return;
        }
        let rows = plan.rows.iter().map(|(_, rows)| rows).sum();
        drafting.draft(&Host { model, pool, tokenizer: tokenizer.as_deref() }, &mut wanted, rows);
        for Wanted { sequence, .. } in wanted {
            sequence.prune();
            let tokens = sequence.tokens.len() + sequence.tree.len();
            if !sequence.tree.is_empty() && !cache.reserve(&mut sequence.table, tokens) {
                sequence.tree.clear();
            }
        }
    }

    /// For each planned sequence with a tree what to go back to when not all of it is right, if it has states.
    fn snapshots(&self, plan: &Plan) -> Vec<Option<Snapshot>> {
        let snapshot = |&(index, _): &(usize, usize)| {
            let sequence = &self.scheduler.running[index];
            let needed = self.cache.stateful() && !sequence.tree.is_empty();
            needed.then(|| self.cache.snapshot(&sequence.table, sequence.computed))
        };
        plan.rows.iter().map(snapshot).collect()
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
        let ancestors: Vec<Vec<u64>> = plan.rows.iter().map(|&(index, _)| ancestors(&running[index].tree)).collect();
        for (&(index, rows), ancestors) in plan.rows.iter().zip(&ancestors) {
            let sequence = &running[index];
            let (start, first_row) = (sequence.computed, inputs.len());
            prefill |= start + rows <= sequence.prompt;
            for index in start..start + rows {
                let (row, position) = sequence.row(index, hidden);
                inputs.push(row);
                positions.push(position);
            }
            for node in sequence.tree.nodes() {
                inputs.push(Row::Token(node.token));
                positions.push((start + rows - 1 + node.depth as usize) as u32);
            }
            let all = rows + sequence.tree.len();
            spans.push(Span { first_row, rows: all, start, pages: sequence.table.pages(), ancestors });
            slots.push(sequence.table.slot());
            let before = logit_rows.len();
            if sequence.wants_all() {
                logit_rows.extend(first_row..first_row + rows);
            } else if start + rows == sequence.tokens.len() && !sequence.wants_states() {
                logit_rows.extend(first_row + rows - 1..first_row + all);
            }
            wanted.push(logit_rows.len() - before);
        }
        let capture = &self.captured(plan)[..];
        let batch = Batch {
            rows: &inputs,
            positions: &positions,
            spans: &spans,
            slots: &slots,
            logit_rows: &logit_rows,
            capture,
        };
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

    /// Blocks whose output the pass keeps: those that drafters want, then the normed states if a sequence wants them.
    fn captured(&self, plan: &Plan) -> Vec<usize> {
        let mut blocks = self.drafting.wants().hidden.clone();
        let all = self.model.config().blocks.len();
        let wanted = plan.rows.iter().any(|&(index, _)| self.scheduler.running[index].wants_states());
        if wanted && blocks.last() != Some(&all) {
            blocks.push(all);
        }
        blocks
    }

    /// Draws tokens, books the pass, takes back what drafts were wrong, retires what has ended.
    fn settle(&mut self, plan: &Plan, pass: &Pass, wanted: &[usize], snapshots: Vec<Option<Snapshot>>) {
        let hidden = self.model.config().hidden;
        let stride = self.captured(plan).len() * hidden;
        let Engine { scheduler, drafting, cache, .. } = self;
        let vocab = self.model.config().vocab;
        let captured = self.scratch.take_captured();
        let width = drafting.wants().hidden.len() * hidden;
        let (mut first_row, mut logits) = (0, self.scratch.logits());
        let (mut ended, mut kv_bytes, mut longest) = (Vec::new(), 0, 0);
        let (mut drawn, mut drafted, mut accepted) = (0, 0, 0);
        for ((&(index, rows), &wanted), snapshot) in plan.rows.iter().zip(wanted).zip(snapshots) {
            let sequence = &mut scheduler.running[index];
            let (before, nodes) = (sequence.computed, sequence.tree.len());
            let bytes = kv_traffic(&self.model.config().blocks, self.kv, before, rows + nodes);
            kv_bytes += bytes;
            longest = longest.max(before);
            sequence.book(pass, bytes);
            let (mine, rest) = logits.split_at_mut(wanted * vocab);
            logits = rest;
            let known = drafting.knows(sequence.id) && !sequence.looking();
            let top = if known { likeliest(mine, vocab, drafting.wants().top) } else { Vec::new() };
            if sequence.wants_states() {
                let mine = captured[first_row * stride..].chunks_exact(stride).take(rows);
                sequence.take_states(mine.flat_map(|row| &row[stride - hidden..]).copied());
            }
            let (committed, mut path) = (sequence.tokens.len(), Vec::new());
            let ending = sequence.advance(rows, mine, &mut path, self.context, Instant::now());
            let right = path.len().saturating_sub(1);
            drawn += path.len() as u64;
            drafted += nodes as u64;
            accepted += right as u64;
            sequence.ledger.drafted += nodes as u64;
            sequence.ledger.accepted += right as u64;
            let tree = std::mem::take(&mut sequence.tree);
            if known && (!path.is_empty() || width > 0) {
                let verified: Vec<u32> = std::iter::once(sequence.tokens[committed - 1])
                    .chain(tree.nodes().iter().map(|node| node.token))
                    .collect();
                // The rows of the text: those that were planned, then the branch that was right.
                let rows_of_text = (0..rows).chain(path.iter().skip(1).map(|&row| rows - 1 + row));
                let state = |row: usize| &captured[(first_row + row) * stride..][..width];
                let hidden: Vec<f32> =
                    if width > 0 { rows_of_text.flat_map(state).copied().collect() } else { Vec::new() };
                let following = before + 1..(before + 1 + rows + right).min(sequence.tokens.len());
                let observed = Observed {
                    request: sequence.id,
                    tokens: &sequence.tokens[committed..],
                    start: before,
                    following: &sequence.tokens[following],
                    hidden: &hidden,
                    rows: if path.is_empty() { &[] } else { &verified },
                    top: &top,
                };
                drafting.observe(&tree, &path, &observed);
            }
            first_row += rows + nodes;
            sequence.look_back(cache);
            match (ending, snapshot) {
                (Some(ending), _) => ended.push((index, ending)),
                (None, Some(snapshot)) if right < nodes => {
                    cache.restore(&mut sequence.table, &snapshot);
                    sequence.computed = snapshot.tokens();
                }
                (None, _) if nodes > 0 => {
                    // Rows of the branch that was right follow the last token's.
                    for (place, &row) in path.iter().enumerate().skip(1) {
                        cache.move_token(&sequence.table, sequence.computed - 1 + row, sequence.computed - 1 + place);
                    }
                    sequence.computed += right;
                    cache.truncate(&mut sequence.table, sequence.computed);
                }
                (None, _) => {}
            }
        }
        if !pass.prefill {
            drafting.pass_took(pass.elapsed.as_secs_f64(), pass.rows, longest);
        }
        // Whoever hears of an end finds it in the books.
        let mut ledger = lock(&self.ledger);
        ledger.book(pass, kv_bytes);
        ledger.note(self.model.stream_statistics() - self.counted);
        ledger.drawn += drawn;
        ledger.drafted += drafted;
        ledger.accepted += accepted;
        ledger.requests += ended.len() as u64;
        drop(ledger);
        let warnings = drafting.take_warnings();
        if !ended.is_empty() || !warnings.is_empty() {
            let mut notices = lock(&self.notices);
            notices.speculation = Some(drafting.report());
            notices.warnings.extend(warnings);
        }
        for (index, ending) in ended.into_iter().rev() {
            let mut sequence = scheduler.running.remove(index);
            cache.truncate(&mut sequence.table, 0);
            drafting.end(sequence.id);
            sequence.end(ending, Instant::now());
        }
    }
}

/// What each row of the last token and its tree sees; nothing when each sees all before it.
fn ancestors(tree: &DraftTree) -> Vec<u64> {
    if tree.is_chain() { Vec::new() } else { std::iter::once(1).chain(tree.ancestors()).collect() }
}

/// The `count` likeliest tokens of each row. `logits: (rows, vocab)`, `(rows, count)` out.
fn likeliest(logits: &[f32], vocab: usize, count: usize) -> Vec<u32> {
    let count = count.min(vocab);
    let mut ids = vec![0; logits.len() / vocab * count];
    if count > 0 {
        top_k(logits, vocab, count, &mut ids);
    }
    ids
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
