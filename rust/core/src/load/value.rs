//! Metadata values of a GGUF file. Strings and arrays stay in the mapped file and are decoded when asked for.

use std::collections::BTreeMap;
use std::ops::{Deref, Range};
use std::sync::Arc;

use super::error::FormatError;
use super::mapped::Mapped;

/// Metadata by key.
///
/// ```
/// use farthing::load::{FormatError, Table};
/// fn layers(table: &Table) -> Result<usize, FormatError> {
///     let architecture: &str = table.require("general.architecture")?;
///     table.require(&format!("{architecture}.block_count"))
/// }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Table {
    entries: BTreeMap<String, Value>,
}

impl Table {
    pub(super) fn insert(&mut self, key: String, value: Value) -> Option<Value> {
        self.entries.insert(key, value)
    }

    /// The value of `key` as a `T`, nothing when the key is absent, [`FormatError::Config`] when it has another type or
    /// does not fit.
    pub fn read<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, FormatError> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        T::from_value(value).map(Some).ok_or_else(|| FormatError::Config {
            key: key.to_string(),
            got: value.describe(),
            expected: T::EXPECTED.to_string(),
        })
    }

    /// As [`Table::read`], but an absent key is [`FormatError::MissingKey`].
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, FormatError> {
        let missing = || FormatError::MissingKey { key: key.to_string(), expected: T::EXPECTED.to_string() };
        self.read(key)?.ok_or_else(missing)
    }
}

impl Deref for Table {
    type Target = BTreeMap<String, Value>;
    fn deref(&self) -> &Self::Target {
        &self.entries
    }
}

/// One metadata value.
#[derive(Clone, Debug)]
pub enum Value {
    /// Type 0.
    U8(u8),
    /// Type 1.
    I8(i8),
    /// Type 2.
    U16(u16),
    /// Type 3.
    I16(i16),
    /// Type 4.
    U32(u32),
    /// Type 5.
    I32(i32),
    /// Type 6.
    F32(f32),
    /// Type 7.
    Bool(bool),
    /// Type 8.
    String(Text),
    /// Type 9.
    Array(Array),
    /// Type 10.
    U64(u64),
    /// Type 11.
    I64(i64),
    /// Type 12.
    F64(f64),
}

/// Type ids of values, in the format's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    pub(super) fn from_id(id: u32) -> Option<ValueType> {
        use ValueType::{Array, Bool, F32, F64, I8, I16, I32, I64, String, U8, U16, U32, U64};
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64].get(id as usize).copied()
    }

    /// The fewest bytes a value takes: a scalar's size, a string's length field, an array's type and length.
    pub(super) fn least_bytes(self) -> u64 {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::String => 8,
            ValueType::Array => 12,
        }
    }

    fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "u8",
            ValueType::I8 => "i8",
            ValueType::U16 => "u16",
            ValueType::I16 => "i16",
            ValueType::U32 => "u32",
            ValueType::I32 => "i32",
            ValueType::F32 => "f32",
            ValueType::Bool => "boolean",
            ValueType::String => "string",
            ValueType::Array => "array",
            ValueType::U64 => "u64",
            ValueType::I64 => "i64",
            ValueType::F64 => "f64",
        }
    }
}

/// A string of the file; the format asks for UTF-8 but real vocabularies hold other bytes.
#[derive(Clone)]
pub struct Text {
    source: Arc<Mapped>,
    range: Range<usize>,
}

impl Text {
    pub(super) fn new(source: Arc<Mapped>, range: Range<usize>) -> Text {
        Text { source, range }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.source[self.range.clone()]
    }
}

impl std::fmt::Debug for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(self.bytes()))
    }
}

/// An array of the file, decoded element by element.
#[derive(Clone)]
pub struct Array {
    source: Arc<Mapped>,
    element: ValueType,
    length: usize,
    range: Range<usize>,
}

