//! States of fixed size: slots, snapshots, and the way back.

use super::{Directory, HIDDEN, VOCAB, load, options, prompt, request, write};
use farthing::engine::cache::{Cache, Table};
use farthing::engine::{Activations, Options, Weights};
use farthing::load::Checkpoint;
use farthing::model::{Batch, Model, Row, Scratch};
use farthing_kernels::attention::{KvType, Span};
use farthing_kernels::pool::Pool;

/// LFM2 of three layers, the middle one attending.
pub(super) fn lfm2(name: &str) -> Directory {
    let inner = 80;
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN], 1.0),
        ("model.embedding_norm.weight".to_owned(), vec![HIDDEN], 0.0),
    ];
    for layer in 0..3 {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let matrix = |part: &str, n: usize, k: usize| (name(part), vec![n, k], 3.0 / (k as f32).sqrt());
        tensors.push((name("operator_norm"), vec![HIDDEN], 0.0));
        tensors.push((name("ffn_norm"), vec![HIDDEN], 0.0));
        tensors.push(matrix("feed_forward.w1", inner, HIDDEN));
        tensors.push(matrix("feed_forward.w3", inner, HIDDEN));
        tensors.push(matrix("feed_forward.w2", HIDDEN, inner));
        if layer == 1 {
            tensors.push((name("self_attn.q_layernorm"), vec![HIDDEN / 4], 0.0));
            tensors.push((name("self_attn.k_layernorm"), vec![HIDDEN / 4], 0.0));
            tensors.push(matrix("self_attn.q_proj", HIDDEN, HIDDEN));
            tensors.push(matrix("self_attn.k_proj", HIDDEN / 2, HIDDEN));
            tensors.push(matrix("self_attn.v_proj", HIDDEN / 2, HIDDEN));
            tensors.push(matrix("self_attn.out_proj", HIDDEN, HIDDEN));
        } else {
            tensors.push(matrix("conv.in_proj", 3 * HIDDEN, HIDDEN));
            tensors.push(matrix("conv.out_proj", HIDDEN, HIDDEN));
            tensors.push((name("conv.conv"), vec![HIDDEN, 1, 3], 1.0));
        }
    }
    let config = serde_json::json!({
        "model_type": "lfm2", "hidden_size": HIDDEN, "intermediate_size": inner, "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"], "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCAB, "block_auto_adjust_ff_dim": false, "max_position_embeddings": 512,
    });
    write(name, &config, tensors)
}

/// Qwen3.5 of three layers, the last one attending.
pub(super) fn qwen35(name: &str) -> Directory {
    let (inner, values) = (80, 4 * 20);
    let qkv = 2 * 2 * 8 + values;
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN], 1.0),
        ("model.norm.weight".to_owned(), vec![HIDDEN], 0.0),
    ];
    for layer in 0..3 {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let matrix = |part: &str, n: usize, k: usize| (name(part) + ".weight", vec![n, k], 3.0 / (k as f32).sqrt());
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((name(norm) + ".weight", vec![HIDDEN], 0.1));
        }
        tensors.push(matrix("mlp.gate_proj", inner, HIDDEN));
        tensors.push(matrix("mlp.up_proj", inner, HIDDEN));
        tensors.push(matrix("mlp.down_proj", HIDDEN, inner));
        if layer == 2 {
            tensors.push((name("self_attn.q_norm.weight"), vec![12], 0.1));
            tensors.push((name("self_attn.k_norm.weight"), vec![12], 0.1));
            tensors.push(matrix("self_attn.q_proj", 2 * HIDDEN, HIDDEN));
            tensors.push(matrix("self_attn.k_proj", HIDDEN / 2, HIDDEN));
            tensors.push(matrix("self_attn.v_proj", HIDDEN / 2, HIDDEN));
            tensors.push(matrix("self_attn.o_proj", HIDDEN, HIDDEN));
        } else {
            tensors.push(matrix("linear_attn.in_proj_qkv", qkv, HIDDEN));
            tensors.push(matrix("linear_attn.in_proj_z", values, HIDDEN));
            tensors.push(matrix("linear_attn.in_proj_a", 4, HIDDEN));
            tensors.push(matrix("linear_attn.in_proj_b", 4, HIDDEN));
            tensors.push(matrix("linear_attn.out_proj", HIDDEN, values));
            tensors.push((name("linear_attn.conv1d.weight"), vec![qkv, 1, 4], 1.0));
            tensors.push((name("linear_attn.norm.weight"), vec![20], 0.0));
            tensors.push((name("linear_attn.A_log"), vec![4], 1.0));
            tensors.push((name("linear_attn.dt_bias"), vec![4], 1.0));
        }
    }
    let config = serde_json::json!({
        "model_type": "qwen3_5_text", "hidden_size": HIDDEN, "intermediate_size": inner, "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"], "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 20, "vocab_size": VOCAB, "tie_word_embeddings": true,
        "max_position_embeddings": 512,
    });
    write(name, &config, tensors)
}

/// One sequence that is computed piece by piece.
struct Walk {
    model: Model,
    cache: Cache,
    scratch: Scratch,
    pool: Pool,
    table: Table,
    computed: usize,
}

