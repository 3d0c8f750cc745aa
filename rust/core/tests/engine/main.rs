//! The engine on a small model with random weights: the same request gives the same bits, whatever surrounds it.

mod speculation;
mod states;

use farthing::engine::request::Embeddings;
use farthing::engine::{
    Activations, Completion, Event, FinishReason, Llm, Options, Prompt, Request, SamplingParams, Speculation, Weights,
};
use farthing::error::Error;
use farthing::load::Checkpoint;
use farthing::model::Model;
use std::path::PathBuf;
use std::time::Duration;

const HIDDEN: usize = 48;
const VOCAB: usize = 96;

/// A checkpoint directory that is gone when it is dropped.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        // Best effort: the system cleans its temporary directory too.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Numbers in (-1, 1), the same in every run.
fn noise(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// A Llama of two layers, four heads over two key-value heads, tied embeddings, `context` positions.
fn checkpoint(name: &str, context: usize) -> Directory {
    let inner = 80;
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN], 1.0)];
    tensors.push(("model.norm.weight".to_owned(), vec![HIDDEN], 0.0));
    for layer in 0..2 {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((name(norm), vec![HIDDEN], 0.0));
        }
        for (part, n, k) in [
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", HIDDEN / 2, HIDDEN),
            ("self_attn.v_proj", HIDDEN / 2, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", inner, HIDDEN),
            ("mlp.up_proj", inner, HIDDEN),
            ("mlp.down_proj", HIDDEN, inner),
        ] {
            tensors.push((name(part), vec![n, k], 3.0 / (k as f32).sqrt()));
        }
    }
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": inner, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "tie_word_embeddings": true,
        "max_position_embeddings": context, "rms_norm_eps": 1e-5,
    });
    write(name, &config, tensors)
}