impl Array {
    pub(super) fn new(source: Arc<Mapped>, element: ValueType, length: usize, range: Range<usize>) -> Array {
        Array { source, element, length, range }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The elements in order.
    pub fn values(&self) -> impl Iterator<Item = Value> {
        let mut at = self.range.start;
        (0..self.length).map_while(move |_| {
            let (value, next) = decode(&self.source, self.element, at, self.range.end)?;
            at = next;
            Some(value)
        })
    }

    /// The elements of an array of strings, nothing for other arrays.
    pub fn strings(&self) -> Option<impl Iterator<Item = &[u8]>> {
        if self.element != ValueType::String {
            return None;
        }
        let mut at = self.range.start;
        Some((0..self.length).map_while(move |_| {
            let string = string_at(&self.source, at, self.range.end)?;
            at = string.end;
            self.source.get(string)
        }))
    }
}

impl std::fmt::Debug for Array {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} x {}", self.length, self.element.name())
    }
}

/// The `N` bytes at `at`, if they end by `end`.
fn bytes_at<const N: usize>(source: &[u8], at: usize, end: usize) -> Option<[u8; N]> {
    source.get(at..end)?.first_chunk().copied()
}

/// Range of the string whose length field is at `at`.
fn string_at(source: &[u8], at: usize, end: usize) -> Option<Range<usize>> {
    let length = usize::try_from(u64::from_le_bytes(bytes_at(source, at, end)?)).ok()?;
    let start = at + 8;
    let stop = start.checked_add(length)?;
    (stop <= end).then_some(start..stop)
}

/// The value at `at` and where the next begins. Ranges were checked at parsing; nothing means that the file has changed.
fn decode(source: &Arc<Mapped>, kind: ValueType, at: usize, end: usize) -> Option<(Value, usize)> {
    macro_rules! number {
        ($variant:ident, $type:ty) => {
            Value::$variant(<$type>::from_le_bytes(bytes_at(source, at, end)?))
        };
    }
    let value = match kind {
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
        ValueType::Bool => Value::Bool(bytes_at::<1>(source, at, end)? != [0]),
        ValueType::String => {
            let range = string_at(source, at, end)?;
            let next = range.end;
            return Some((Value::String(Text::new(source.clone(), range)), next));
        }
        ValueType::Array => {
            let element = ValueType::from_id(u32::from_le_bytes(bytes_at(source, at, end)?))?;
            let length = usize::try_from(u64::from_le_bytes(bytes_at(source, at + 4, end)?)).ok()?;
            let start = at + 12;
            let stop = skip(source, element, length, start, end)?;
            return Some((Value::Array(Array::new(source.clone(), element, length, start..stop)), stop));
        }
    };
    Some((value, at + kind.least_bytes() as usize))
}

/// Where `length` values that start at `at` end.
fn skip(source: &[u8], kind: ValueType, length: usize, mut at: usize, end: usize) -> Option<usize> {
    match kind {
        ValueType::String => {
            for _ in 0..length {
                at = string_at(source, at, end)?.end;
            }
        }
        ValueType::Array => {
            for _ in 0..length {
                let element = ValueType::from_id(u32::from_le_bytes(bytes_at(source, at, end)?))?;
                let inner = usize::try_from(u64::from_le_bytes(bytes_at(source, at + 4, end)?)).ok()?;
                at = skip(source, element, inner, at + 12, end)?;
            }
        }
        scalar => at = at.checked_add(length.checked_mul(scalar.least_bytes() as usize)?)?,
    }
    (at <= end).then_some(at)
}

impl Value {
    /// The integer, whatever its width.
    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(value) => value.into(),
            Value::I8(value) => value.into(),
            Value::U16(value) => value.into(),
            Value::I16(value) => value.into(),
            Value::U32(value) => value.into(),
            Value::I32(value) => value.into(),
            Value::U64(value) => value.into(),
            Value::I64(value) => value.into(),
            _ => return None,
        })
    }

    /// The value in words, for error messages.
    pub fn describe(&self) -> String {
        match self {
            Value::U8(value) => format!("the u8 {value}"),
            Value::I8(value) => format!("the i8 {value}"),
            Value::U16(value) => format!("the u16 {value}"),
            Value::I16(value) => format!("the i16 {value}"),
            Value::U32(value) => format!("the u32 {value}"),
            Value::I32(value) => format!("the i32 {value}"),
            Value::U64(value) => format!("the u64 {value}"),
            Value::I64(value) => format!("the i64 {value}"),
            Value::F32(value) => format!("the f32 {value}"),
            Value::F64(value) => format!("the f64 {value}"),
            Value::Bool(value) => format!("the boolean {value}"),
            Value::String(text) => {
                let head = &text.bytes()[..text.bytes().len().min(64)];
                format!("the string {:?}", String::from_utf8_lossy(head))
            }
            Value::Array(array) => format!("an array of {} elements of type {}", array.length, array.element.name()),
        }
    }
}

