//! Ids equal those of the libraries that tokenizers come from, on small vocabularies that are committed
//! (`fixtures/vocabularies.py`), and the published vectors of llama.cpp on real ones where those are at hand.

use crate::shared::{data, fixture};
use farthing::load::text::Text;
use farthing::load::{Tokenizer, Vocabulary};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

pub(crate) fn vocabulary(value: &Value) -> Vocabulary {
    serde_json::from_value(value.clone()).expect("a vocabulary")
}

pub(crate) fn ids(value: &Value) -> Option<Vec<u32>> {
    Some(value.as_array()?.iter().map(|id| id.as_u64().expect("an id") as u32).collect())
}

fn texts(fixture: &Value) -> Vec<String> {
    serde_json::from_value(fixture["texts"].clone()).expect("texts")
}

/// The fixture's byte-level vocabulary with one way to cut text.
fn byte_level(fixture: &Value, cut: &Value) -> Tokenizer {
    let mut vocabulary = vocabulary(&fixture["byte_level"]["vocabulary"]);
    vocabulary.pre = cut["pre"].as_str().expect("a name").into();
    Tokenizer::from_vocabulary(vocabulary).expect("loads")
}

/// The same as `tokenizer.json`.
pub(crate) fn byte_level_json(fixture: &Value, cut: &Value) -> Value {
    let vocabulary = &fixture["byte_level"]["vocabulary"];
    let mut described = cut["json"].clone();
    let added = described["added_tokens"].as_array().expect("added tokens").len();
    let tokens = vocabulary["tokens"].as_array().expect("tokens");
    let vocab = tokens[..tokens.len() - added].iter().enumerate();
    let vocab = vocab.map(|(id, token)| (token.as_str().expect("a token").to_owned(), json!(id)));
    described["model"]["vocab"] = Value::Object(vocab.collect());
    described["model"]["merges"] = vocabulary["merges"].clone();
    described
}

#[test]
fn byte_level_equals_the_tokenizers_library() {
    let fixture = fixture("vocabularies.json");
    for cut in fixture["byte_level"]["cuts"].as_array().expect("cuts") {
        let from_lists = byte_level(&fixture, cut);
        let bytes = serde_json::to_vec(&byte_level_json(&fixture, cut)).expect("JSON");
        let from_json = Tokenizer::from_json(&bytes, None).expect("loads");
        for (text, expected) in texts(&fixture).iter().zip(cut["ids"].as_array().expect("ids")) {
            let expected = ids(expected).expect("ids");
            assert_eq!(from_lists.encode(text, false), expected, "{}: {text:?}", cut["pre"]);
            assert_eq!(from_json.encode(text, false), expected, "{} as JSON: {text:?}", cut["pre"]);
            assert_eq!(from_json.decode(&expected, false), *text);
        }
    }
}

#[test]
fn sentence_piece_equals_its_library() {
    let fixture = fixture("vocabularies.json");
    let mut compared = 0;
    for entry in fixture["sentence_piece"].as_array().expect("vocabularies") {
        let tokenizer = Tokenizer::from_vocabulary(vocabulary(&entry["vocabulary"])).expect("loads");
        for (text, expected) in texts(&fixture).iter().zip(entry["ids"].as_array().expect("ids")) {
            let Some(expected) = ids(expected) else { continue };
            compared += 1;
            assert_eq!(tokenizer.encode(text, false), expected, "{}: {text:?}", entry["name"]);
            // `▁` and the blank are one to SentencePiece.
            assert_eq!(tokenizer.decode(&expected, false), text.replace('▁', " "), "{}", entry["name"]);
        }
    }
    assert!(compared > 100, "{compared}");
}

