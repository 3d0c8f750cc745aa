//! What can be wrong with a model file: one variant for each way, each naming the place, what it got and what it expected.

use super::template::TemplateError;
use super::tokenizer::TokenizerError;

/// A model file, directory or value that cannot be loaded.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FormatError {
    /// A GGUF file is malformed.
    #[error("{file}: {error}")]
    Gguf {
        /// The file.
        file: String,
        /// What is wrong with it.
        error: GgufError,
    },
    /// A safetensors file is malformed.
    #[error("{file}: {error}")]
    Safetensors {
        /// The file.
        file: String,
        /// What is wrong with it.
        error: SafetensorsError,
    },
    /// The index of a sharded checkpoint is malformed or disagrees with its shards.
    #[error("{file}: {error}")]
    Index {
        /// The index file.
        file: String,
        /// What is wrong with it.
        error: IndexError,
    },
    /// The system refused to open, map or list a file.
    #[error("{file}: expected a readable file, got {got}")]
    Io {
        /// The file.
        file: String,
        /// The system's message.
        got: String,
    },
    /// A path names neither a file nor a directory of the expected kind.
    #[error("{file}: expected a regular file, got {got}")]
    NotAFile {
        /// The path.
        file: String,
        /// What lies there.
        got: &'static str,
    },
    /// The file changed its size while it was being mapped.
    #[error("{file}: changed while it was being opened: expected {expected} bytes, got {got}")]
    FileChanged {
        /// The file.
        file: String,
        /// Bytes after mapping.
        got: u64,
        /// Bytes before mapping.
        expected: u64,
    },
    /// The first bytes belong to no format that can be loaded.
    #[error("{file}: expected a GGUF or safetensors file, got one that starts with {got:02x?}")]
    UnknownFile {
        /// The file.
        file: String,
        /// Its first bytes, at most eight.
        got: Vec<u8>,
    },
    /// The weights are pickled, and loading a pickle may run code.
    #[error(
        "{file}: expected safetensors or GGUF weights, got pickled weights ({got}), which are never loaded because they \
         can run code; save the model with save_pretrained(..., safe_serialization=True) or convert it to GGUF"
    )]
    Pickle {
        /// The file or directory.
        file: String,
        /// The pickled files.
        got: String,
    },
    /// A directory holds no weights.
    #[error("{directory}: expected model.safetensors or model.safetensors.index.json, got {got}")]
    NoWeights {
        /// The directory.
        directory: String,
        /// What it holds instead.
        got: String,
    },
    /// A checkpoint lacks a file it needs.
    #[error("{directory}: expected {expected}, got no such file")]
    MissingFile {
        /// The directory.
        directory: String,
        /// The file.
        expected: String,
    },
    /// A file of suffixes for speculation is damaged.
    #[error("{file}: expected {expected}, got {got}")]
    Suffixes {
        /// The file.
        file: String,
        /// What a sound file has there.
        expected: &'static str,
        /// What was found.
        got: String,
    },
    /// A JSON file beside the weights does not parse.
    #[error("{file}: expected a JSON object, got {got}")]
    Json {
        /// The file.
        file: String,
        /// The parser's message, or the kind of value.
        got: String,
    },
    /// A JSON file beside the weights is larger than any real one.
    #[error("{file}: expected at most {expected} {unit}, got {got}")]
    JsonSize {
        /// The file.
        file: String,
        /// `bytes` or `values`.
        unit: &'static str,
        /// Its size.
        got: u64,
        /// The limit.
        expected: u64,
    },
    /// A configuration value, from GGUF metadata or `config.json`, has the wrong type or an impossible value.
    #[error("configuration key {key}: expected {expected}, got {got}")]
    Config {
        /// The key.
        key: String,
        /// The value found.
        got: String,
        /// What would be accepted.
        expected: String,
    },
    /// A configuration key is absent.
    #[error("configuration key {key}: expected {expected}, got nothing")]
    MissingKey {
        /// The key.
        key: String,
        /// What it should hold.
        expected: String,
    },
    /// The checkpoint lacks a tensor.
    #[error("tensor {tensor}: expected shape {expected:?}, got no such tensor")]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// Its shape, outermost first.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor {tensor}: expected shape {expected:?}, got {got:?}")]
    TensorShape {
        /// The tensor.
        tensor: String,
        /// Its shape in the file, outermost first.
        got: Vec<usize>,
        /// The shape the configuration asks for.
        expected: Vec<usize>,
    },
    /// A vector (norm, bias) holds NaN or infinity.
    #[error("tensor {tensor}: expected finite numbers, got NaN or infinity at index {index}")]
    NonFinite {
        /// The tensor.
        tensor: String,
        /// Its first such element.
        index: usize,
    },
    /// A matrix can't be packed exactly: NaN or infinite scales or weights.
    #[error("tensor {tensor}: {reason}")]
    Pack {
        /// The tensor.
        tensor: String,
        /// What the packer got and expected.
        reason: String,
    },
    /// The tokenizer is malformed.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template is malformed, hostile, or refuses the messages.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A tensor's type is known but cannot be read; the file itself is well formed.
    #[error("tensor {tensor}: expected one of {expected}, got {got}")]
    UnsupportedType {
        /// The tensor.
        tensor: String,
        /// Its type.
        got: &'static str,
        /// The types that can be read.
        expected: &'static str,
    },
}

