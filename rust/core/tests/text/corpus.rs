//! The seeds of the fuzz targets of this room in `fuzz/corpus`: written from the fixtures of these tests, and loaded by it.

use crate::malformed_tokenizers::valid;
use crate::shared::fixture;
use farthing::load::{ChatTemplate, TemplateOptions, Tokenizer};
use serde_json::{Value, json};
use std::path::PathBuf;

fn directory(target: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus")).join(target)
}

pub(crate) fn seeds(target: &str) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(directory(target)).expect("seeds are committed");
    entries.map(|entry| std::fs::read(entry.expect("an entry").path()).expect("readable")).collect()
}

#[test]
fn seeds_load_or_give_an_error() {
    let tokenizers = seeds("tokenizer_loads_or_errors");
    let loaded = tokenizers.iter().filter(|bytes| Tokenizer::from_json(bytes, None).is_ok()).count();
    assert!(loaded >= 5 && tokenizers.len() >= 10, "{loaded} of {}", tokenizers.len());
    let templates = seeds("template_renders_or_errors");
    let renders = |source: &Vec<u8>| {
        let template = ChatTemplate::new(&String::from_utf8_lossy(source)).ok()?;
        template.render(&json!([{"role": "user", "content": "x"}]), &TemplateOptions::default()).ok()
    };
    let rendered = templates.iter().filter_map(renders).count();
    assert!(rendered >= 10 && templates.len() >= 15, "{rendered} of {}", templates.len());
}

/// A small `tokenizer.json` with other components.
fn variants() -> Vec<Value> {
    let change = |pairs: &[(&str, Value)]| {
        let mut json = valid();
        for (key, value) in pairs {
            json[*key] = value.clone();
        }
        json
    };
    let sequence = |list: &str, steps: Value| json!({"type": "Sequence", list: steps});
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
    let bytes: serde_json::Map<String, Value> =
        (0..=255).map(|byte| (format!("<0x{byte:02X}>"), json!(byte + 4))).collect();
    let mut piece = json!({"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true, "merges": [["▁", "a"]], "vocab": bytes});
    for (id, token) in ["<unk>", "▁", "a", "▁a"].iter().enumerate() {
        piece["vocab"][token] = json!(id);
    }
    let template = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|end|>"}}, {"Sequence": {"id": "A"}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [3]}}});
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let decoder = json!([replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]);
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true});
    vec![
        valid(),
        change(&[("post_processor", template)]),
        change(&[(
            "normalizer",
            sequence("normalizers", json!([{"type": "NFKD"}, {"type": "Lowercase"}, replace("a", "b")])),
        )]),
        change(&[(
            "pre_tokenizer",
            sequence("pretokenizers", json!([split(r"\p{N}{1,3}|\s+(?!\S)|\s+"), byte_level])),
        )]),
        change(&[(
            "pre_tokenizer",
            sequence("pretokenizers", json!([{"type": "Digits", "individual_digits": true}, byte_level])),
        )]),
        change(&[
            ("model", piece.clone()),
            (
                "added_tokens",
                json!([{"id": 260, "content": "<x>", "lstrip": true, "rstrip": true, "single_word": true, "normalized": true}]),
            ),
            ("normalizer", sequence("normalizers", json!([{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]))),
            ("pre_tokenizer", Value::Null),
            ("decoder", sequence("decoders", decoder)),
        ]),
        change(&[
            ("model", piece),
            ("added_tokens", json!([])),
            ("pre_tokenizer", metaspace.clone()),
            ("decoder", metaspace),
        ]),
        change(&[("model", json!({"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}))]),
        change(&[("decoder", json!({"type": "CTC"}))]),
    ]
}

#[test]
#[ignore = "writes fuzz/corpus anew"]
fn write_the_seeds() {
    let write = |target: &str, index: usize, bytes: &[u8]| {
        std::fs::create_dir_all(directory(target)).expect("can be made");
        std::fs::write(directory(target).join(format!("{index:02}")), bytes).expect("can be written");
    };
    let vocabularies = [
        "model=gpt2\npre=gpt-2\ntokens=a,b,ab,<|end|>\ntypes=1,1,1,3\nmerges=a b\neos=3",
        "model=gpt2\npre=llama-bpe\ntokens=a,b,ab,<|end|>\nmerges=a b\nbos=3",
        "model=llama\ntokens=<unk>,<s>,</s>,▁,a,▁a\nbytes=\nscores=0,0,0,-1,-2,-3\ntypes=2,3,3,1,1,1\nprefix=1",
        "model=llama\ntokens=<unk>,<0x-1>\nscores=nan,inf\ntypes=2,6\nunk=0\nbos=0",
    ];
    let tokenizers = variants().into_iter().map(|json| serde_json::to_vec(&json).expect("JSON"));
    let tokenizers = tokenizers.chain(vocabularies.iter().map(|text| text.as_bytes().to_vec()));
    for (index, bytes) in tokenizers.enumerate() {
        write("tokenizer_loads_or_errors", index, &bytes);
    }
    let fixture = fixture("templates.json");
    let own =
        fixture["templates"].as_array().expect("a list").iter().filter_map(|template| template["source"].as_str());
    for (index, source) in own.enumerate() {
        write("template_renders_or_errors", index, source.as_bytes());
    }
}