impl Walk {
    fn new(directory: &Directory) -> Walk {
        let checkpoint = Checkpoint::open(&directory.0).unwrap();
        let model = Model::load(&checkpoint, Weights::Int8, Activations::Auto, None, &|_| ()).unwrap();
        let cache = Cache::new(model.config(), 8, KvType::F16, 2).unwrap();
        let (scratch, pool, table) = (Scratch::default(), Pool::new(2), Table::default());
        Walk { model, cache, scratch, pool, table, computed: 0 }
    }

    /// The bits of the logits of `ids`, computed behind what there is.
    fn step(&mut self, ids: &[u32]) -> Vec<u32> {
        let tokens = self.computed + ids.len();
        assert!(self.cache.reserve(&mut self.table, tokens));
        let rows: Vec<Row<'_>> = ids.iter().map(|&id| Row::Token(id)).collect();
        let positions: Vec<u32> = (self.computed as u32..tokens as u32).collect();
        let span =
            Span { first_row: 0, rows: ids.len(), start: self.computed, pages: self.table.pages(), ancestors: &[] };
        let logit_rows: Vec<usize> = (0..ids.len()).collect();
        let (spans, slots) = ([span], [self.table.slot()]);
        let batch = Batch {
            rows: &rows,
            positions: &positions,
            spans: &spans,
            slots: &slots,
            logit_rows: &logit_rows,
            capture: &[],
        };
        self.model.forward(&self.pool, &batch, &mut self.cache, &mut self.scratch).unwrap();
        self.computed = tokens;
        self.scratch.logits().iter().map(|x| x.to_bits()).collect()
    }
}

#[test]
fn a_restored_sequence_goes_on_as_if_nothing_had_been() {
    for directory in [lfm2("snapshot-lfm2"), qwen35("snapshot-qwen35")] {
        restored(&directory);
    }
}

/// Snapshot, drafts, and back.
fn restored(directory: &Directory) {
    let ids = prompt(5);
    let (first, rest) = ids.split_at(40);
    let mut walk = Walk::new(directory);
    walk.step(first);
    let snapshot = walk.cache.snapshot(&walk.table, 40);
    assert_eq!(snapshot.tokens(), 40);
    let expected = walk.step(rest);
    // Rejected drafts, over the edge of a page, in pieces: gone without a trace.
    for (draft, pieces) in [(prompt(3), 1), (prompt(1), 20), (rest.to_vec(), 7)] {
        assert!(walk.cache.restore(&mut walk.table, &snapshot));
        walk.computed = 40;
        draft.chunks(pieces).for_each(|piece| drop(walk.step(piece)));
        assert!(walk.cache.restore(&mut walk.table, &snapshot));
        walk.computed = 40;
        assert_eq!(walk.step(rest), expected);
    }
    // A state left as it was does change the result, so the test can fail.
    walk.cache.truncate(&mut walk.table, 40);
    walk.computed = 40;
    assert_ne!(walk.step(rest), expected);
}

#[test]
fn slots_are_zeroed_handed_out_and_taken_back() {
    for directory in [lfm2("slots-lfm2"), qwen35("slots-qwen35")] {
        zeroed(&directory);
    }
}

/// Slots of two sequences, one of them preempted.
fn zeroed(directory: &Directory) {
    let ids = prompt(4);
    let mut walk = Walk::new(directory);
    let expected = walk.step(&ids);
    let snapshot = walk.cache.snapshot(&walk.table, ids.len());
    let (mut second, mut third) = (Table::default(), Table::default());
    assert!(walk.cache.reserve(&mut second, 1));
    assert_ne!(second.slot(), walk.table.slot());
    assert!(!walk.cache.reserve(&mut third, 1), "two sequences have the two slots");
    assert_eq!(third.pages(), [] as [u32; 0], "nothing taken");
    // Preempted: pages and states go together, and nothing of them is left in the slot.
    let pages = walk.cache.available();
    walk.cache.truncate(&mut walk.table, 0);
    assert_eq!(walk.cache.available(), pages + ids.len().div_ceil(32));
    assert!(!walk.cache.restore(&mut walk.table, &snapshot), "the pages are gone");
    walk.computed = 0;
    assert_eq!(walk.step(&ids), expected);
    assert_eq!(walk.cache.snapshot(&walk.table, ids.len()), snapshot);
}

#[test]
fn company_chunks_and_preemption_change_no_bit() {
    for directory in [lfm2("company-lfm2"), qwen35("company-qwen35")] {
        in_company(&directory);
    }
}

/// Eight requests at once under several options, against one by one.
fn in_company(directory: &Directory) {
    let alone = load(directory, &options());
    let answer = |completion: &farthing::engine::Completion| super::bits(completion);
    let expected: Vec<_> = (0..8).map(|index| answer(&alone.generate(vec![request(index)]).unwrap()[0])).collect();
    for variant in [
        options(),
        Options { chunk: Some(7), threads: Some(2), ..options() },
        Options { max_sequences: 3, ..options() },
        Options { kv_pages: Some(6), ..options() },
    ] {
        let llm = load(directory, &variant);
        let together = llm.generate((0..8).map(request).collect()).unwrap();
        assert_eq!(together.iter().map(answer).collect::<Vec<_>>(), expected, "{variant:?}");
        assert_eq!(llm.ledger().preemptions > 0, variant.kv_pages.is_some());
    }
}