impl FormatError {
    /// Whether the file is well formed but uses something that cannot be read yet.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, FormatError::UnsupportedType { .. } | FormatError::Pickle { .. })
    }
}

/// One way for a GGUF file to be malformed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum GgufError {
    /// The file ends inside a field.
    #[error("truncated at byte {at}: expected {expected} bytes of {field}, got {got}")]
    Truncated {
        /// Offset of the field.
        at: u64,
        /// The field.
        field: &'static str,
        /// Bytes that are left.
        got: u64,
        /// Bytes of the field.
        expected: u64,
    },
    /// The first four bytes are not `GGUF`.
    #[error("expected the magic \"GGUF\", got {got:02x?}")]
    Magic {
        /// The first bytes.
        got: [u8; 4],
    },
    /// A version other than 2 and 3.
    #[error("expected GGUF version 2 or 3, got {got}")]
    Version {
        /// The version.
        got: u32,
    },
    /// A file of the other byte order.
    #[error("expected a little-endian file, got a big-endian one (version bytes {got:02x?})")]
    BigEndian {
        /// The version field.
        got: [u8; 4],
    },
    /// More tensors than the file can describe.
    #[error("expected at most {expected} tensors, got {got}")]
    TensorCount {
        /// The declared count.
        got: u64,
        /// The most that fit in the rest of the file, or the limit.
        expected: u64,
    },
    /// More metadata keys than the file can hold.
    #[error("expected at most {expected} metadata keys, got {got}")]
    KeyCount {
        /// The declared count.
        got: u64,
        /// The most that fit in the rest of the file, or the limit.
        expected: u64,
    },
    /// A key longer than the format allows.
    #[error("metadata key {index}: expected a length of at most {expected} bytes, got {got}")]
    KeyLength {
        /// Position of the key.
        index: u64,
        /// The declared length.
        got: u64,
        /// The limit.
        expected: u64,
    },
    /// A key without characters.
    #[error("metadata key {index}: expected a name, got an empty one")]
    EmptyKey {
        /// Position of the key.
        index: u64,
    },
    /// A key that is not UTF-8.
    #[error("metadata key {index}: expected UTF-8, got {got:?}")]
    KeyEncoding {
        /// Position of the key.
        index: u64,
        /// The key, with replacement characters.
        got: String,
    },
    /// A key that occurs twice.
    #[error("metadata key {key}: expected it once, got it twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A value type that does not exist.
    #[error("metadata key {key}: expected a value type from 0 to 12, got {got}")]
    ValueType {
        /// The key.
        key: String,
        /// The type id.
        got: u32,
    },
    /// A string that is longer than the rest of the file.
    #[error("metadata key {key}: expected a string of at most {expected} bytes, got {got}")]
    StringLength {
        /// The key.
        key: String,
        /// The declared length.
        got: u64,
        /// Bytes that are left.
        expected: u64,
    },
    /// An array that is longer than the rest of the file.
    #[error("metadata key {key}: expected an array of at most {expected} elements, got {got}")]
    ArrayLength {
        /// The key.
        key: String,
        /// The declared length.
        got: u64,
        /// The most elements that fit in the rest of the file.
        expected: u64,
    },
    /// Arrays nested too deep.
    #[error("metadata key {key}: expected arrays nested at most {expected} deep, got {got}")]
    ArrayDepth {
        /// The key.
        key: String,
        /// The depth reached.
        got: u32,
        /// The limit.
        expected: u32,
    },
    /// A boolean that is neither 0 nor 1.
    #[error("metadata key {key}: expected a boolean of 0 or 1, got {got}")]
    Boolean {
        /// The key.
        key: String,
        /// The byte.
        got: u8,
    },
    /// `general.alignment` is not a power of two.
    #[error("general.alignment: expected a power of two, got {got}")]
    Alignment {
        /// The value.
        got: u32,
    },
    /// `general.alignment` has another type than u32.
    #[error("general.alignment: expected a u32, got {got}")]
    AlignmentType {
        /// The value.
        got: String,
    },
    /// A tensor name longer than the format allows.
    #[error("tensor {index}: expected a name of at most {expected} bytes, got {got}")]
    NameLength {
        /// Position of the tensor.
        index: u64,
        /// The declared length.
        got: u64,
        /// The limit.
        expected: u64,
    },
    /// A tensor name that is not UTF-8.
    #[error("tensor {index}: expected a UTF-8 name, got {got:?}")]
    NameEncoding {
        /// Position of the tensor.
        index: u64,
        /// The name, with replacement characters.
        got: String,
    },
    /// A tensor name that occurs twice.
    #[error("tensor {tensor}: expected it once, got it twice")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
    },
    /// Too many dimensions.
    #[error("tensor {tensor}: expected at most {expected} dimensions, got {got}")]
    Dimensions {
        /// The tensor.
        tensor: String,
        /// The declared count.
        got: u32,
        /// The limit.
        expected: u32,
    },
    /// A dimension that is negative as a signed number.
    #[error("tensor {tensor}: expected dimension {dimension} between 0 and 2^63 - 1, got {got}")]
    NegativeDimension {
        /// The tensor.
        tensor: String,
        /// Which dimension, innermost first.
        dimension: usize,
        /// The value, read as signed.
        got: i64,
    },
    /// The number of elements overflows.
    #[error("tensor {tensor}: expected fewer than 2^63 elements, got shape {got:?}")]
    Elements {
        /// The tensor.
        tensor: String,
        /// The shape, outermost first.
        got: Vec<u64>,
    },
    /// The number of bytes overflows.
    #[error("tensor {tensor}: expected fewer than 2^64 bytes, got {got} elements of {kind}")]
    Bytes {
        /// The tensor.
        tensor: String,
        /// Its elements.
        got: u64,
        /// Its type.
        kind: &'static str,
    },
    /// A type id that does not exist.
    #[error("tensor {tensor}: expected a known tensor type, got {got}")]
    TensorType {
        /// The tensor.
        tensor: String,
        /// The type id.
        got: u32,
    },
    /// A row that is no whole number of blocks.
    #[error("tensor {tensor}: expected rows of a multiple of {expected} elements for {kind}, got {got}")]
    RowLength {
        /// The tensor.
        tensor: String,
        /// Its type.
        kind: &'static str,
        /// Elements of a row.
        got: u64,
        /// Elements of a block.
        expected: u64,
    },
    /// An offset off the alignment.
    #[error("tensor {tensor}: expected an offset that is a multiple of {expected}, got {got}")]
    OffsetAlignment {
        /// The tensor.
        tensor: String,
        /// The offset in the data section.
        got: u64,
        /// The alignment.
        expected: u64,
    },
    /// The end of a tensor overflows.
    #[error("tensor {tensor}: expected an end below 2^64, got {got} bytes at offset {offset}")]
    EndOverflow {
        /// The tensor.
        tensor: String,
        /// Its offset in the data section.
        offset: u64,
        /// Its bytes.
        got: u64,
    },
    /// A tensor reaches past the end of the file.
    #[error("tensor {tensor}: expected it to end by byte {expected}, the end of the file, got an end at {got}")]
    Outside {
        /// The tensor.
        tensor: String,
        /// Its end in the file.
        got: u64,
        /// The size of the file.
        expected: u64,
    },
    /// Two tensors share bytes.
    #[error("tensor {tensor}: expected a start at or after byte {expected}, where {other} ends, got {got}")]
    Overlap {
        /// The tensor.
        tensor: String,
        /// The tensor it overlaps.
        other: String,
        /// Its start in the file.
        got: u64,
        /// The end of the other.
        expected: u64,
    },
    /// A part of a split file whose own name does not say so.
    #[error("split.count is {count}: expected a file named ...-{part:05}-of-{count:05}.gguf, got {got}")]
    SplitName {
        /// The declared number of parts.
        count: u64,
        /// The declared part, from 1.
        part: u64,
        /// The file's name.
        got: String,
    },
    /// A part of a split file that contradicts the first.
    #[error("{key}: expected {expected}, got {got}")]
    Split {
        /// The metadata key.
        key: &'static str,
        /// The value or sum found.
        got: u64,
        /// The value the other parts ask for.
        expected: u64,
    },
}