/// A checkpoint of random tensors: (name, shape, scale), a scale of 0 for norms.
fn write(name: &str, config: &serde_json::Value, tensors: Vec<(String, Vec<usize>, f32)>) -> Directory {
    let (mut header, mut data, mut state) = (serde_json::Map::new(), Vec::new(), 7);
    for (name, shape, scale) in tensors {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            // Norms lie around 1, matrices around 0.
            let value = if scale == 0.0 { 1.0 + 0.1 * noise(&mut state) } else { scale * noise(&mut state) };
            data.extend_from_slice(&value.to_le_bytes());
        }
        let entry = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name, entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let path = std::env::temp_dir().join(format!("farthing-engine-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    std::fs::write(path.join("config.json"), config.to_string()).unwrap();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(path.join("model.safetensors"), bytes).unwrap();
    Directory(path)
}

fn options() -> Options {
    Options { weights: Weights::Int4, threads: Some(1), ..Options::default() }
}

fn load(directory: &Directory, options: &Options) -> Llm {
    Llm::load(&directory.0, options, Speculation::default(), &|_| ()).unwrap()
}

fn prompt(index: usize) -> Vec<u32> {
    (0..3 + 17 * index).map(|at| ((at * 31 + index * 7) % VOCAB) as u32).collect()
}

/// Requests of all kinds: greedy and drawn, with and without penalties.
fn request(index: usize) -> Request {
    let sampling = SamplingParams {
        max_tokens: 20 + index,
        temperature: if index.is_multiple_of(2) { 0.0 } else { 0.9 },
        top_p: 0.95,
        repetition_penalty: if index.is_multiple_of(3) { 1.0 } else { 1.2 },
        seed: Some(index as u64),
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    Request { prompt: Prompt::Tokens(prompt(index)), sampling }
}

/// The bits of an answer: tokens and log-probabilities.
fn bits(completion: &Completion) -> (Vec<u32>, Vec<u32>) {
    let logprobs = completion.logprobs.iter().flatten();
    let floats = logprobs.flat_map(|at| [at.logprob, at.top[0].1, at.top[1].1]);
    (completion.token_ids.clone(), floats.map(f32::to_bits).collect())
}

#[test]
fn company_chunks_threads_and_preemption_change_no_bit() {
    let directory = checkpoint("bits", 512);
    let alone = load(&directory, &options());
    let expected: Vec<_> = (0..8).map(|index| bits(&alone.generate(vec![request(index)]).unwrap()[0])).collect();
    let alone_passes = alone.ledger().passes;
    drop(alone);
    let variants = [
        options(),
        Options { threads: Some(2), ..options() },
        Options { chunk: Some(1), ..options() },
        Options { chunk: Some(7), threads: Some(2), ..options() },
        Options { max_sequences: 3, ..options() },
        // The longest sequence needs 5 pages; 6 pages for eight sequences means that somebody always waits.
        Options { kv_pages: Some(6), ..options() },
    ];
    for variant in variants {
        let llm = load(&directory, &variant);
        let together = llm.generate((0..8).map(request).collect()).unwrap();
        let ledger = llm.ledger();
        for (index, completion) in together.iter().enumerate() {
            assert_eq!(bits(completion), expected[index], "request {index} under {variant:?}");
            assert_eq!(completion.ledger.answer_tokens, 20 + index as u64);
            assert_eq!(completion.ledger.prompt_tokens, 3 + 17 * index as u64);
        }
        if variant.kv_pages.is_some() {
            assert!(ledger.preemptions > 0, "six pages are too few for eight sequences");
        } else {
            assert_eq!(ledger.preemptions, 0);
        }
        if variant == options() {
            assert!(ledger.passes * 4 <= alone_passes, "{} passes together, {alone_passes} alone", ledger.passes);
        }
    }
}

#[test]
fn logits_of_all_tokens_do_not_depend_on_chunks() {
    let directory = checkpoint("logits", 256);
    let ids = prompt(6);
    let whole = load(&directory, &options()).logits(&ids).unwrap();
    assert_eq!(whole.len(), ids.len() * VOCAB);
    for chunk in [1, 7, 64] {
        let pieces = load(&directory, &Options { chunk: Some(chunk), ..options() }).logits(&ids).unwrap();
        assert!(whole.iter().zip(&pieces).all(|(a, b)| a.to_bits() == b.to_bits()), "chunks of {chunk}");
    }
}

#[test]
fn embeddings_of_tokens_are_the_tokens() {
    let directory = checkpoint("embeddings", 256);
    let checkpoint = Checkpoint::open(&directory.0).unwrap();
    let model = Model::load(&checkpoint, Weights::Int4, Activations::Auto, None, &|_| ()).unwrap();
    let ids = prompt(3);
    let mut rows = vec![0.0; ids.len() * HIDDEN];
    for (&id, row) in ids.iter().zip(rows.chunks_exact_mut(HIDDEN)) {
        model.embed(id, row);
    }
    let llm = load(&directory, &options());
    let greedy = || SamplingParams { max_tokens: 12, logprobs: Some(2), ..SamplingParams::default() };
    let ask = |prompt| llm.generate(vec![Request { prompt, sampling: greedy() }]).map(|mut all| all.remove(0));
    let embedded = |positions: Vec<u32>| Prompt::Embeddings(Embeddings { rows: rows.clone(), positions });
    let by_id = ask(Prompt::Tokens(ids.clone())).unwrap();
    let by_row = ask(embedded((0..ids.len() as u32).collect())).unwrap();
    assert_eq!(bits(&by_row), bits(&by_id));
    let moved = ask(embedded(ids.iter().map(|id| id % 13).collect())).unwrap();
    assert_ne!(bits(&moved), bits(&by_id), "positions are the caller's");
    let error = ask(embedded(vec![0, 1])).unwrap_err();
    assert!(matches!(error, Error::Argument { name: "embeddings", .. }), "{error}");
}

#[test]
fn answers_end_where_the_context_or_the_caller_ends_them() {
    let directory = checkpoint("ends", 40);
    let llm = load(&directory, &options());
    let long = |length| Request {
        prompt: Prompt::Tokens(prompt(9)[..length].to_vec()),
        sampling: SamplingParams { max_tokens: 1000, ..SamplingParams::default() },
    };
    let full = llm.generate(vec![long(30)]).unwrap().remove(0);
    assert_eq!((full.token_ids.len(), full.finish_reason), (10, FinishReason::Length));
    let error = llm.generate(vec![long(40)]).unwrap_err();
    assert_eq!(error.to_string(), "prompt: got 40 tokens, expected at most 39 tokens");
    for bad in [Prompt::Tokens(Vec::new()), Prompt::Tokens(vec![VOCAB as u32]), Prompt::Text("text".to_owned())] {
        let sampling = SamplingParams::default();
        assert!(llm.generate(vec![long(3), Request { prompt: bad.clone(), sampling }]).is_err(), "{bad:?}");
    }
    assert_eq!(llm.ledger().requests, 1, "a batch with a wrong request computes nothing");
    let roomy = load(&checkpoint("cancel", 1 << 16), &Options { kv_pages: Some(2048), ..options() });
    let mut endless = long(3);
    endless.sampling.max_tokens = 1 << 15;
    let mut stream = roomy.submit(vec![endless]).unwrap().remove(0);
    stream.cancel();
    loop {
        match stream.next(Duration::from_mins(1)) {
            Some(Event::Done(completion)) => break assert_eq!(completion.finish_reason, FinishReason::Cancelled),
            Some(Event::Failed(error)) => panic!("{error}"),
            Some(_) => {}
            None => panic!("a cancelled request must end"),
        }
    }
    let next = roomy.generate(
        vec![long(3)]
            .into_iter()
            .map(|mut it| {
                it.sampling.max_tokens = 2;
                it
            })
            .collect(),
    );
    assert_eq!(next.unwrap()[0].token_ids.len(), 2, "the engine goes on");
}
