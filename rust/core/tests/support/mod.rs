//! Writers of small model files, right and wrong.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use farthing::load::{Checkpoint, Metadata, Rows, Value};
use farthing_kernels::format::RowCodes;

pub(crate) const F32: u32 = 0;
pub(crate) const F16: u32 = 1;
pub(crate) const Q4_0: u32 = 2;
pub(crate) const Q8_0: u32 = 8;
pub(crate) const TQ2_0: u32 = 35;
pub(crate) const Q2K: u32 = 10;
pub(crate) const Q4K: u32 = 12;
pub(crate) const Q6K: u32 = 14;
pub(crate) const I8: u32 = 24;
pub(crate) const I64: u32 = 27;

/// Value type ids.
pub(crate) const U32_VALUE: u32 = 4;
pub(crate) const I32_VALUE: u32 = 5;
pub(crate) const BOOL_VALUE: u32 = 7;
pub(crate) const STRING_VALUE: u32 = 8;
pub(crate) const ARRAY_VALUE: u32 = 9;

/// A string with its length field.
pub(crate) fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

/// An array of `length` elements that are already encoded.
pub(crate) fn array(element: u32, length: u64, elements: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &length.to_le_bytes(), elements].concat()
}

/// An array of strings.
pub(crate) fn strings(texts: &[&str]) -> Vec<u8> {
    array(STRING_VALUE, texts.len() as u64, &texts.iter().flat_map(string).collect::<Vec<u8>>())
}

/// `depth` arrays of one element around an empty array of u8.
pub(crate) fn nested(depth: u32) -> Vec<u8> {
    (1..depth).fold(array(0, 0, &[]), |inner, _| array(ARRAY_VALUE, 1, &inner))
}

/// Bytes that count up.
pub(crate) fn ramp(length: usize) -> Vec<u8> {
    (0..length).map(|i| i as u8).collect()
}

/// A GGUF file under construction; every field can be made wrong.
#[derive(Clone)]
pub(crate) struct Gguf {
    pub(crate) magic: [u8; 4],
    pub(crate) version: [u8; 4],
    /// Declared counts, when they should differ from the real ones.
    pub(crate) tensor_count: Option<u64>,
    pub(crate) key_count: Option<u64>,
    pub(crate) alignment: usize,
    pub(crate) keys: Vec<Vec<u8>>,
    pub(crate) tensors: Vec<Vec<u8>>,
    pub(crate) data: Vec<u8>,
}

impl Gguf {
    pub(crate) fn new() -> Gguf {
        Gguf {
            magic: *b"GGUF",
            version: 3_u32.to_le_bytes(),
            tensor_count: None,
            key_count: None,
            alignment: 32,
            keys: Vec::new(),
            tensors: Vec::new(),
            data: Vec::new(),
        }
    }

    /// A key with an encoded value of type `kind`.
    pub(crate) fn key(mut self, name: impl AsRef<[u8]>, kind: u32, value: &[u8]) -> Gguf {
        self.keys.push([&string(name)[..], &kind.to_le_bytes(), value].concat());
        self
    }

    pub(crate) fn u32(self, name: &str, value: u32) -> Gguf {
        self.key(name, U32_VALUE, &value.to_le_bytes())
    }

    /// A key of raw bytes.
    pub(crate) fn raw_key(mut self, bytes: &[u8]) -> Gguf {
        self.keys.push(bytes.to_vec());
        self
    }

    /// `general.alignment`, which the data then follows.
    pub(crate) fn aligned(mut self, alignment: u32) -> Gguf {
        self.alignment = alignment as usize;
        self.u32("general.alignment", alignment)
    }

    /// A tensor's header alone; `dimensions` innermost first.
    pub(crate) fn header(mut self, name: impl AsRef<[u8]>, dimensions: &[u64], kind: u32, offset: u64) -> Gguf {
        let sizes: Vec<u8> = dimensions.iter().flat_map(|size| size.to_le_bytes()).collect();
        let count = (dimensions.len() as u32).to_le_bytes();
        self.tensors.push([&string(name)[..], &count, &sizes, &kind.to_le_bytes(), &offset.to_le_bytes()].concat());
        self
    }