#[test]
fn roles() {
    let fixture = fixture("vocabularies.json");
    let cuts = &fixture["byte_level"]["cuts"];
    let gpt2 = byte_level(&fixture, &cuts[0]);
    let (bos, eos) = (gpt2.bos().expect("bos"), gpt2.eos_ids()[0]);
    assert_eq!(gpt2.id_to_token(bos), Some("<|endoftext|>"));
    assert_eq!(gpt2.token_to_id("<|im_end|>"), Some(eos));
    assert_eq!(gpt2.eos_ids(), [eos, bos], "the named ends follow the declared one");
    assert!(gpt2.is_special(eos) && !gpt2.is_special(0));
    assert_eq!(gpt2.encode("a", true), gpt2.encode("a", false), "gpt-2 adds nothing");
    assert_eq!(gpt2.decode(&[bos, 0, eos], true), "!");
    assert_eq!(gpt2.decode(&[bos, 0, eos], false), "<|endoftext|>!<|im_end|>");
    assert_eq!(gpt2.vocab_size(), fixture["byte_level"]["vocabulary"]["tokens"].as_array().expect("tokens").len());
    assert_eq!((gpt2.id_to_token(9999), gpt2.token_to_id("no such token")), (None, None));
    assert_eq!(gpt2.decode(&[9999], true), "");

    let llama = byte_level(&fixture, &cuts[3]);
    assert_eq!(llama.encode("a", true), [vec![bos], llama.encode("a", false)].concat(), "llama-bpe begins texts");

    let piece = vocabulary(&fixture["sentence_piece"][0]["vocabulary"]);
    let with = |add_bos, add_eos| {
        let vocabulary = Vocabulary { add_bos, add_eos, ..piece.clone() };
        Tokenizer::from_vocabulary(vocabulary).expect("loads").affixes().0.len()
    };
    assert_eq!([with(None, None), with(Some(false), None), with(Some(true), None)], [1, 0, 1]);
    let both = Vocabulary { add_eos: Some(true), ..piece.clone() };
    assert_eq!(Tokenizer::from_vocabulary(both).expect("loads").encode("", true), [1, 2]);

    let mut tokenizer = Tokenizer::from_vocabulary(piece).expect("loads");
    tokenizer.set_eos_ids(&[2, 5]).expect("in the vocabulary");
    assert_eq!(tokenizer.eos_ids(), [2, 5]);
    assert!(tokenizer.set_eos_ids(&[1_000_000]).is_err());
    assert_eq!(tokenizer.eos_ids(), [2, 5]);
}

