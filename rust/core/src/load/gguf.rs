//! The GGUF container, versions 2 and 3, little-endian.
//!
//! Layout: magic `GGUF`, version u32, tensor count u64, key count u64; keys (string, type u32, value); tensors (name
//! string, dimension count u32, dimensions u64 innermost first, type u32, offset u64 into the data section); zeros up to
//! `general.alignment` (32 when absent); data. A string is a u64 length and its bytes; an array is an element type u32,
//! a u64 length and its elements. Source: ggml's `docs/gguf.md` and `gguf.cpp`.
//!
//! Every length is compared with the bytes that are left before anything is read or allocated, and all sizes are u64 with
//! checked arithmetic.

use std::ops::Range;
use std::sync::Arc;

use super::checkpoint::Tensor;
use super::error::GgufError;
use super::kind::TensorKind;
use super::mapped::Mapped;
use super::value::{Array, Table, Text, Value, ValueType};

/// A real file has under 100 keys; this bounds the memory a hostile one takes.
const MOST_KEYS: u64 = 1 << 16;
/// A real file has under 5000 tensors.
const MOST_TENSORS: u64 = 1 << 16;
const LONGEST_KEY: u64 = (1 << 16) - 1;
const LONGEST_NAME: u64 = 63;
/// Dimensions and their product are signed in ggml.
const MOST_ELEMENTS: u64 = i64::MAX as u64;
const MOST_DIMENSIONS: u32 = 4;
const DEEPEST_ARRAY: u32 = 4;
const DEFAULT_ALIGNMENT: u32 = 32;
/// Key length, one character, type and a one-byte value.
const LEAST_KEY_BYTES: u64 = 8 + 1 + 4 + 1;
/// Name length, dimension count, type and offset.
const LEAST_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;

/// A parsed header. Tensors are in the order of their data.
pub(super) struct Gguf {
    pub(super) metadata: Table,
    pub(super) tensors: Vec<Tensor>,
}

/// Parses the header of `source`, which is file number `file` of the checkpoint.
pub(super) fn parse(source: &Arc<Mapped>, file: u32) -> Result<Gguf, GgufError> {
    let mut reader = Reader { source, at: 0 };
    let got = reader.array("the magic")?;
    if got != *b"GGUF" {
        return Err(GgufError::Magic { got });
    }
    let version: [u8; 4] = reader.array("the version")?;
    match (u32::from_le_bytes(version), u32::from_be_bytes(version)) {
        (2 | 3, _) => {}
        (_, 1..=3) => return Err(GgufError::BigEndian { got: version }),
        (got, _) => return Err(GgufError::Version { got }),
    }
    let (tensor_count, key_count) = (reader.u64("the tensor count")?, reader.u64("the key count")?);
    let expected = MOST_TENSORS.min(reader.left() / LEAST_TENSOR_BYTES);
    if tensor_count > expected {
        return Err(GgufError::TensorCount { got: tensor_count, expected });
    }
    let expected = MOST_KEYS.min(reader.left() / LEAST_KEY_BYTES);
    if key_count > expected {
        return Err(GgufError::KeyCount { got: key_count, expected });
    }
    let mut metadata = Table::default();
    for index in 0..key_count {
        let key = reader.key(index)?;
        let value = reader.value(&key)?;
        if metadata.contains_key(&key) {
            return Err(GgufError::DuplicateKey { key });
        }
        metadata.insert(key, value);
    }
    let alignment = alignment(&metadata)?;
    let mut headers = Vec::new();
    for index in 0..tensor_count {
        headers.push(reader.tensor(index)?);
    }
    let tensors = place(headers, reader.at as u64, source.len() as u64, alignment, file)?;
    Ok(Gguf { metadata, tensors })
}

fn alignment(metadata: &Table) -> Result<u64, GgufError> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT.into()),
        Some(&Value::U32(got)) if got.is_power_of_two() => Ok(got.into()),
        Some(&Value::U32(got)) => Err(GgufError::Alignment { got }),
        Some(value) => Err(GgufError::AlignmentType { got: value.describe() }),
    }
}

/// A tensor as the header describes it.
struct Header {
    name: Box<str>,
    kind: TensorKind,
    /// Outermost first.
    shape: Box<[usize]>,
    bytes: u64,
    offset: u64,
}

