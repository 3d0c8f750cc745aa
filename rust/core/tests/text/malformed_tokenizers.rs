//! Tokenizers that are wrong in one way each, and the error that says so.

use crate::shared::fixture;
use crate::tokenizers::{byte_level_json, vocabulary};
use farthing::load::{Tokenizer, TokenizerError as Wrong, Vocabulary};
use serde_json::{Value, json};

fn byte_level() -> Vocabulary {
    Vocabulary {
        model: "gpt2".into(),
        pre: "gpt-2".into(),
        tokens: ["a", "b", "ab", "<|end|>"].map(String::from).into(),
        types: Some(vec![1, 1, 1, 3]),
        merges: Some(vec!["a b".into()]),
        ..Vocabulary::default()
    }
}

fn sentence_piece() -> Vocabulary {
    vocabulary(&fixture("vocabularies.json")["sentence_piece"][0]["vocabulary"])
}

fn error(vocabulary: Vocabulary) -> Wrong {
    Tokenizer::from_vocabulary(vocabulary).expect_err("is malformed")
}

#[test]
fn vocabularies() {
    assert!(Tokenizer::from_vocabulary(byte_level()).is_ok());
    assert!(Tokenizer::from_vocabulary(sentence_piece()).is_ok());
    let tokens = |tokens: &[&str]| tokens.iter().map(ToString::to_string).collect::<Vec<_>>();

    let wrong = error(Vocabulary { model: "bert".into(), ..byte_level() });
    assert_eq!(wrong.to_string(), "tokenizer.ggml.model: expected one of gpt2, llama, got bert");
    assert!(wrong.is_unsupported());
    let wrong = error(Vocabulary { pre: "klingon".into(), ..byte_level() });
    assert!(wrong.to_string().starts_with("tokenizer.ggml.pre: expected one of gpt-2, smollm, llama-bpe"), "{wrong}");
    assert_eq!(error(Vocabulary { tokens: Vec::new(), types: None, ..byte_level() }), Wrong::Empty);
    assert_eq!(
        error(Vocabulary { types: Some(vec![1, 1]), ..byte_level() }),
        Wrong::Length { field: "tokenizer.ggml.token_type", got: 2, expected: 4 }
    );
    assert_eq!(error(Vocabulary { types: Some(vec![1, 1, 7, 3]), ..byte_level() }), Wrong::TokenType { id: 2, got: 7 });
    assert_eq!(
        error(Vocabulary { tokens: tokens(&["a", "b", "ab", "a"]), ..byte_level() }),
        Wrong::DuplicateToken { token: "a".into(), first: 0, second: 3 }
    );
    assert_eq!(
        error(Vocabulary { eos: Some(4), ..byte_level() }),
        Wrong::Id { what: "tokenizer.ggml.eos_token_id".into(), got: 4, expected: 4 }
    );
    assert_eq!(
        error(Vocabulary { add_bos: Some(true), ..byte_level() }),
        Wrong::Missing { field: "tokenizer.ggml.bos_token_id", expected: "the id of the token to add" }
    );
    assert_eq!(
        error(Vocabulary { merges: None, ..byte_level() }),
        Wrong::Missing { field: "tokenizer.ggml.merges", expected: "a list of merges" }
    );
    for (merge, missing) in [("a c", "c"), ("b a", "ba"), ("a b c", "b c")] {
        let merges = Some(tokens(&["a b", merge]));
        let expected = Wrong::MergeToken { index: 1, got: missing.into() };
        assert_eq!(error(Vocabulary { merges, ..byte_level() }), expected);
    }
    for merge in ["ab", "", " "] {
        let expected = Wrong::MergeShape { index: 0, got: merge.into() };
        assert_eq!(error(Vocabulary { merges: Some(tokens(&[merge])), ..byte_level() }), expected);
    }
    let long = vec!["x".repeat(70_000)];
    assert_eq!(
        error(Vocabulary { tokens: long, types: None, merges: Some(Vec::new()), ..byte_level() }),
        Wrong::TokenLength { id: 0, got: 70_000, expected: 65_536 }
    );
    let many = Vocabulary { tokens: vec![String::new(); (1 << 20) + 1], types: None, ..byte_level() };
    assert_eq!(
        error(many),
        Wrong::TooLarge { what: "vocabulary", unit: "tokens", got: (1 << 20) + 1, expected: 1 << 20 }
    );
}