/// A type that metadata values convert to without loss.
pub trait FromValue<'a>: Sized {
    /// What is accepted, in words.
    const EXPECTED: &'static str;
    /// The value, or nothing when it has another type or does not fit.
    fn from_value(value: &'a Value) -> Option<Self>;
}

macro_rules! from_integer {
    ($($type:ty: $expected:literal),*) => {$(
        impl FromValue<'_> for $type {
            const EXPECTED: &'static str = $expected;
            fn from_value(value: &Value) -> Option<Self> {
                value.integer()?.try_into().ok()
            }
        }
    )*};
}
from_integer!(
    u16: "an integer from 0 to 65535",
    u32: "an integer from 0 to 2^32 - 1",
    u64: "an integer from 0 to 2^64 - 1",
    usize: "an integer from 0 to the size of memory",
    i32: "an integer from -2^31 to 2^31 - 1",
    i64: "an integer from -2^63 to 2^63 - 1"
);

impl FromValue<'_> for f64 {
    const EXPECTED: &'static str = "a float";
    fn from_value(value: &Value) -> Option<Self> {
        match *value {
            Value::F32(value) => Some(value.into()),
            Value::F64(value) => Some(value),
            _ => None,
        }
    }
}

impl FromValue<'_> for f32 {
    const EXPECTED: &'static str = "an f32";
    fn from_value(value: &Value) -> Option<Self> {
        if let Value::F32(value) = *value { Some(value) } else { None }
    }
}

impl FromValue<'_> for bool {
    const EXPECTED: &'static str = "a boolean";
    fn from_value(value: &Value) -> Option<Self> {
        if let Value::Bool(value) = *value { Some(value) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a [u8] {
    const EXPECTED: &'static str = "a string";
    fn from_value(value: &'a Value) -> Option<Self> {
        if let Value::String(text) = value { Some(text.bytes()) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "a string of UTF-8";
    fn from_value(value: &'a Value) -> Option<Self> {
        if let Value::String(text) = value { std::str::from_utf8(text.bytes()).ok() } else { None }
    }
}

impl<'a> FromValue<'a> for &'a Array {
    const EXPECTED: &'static str = "an array";
    fn from_value(value: &'a Value) -> Option<Self> {
        if let Value::Array(array) = value { Some(array) } else { None }
    }
}

impl<'a> FromValue<'a> for Vec<&'a [u8]> {
    const EXPECTED: &'static str = "an array of strings";
    fn from_value(value: &'a Value) -> Option<Self> {
        <&Array>::from_value(value)?.strings().map(Iterator::collect)
    }
}

impl<'a> FromValue<'a> for Vec<&'a str> {
    const EXPECTED: &'static str = "an array of UTF-8 strings";
    fn from_value(value: &'a Value) -> Option<Self> {
        <&Array>::from_value(value)?.strings()?.map(|bytes| std::str::from_utf8(bytes).ok()).collect()
    }
}

macro_rules! from_array {
    ($($type:ty: $expected:literal),*) => {$(
        impl FromValue<'_> for Vec<$type> {
            const EXPECTED: &'static str = $expected;
            fn from_value(value: &Value) -> Option<Self> {
                <&Array>::from_value(value)?.values().map(|value| <$type>::from_value(&value)).collect()
            }
        }
    )*};
}
from_array!(
    u32: "an array of integers from 0 to 2^32 - 1",
    i32: "an array of integers from -2^31 to 2^31 - 1",
    i64: "an array of integers from -2^63 to 2^63 - 1",
    usize: "an array of integers from 0 to the size of memory",
    f32: "an array of f32",
    bool: "an array of booleans"
);