/// Turns offsets into file ranges, which must be aligned, inside the file and disjoint.
fn place(headers: Vec<Header>, end: u64, file_bytes: u64, alignment: u64, file: u32) -> Result<Vec<Tensor>, GgufError> {
    let data = end.next_multiple_of(alignment);
    let mut tensors = Vec::with_capacity(headers.len());
    for Header { name, kind, shape, bytes, offset } in headers {
        if offset % alignment != 0 {
            return Err(GgufError::OffsetAlignment { tensor: name.into(), got: offset, expected: alignment });
        }
        let Some(stop) = data.checked_add(offset).and_then(|start| start.checked_add(bytes)) else {
            return Err(GgufError::EndOverflow { tensor: name.into(), offset, got: bytes });
        };
        // An empty tensor has no place; an unpadded end of the file must not make it wrong.
        if bytes == 0 {
            tensors.push(Tensor { name, kind, shape, file, range: 0..0 });
            continue;
        }
        if stop > file_bytes {
            return Err(GgufError::Outside { tensor: name.into(), got: stop, expected: file_bytes });
        }
        // Both ends are at most the length of the map, a usize.
        tensors.push(Tensor { name, kind, shape, file, range: (stop - bytes) as usize..stop as usize });
    }
    tensors.sort_by_key(|tensor| tensor.range.start);
    let placed = || tensors.iter().filter(|tensor| !tensor.range.is_empty());
    for (other, tensor) in placed().zip(placed().skip(1)) {
        if tensor.range.start < other.range.end {
            return Err(GgufError::Overlap {
                tensor: tensor.name.to_string(),
                other: other.name.to_string(),
                got: tensor.range.start as u64,
                expected: other.range.end as u64,
            });
        }
    }
    Ok(tensors)
}

struct Reader<'a> {
    source: &'a Arc<Mapped>,
    at: usize,
}

