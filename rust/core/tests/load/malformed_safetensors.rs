//! Malformed safetensors files, one for each way to be wrong.

use farthing::load::{Checkpoint, FormatError, SafetensorsError};

use crate::support::{header, ramp, safetensors, safetensors_sample, string, vectors};

/// One tensor `t` with these fields and 16 bytes of data.
fn tensor(fields: &str) -> Vec<u8> {
    safetensors(format!(r#"{{"t":{{{fields}}}}}"#), &ramp(16))
}

fn cases() -> Vec<(&'static str, Vec<u8>, SafetensorsError)> {
    let t = || String::from("t");
    let declared = |length: u64, rest: &[u8]| [&length.to_le_bytes()[..], rest].concat();
    let field = |dtype: &str, shape: &str, end: u64| {
        tensor(&format!(r#""dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]"#))
    };
    let twice = r#"{"t":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"t":{"dtype":"F32","shape":[0],"data_offsets":[16,16]}}"#;
    let two = |a: &str, b: &str| {
        let entry =
            |name, offsets: &str| format!(r#""{name}":{{"dtype":"U8","shape":[8],"data_offsets":[{offsets}]}}"#);
        safetensors(format!("{{{},{}}}", entry("a", a), entry("t", b)), &ramp(16))
    };
    let name = "n".repeat(1025);
    let notes: Vec<String> = (0..=65_536).map(|i| format!(r#""{i}":"""#)).collect();
    let crowd: Vec<String> =
        (0..=131_072).map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)).collect();
    let (many, dimension) = (1_u64 << 32, 1_u64 << 33);
    vec![
        (
            "header larger than the format allows",
            declared(100_000_001, b"{}"),
            SafetensorsError::HeaderTooLarge { got: 100_000_001, expected: 100_000_000 },
        ),
        (
            "header of 2^64 - 1 bytes",
            declared(u64::MAX, b"{}"),
            SafetensorsError::HeaderTooLarge { got: u64::MAX, expected: 100_000_000 },
        ),
        ("header past the end", declared(3, b"{}"), SafetensorsError::HeaderOutside { got: 3, expected: 2 }),
        ("empty header", declared(0, b"{}"), SafetensorsError::HeaderStart { got: None }),
        ("string too long", safetensors(format!(r#"{{"{}":0}}"#, "n".repeat((8 << 20) + 1)), &[]), {
            SafetensorsError::StringLength { got: (8 << 20) + 1, expected: 8 << 20 }
        }),
        ("tensor twice", safetensors(twice, &ramp(16)), SafetensorsError::Duplicate { name: t() }),
        (
            "metadata twice",
            safetensors(r#"{"__metadata__":{},"__metadata__":{}}"#, &[]),
            SafetensorsError::Duplicate { name: "__metadata__".to_string() },
        ),
        (
            "metadata key twice",
            safetensors(r#"{"__metadata__":{"t":"","t":""}}"#, &[]),
            SafetensorsError::Duplicate { name: t() },
        ),
        (
            "metadata without end",
            safetensors(format!(r#"{{"__metadata__":{{{}}}}}"#, notes.join(",")), &[]),
            SafetensorsError::Count { unit: "metadata entries", expected: 65_536 },
        ),
        (
            "more tensors than any model",
            safetensors(format!("{{{}}}", crowd.join(",")), &[]),
            SafetensorsError::Count { unit: "tensors", expected: 131_072 },
        ),
        (
            "name too long",
            vectors(&[(&name, 4)]),
            SafetensorsError::NameLength { tensor: name[..64].to_string(), got: 1025, expected: 1024 },
        ),
        (
            "nine dimensions",
            field("F32", "[4,1,1,1,1,1,1,1,1]", 16),
            SafetensorsError::Dimensions { tensor: t(), expected: 8 },
        ),
        (
            "unknown dtype",
            field("F33", "[4]", 16),
            SafetensorsError::TensorType { tensor: t(), got: "F33".to_string() },
        ),
        (
            "elements overflow",
            field("F32", "[4294967296,8589934592]", 16),
            SafetensorsError::Overflow { tensor: t(), got: vec![many, dimension] },
        ),
        (
            "bits overflow",
            field("F64", "[4294967296,134217728]", 16),
            SafetensorsError::Overflow { tensor: t(), got: vec![many, 1 << 27] },
        ),
        ("half a byte", field("F4", "[3]", 16), SafetensorsError::PartialByte { tensor: t(), got: 12 }),
        (
            "offsets reversed",
            tensor(r#""dtype":"F32","shape":[4],"data_offsets":[16,0]"#),
            SafetensorsError::OffsetOrder { tensor: t(), start: 16, got: 0 },
        ),
        (
            "size smaller than the shape",
            field("F32", "[5]", 16),
            SafetensorsError::Size { tensor: t(), got: 16, expected: 20 },
        ),
        (
            "size larger than the shape",
            field("F32", "[3]", 16),
            SafetensorsError::Size { tensor: t(), got: 16, expected: 12 },
        ),
        (
            "hole before the first tensor",
            two("1,9", "9,17"),
            SafetensorsError::NotContiguous { tensor: "a".to_string(), got: 1, expected: 0 },
        ),
        (
            "hole between tensors",
            two("0,8", "9,17"),
            SafetensorsError::NotContiguous { tensor: t(), got: 9, expected: 8 },
        ),
        ("overlap", two("0,8", "7,15"), SafetensorsError::NotContiguous { tensor: t(), got: 7, expected: 8 }),
        (
            "bytes behind the last tensor",
            safetensors(header(&[("t", 3)]), &ramp(16)),
            SafetensorsError::DataLength { got: 16, expected: 12 },
        ),
        (
            "last tensor cut off",
            safetensors(header(&[("t", 5)]), &ramp(16)),
            SafetensorsError::DataLength { got: 16, expected: 20 },
        ),
        (
            "offsets of 2^64 - 1",
            field("U8", "[18446744073709551615]", u64::MAX),
            SafetensorsError::Overflow { tensor: t(), got: vec![u64::MAX] },
        ),
        ("data without tensors", safetensors("{}", &[0]), SafetensorsError::DataLength { got: 1, expected: 0 }),
    ]
}

/// Headers that are no JSON or other JSON, with a part of the parser's message.
fn json_cases() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let field = |fields: &str| tensor(fields);
    vec![
        ("unclosed", safetensors("{", &[]), "EOF"),
        ("two objects", safetensors("{} {}", &[]), "trailing characters"),
        ("zero padding", safetensors("{}\0\0", &[]), "trailing characters"),
        ("not UTF-8", safetensors(b"{\"\xff\":0}", &[]), "invalid unicode"),
        ("tensor that is a number", safetensors(r#"{"t":3}"#, &[]), "expected an object of dtype"),
        ("metadata of numbers", safetensors(r#"{"__metadata__":{"a":1}}"#, &[]), "expected a string"),
        ("metadata that is a string", safetensors(r#"{"__metadata__":"a"}"#, &[]), "expected an object of strings"),
        ("no dtype", field(r#""shape":[4],"data_offsets":[0,16]"#), "missing field `dtype`"),
        ("no shape", field(r#""dtype":"F32","data_offsets":[0,16]"#), "missing field `shape`"),
        ("no offsets", field(r#""dtype":"F32","shape":[4]"#), "missing field `data_offsets`"),
        ("one offset", field(r#""dtype":"F32","shape":[4],"data_offsets":[0]"#), "invalid length 1"),
        ("three offsets", field(r#""dtype":"F32","shape":[4],"data_offsets":[0,16,16]"#), "trailing characters"),
        ("field twice", field(r#""dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]"#), "twice"),
        ("unknown field", field(r#""dtype":"F32","shape":[4],"data_offsets":[0,16],"x":0"#), "unknown field"),
        ("negative dimension", field(r#""dtype":"F32","shape":[-4],"data_offsets":[0,16]"#), "integer `-4`"),
        ("fractional dimension", field(r#""dtype":"F32","shape":[4.0],"data_offsets":[0,16]"#), "floating point"),
        ("dimension of 2^64", field(r#""dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,16]"#), "float"),
        ("dtype that is a number", field(r#""dtype":4,"shape":[4],"data_offsets":[0,16]"#), "expected a dtype"),
        ("deep nesting", safetensors(format!(r#"{{"t":{}}}"#, "[".repeat(100_000)), &[]), "expected an object"),
    ]
}

/// Every file of the tables, with its name.
pub(crate) fn all_cases() -> Vec<(&'static str, Vec<u8>)> {
    let typed = cases().into_iter().map(|(name, bytes, _)| (name, bytes));
    typed.chain(json_cases().into_iter().map(|(name, bytes, _)| (name, bytes))).collect()
}

fn open(name: &str, bytes: Vec<u8>) -> (SafetensorsError, String) {
    let error = Checkpoint::from_bytes(bytes).expect_err(name);
    let message = error.to_string();
    assert!(message.contains("expected") && message.contains("got"), "{name}: {message}");
    match error {
        FormatError::Safetensors { file, error } if file == "memory" => (error, message),
        other => panic!("{name}: {other}"),
    }
}

#[test]
fn each_malformed_file_has_its_error() {
    let cases = cases();
    assert!(cases.len() >= 13, "{}", cases.len());
    for (name, bytes, expected) in cases {
        assert_eq!(open(name, bytes).0, expected, "{name}");
    }
}

#[test]
fn each_malformed_header_has_its_message() {
    for (name, bytes, part) in json_cases() {
        let (error, message) = open(name, bytes);
        assert!(matches!(error, SafetensorsError::Json { .. }), "{name}: {error}");
        assert!(message.contains(part), "{name}: {message}");
    }
}

#[test]
fn files_too_short_or_of_another_start_are_told_by_their_name() {
    let cases = [
        (b"1234567".to_vec(), SafetensorsError::Truncated { got: 7 }),
        (Vec::new(), SafetensorsError::Truncated { got: 0 }),
        (string("[]"), SafetensorsError::HeaderStart { got: Some('[') }),
        (string(""), SafetensorsError::HeaderStart { got: None }),
    ];
    for (bytes, expected) in cases {
        let directory = crate::support::Directory::new().file("config.json", "{}").file("x.safetensors", bytes);
        let error = Checkpoint::open(&directory.path().join("x.safetensors")).unwrap_err();
        assert_eq!(error, FormatError::Safetensors { file: directory.name("x.safetensors"), error: expected });
        assert!(error.to_string().contains("expected") && error.to_string().contains("got"), "{error}");
    }
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = safetensors_sample();
    Checkpoint::from_bytes(bytes.clone()).unwrap();
    for length in 0..bytes.len() {
        Checkpoint::from_bytes(bytes[..length].to_vec()).expect_err("a prefix");
    }
}