    /// A tensor behind the data so far.
    pub(crate) fn tensor(mut self, name: &str, dimensions: &[u64], kind: u32, bytes: &[u8]) -> Gguf {
        self.data.resize(self.data.len().next_multiple_of(self.alignment), 0);
        let offset = self.data.len() as u64;
        self.data.extend_from_slice(bytes);
        self.header(name, dimensions, kind, offset)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = [self.magic, self.version].concat();
        out.extend_from_slice(&self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend_from_slice(&self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        out.extend(self.keys.iter().chain(&self.tensors).flatten());
        if !self.data.is_empty() {
            out.resize(out.len().next_multiple_of(self.alignment.max(1)), 0);
            out.extend_from_slice(&self.data);
        }
        out
    }
}

/// A safetensors file with this header and data.
pub(crate) fn safetensors(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    [&string(header)[..], data].concat()
}

/// A header of f32 vectors of `sizes`, named in order.
pub(crate) fn header(tensors: &[(&str, usize)]) -> String {
    let mut start = 0;
    let entries: Vec<String> = tensors
        .iter()
        .map(|(name, size)| {
            let end = start + 4 * size;
            let entry = format!(r#""{name}":{{"dtype":"F32","shape":[{size}],"data_offsets":[{start},{end}]}}"#);
            start = end;
            entry
        })
        .collect();
    format!("{{{}}}", entries.join(","))
}

/// A safetensors file of f32 vectors.
pub(crate) fn vectors(tensors: &[(&str, usize)]) -> Vec<u8> {
    safetensors(header(tensors), &ramp(4 * tensors.iter().map(|(_, size)| size).sum::<usize>()))
}

/// A small valid GGUF file with something of everything.
pub(crate) fn gguf_sample() -> Vec<u8> {
    Gguf::new()
        .key("general.architecture", STRING_VALUE, &string("llama"))
        .u32("llama.block_count", 2)
        .key("tokenizer.ggml.tokens", ARRAY_VALUE, &strings(&["<s>", "a", "höhe"]))
        .key("tokenizer.ggml.scores", ARRAY_VALUE, &array(6, 3, &[0; 12]))
        .key("nested", ARRAY_VALUE, &nested(3))
        .key("flag", BOOL_VALUE, &[1])
        .tensor("norm.weight", &[8], F32, &ramp(32))
        .tensor("token_embd.weight", &[32, 3], Q4_0, &ramp(54))
        .tensor("half.weight", &[5, 2], F16, &ramp(20))
        .tensor("output.weight", &[256, 1], Q6K, &ramp(210))
        .tensor("other.weight", &[256, 1], Q2K, &ramp(84))
        .bytes()
}

/// A small valid safetensors file.
pub(crate) fn safetensors_sample() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[16,28]},
        "a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},
        "ids":{"dtype":"I64","shape":[1],"data_offsets":[28,36]},
        "empty":{"dtype":"F16","shape":[0,7],"data_offsets":[36,36]}}"#;
    safetensors(header, &ramp(36))
}

/// Reads everything a checkpoint gives access to; nothing may panic.
pub(crate) fn exercise(checkpoint: &Checkpoint) {
    if let Metadata::Gguf(table) = &checkpoint.metadata {
        for (key, value) in table.iter() {
            visit(value);
            _ = (table.read::<&str>(key), table.read::<Vec<&[u8]>>(key), table.read::<Vec<f32>>(key));
            _ = (table.read::<u64>(key), table.read::<f64>(key), table.read::<bool>(key));
        }
    }
    let (mut row, mut codes) = (Vec::new(), RowCodes::default());
    for tensor in checkpoint.tensors() {
        let format = tensor.natural_format();
        for i in [0, tensor.rows() / 2, tensor.rows().saturating_sub(1)] {
            if i < tensor.rows() {
                row.resize(tensor.columns(), 0.0);
                assert_eq!(tensor.row(i, &mut row).is_ok(), format.is_ok());
                for format in [format.clone(), tensor.exact_format()].into_iter().flatten() {
                    _ = tensor.codes(i, format, &mut codes);
                }
            }
        }
        tensor.release();
        assert!(checkpoint.tensor(tensor.name()).is_some());
        assert!(checkpoint.require(tensor.name(), tensor.shape()).is_ok());
    }
}

fn visit(value: &Value) {
    _ = value.describe();
    if let Value::Array(array) = value {
        assert_eq!(array.values().inspect(visit).count(), array.len());
    }
}

/// A directory of its own that is removed in the end.
pub(crate) struct Directory {
    path: PathBuf,
}

impl Directory {
    pub(crate) fn new() -> Directory {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("farthing-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Directory { path }
    }

    pub(crate) fn file(self, name: &str, bytes: impl AsRef<[u8]>) -> Directory {
        std::fs::write(self.path.join(name), bytes).unwrap();
        self
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a file in it, as error messages spell it.
    pub(crate) fn name(&self, file: &str) -> String {
        self.path.join(file).display().to_string()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        _ = std::fs::remove_dir_all(&self.path);
    }
}