/// One way for a safetensors file to be malformed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SafetensorsError {
    /// The file is too short for the header's length.
    #[error("expected at least 8 bytes, got {got}")]
    Truncated {
        /// Bytes of the file.
        got: u64,
    },
    /// The header is larger than the format allows.
    #[error("expected a header of at most {expected} bytes, got {got}")]
    HeaderTooLarge {
        /// The declared length.
        got: u64,
        /// The limit.
        expected: u64,
    },
    /// The header reaches past the end of the file.
    #[error("expected a header of at most {expected} bytes, which the file holds, got {got}")]
    HeaderOutside {
        /// The declared length.
        got: u64,
        /// Bytes behind the length field.
        expected: u64,
    },
    /// The header does not start with `{`.
    #[error("expected the header to start with '{{', got {got:?}")]
    HeaderStart {
        /// The first byte, or nothing.
        got: Option<char>,
    },
    /// The header is not the JSON it should be.
    #[error("header: expected {{name: {{dtype, shape, data_offsets}}}}, got {got}")]
    Json {
        /// The parser's message.
        got: String,
    },
    /// A string longer than any real one.
    #[error("header: expected strings of at most {expected} bytes, got {got}")]
    StringLength {
        /// Bytes of the longest string.
        got: u64,
        /// The limit.
        expected: u64,
    },
    /// A name that occurs twice.
    #[error("{name}: expected it once in the header, got it twice")]
    Duplicate {
        /// The tensor, or `__metadata__`, or one of its keys.
        name: String,
    },
    /// More tensors, or metadata entries, than any real file has.
    #[error("expected at most {expected} {unit}, got more")]
    Count {
        /// `tensors` or `metadata entries`.
        unit: &'static str,
        /// The limit.
        expected: usize,
    },
    /// A name longer than any real one.
    #[error("tensor {tensor}...: expected a name of at most {expected} bytes, got {got}")]
    NameLength {
        /// The start of the name.
        tensor: String,
        /// Bytes of the name.
        got: usize,
        /// The limit.
        expected: usize,
    },
    /// Too many dimensions.
    #[error("tensor {tensor}: expected at most {expected} dimensions, got more")]
    Dimensions {
        /// The tensor.
        tensor: String,
        /// The limit.
        expected: usize,
    },
    /// A type that does not exist.
    #[error("tensor {tensor}: expected a safetensors dtype, got {got:?}")]
    TensorType {
        /// The tensor.
        tensor: String,
        /// The dtype, shortened.
        got: String,
    },
    /// The size overflows.
    #[error("tensor {tensor}: expected fewer than 2^64 bits, got shape {got:?}")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The shape.
        got: Vec<u64>,
    },
    /// A sub-byte tensor that does not end at a byte.
    #[error("tensor {tensor}: expected a whole number of bytes, got {got} bits")]
    PartialByte {
        /// The tensor.
        tensor: String,
        /// Bits of the tensor.
        got: u64,
    },
    /// `data_offsets` that run backwards.
    #[error("tensor {tensor}: expected data_offsets [start, end] with start <= end, got [{start}, {got}]")]
    OffsetOrder {
        /// The tensor.
        tensor: String,
        /// The start.
        start: u64,
        /// The end.
        got: u64,
    },
    /// `data_offsets` that disagree with shape and type.
    #[error("tensor {tensor}: expected {expected} bytes from its shape and dtype, got {got} from its data_offsets")]
    Size {
        /// The tensor.
        tensor: String,
        /// Bytes by the offsets.
        got: u64,
        /// Bytes by shape and type.
        expected: u64,
    },
    /// A hole before a tensor, or an overlap.
    #[error("tensor {tensor}: expected it to start at {expected}, where the one before it ends, got {got}")]
    NotContiguous {
        /// The tensor.
        tensor: String,
        /// Its start.
        got: u64,
        /// The end of the tensor before it, or 0.
        expected: u64,
    },
    /// The tensors do not fill the rest of the file exactly.
    #[error("expected {expected} bytes of data behind the header, got {got}")]
    DataLength {
        /// Bytes behind the header.
        got: u64,
        /// The end of the last tensor.
        expected: u64,
    },
}

