//! Who goes into the next step, with how many rows: continuous batching, chunked prompts, preemption by recomputation.

use super::cache::Cache;
use super::sequence::Sequence;
use std::collections::VecDeque;

/// Limits of one step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Most sequences that hold pages.
    pub(super) max_sequences: usize,
    /// Most rows of unfinished prompts in one step; each sequence that only needs its next token comes on top.
    pub(super) chunk: usize,
}

/// The queue of sequences: first come, first served.
#[derive(Debug, Default)]
pub(super) struct Scheduler {
    /// Sequences without pages, first to be admitted in front.
    pub(super) waiting: VecDeque<Sequence>,
    /// Sequences with pages, in order of arrival.
    pub(super) running: Vec<Sequence>,
}

/// What a step computes.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// `(index in running, rows)`, ascending.
    pub(super) rows: Vec<(usize, usize)>,
    /// Sequences that lost their pages to make room.
    pub(super) preempted: u64,
}

impl Scheduler {
    /// Plans a step and reserves its pages. Empty only when nothing is running or waiting.
    pub(super) fn plan(&mut self, cache: &mut Cache, limits: Limits) -> Plan {
        let mut plan = Plan::default();
        let mut budget = limits.chunk;
        let mut index = 0;
        while index < self.running.len() {
            let remaining = self.running[index].remaining();
            let rows = if remaining == 1 { 1 } else { remaining.min(budget) };
            if rows > 0 && self.reserve(cache, index, rows, &mut plan) {
                budget -= if remaining == 1 { 0 } else { rows };
                plan.rows.push((index, rows));
            }
            index += 1;
        }
        // Whoever lost pages goes first again; nobody new comes in at their expense.
        while plan.preempted == 0 && budget > 0 && self.running.len() < limits.max_sequences {
            let Some(mut next) = self.waiting.pop_front() else { break };
            let rows = next.remaining().min(budget);
            let computed = next.computed;
            if !cache.reserve(&mut next.table, computed + rows) {
                self.waiting.push_front(next);
                break;
            }
            budget -= rows;
            plan.rows.push((self.running.len(), rows));
            self.running.push(next);
        }
        plan
    }