#[test]
fn sentence_piece_vocabularies() {
    let with = |change: &dyn Fn(&mut Vocabulary)| {
        let mut vocabulary = sentence_piece();
        change(&mut vocabulary);
        error(vocabulary)
    };
    assert_eq!(
        with(&|it| it.scores = None),
        Wrong::Missing { field: "tokenizer.ggml.scores", expected: "a score for each token" }
    );
    let count = sentence_piece().tokens.len();
    assert_eq!(
        with(&|it| it.scores = Some(vec![0.0; 3])),
        Wrong::Length { field: "tokenizer.ggml.scores", got: 3, expected: count }
    );
    for (score, got) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf"), (f32::INFINITY, "inf")] {
        let expected = Wrong::Score { id: 9, got: got.into() };
        assert_eq!(with(&|it| it.scores.as_mut().expect("scores")[9] = score), expected);
    }
    let byte = sentence_piece().types.expect("types").iter().position(|&kind| kind == 6).expect("byte tokens");
    for token in ["<0x-1>", "<0xZZ>", "<0x100>", "<0x>", "0x41", "<0x4>", "<0xab>", "", "<0x+F>"] {
        let expected = Wrong::ByteToken { id: byte as u32, got: token.into() };
        assert_eq!(with(&|it| it.tokens[byte] = token.into()), expected);
    }
    let without_bytes = Vocabulary {
        model: "llama".into(),
        tokens: ["a"].map(String::from).into(),
        scores: Some(vec![0.0]),
        ..Vocabulary::default()
    };
    // The only token has the place of the unknown one.
    assert_eq!(
        error(without_bytes),
        Wrong::Missing { field: "tokenizer.ggml.bos_token_id", expected: "the id of the token to add" }
    );
}

/// A small `tokenizer.json` that loads.
pub(crate) fn valid() -> Value {
    json!({
        "added_tokens": [{"id": 3, "content": "<|end|>", "special": true}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
        "post_processor": {"type": "ByteLevel"},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    })
}

fn load(value: &Value) -> Result<Tokenizer, Wrong> {
    Tokenizer::from_json(&serde_json::to_vec(value).expect("JSON"), None)
}

/// The error after putting `value` at `place`.
fn changed(place: &str, value: Value) -> Wrong {
    let mut json = valid();
    *json.pointer_mut(place).expect("a place in the file") = value;
    load(&json).expect_err("is malformed")
}

#[test]
fn tokenizer_json_of_the_wrong_shape() {
    assert_eq!(load(&valid()).expect("loads").encode("ab<|end|>", false), [2, 3]);
    let message = |wrong: &Wrong| wrong.to_string();
    for bytes in [&b""[..], b"[", b"{", b"null", b"[]", b"{}", b"{\"model\": 5}", b"\xff\xfe", &b"[".repeat(100_000)] {
        let wrong = Tokenizer::from_json(bytes, None).expect_err("is malformed");
        assert!(matches!(wrong, Wrong::Json { .. }), "{wrong}");
        assert!(message(&wrong).starts_with("expected the JSON of a tokenizer, got "), "{wrong}");
    }
    for (place, value) in [
        ("/model/vocab", json!(["a", "b"])),
        ("/model/vocab", json!({"a": "0"})),
        ("/model/vocab", json!({"a": 1.5})),
        ("/model/vocab", json!({"a": -1})),
        ("/model/vocab", json!({"a": 4_294_967_296_u64})),
        ("/model/vocab/a", json!(1 << 20)),
        ("/model/merges", json!("a b")),
        ("/model/merges", json!([5])),
        ("/model/merges", json!([["a"]])),
        ("/model/merges", json!([["a", "b", "c"]])),
        ("/model/merges", json!([["a", null]])),
        ("/model/type", json!(7)),
        ("/added_tokens", json!({})),
        ("/added_tokens", json!([{"content": "x"}])),
        ("/added_tokens", json!([{"id": 3, "content": 4}])),
        ("/added_tokens", json!([{"id": 3, "content": "x", "special": "yes"}])),
    ] {
        let wrong = changed(place, value.clone());
        assert!(matches!(wrong, Wrong::Json { .. }), "{place} {value}: {wrong:?}");
    }
}

#[test]
fn tokenizer_json_with_wrong_values() {
    let unsupported = |place: &str, kind: &str| {
        let wrong = changed(place, json!({"type": kind}));
        assert!(matches!(&wrong, Wrong::Unsupported { got, .. } if got.contains(kind)), "{place} {kind}: {wrong:?}");
        assert!(wrong.is_unsupported());
    };
    for (place, kind) in [
        ("/model", "Unigram"),
        ("/model", "WordPiece"),
        ("/normalizer", "Precompiled"),
        ("/pre_tokenizer", "BertPreTokenizer"),
        ("/post_processor", "BertProcessing"),
        ("/decoder", "WordPiece"),
    ] {
        unsupported(place, kind);
    }
    let id = |token: i64| json!([{"id": token, "content": "<x>"}]);
    for got in [-1, 1 << 20, i64::MAX, i64::MIN] {
        let what = "added token \"<x>\"".to_owned();
        assert_eq!(changed("/added_tokens", id(got)), Wrong::Id { what, got, expected: 1 << 20 });
    }
    assert_eq!(changed("/added_tokens", id(2)), Wrong::DuplicateId { id: 2, first: "ab".into(), second: "<x>".into() });
    assert_eq!(
        changed("/added_tokens/0/content", json!("a")),
        Wrong::DuplicateToken { token: "a".into(), first: 0, second: 3 }
    );
    assert_eq!(
        changed("/model/vocab/b", json!(0)),
        Wrong::DuplicateId { id: 0, first: "a".into(), second: "b".into() }
    );
    assert_eq!(changed("/model/merges", json!(["a  b"])), Wrong::MergeShape { index: 0, got: "a  b".into() });
    assert_eq!(changed("/model/merges", json!(["ab"])), Wrong::MergeShape { index: 0, got: "ab".into() });
    assert_eq!(changed("/model/merges", json!([["a", "c"]])), Wrong::MergeToken { index: 0, got: "c".into() });
    assert_eq!(changed("/model/merges", json!(["a b", "b a"])), Wrong::MergeToken { index: 1, got: "ba".into() });
    let nothing = json!({"type": "BPE", "vocab": {}, "merges": []});
    let mut empty = valid();
    (empty["model"], empty["added_tokens"]) = (nothing, json!([]));
    assert_eq!(load(&empty).err(), Some(Wrong::Empty));

    let setting = |wrong: Wrong, expected_field: &str| match wrong {
        Wrong::Setting { field, .. } => assert_eq!(field, expected_field),
        other => panic!("{other:?}"),
    };
    setting(changed("/normalizer", json!({"kind": "NFC"})), "normalizer.type");
    setting(changed("/normalizer", json!({"type": "Prepend"})), "normalizer.prepend");
    setting(changed("/normalizer", json!({"type": "Sequence", "normalizers": 3})), "normalizer.normalizers");
    setting(changed("/pre_tokenizer/add_prefix_space", json!(1)), "pre_tokenizer.add_prefix_space");
    setting(
        changed("/pre_tokenizer", json!({"type": "Split", "behavior": "Isolated"})),
        "pre_tokenizer.pattern.String",
    );
    let mut dropout = valid();
    dropout["model"]["dropout"] = json!(0.1);
    setting(load(&dropout).expect_err("is random"), "model.dropout");
    let mut unknown = valid();
    unknown["model"]["unk_token"] = json!("<unk>");
    setting(load(&unknown).expect_err("names no token"), "model.unk_token");
    let config = json!({"eos_token": "</s>"});
    let bytes = serde_json::to_vec(&valid()).expect("JSON");
    setting(Tokenizer::from_json(&bytes, Some(&config)).expect_err("names no token"), "eos_token");
    let template = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [99]}}});
    let what = "post_processor.special_tokens.<s>.ids".to_owned();
    assert_eq!(changed("/post_processor", template), Wrong::Id { what, got: 99, expected: 4 });
    let mut characters = valid();
    (characters["pre_tokenizer"], characters["decoder"]) =
        (Value::Null, json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}));
    assert_eq!(load(&characters).err(), Some(Wrong::Fallback { got: 0 }));
}

