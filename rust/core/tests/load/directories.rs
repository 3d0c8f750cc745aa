//! Checkpoints of several files: directories with shards, files beside a configuration, split GGUF.

use std::path::PathBuf;

use farthing::load::{Checkpoint, FormatError, GgufError, IndexError, Metadata, Rows};

use crate::support::{Directory, F32, Gguf, I32_VALUE, STRING_VALUE, gguf_sample, ramp, string, vectors};

const INDEX: &str = "model.safetensors.index.json";

/// An index and two shards of two vectors each.
fn sharded(weight_map: &str) -> Directory {
    Directory::new()
        .file("config.json", r#"{"model_type":"llama"}"#)
        .file(INDEX, format!(r#"{{"metadata":{{"total_size":1}},"weight_map":{weight_map}}}"#))
        .file("model-00001-of-00002.safetensors", vectors(&[("a", 2), ("b", 3)]))
        .file("model-00002-of-00002.safetensors", vectors(&[("c", 1), ("d", 4)]))
}

/// Part `number` of `count`, named `m`, with one tensor.
fn part(number: u16, count: u16, tensor: &str) -> Vec<u8> {
    let mut gguf = Gguf::new().key("split.no", 2, &number.to_le_bytes()).key("split.count", 2, &count.to_le_bytes());
    if number == 0 {
        gguf = gguf.key("general.architecture", STRING_VALUE, &string("llama"));
        gguf = gguf.key("split.tensors.count", I32_VALUE, &i32::from(count).to_le_bytes());
    }
    gguf.tensor(tensor, &[u64::from(number) + 1], F32, &ramp(4 * (usize::from(number) + 1))).bytes()
}

fn part_name(number: usize) -> String {
    format!("m-{number:05}-of-00003.gguf")
}

fn split() -> Directory {
    ["a", "b", "c"].iter().enumerate().fold(Directory::new(), |directory, (number, tensor)| {
        directory.file(&part_name(number + 1), part(number as u16, 3, tensor))
    })
}

#[test]
fn shards_open_together() {
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let directory = sharded(&format!(r#"{{"c":"{two}","a":"{one}","b":"{one}","d":"{two}"}}"#))
        .file("generation_config.json", r#"{"eos_token_id":2}"#);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let mut names: Vec<&str> = checkpoint.tensors().map(|tensor| tensor.name()).collect();
    names.sort_unstable();
    assert_eq!(names, ["a", "b", "c", "d"]);
    assert_eq!(checkpoint.require("d", &[4]).unwrap().shape(), [4]);
    let Metadata::HuggingFace(metadata) = &checkpoint.metadata else { panic!("a directory") };
    assert_eq!(metadata.config["model_type"], "llama");
    assert_eq!(metadata.generation_config.as_ref().unwrap()["eos_token_id"], 2);
    assert_eq!(metadata.tokenizer_config, None);
    assert_eq!(metadata.directory, directory.path());
}

#[test]
fn split_gguf_opens_from_any_part() {
    let directory = split();
    for opened in 1..=3 {
        let checkpoint = Checkpoint::open(&directory.path().join(part_name(opened))).unwrap();
        for (name, size) in [("a", 1), ("b", 2), ("c", 3)] {
            let mut row = vec![0.0; size];
            checkpoint.require(name, &[size]).unwrap().row(0, &mut row).unwrap();
            assert_eq!(row[0], f32::from_le_bytes([0, 1, 2, 3]));
        }
        let Metadata::Gguf(table) = &checkpoint.metadata else { panic!("a GGUF file") };
        assert_eq!(table.require::<&str>("general.architecture").unwrap(), "llama");
    }
}

#[test]
fn a_file_opens_beside_its_configuration() {
    let directory = Directory::new().file("config.json", "{}").file("w.safetensors", vectors(&[("a", 2)]));
    assert_eq!(Checkpoint::open(&directory.path().join("w.safetensors")).unwrap().tensors().len(), 1);
    let directory = directory.file("blob", gguf_sample());
    assert_eq!(Checkpoint::open(&directory.path().join("blob")).unwrap().tensors().len(), 5);
}

#[test]
fn missing_tensors_and_other_shapes_are_named() {
    let checkpoint = Checkpoint::from_bytes(gguf_sample()).unwrap();
    assert!(checkpoint.require("token_embd.weight", &[3, 32]).is_ok());
    let error = checkpoint.require("token_embd.weight", &[32, 3]).unwrap_err();
    assert_eq!(error.to_string(), "tensor token_embd.weight: expected shape [32, 3], got [3, 32]");
    let error = checkpoint.require("rope.weight", &[4]).unwrap_err();
    assert_eq!(error.to_string(), "tensor rope.weight: expected shape [4], got no such tensor");
}

#[test]
fn values_of_another_type_are_named() {
    let checkpoint = Checkpoint::from_bytes(gguf_sample()).unwrap();
    let Metadata::Gguf(table) = &checkpoint.metadata else { panic!("a GGUF file") };
    let message = |error: FormatError| error.to_string();
    assert_eq!(table.read::<u32>("absent").unwrap(), None);
    assert_eq!(
        message(table.require::<u32>("absent").unwrap_err()),
        "configuration key absent: expected an integer from 0 to 2^32 - 1, got nothing"
    );
    assert_eq!(
        message(table.require::<usize>("general.architecture").unwrap_err()),
        "configuration key general.architecture: expected an integer from 0 to the size of memory, got the string \"llama\""
    );
    assert_eq!(
        message(table.require::<&str>("llama.block_count").unwrap_err()),
        "configuration key llama.block_count: expected a string of UTF-8, got the u32 2"
    );
    assert_eq!(
        message(table.require::<Vec<&str>>("tokenizer.ggml.scores").unwrap_err()),
        "configuration key tokenizer.ggml.scores: expected an array of UTF-8 strings, got an array of 3 elements of type f32"
    );
}

#[test]
fn types_that_cannot_be_read_are_named() {
    let checkpoint = Checkpoint::from_bytes(gguf_sample()).unwrap();
    let tensor = checkpoint.tensor("other.weight").unwrap();
    let error = tensor.row(0, &mut [0.0; 256]).unwrap_err();
    assert!(error.is_unsupported());
    assert_eq!(tensor.natural_format().unwrap_err(), error);
    assert_eq!(
        error.to_string(),
        "tensor other.weight: expected one of F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4, TQ1_0, TQ2_0, got Q2_K"
    );
}

/// Opens `file` in the directory, or the directory itself, and returns the error.
fn refused(name: &str, directory: &Directory, file: &str) -> FormatError {
    let path = if file.is_empty() { PathBuf::from(directory.path()) } else { directory.path().join(file) };
    let error = Checkpoint::open(&path).expect_err(name);
    let message = error.to_string();
    assert!(message.contains("expected") && message.contains("got"), "{name}: {message}");
    error
}

#[test]
fn indices_that_disagree_with_their_shards_are_errors() {
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let misplaced = |tensor: &str, got: &str, expected: &str| IndexError::Misplaced {
        tensor: tensor.to_string(),
        got: got.to_string(),
        expected: expected.to_string(),
    };
    let shard_name = |got: &str| IndexError::ShardName { got: got.to_string() };
    let map = |a: &str, b: &str, rest: &str| format!(r#"{{"a":"{a}","b":"{b}","c":"{two}","d":"{two}"{rest}}}"#);
    let cases = [
        ("in the other shard", map(one, two, ""), misplaced("b", one, two)),
        (
            "not mapped",
            format!(r#"{{"a":"{one}","c":"{two}","d":"{two}"}}"#),
            misplaced("b", one, "no shard, as weight_map does not name it"),
        ),
        ("in no shard", map(one, one, &format!(r#","e":"{two}""#)), misplaced("e", "no such tensor there", two)),
        ("mapped twice", map(one, one, &format!(r#","a":"{one}""#)), IndexError::Duplicate { tensor: "a".to_string() }),
        (
            "no such shard",
            map(one, "x.safetensors", ""),
            IndexError::MissingShard { shard: "x.safetensors".to_string() },
        ),
        ("upwards", map(one, "../x.safetensors", ""), shard_name("../x.safetensors")),
        ("absolute", map(one, "/x.safetensors", ""), shard_name("/x.safetensors")),
        ("downwards", map(one, "a/x.safetensors", ""), shard_name("a/x.safetensors")),
        ("backwards", map(one, r"..\\x.safetensors", ""), shard_name(r"..\x.safetensors")),
        ("a drive", map(one, "C:x.safetensors", ""), shard_name("C:x.safetensors")),
        ("a pickle", map(one, "pytorch_model.bin", ""), shard_name("pytorch_model.bin")),
        ("nothing", map(one, "", ""), shard_name("")),
    ];
    for (name, weight_map, expected) in cases {
        let directory = sharded(&weight_map);
        let expected = FormatError::Index { file: directory.name(INDEX), error: expected };
        assert_eq!(refused(name, &directory, ""), expected, "{name}");
    }
    for weight_map in ["[]", "{", r#"{"a":1}"#, "null"] {
        let error = refused(weight_map, &sharded(weight_map), "");
        assert!(matches!(error, FormatError::Index { error: IndexError::Json { .. }, .. }), "{error}");
    }
}

#[test]
fn indices_without_end_are_errors() {
    let map = |count: usize, entry: &dyn Fn(usize) -> String| {
        format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","))
    };
    let size = |unit, got, expected| IndexError::Size { unit, got, expected };
    let cases = [
        (map(524_289, &|i| format!(r#""{i}":"a.safetensors""#)), size("tensors", 524_289, 524_288)),
        (map(4_098, &|i| format!(r#""{i}":"{i}.safetensors""#)), size("shards", 4_097, 4_096)),
        (format!("{{{}}}", " ".repeat(32 << 20)), size("bytes", (32 << 20) + 45, 32 << 20)),
        (format!(r#"{{"{}":""}}"#, "n".repeat((8 << 20) + 1)), size("bytes of a string", (8 << 20) + 1, 8 << 20)),
    ];
    for (weight_map, expected) in cases {
        let directory = sharded(&weight_map);
        let FormatError::Index { error, .. } = refused(expected.to_string().as_str(), &directory, "") else {
            panic!("an index: {expected}")
        };
        assert_eq!(error, expected);
    }
}

#[test]
fn the_same_tensor_in_two_shards_is_an_error() {
    let one = "model-00001-of-00002.safetensors";
    let directory = sharded(&format!(r#"{{"a":"{one}","b":"{one}","d":"model-00002-of-00002.safetensors"}}"#))
        .file("model-00002-of-00002.safetensors", vectors(&[("a", 2), ("d", 4)]));
    let FormatError::Index { error, .. } = refused("twice", &directory, "") else { panic!("an index") };
    let (tensor, got) = ("a".to_string(), "model-00002-of-00002.safetensors".to_string());
    assert_eq!(error, IndexError::Misplaced { tensor, got, expected: one.to_string() });
}

#[test]
fn directories_without_weights_say_what_would_work() {
    let new = Directory::new;
    let no_weights = |directory: &Directory, got: &str| FormatError::NoWeights {
        directory: directory.path().display().to_string(),
        got: got.to_string(),
    };
    let empty = new();
    assert_eq!(refused("empty", &empty, ""), no_weights(&empty, "an empty directory"));
    let other = new().file("x.gguf", gguf_sample()).file("README.md", "");
    assert_eq!(refused("other files", &other, ""), no_weights(&other, "README.md, x.gguf"));
    let pickled = new().file("config.json", "{}").file("pytorch_model.bin", "").file("a.pt", "");
    let error = refused("pickled", &pickled, "");
    assert!(error.is_unsupported());
    assert!(error.to_string().contains("safe_serialization") && error.to_string().contains("a.pt, pytorch_model.bin"));
    for name in ["w.bin", "w.pt", "w.pth", "w.ckpt", "w.PT"] {
        let error = refused(name, &new().file(name, gguf_sample()), name);
        assert!(matches!(error, FormatError::Pickle { .. }), "{name}: {error}");
    }
    for bytes in [&b"PK\x03\x04 archive"[..], b"\x80\x02}q\x00."] {
        assert!(matches!(refused("magic", &new().file("w", bytes), "w"), FormatError::Pickle { .. }));
    }
}

#[test]
fn files_that_are_none_are_errors() {
    let new = Directory::new;
    assert!(matches!(refused("absent", &new(), "absent.gguf"), FormatError::Io { .. }));
    let directory = new().file("config.json", "{}");
    std::fs::create_dir(directory.path().join("model.safetensors")).unwrap();
    let expected = FormatError::NotAFile { file: directory.name("model.safetensors"), got: "a directory" };
    assert_eq!(refused("directory", &directory, ""), expected);
    #[cfg(target_os = "linux")]
    assert!(matches!(
        Checkpoint::open("/dev/zero".as_ref()).unwrap_err(),
        FormatError::NotAFile { got: "a device or a pipe", .. }
    ));
    let text = new().file("notes.txt", "hello");
    let expected = FormatError::UnknownFile { file: text.name("notes.txt"), got: b"hello".to_vec() };
    assert_eq!(refused("text", &text, "notes.txt"), expected);
    let fake = new().file("w.gguf", "hello");
    let expected = FormatError::Gguf { file: fake.name("w.gguf"), error: GgufError::Magic { got: *b"hell" } };
    assert_eq!(refused("text with a model's name", &fake, "w.gguf"), expected);
}

#[test]
fn configurations_that_are_none_are_errors() {
    let with =
        |config: &str| Directory::new().file("model.safetensors", vectors(&[("a", 1)])).file("config.json", config);
    let none = Directory::new().file("model.safetensors", vectors(&[("a", 1)]));
    let expected =
        FormatError::MissingFile { directory: none.path().display().to_string(), expected: "config.json".to_string() };
    assert_eq!(refused("absent", &none, ""), expected);
    for config in ["", "{", "[1]", "\"a\"", "{\"a\":NaN}", "\u{feff}{}"] {
        assert!(matches!(refused(config, &with(config), ""), FormatError::Json { .. }), "{config}");
    }
    let many = with(&format!(r#"{{"a":[{}0]}}"#, "0,".repeat(120_000)));
    let (file, got, expected) = (many.name("config.json"), 120_002, 120_000);
    assert_eq!(refused("many values", &many, ""), FormatError::JsonSize { file, unit: "values", got, expected });
    let large = with(&format!("{{{}}}", " ".repeat(8 << 20)));
    let (file, got, expected) = (large.name("config.json"), (8 << 20) + 2, 8 << 20);
    assert_eq!(refused("large", &large, ""), FormatError::JsonSize { file, unit: "bytes", got, expected });
}

#[test]
fn parts_that_disagree_are_errors() {
    let gguf =
        |directory: &Directory, number, error| FormatError::Gguf { file: directory.name(&part_name(number)), error };
    let first = part_name(1);

    let alone = Directory::new().file("m.gguf", part(0, 3, "a"));
    let error = GgufError::SplitName { count: 3, part: 1, got: "m.gguf".to_string() };
    assert_eq!(refused("name", &alone, "m.gguf"), FormatError::Gguf { file: alone.name("m.gguf"), error });

    let renamed = split().file(&part_name(1), part(1, 3, "a"));
    let error = GgufError::SplitName { count: 3, part: 2, got: first.clone() };
    assert_eq!(refused("number", &renamed, &first), gguf(&renamed, 1, error));

    let missing = Directory::new().file(&first, part(0, 3, "a")).file(&part_name(2), part(1, 3, "b"));
    let directory = missing.path().display().to_string();
    assert_eq!(refused("missing", &missing, &first), FormatError::MissingFile { directory, expected: part_name(3) });

    let swapped = split().file(&part_name(2), part(2, 3, "b"));
    let error = GgufError::Split { key: "split.no", got: 2, expected: 1 };
    assert_eq!(refused("swapped", &swapped, &first), gguf(&swapped, 2, error));

    let other = split().file(&part_name(3), part(2, 4, "c"));
    let error = GgufError::Split { key: "split.count", got: 4, expected: 3 };
    assert_eq!(refused("another count", &other, &first), gguf(&other, 3, error));

    let twice = split().file(&part_name(3), part(2, 3, "a"));
    let error = GgufError::DuplicateTensor { tensor: "a".to_string() };
    assert_eq!(refused("twice", &twice, &first), gguf(&twice, 3, error));

    let plain = Gguf::new().key("split.no", 2, &[2, 0]).key("split.count", 2, &[3, 0]).bytes();
    let fewer = split().file(&part_name(3), plain);
    let error = GgufError::Split { key: "split.tensors.count", got: 2, expected: 3 };
    assert_eq!(refused("fewer tensors", &fewer, &first), gguf(&fewer, 1, error));

    let unnumbered = split().file(&part_name(2), gguf_sample());
    let error = FormatError::MissingKey {
        key: "split.count".to_string(),
        expected: "an integer from 0 to 2^64 - 1".to_string(),
    };
    assert_eq!(refused("a whole file", &unnumbered, &first), error);
}