impl Reader<'_> {
    fn left(&self) -> u64 {
        (self.source.len() - self.at) as u64
    }

    /// The range of the next `length` bytes.
    fn take(&mut self, length: u64, field: &'static str) -> Result<Range<usize>, GgufError> {
        let got = self.left();
        if length > got {
            return Err(GgufError::Truncated { at: self.at as u64, field, got, expected: length });
        }
        let start = self.at;
        self.at += length as usize;
        Ok(start..self.at)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], GgufError> {
        let range = self.take(N as u64, field)?;
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.source[range]);
        Ok(bytes)
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    fn key(&mut self, index: u64) -> Result<String, GgufError> {
        let got = self.u64("a key's length")?;
        if got > LONGEST_KEY {
            return Err(GgufError::KeyLength { index, got, expected: LONGEST_KEY });
        }
        if got == 0 {
            return Err(GgufError::EmptyKey { index });
        }
        let bytes = &self.source[self.take(got, "a key")?];
        match std::str::from_utf8(bytes) {
            Ok(key) => Ok(key.to_string()),
            Err(_) => Err(GgufError::KeyEncoding { index, got: String::from_utf8_lossy(bytes).into_owned() }),
        }
    }

    fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        macro_rules! number {
            ($variant:ident, $type:ty) => {
                Value::$variant(<$type>::from_le_bytes(self.array("a number")?))
            };
        }
        Ok(match self.value_type(key)? {
            ValueType::U8 => number!(U8, u8),
            ValueType::I8 => number!(I8, i8),
            ValueType::U16 => number!(U16, u16),
            ValueType::I16 => number!(I16, i16),
            ValueType::U32 => number!(U32, u32),
            ValueType::I32 => number!(I32, i32),
            ValueType::F32 => number!(F32, f32),
            ValueType::U64 => number!(U64, u64),
            ValueType::I64 => number!(I64, i64),
            ValueType::F64 => number!(F64, f64),
            ValueType::Bool => Value::Bool(self.boolean(key)?),
            ValueType::String => Value::String(Text::new(self.source.clone(), self.string(key)?)),
            ValueType::Array => {
                let (element, length) = self.array_header(key)?;
                let start = self.at;
                self.skip(key, element, length, 1)?;
                // At most the bytes that were left, so a usize.
                Value::Array(Array::new(self.source.clone(), element, length as usize, start..self.at))
            }
        })
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType, GgufError> {
        let got = self.u32("a value's type")?;
        ValueType::from_id(got).ok_or_else(|| GgufError::ValueType { key: key.to_string(), got })
    }

    fn boolean(&mut self, key: &str) -> Result<bool, GgufError> {
        match self.array("a boolean")? {
            [0] => Ok(false),
            [1] => Ok(true),
            [got] => Err(GgufError::Boolean { key: key.to_string(), got }),
        }
    }

    fn string(&mut self, key: &str) -> Result<Range<usize>, GgufError> {
        let (got, expected) = (self.u64("a string's length")?, self.left());
        if got > expected {
            return Err(GgufError::StringLength { key: key.to_string(), got, expected });
        }
        self.take(got, "a string")
    }

    fn array_header(&mut self, key: &str) -> Result<(ValueType, u64), GgufError> {
        let element = self.value_type(key)?;
        let (got, expected) = (self.u64("an array's length")?, self.left() / element.least_bytes());
        if got > expected {
            return Err(GgufError::ArrayLength { key: key.to_string(), got, expected });
        }
        Ok((element, got))
    }

    /// Checks and passes the elements of an array at nesting `depth`.
    fn skip(&mut self, key: &str, element: ValueType, length: u64, depth: u32) -> Result<(), GgufError> {
        if depth > DEEPEST_ARRAY {
            return Err(GgufError::ArrayDepth { key: key.to_string(), got: depth, expected: DEEPEST_ARRAY });
        }
        match element {
            ValueType::Bool => (0..length).try_for_each(|_| self.boolean(key).map(drop)),
            ValueType::String => (0..length).try_for_each(|_| self.string(key).map(drop)),
            ValueType::Array => (0..length).try_for_each(|_| {
                let (element, length) = self.array_header(key)?;
                self.skip(key, element, length, depth + 1)
            }),
            // No overflow: the length was compared with the bytes that are left.
            number => self.take(length * number.least_bytes(), "an array").map(drop),
        }
    }

    fn tensor(&mut self, index: u64) -> Result<Header, GgufError> {
        let got = self.u64("a tensor name's length")?;
        if got > LONGEST_NAME {
            return Err(GgufError::NameLength { index, got, expected: LONGEST_NAME });
        }
        let bytes = &self.source[self.take(got, "a tensor name")?];
        let Ok(name) = std::str::from_utf8(bytes) else {
            return Err(GgufError::NameEncoding { index, got: String::from_utf8_lossy(bytes).into_owned() });
        };
        let tensor = || name.to_string();
        let got = self.u32("a dimension count")?;
        if got > MOST_DIMENSIONS {
            return Err(GgufError::Dimensions { tensor: tensor(), got, expected: MOST_DIMENSIONS });
        }
        let mut dimensions = Vec::with_capacity(got as usize);
        for dimension in 0..got as usize {
            let size = self.u64("a dimension")?;
            if size > MOST_ELEMENTS {
                return Err(GgufError::NegativeDimension { tensor: tensor(), dimension, got: size.cast_signed() });
            }
            dimensions.push(size);
        }
        let columns = dimensions.first().copied().unwrap_or(1);
        dimensions.reverse();
        let got = self.u32("a tensor's type")?;
        let kind = TensorKind::from_gguf(got).ok_or_else(|| GgufError::TensorType { tensor: tensor(), got })?;
        let offset = self.u64("a tensor's offset")?;
        let product = dimensions.iter().try_fold(1_u64, |product, &size| product.checked_mul(size.max(1)));
        let Some(product) = product.filter(|&product| product <= MOST_ELEMENTS) else {
            return Err(GgufError::Elements { tensor: tensor(), got: dimensions });
        };
        let elements = if dimensions.contains(&0) { 0 } else { product };
        let expected = kind.block_elements();
        if columns % expected != 0 {
            return Err(GgufError::RowLength { tensor: tensor(), kind: kind.name(), got: columns, expected });
        }
        let Some(bytes) = (elements / expected).checked_mul(kind.block_bytes()) else {
            return Err(GgufError::Bytes { tensor: tensor(), got: elements, kind: kind.name() });
        };
        let Some(shape) = dimensions.iter().map(|&size| usize::try_from(size).ok()).collect() else {
            return Err(GgufError::Elements { tensor: tensor(), got: dimensions });
        };
        Ok(Header { name: name.into(), kind, shape, bytes, offset })
    }
}