    /// Pages for `rows` more rows of `running[index]`, taken from the youngest sequences if need be; false when the
    /// sequence itself was the youngest and had to go.
    fn reserve(&mut self, cache: &mut Cache, index: usize, rows: usize, plan: &mut Plan) -> bool {
        loop {
            let sequence = &mut self.running[index];
            let tokens = sequence.computed + rows;
            if cache.reserve(&mut sequence.table, tokens) {
                return true;
            }
            let Some(mut youngest) = self.running.pop() else { return false };
            cache.truncate(&mut youngest.table, 0);
            youngest.computed = 0;
            youngest.ledger.preemptions += 1;
            self.waiting.push_front(youngest);
            plan.preempted += 1;
            if self.running.len() == index {
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::cache::Table;
    use super::super::sequence::Purpose;
    use super::*;
    use crate::ledger::Ledger;
    use crate::model::Names;
    use crate::model::config::{BlockSpec, Config};
    use crate::model::feed_forward::FeedForwardSpec;
    use crate::model::feed_forward::dense::DenseSpec;
    use crate::model::mixer::MixerSpec;
    use crate::model::mixer::attention::AttentionSpec;
    use crate::speculative::tree::DraftTree;
    use farthing_kernels::activation::Activation;
    use farthing_kernels::attention::KvType;
    use proptest::prelude::*;
    use std::time::Instant;

    fn config() -> Config {
        let attention = AttentionSpec {
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            scale: 1.0,
            softcap: None,
            window: None,
            rope: None,
            qkv_bias: false,
            output_bias: false,
            head_norm: None,
            sinks: false,
            gated: false,
            doubled: false,
        };
        let feed_forward = DenseSpec { intermediate: 1, activation: Activation::Silu, bias: false };
        let block = BlockSpec {
            mixer: MixerSpec::Attention(attention),
            feed_forward: FeedForwardSpec::Dense(feed_forward),
            sandwich: false,
        };
        Config {
            family: "llama".to_owned(),
            vocab: 1,
            hidden: 2,
            context: 1 << 20,
            tied: true,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            norm_offset: 0.0,
            epsilon: 1e-6,
            final_softcap: None,
            ropes: Vec::new(),
            blocks: vec![block],
            names: Names::default(),
        }
    }

    fn sequence(id: u64, prompt: usize) -> Sequence {
        Sequence {
            id,
            tokens: vec![0; prompt],
            embeddings: None,
            prompt,
            computed: 0,
            table: Table::default(),
            tree: DraftTree::default(),
            purpose: Purpose::Logits { rows: Vec::new(), reply: std::sync::mpsc::channel().0 },
            ledger: Ledger::default(),
            submitted: Instant::now(),
            started: None,
            first_token: None,
        }
    }

    /// Runs sequences of (prompt, output) lengths to their ends; returns the order of ending and the passes taken.
    fn run(jobs: &[(usize, usize)], pages: usize, limits: Limits) -> (Vec<u64>, usize) {
        let mut cache = Cache::new(&config(), pages, KvType::F32, limits.max_sequences).unwrap();
        let mut scheduler = Scheduler::default();
        for (id, &(prompt, _)) in jobs.iter().enumerate() {
            scheduler.waiting.push_back(sequence(id as u64, prompt));
        }
        let (mut ended, mut passes) = (Vec::new(), 0);
        while !(scheduler.waiting.is_empty() && scheduler.running.is_empty()) {
            let plan = scheduler.plan(&mut cache, limits);
            passes += 1;
            assert!(!plan.rows.is_empty(), "a step without rows would never end");
            assert!(scheduler.running.len() <= limits.max_sequences);
            assert!(plan.rows.is_sorted_by(|a, b| a.0 < b.0));
            let many: usize = plan
                .rows
                .iter()
                .filter(|&&(index, _)| scheduler.running[index].remaining() > 1)
                .map(|&(_, rows)| rows)
                .sum();
            assert!(many <= limits.chunk, "{many} prompt rows with a chunk of {}", limits.chunk);
            for &(index, rows) in plan.rows.iter().rev() {
                let sequence = &mut scheduler.running[index];
                assert!(rows >= 1 && rows <= sequence.remaining());
                sequence.computed += rows;
                assert!(sequence.table.pages().len() * 32 >= sequence.computed);
                if sequence.remaining() > 0 {
                    continue;
                }
                sequence.tokens.push(0);
                if sequence.tokens.len() == sequence.prompt + jobs[sequence.id as usize].1 {
                    let mut sequence = scheduler.running.remove(index);
                    cache.truncate(&mut sequence.table, 0);
                    ended.push(sequence.id);
                }
            }
            let mut held: Vec<u32> =
                scheduler.running.iter().flat_map(|sequence| sequence.table.pages().iter().copied()).collect();
            assert_eq!(held.len() + cache.available(), cache.total(), "pages are lost or made up");
            held.sort_unstable();
            held.dedup();
            assert_eq!(held.len() + cache.available(), cache.total(), "a page has two owners");
        }
        (ended, passes)
    }

    proptest! {
        #[test]
        fn every_sequence_ends_and_no_page_is_lost(
            jobs in prop::collection::vec((1usize..200, 1usize..40), 1..12),
            spare in 0usize..6,
            max_sequences in 1usize..6,
            chunk in prop::sample::select(vec![1usize, 7, 64, 1 << 20]),
        ) {
            let longest = jobs.iter().map(|&(prompt, output)| (prompt + output).div_ceil(32)).max().unwrap_or(1);
            let (mut ended, _) = run(&jobs, longest + spare, Limits { max_sequences, chunk });
            ended.sort_unstable();
            prop_assert_eq!(ended, (0..jobs.len() as u64).collect::<Vec<_>>());
        }
    }

    #[test]
    fn sequences_share_their_passes() {
        let jobs = [(20, 16); 16];
        let (_, together) = run(&jobs, 1000, Limits { max_sequences: 16, chunk: 512 });
        let (_, alone) = run(&jobs, 1000, Limits { max_sequences: 1, chunk: 512 });
        assert_eq!((together, alone), (16, 16 * 16));
    }
}
