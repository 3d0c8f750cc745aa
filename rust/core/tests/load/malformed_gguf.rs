//! Malformed GGUF files, one for each way to be wrong. Upper-case names are those of llama.cpp's `tests/test-gguf.cpp`.

use farthing::load::{Checkpoint, FormatError, GgufError};

use crate::support::{
    ARRAY_VALUE, BOOL_VALUE, F32, Gguf, I8, I32_VALUE, I64, Q4_0, Q4K, STRING_VALUE, array, gguf_sample, nested, ramp,
    string,
};

pub(crate) type Case = (&'static str, Vec<u8>, GgufError);

fn header_cases() -> Vec<Case> {
    let version = |version: u32| Gguf { version: version.to_le_bytes(), ..Gguf::new() }.bytes();
    let counts = |tensor_count, key_count| Gguf { tensor_count, key_count, ..Gguf::new() };
    let mut crowded = counts(Some(65_537), None);
    crowded.data = vec![0; 65_537 * 24];
    let mut wordy = counts(None, Some(65_537));
    wordy.data = vec![0; 65_537 * 14];
    vec![
        ("HEADER_BAD_VERSION_0", version(0), GgufError::Version { got: 0 }),
        ("HEADER_BAD_VERSION_1", version(1), GgufError::Version { got: 1 }),
        ("HEADER_BAD_VERSION_FUTURE", version(4), GgufError::Version { got: 4 }),
        (
            "big endian",
            Gguf { version: 3_u32.to_be_bytes(), ..Gguf::new() }.bytes(),
            GgufError::BigEndian { got: [0, 0, 0, 3] },
        ),
        (
            "HEADER_BAD_N_TENSORS",
            counts(Some(u64::MAX), None).bytes(),
            GgufError::TensorCount { got: u64::MAX, expected: 0 },
        ),
        ("HEADER_BAD_N_KV", counts(None, Some(u64::MAX)).bytes(), GgufError::KeyCount { got: u64::MAX, expected: 0 }),
        ("more tensors than any model", crowded.bytes(), GgufError::TensorCount { got: 65_537, expected: 65_536 }),
        ("more keys than any model", wordy.bytes(), GgufError::KeyCount { got: 65_537, expected: 65_536 }),
        (
            "one tensor more than there are",
            Gguf { tensor_count: Some(1), ..Gguf::new() }.bytes(),
            GgufError::TensorCount { got: 1, expected: 0 },
        ),
        (
            "nothing but the magic",
            b"GGUF".to_vec(),
            GgufError::Truncated { at: 4, field: "the version", got: 0, expected: 4 },
        ),
        (
            "half a tensor count",
            version(3)[..12].to_vec(),
            GgufError::Truncated { at: 8, field: "the tensor count", got: 4, expected: 8 },
        ),
        (
            "no key count",
            version(3)[..16].to_vec(),
            GgufError::Truncated { at: 16, field: "the key count", got: 0, expected: 8 },
        ),
    ]
}

fn key_cases() -> Vec<Case> {
    let (key, long) = (String::from("k"), u64::MAX);
    let gguf = Gguf::new;
    let value = |kind, bytes: &[u8]| Gguf::new().key("k", kind, bytes).bytes();
    let raw = |bytes: &[u8]| Gguf::new().raw_key(bytes).bytes();
    let length = |length: u64| length.to_le_bytes();
    vec![
        (
            "KV_BAD_KEY_SIZE",
            raw(&[&length(long)[..], &[0; 16]].concat()),
            GgufError::KeyLength { index: 0, got: long, expected: 65_535 },
        ),
        (
            "key longer than the file",
            raw(&[&length(100)[..], &[b'k'; 16]].concat()),
            GgufError::Truncated { at: 32, field: "a key", got: 16, expected: 100 },
        ),
        ("KV_EMPTY_KEY", gguf().key("", 4, &[0; 4]).bytes(), GgufError::EmptyKey { index: 0 }),
        (
            "key of other bytes than UTF-8",
            gguf().key(b"k\xff", 4, &[0; 4]).bytes(),
            GgufError::KeyEncoding { index: 0, got: "k\u{fffd}".to_string() },
        ),
        ("KV_BAD_TYPE", value(13, &[0]), GgufError::ValueType { key: key.clone(), got: 13 }),
        ("KV_DUPLICATE_KEY", gguf().u32("k", 1).u32("k", 2).bytes(), GgufError::DuplicateKey { key: key.clone() }),
        ("KV_BAD_ALIGN", gguf().u32("general.alignment", 13).bytes(), GgufError::Alignment { got: 13 }),
        ("alignment of zero", gguf().u32("general.alignment", 0).bytes(), GgufError::Alignment { got: 0 }),
        (
            "KV_WRONG_TYPE_ALIGN",
            gguf().key("general.alignment", I32_VALUE, &32_i32.to_le_bytes()).bytes(),
            GgufError::AlignmentType { got: "the i32 32".to_string() },
        ),
        (
            "alignment that is a string",
            gguf().key("general.alignment", STRING_VALUE, &string("32")).bytes(),
            GgufError::AlignmentType { got: "the string \"32\"".to_string() },
        ),
        ("boolean of 2", value(BOOL_VALUE, &[2]), GgufError::Boolean { key: key.clone(), got: 2 }),
        (
            "boolean of 255 in an array",
            value(ARRAY_VALUE, &array(BOOL_VALUE, 3, &[0, 1, 255])),
            GgufError::Boolean { key: key.clone(), got: 255 },
        ),
        (
            "KV_BAD_VALUE_SIZE",
            value(STRING_VALUE, &length(long)),
            GgufError::StringLength { key: key.clone(), got: long, expected: 0 },
        ),
        (
            "string one byte too long",
            value(STRING_VALUE, &[&length(4)[..], b"abc"].concat()),
            GgufError::StringLength { key: key.clone(), got: 4, expected: 3 },
        ),
        (
            "string too long inside an array",
            value(ARRAY_VALUE, &array(STRING_VALUE, 2, &[string("ab"), length(9).to_vec()].concat())),
            GgufError::StringLength { key: key.clone(), got: 9, expected: 0 },
        ),
        (
            "array of 2^64 - 1 bytes",
            value(ARRAY_VALUE, &array(0, long, &[0; 9])),
            GgufError::ArrayLength { key: key.clone(), got: long, expected: 9 },
        ),
        (
            "array of 2^61 numbers, whose bytes overflow",
            value(ARRAY_VALUE, &array(10, 1 << 61, &[0; 24])),
            GgufError::ArrayLength { key: key.clone(), got: 1 << 61, expected: 3 },
        ),
        (
            "array of more strings than fit",
            value(ARRAY_VALUE, &array(STRING_VALUE, 3, &[0; 16])),
            GgufError::ArrayLength { key: key.clone(), got: 3, expected: 2 },
        ),
        (
            "array of an unknown type",
            value(ARRAY_VALUE, &array(99, 0, &[])),
            GgufError::ValueType { key: key.clone(), got: 99 },
        ),
        (
            "arrays five deep",
            value(ARRAY_VALUE, &nested(5)),
            GgufError::ArrayDepth { key: key.clone(), got: 5, expected: 4 },
        ),
        (
            "arrays a thousand deep",
            value(ARRAY_VALUE, &nested(1000)),
            GgufError::ArrayDepth { key: key.clone(), got: 5, expected: 4 },
        ),
        ("number cut off", value(10, &[0; 3]), GgufError::Truncated { at: 37, field: "a number", got: 3, expected: 8 }),
        (
            "value without a type",
            raw(&[&string("kkkk")[..], &[0; 2]].concat()),
            GgufError::Truncated { at: 36, field: "a value's type", got: 2, expected: 4 },
        ),
    ]
}

fn tensor_cases() -> Vec<Case> {
    let tensor = || String::from("t");
    let header = |dimensions: &[u64], kind, offset| Gguf::new().header("t", dimensions, kind, offset).bytes();
    let (big, root) = (4 * 0x7fff_ffff_u64, 1_600_000_000_u64);
    let name = "a_tensor_with_a_very_long_name_which_is_longer_than_what_is_allowed_for_ggml_tensors";
    vec![
        (
            "TENSORS_BAD_NAME_SIZE",
            Gguf::new().header(name, &[1], F32, 0).bytes(),
            GgufError::NameLength { index: 0, got: name.len() as u64, expected: 63 },
        ),
        (
            "name of other bytes than UTF-8",
            Gguf::new().header(b"\xc3(", &[1], F32, 0).bytes(),
            GgufError::NameEncoding { index: 0, got: "\u{fffd}(".to_string() },
        ),
        (
            "TENSORS_BAD_N_DIMS",
            header(&[1; 5], F32, 0),
            GgufError::Dimensions { tensor: tensor(), got: 5, expected: 4 },
        ),
        (
            "TENSORS_BAD_SHAPE",
            header(&[1, u64::MAX], F32, 0),
            GgufError::NegativeDimension { tensor: tensor(), dimension: 1, got: -1 },
        ),
        (
            "TENSORS_NE_TOO_BIG",
            header(&[big, big], F32, 0),
            GgufError::Elements { tensor: tensor(), got: vec![big, big] },
        ),
        (
            "elements that wrap to a small number",
            header(&[1 << 32, 1 << 32, 2], I8, 0),
            GgufError::Elements { tensor: tensor(), got: vec![2, 1 << 32, 1 << 32] },
        ),
        (
            "TENSORS_NBYTES_TOO_BIG",
            header(&[root, root], I64, 0),
            GgufError::Bytes { tensor: tensor(), got: root * root, kind: "I64" },
        ),
        ("TENSORS_BAD_TYPE", header(&[1], 43, 0), GgufError::TensorType { tensor: tensor(), got: 43 }),
        ("type that was removed", header(&[32], 4, 0), GgufError::TensorType { tensor: tensor(), got: 4 }),
        (
            "TENSORS_BAD_OFFSET",
            header(&[1], F32, u64::MAX),
            GgufError::OffsetAlignment { tensor: tensor(), got: u64::MAX, expected: 32 },
        ),
        (
            "offset that wraps the end of the tensor",
            header(&[8], F32, u64::MAX - 31),
            GgufError::EndOverflow { tensor: tensor(), offset: u64::MAX - 31, got: 32 },
        ),
        (
            "size whose padding overflows",
            header(&[(1 << 61) - 1], I64, 0),
            GgufError::EndOverflow { tensor: tensor(), offset: 0, got: u64::MAX - 7 },
        ),
        (
            "TENSORS_DUPLICATE_NAME",
            Gguf::new().tensor("t", &[8], F32, &ramp(32)).tensor("t", &[8], F32, &ramp(32)).bytes(),
            GgufError::DuplicateTensor { tensor: tensor() },
        ),
        (
            "TENSORS_BAD_ALIGN",
            Gguf::new().u32("general.alignment", 13).header("t", &[8], F32, 0).bytes(),
            GgufError::Alignment { got: 13 },
        ),
        (
            "TENSORS_INCONSISTENT_ALIGN",
            header(&[4], F32, 16),
            GgufError::OffsetAlignment { tensor: tensor(), got: 16, expected: 32 },
        ),
        (
            "row of 33 in blocks of 32",
            header(&[33, 2], Q4_0, 0),
            GgufError::RowLength { tensor: tensor(), kind: "Q4_0", got: 33, expected: 32 },
        ),
        (
            "row of 64 in blocks of 256, with whole blocks in sum",
            header(&[64, 4], Q4K, 0),
            GgufError::RowLength { tensor: tensor(), kind: "Q4_K", got: 64, expected: 256 },
        ),
        (
            "blocks without dimensions",
            header(&[], Q4_0, 0),
            GgufError::RowLength { tensor: tensor(), kind: "Q4_0", got: 1, expected: 32 },
        ),
    ]
}

fn data_cases() -> Vec<Case> {
    let tensor = || String::from("t");
    let valid = Gguf::new().tensor("t", &[8], F32, &ramp(32));
    let huge = 0x7fff_ffff_ffff_ffc0;
    let mut far = Gguf::new().header("a", &[huge], I8, 0).header("b", &[huge], I8, huge);
    far.data = ramp(32);
    let mut shared = Gguf::new().header("a", &[16], F32, 0).header("t", &[8], F32, 32);
    shared.data = ramp(64);
    let mut same = Gguf::new().header("a", &[8], F32, 0).header("t", &[8], F32, 0);
    same.data = ramp(32);
    let inconsistent = Gguf::new().aligned(16).tensor("a", &[4], F32, &ramp(16)).header("t", &[2], F32, 8);
    let size = valid.bytes().len() as u64;
    vec![
        (
            "DATA_NOT_ENOUGH_DATA",
            valid.bytes()[..size as usize - 1].to_vec(),
            GgufError::Outside { tensor: tensor(), got: size, expected: size - 1 },
        ),
        (
            "DATA_BAD_ALIGN",
            Gguf::new().u32("general.alignment", 13).tensor("t", &[8], F32, &ramp(32)).bytes(),
            GgufError::Alignment { got: 13 },
        ),
        (
            "DATA_INCONSISTENT_ALIGN",
            inconsistent.bytes(),
            GgufError::OffsetAlignment { tensor: tensor(), got: 8, expected: 16 },
        ),
        (
            "DATA_MEM_SIZE_OVERFLOW",
            far.bytes(),
            GgufError::Outside { tensor: "a".to_string(), got: 96 + huge, expected: 128 },
        ),
        (
            "tensors that share bytes",
            shared.bytes(),
            GgufError::Overlap { tensor: tensor(), other: "a".to_string(), got: 128, expected: 160 },
        ),
        (
            "tensors in one place",
            same.bytes(),
            GgufError::Overlap { tensor: tensor(), other: "a".to_string(), got: 96, expected: 128 },
        ),
        (
            "alignment larger than the file",
            Gguf::new().u32("general.alignment", 1 << 31).header("t", &[1], F32, 0).bytes(),
            GgufError::Outside { tensor: tensor(), got: (1 << 31) + 4, expected: 90 },
        ),
    ]
}

pub(crate) fn cases() -> Vec<Case> {
    [header_cases(), key_cases(), tensor_cases(), data_cases()].concat()
}

#[test]
fn each_malformed_file_has_its_error() {
    let cases = cases();
    assert!(cases.len() >= 40, "{}", cases.len());
    for (name, bytes, expected) in cases {
        let error = Checkpoint::from_bytes(bytes).expect_err(name);
        assert_eq!(error, FormatError::Gguf { file: "memory".to_string(), error: expected }, "{name}");
        let message = error.to_string();
        assert!(message.contains("expected") && message.contains("got"), "{name}: {message}");
    }
}

#[test]
fn bytes_of_no_format_are_named() {
    let cases: [(&str, Vec<u8>); 3] = [
        ("empty", Vec::new()),
        ("HEADER_BAD_MAGIC", Gguf { magic: *b"FUGG", ..Gguf::new() }.bytes()),
        ("text", b"hello".to_vec()),
    ];
    for (name, bytes) in cases {
        let got = bytes[..bytes.len().min(8)].to_vec();
        let error = Checkpoint::from_bytes(bytes).expect_err(name);
        assert_eq!(error, FormatError::UnknownFile { file: "memory".to_string(), got }, "{name}");
    }
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = gguf_sample();
    Checkpoint::from_bytes(bytes.clone()).unwrap();
    for length in 4..bytes.len() {
        let error = Checkpoint::from_bytes(bytes[..length].to_vec()).expect_err("a prefix");
        assert!(matches!(error, FormatError::Gguf { .. }), "{length}: {error}");
    }
}
