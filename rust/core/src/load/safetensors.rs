//! The safetensors container, read strictly.
//!
//! Layout: header length u64 (little-endian, at most 100,000,000); header, a JSON object of
//! `name: {dtype, shape, data_offsets: [start, end]}` and optionally `__metadata__: {string: string}`; data. Offsets count
//! from the end of the header; in ascending order they leave no hole, do not overlap and end where the file ends, so that
//! no byte of a file is unaccounted for. Duplicate keys are errors. Source: the format section of the safetensors README.

use std::collections::HashSet;
use std::fmt::{self, Formatter};

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::checkpoint::Tensor;
use super::error::SafetensorsError;
use super::json::{LONGEST_STRING, survey};
use super::kind::TensorKind;

const LARGEST_HEADER: u64 = 100_000_000;
/// The largest published checkpoints have under 200,000 tensors, spread over many files.
const MOST_TENSORS: usize = 1 << 17;
const MOST_NOTES: usize = 1 << 16;
const LONGEST_NAME: usize = 1024;
const MOST_DIMENSIONS: usize = 8;

/// Parses the header of a whole file, which is file number `file` of the checkpoint. Tensors are in the order of their data.
pub(super) fn parse(bytes: &[u8], file: u32) -> Result<Vec<Tensor>, SafetensorsError> {
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return Err(SafetensorsError::Truncated { got: bytes.len() as u64 });
    };
    let got = u64::from_le_bytes(*length);
    if got > LARGEST_HEADER {
        return Err(SafetensorsError::HeaderTooLarge { got, expected: LARGEST_HEADER });
    }
    let Some((header, data)) = rest.split_at_checked(got as usize) else {
        return Err(SafetensorsError::HeaderOutside { got, expected: rest.len() as u64 });
    };
    if header.first() != Some(&b'{') {
        return Err(SafetensorsError::HeaderStart { got: header.first().copied().map(char::from) });
    }
    let longest = survey(header).longest_string;
    if longest > LONGEST_STRING {
        return Err(SafetensorsError::StringLength { got: longest, expected: LONGEST_STRING });
    }
    let mut problem = None;
    let mut parser = serde_json::Deserializer::from_slice(header);
    let parsed = Header { problem: &mut problem }.deserialize(&mut parser).and_then(|raw| parser.end().map(|()| raw));
    let mut tensors = match (parsed, problem) {
        (_, Some(problem)) => return Err(problem),
        (Err(error), None) => return Err(SafetensorsError::Json { got: error.to_string() }),
        (Ok(tensors), None) => tensors,
    };
    tensors.sort_by_key(|tensor| (tensor.start, tensor.end));
    let data_start = bytes.len() - data.len();
    place(tensors, data_start, data.len() as u64, file)
}

/// Checks that the tensors, sorted by their offsets, fill the data exactly.
fn place(raw: Vec<Raw>, data_start: usize, data_bytes: u64, file: u32) -> Result<Vec<Tensor>, SafetensorsError> {
    let mut tensors = Vec::with_capacity(raw.len());
    let mut expected = 0;
    for Raw { name, kind, shape, bytes, start, end } in raw {
        if start != expected {
            return Err(SafetensorsError::NotContiguous { tensor: name.into(), got: start, expected });
        }
        if end > data_bytes {
            return Err(SafetensorsError::DataLength { got: data_bytes, expected: end });
        }
        if end - start != bytes {
            return Err(SafetensorsError::Size { tensor: name.into(), got: end - start, expected: bytes });
        }
        expected = end;
        tensors.push(Tensor { name, kind, shape, file, range: data_start + start as usize..data_start + end as usize });
    }
    if expected != data_bytes {
        return Err(SafetensorsError::DataLength { got: data_bytes, expected });
    }
    Ok(tensors)
}

/// A tensor as the header describes it; `start <= end`.
struct Raw {
    name: Box<str>,
    kind: TensorKind,
    shape: Box<[usize]>,
    bytes: u64,
    start: u64,
    end: u64,
}

impl Raw {
    fn new(name: String, fields: &Fields) -> Result<Raw, SafetensorsError> {
        let kind = match &fields.kind {
            Ok(kind) => *kind,
            Err(got) => return Err(SafetensorsError::TensorType { tensor: name, got: got.clone() }),
        };
        let (start, end) = fields.offsets;
        if start > end {
            return Err(SafetensorsError::OffsetOrder { tensor: name, start, got: end });
        }
        let Shape { sizes, length } = &fields.shape;
        let Some(sizes) = sizes.get(..*length) else {
            return Err(SafetensorsError::Dimensions { tensor: name, expected: MOST_DIMENSIONS });
        };
        let product = sizes.iter().try_fold(1_u64, |product, &size| product.checked_mul(size));
        let block_bits = kind.block_bytes() * 8;
        let bits = product.and_then(|elements| elements.checked_mul(block_bits / kind.block_elements()));
        let shape = sizes.iter().map(|&size| usize::try_from(size).ok()).collect();
        let (Some(bits), Some(shape)) = (bits, shape) else {
            return Err(SafetensorsError::Overflow { tensor: name, got: sizes.to_vec() });
        };
        if bits % 8 != 0 {
            return Err(SafetensorsError::PartialByte { tensor: name, got: bits });
        }
        Ok(Raw { name: name.into(), kind, shape, bytes: bits / 8, start, end })
    }
}