/// One way for `model.safetensors.index.json` to be wrong.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum IndexError {
    /// The index is not the JSON it should be.
    #[error("expected {{\"weight_map\": {{tensor: shard}}}}, got {got}")]
    Json {
        /// The parser's message.
        got: String,
    },
    /// The index is larger than any real one.
    #[error("expected at most {expected} {unit}, got {got}")]
    Size {
        /// `bytes`, `tensors` or `shards`.
        unit: &'static str,
        /// Its size.
        got: u64,
        /// The limit.
        expected: u64,
    },
    /// A tensor that is mapped twice.
    #[error("tensor {tensor}: expected it once in weight_map, got it twice")]
    Duplicate {
        /// The tensor.
        tensor: String,
    },
    /// A shard name that is more than a file name.
    #[error("expected the plain name of a .safetensors file in the same directory, got {got:?}")]
    ShardName {
        /// The name.
        got: String,
    },
    /// A shard that is not there.
    #[error("expected the shard {shard}, got no such file")]
    MissingShard {
        /// The shard.
        shard: String,
    },
    /// A tensor that its shard does not hold.
    #[error("tensor {tensor}: expected it in {expected}, got {got}")]
    Misplaced {
        /// The tensor.
        tensor: String,
        /// Where it is, in words.
        got: String,
        /// The place the index names, in words.
        expected: String,
    },
}