#[test]
fn hostile_patterns() {
    let split = |pattern: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        changed("/pre_tokenizer", json!({"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}))
    };
    for pattern in [
        "(",
        "(?=a)b",
        r"(a)\1",
        "((a{1000}){1000}){1000}",
        r"(\p{L}{500}){500}",
        &"(".repeat(1000),
        &format!("{}a{}", "(".repeat(200), ")".repeat(200)),
        "[z-a]",
        "(?P<n>a)(?P<n>b)",
    ] {
        let wrong = split(pattern);
        assert!(matches!(wrong, Wrong::Pattern { .. }), "{pattern}: {wrong:?}");
    }
    let long = "a".repeat(5000);
    let expected = Wrong::TooLarge { what: "split pattern", unit: "bytes", got: 5000, expected: 4096 };
    assert_eq!(split(&long), expected);
}

#[test]
fn large_sections() {
    let deep = (0..20).fold(json!({"type": "NFC"}), |inner, _| json!({"type": "Sequence", "normalizers": [inner]}));
    assert!(matches!(changed("/normalizer", deep), Wrong::Unsupported { field: "normalizer", .. }));
    let wide = json!({"type": "Sequence", "normalizers": vec![json!({"type": "NFC"}); 17]});
    let expected = Wrong::TooLarge { what: "normalizer", unit: "steps", got: 17, expected: 16 };
    assert_eq!(changed("/normalizer", wide), expected);
    let huge = json!({"type": "NFC", "padding": "x".repeat(70_000)});
    assert!(matches!(changed("/normalizer", huge), Wrong::TooLarge { what: "normalizer", unit: "bytes", .. }));
    let many: Vec<Value> = (0..65_537).map(|id| json!({"id": id + 3, "content": format!("<{id}>")})).collect();
    let expected = Wrong::TooLarge { what: "added tokens", unit: "tokens", got: 65_537, expected: 65_536 };
    assert_eq!(changed("/added_tokens", Value::Array(many)), expected);
}

#[test]
fn any_prefix_of_a_tokenizer_fails_or_loads() {
    let fixture = fixture("vocabularies.json");
    let bytes = serde_json::to_vec(&byte_level_json(&fixture, &fixture["byte_level"]["cuts"][3])).expect("JSON");
    assert!(Tokenizer::from_json(&bytes, None).is_ok());
    for end in (0..bytes.len()).step_by(97) {
        assert!(Tokenizer::from_json(&bytes[..end], None).is_err());
    }
}