/// Reads the header; what the format forbids beyond JSON goes to `problem`.
struct Header<'a> {
    problem: &'a mut Option<SafetensorsError>,
}

impl Header<'_> {
    /// Ends the parse with `problem`.
    fn stop<T, E: Error>(self, problem: SafetensorsError) -> Result<T, E> {
        *self.problem = Some(problem);
        Err(E::custom("stopped"))
    }
}

impl<'de> DeserializeSeed<'de> for Header<'_> {
    type Value = Vec<Raw>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Raw>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Header<'_> {
    type Value = Vec<Raw>;

    fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vec<Raw>, A::Error> {
        let (mut tensors, mut notes): (Vec<Raw>, Option<Notes>) = (Vec::new(), None);
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if notes.is_some() {
                    return self.stop(SafetensorsError::Duplicate { name });
                }
                let new: Notes = map.next_value()?;
                if let Some(name) = new.duplicate {
                    return self.stop(SafetensorsError::Duplicate { name });
                }
                if new.count > MOST_NOTES {
                    return self.stop(SafetensorsError::Count { unit: "metadata entries", expected: MOST_NOTES });
                }
                notes = Some(new);
                continue;
            }
            if name.len() > LONGEST_NAME {
                let tensor = name.chars().take(64).collect();
                return self.stop(SafetensorsError::NameLength { tensor, got: name.len(), expected: LONGEST_NAME });
            }
            if tensors.len() == MOST_TENSORS {
                return self.stop(SafetensorsError::Count { unit: "tensors", expected: MOST_TENSORS });
            }
            match Raw::new(name, &map.next_value()?) {
                Ok(tensor) => tensors.push(tensor),
                Err(problem) => return self.stop(problem),
            }
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            let name = pair[0].name.to_string();
            return self.stop(SafetensorsError::Duplicate { name });
        }
        Ok(tensors)
    }
}

/// `__metadata__`: checked, counted and dropped.
#[derive(Default)]
struct Notes {
    count: usize,
    duplicate: Option<String>,
}

impl<'de> Deserialize<'de> for Notes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Notes, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Notes;
            fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Notes, A::Error> {
                let (mut notes, mut seen) = (Notes::default(), HashSet::new());
                while let Some((key, Note)) = map.next_entry::<String, Note>()? {
                    notes.count += 1;
                    // Past the limit the file is refused anyway.
                    if notes.count <= MOST_NOTES && notes.duplicate.is_none() && !seen.insert(key.clone()) {
                        notes.duplicate = Some(key);
                    }
                }
                Ok(notes)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// A string that nobody reads.
struct Note;

impl<'de> Deserialize<'de> for Note {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Note, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Note;
            fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E: Error>(self, _: &str) -> Result<Note, E> {
                Ok(Note)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// The fields of one tensor.
struct Fields {
    /// The type, or its unknown name.
    kind: Result<TensorKind, String>,
    shape: Shape,
    offsets: (u64, u64),
}

#[derive(serde::Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    Dtype,
    Shape,
    DataOffsets,
    #[serde(other)]
    Unknown,
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Fields, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields;
            fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
                f.write_str("an object of dtype, shape and data_offsets")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let (mut kind, mut shape, mut offsets) = (None, None, None);
                while let Some(field) = map.next_key()? {
                    let twice = match field {
                        Field::Dtype => kind.replace(map.next_value::<Dtype>()?.0).is_some(),
                        Field::Shape => shape.replace(map.next_value()?).is_some(),
                        Field::DataOffsets => offsets.replace(map.next_value()?).is_some(),
                        Field::Unknown => return Err(A::Error::custom("an unknown field of a tensor")),
                    };
                    if twice {
                        return Err(A::Error::custom("a field of a tensor twice"));
                    }
                }
                Ok(Fields {
                    kind: kind.ok_or_else(|| A::Error::missing_field("dtype"))?,
                    shape: shape.ok_or_else(|| A::Error::missing_field("shape"))?,
                    offsets: offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?,
                })
            }
        }
        deserializer.deserialize_map(Object)
    }
}

struct Dtype(Result<TensorKind, String>);

impl<'de> Deserialize<'de> for Dtype {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Dtype, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Dtype;
            fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
                f.write_str("a dtype")
            }
            fn visit_str<E: Error>(self, name: &str) -> Result<Dtype, E> {
                Ok(Dtype(TensorKind::from_safetensors(name).ok_or_else(|| name.chars().take(32).collect())))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// Dimensions, outermost first; `length` counts those beyond the limit too.
struct Shape {
    sizes: [u64; MOST_DIMENSIONS],
    length: usize,
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Shape, D::Error> {
        struct Sizes;
        impl<'de> Visitor<'de> for Sizes {
            type Value = Shape;
            fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
                f.write_str("an array of dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut shape = Shape { sizes: [0; MOST_DIMENSIONS], length: 0 };
                while shape.length < MOST_DIMENSIONS {
                    let Some(size) = seq.next_element()? else { return Ok(shape) };
                    shape.sizes[shape.length] = size;
                    shape.length += 1;
                }
                while seq.next_element::<u64>()?.is_some() {
                    shape.length += 1;
                }
                Ok(shape)
            }
        }
        deserializer.deserialize_seq(Sizes)
    }
}