#[test]
fn configuration_of_tokenizer_json() {
    let fixture = fixture("vocabularies.json");
    let bytes = serde_json::to_vec(&byte_level_json(&fixture, &fixture["byte_level"]["cuts"][2])).expect("JSON");
    let load = |config: Value| Tokenizer::from_json(&bytes, Some(&config)).expect("loads");
    let plain = load(json!({"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": null}));
    let (bos, eos) = (plain.bos().expect("bos"), plain.eos_ids()[0]);
    assert_eq!(plain.id_to_token(eos), Some("<|im_end|>"));
    assert_eq!(plain.affixes(), (&[][..], &[][..]));
    let adding = load(json!({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": true}));
    assert_eq!(adding.affixes(), (&[bos][..], &[][..]));
    let both = load(
        json!({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": true, "add_eos_token": true}),
    );
    assert_eq!(both.affixes(), (&[bos][..], &[eos][..]));
}

#[test]
fn merges_go_leftmost_first() {
    let tokens = ["a", "aa", "b", "ab", "aab"].map(String::from).to_vec();
    let tokenizer = |merges: &[&str]| {
        let merges = Some(merges.iter().map(ToString::to_string).collect());
        let vocabulary = Vocabulary {
            model: "gpt2".into(),
            pre: "gpt-2".into(),
            tokens: tokens.clone(),
            merges,
            ..Vocabulary::default()
        };
        Tokenizer::from_vocabulary(vocabulary).expect("loads")
    };
    assert_eq!(tokenizer(&["a a", "a b"]).encode("aaab", false), [1, 3]);
    assert_eq!(tokenizer(&["a b", "a a"]).encode("aaab", false), [1, 3]);
    assert_eq!(tokenizer(&["a b", "a ab"]).encode("aaab", false), [0, 4]);
    assert_eq!(tokenizer(&["a a", "aa b"]).encode("aaaab", false), [1, 4]);
}

#[test]
fn scores_decide_and_the_left_wins_ties() {
    let tokens = ["<unk>", "a", "b", "c", "ab", "bc", "abc"].map(String::from).to_vec();
    let tokenizer = |ab: f32, bc: f32| {
        let scores = Some(vec![0.0, -9.0, -9.0, -9.0, ab, bc, -20.0]);
        let vocabulary = Vocabulary {
            model: "llama".into(),
            tokens: tokens.clone(),
            types: Some(vec![2, 1, 1, 1, 1, 1, 5]),
            scores,
            unk: Some(0),
            bos: Some(0),
            eos: Some(0),
            add_bos: Some(false),
            add_space_prefix: Some(false),
            ..Vocabulary::default()
        };
        Tokenizer::from_vocabulary(vocabulary).expect("loads")
    };
    // Either order ends in the row without text, as it does for llama.cpp.
    assert_eq!(tokenizer(-1.0, -2.0).encode("abc", false), [6]);
    assert_eq!(tokenizer(-1.0, -2.0).encode("abbc", false), [4, 5]);
    assert_eq!(tokenizer(-2.0, -2.0).encode("abcbc", false), [6, 5]);
    assert_eq!(tokenizer(-1.0, -2.0).encode("axyb", false), [1, 0, 0, 2], "no fusing of unknown characters");
}

#[test]
fn long_texts_take_linear_time() {
    let fixture = fixture("vocabularies.json");
    let piece = Tokenizer::from_vocabulary(vocabulary(&fixture["sentence_piece"][0]["vocabulary"])).expect("loads");
    for text in ["a".repeat(1 << 18), " ".repeat(1 << 18), "\n \n".repeat(80_000), format!("{}x", " ".repeat(1 << 18))]
    {
        assert_eq!(piece.decode(&piece.encode(&text, false), false), text);
        for cut in fixture["byte_level"]["cuts"].as_array().expect("cuts") {
            let tokenizer = byte_level(&fixture, cut);
            assert_eq!(tokenizer.decode(&tokenizer.encode(&text, false), false), text);
        }
    }
}

/// Texts and ids of the published vectors.
fn vectors(name: &str) -> Option<Vec<(String, Vec<u32>)>> {
    let directory = data("tokenizers/vectors")?;
    let read = |extension: &str| {
        let path = directory.join(format!("ggml-vocab-{name}.gguf.{extension}"));
        std::fs::read_to_string(path).expect("vectors are UTF-8")
    };
    let (input, output) = (read("inp"), read("out"));
    let texts = input.split("\n__ggml_vocab_test__\n");
    let ids = output.lines().map(|line| line.split_whitespace().map(|id| id.parse().expect("an id")).collect());
    Some(texts.map(str::to_owned).zip(ids).collect())
}

#[test]
fn shared_tokenizer_json_equals_the_vectors() {
    for (directory, name) in [("gpt2", "gpt-2"), ("qwen2.5", "qwen2")] {
        let (Some(path), Some(vectors)) = (data(&format!("tokenizers/{directory}/tokenizer.json")), vectors(name))
        else {
            continue;
        };
        let bytes = std::fs::read(path).expect("readable");
        let tokenizer = Tokenizer::from_json(&bytes, None).expect("loads");
        assert!(vectors.len() >= 45, "{name}: {}", vectors.len());
        for (text, expected) in vectors {
            assert_eq!(tokenizer.encode(&text, false), expected, "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&expected, false), text);
        }
    }
}

/// Directories that may hold llama.cpp's vocabulary files.
fn vocabulary_file(name: &str) -> Option<PathBuf> {
    let models = std::env::var_os("FARTHING_VOCABULARIES")?;
    Some(Path::new(&models).join(format!("ggml-vocab-{name}.gguf"))).filter(|path| path.exists())
}

#[test]
fn vocabulary_files_equal_the_vectors() {
    for name in ["gpt-2", "qwen2", "llama-bpe", "llama-spm", "qwen35"] {
        let (Some(path), Some(vectors)) = (vocabulary_file(name), vectors(name)) else { continue };
        let checkpoint = farthing::load::Checkpoint::open(&path).expect("opens");
        let tokenizer = Text::of(&checkpoint).expect("loads").tokenizer.expect("a tokenizer");
        assert!(vectors.len() >= 45, "{name}: {}", vectors.len());
        for (text, expected) in vectors {
            assert_eq!(tokenizer.encode(&text, false), expected, "{name}: {text:?}");
        }
    }
}

#[test]
fn stories260k() {
    let Some(directory) = data("stories260k-hf") else { return };
    let bytes = std::fs::read(directory.join("tokenizer.json")).expect("readable");
    let config = std::fs::read(directory.join("tokenizer_config.json")).expect("readable");
    let config = serde_json::from_slice(&config).expect("JSON");
    let tokenizer = Tokenizer::from_json(&bytes, Some(&config)).expect("loads");
    assert_eq!(tokenizer.encode("Once upon a time", true), [1, 403, 407, 261, 378]);
    assert_eq!(tokenizer.decode(&[1, 403, 407, 261, 378], true), "Once upon a time");
    assert_eq!((tokenizer.bos(), tokenizer.eos_ids()), (Some(1), &[2][..]));
    for text in texts(&fixture("vocabularies.json")) {
        if text.contains('<') || text.contains('▁') {
            continue;
        }
        assert_eq!(tokenizer.decode(&tokenizer.encode(&text, false), false), text);
    }
}
