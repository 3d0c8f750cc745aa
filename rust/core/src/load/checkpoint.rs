//! A checkpoint: tensors by name and the metadata that describes the model, from one of the formats.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farthing_kernels::format::{FloatType, Format, RowCodes};

use super::blocks::{blocks, widen};
use super::error::{FormatError, GgufError, IndexError};
use super::gguf::{self, Gguf};
use super::json::{LONGEST_STRING, survey};
use super::kind::{SUPPORTED, TensorKind};
use super::mapped::Mapped;
use super::value::Table;
use super::{index, safetensors};

/// Values a JSON file beside the weights may hold; each costs up to a few hundred bytes once parsed.
const MOST_JSON_VALUES: u64 = 120_000;
const PICKLES: [&str; 4] = ["bin", "pt", "pth", "ckpt"];

/// What a checkpoint says about its model.
#[derive(Clone, Debug)]
pub enum Metadata {
    /// Keys and values of a GGUF file; of the first part when it is split.
    Gguf(Table),
    /// The JSON files of a Hugging Face directory.
    HuggingFace(Box<HuggingFace>),
}

/// The JSON files of a Hugging Face directory; each is an object.
#[derive(Clone, Debug)]
pub struct HuggingFace {
    /// Where the files lie: `tokenizer.json` and chat templates are read from here.
    pub directory: PathBuf,
    /// `config.json`.
    pub config: serde_json::Value,
    /// `generation_config.json`.
    pub generation_config: Option<serde_json::Value>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<serde_json::Value>,
}

/// A tensor's place.
pub(super) struct Tensor {
    pub(super) name: Box<str>,
    pub(super) kind: TensorKind,
    /// Outermost first.
    pub(super) shape: Box<[usize]>,
    /// Which of the checkpoint's files.
    pub(super) file: u32,
    /// Its bytes in that file.
    pub(super) range: Range<usize>,
}

/// An open model: mapped files, the tensors in them and the metadata.
///
/// ```no_run
/// use farthing::load::Checkpoint;
/// let checkpoint = Checkpoint::open("model.gguf".as_ref())?;
/// for tensor in checkpoint.tensors() {
///     println!("{} {} {:?}", tensor.name(), tensor.kind(), tensor.shape());
/// }
/// # Ok::<(), farthing::load::FormatError>(())
/// ```
pub struct Checkpoint {
    /// What the checkpoint says about its model.
    pub metadata: Metadata,
    files: Vec<Arc<Mapped>>,
    tensors: Vec<Tensor>,
    /// Positions in `tensors`, sorted by name.
    by_name: Vec<u32>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Checkpoint({} tensors in {} files)", self.tensors.len(), self.files.len())
    }
}

impl Checkpoint {
    /// Opens a GGUF file (any part of a split one), a `.safetensors` file with its `config.json` beside it, or a directory
    /// with `config.json` and `model.safetensors` or `model.safetensors.index.json`. Weights are mapped, not read.
    pub fn open(path: &Path) -> Result<Checkpoint, FormatError> {
        if path.is_dir() {
            return open_directory(path);
        }
        if has_extension(path, &PICKLES) {
            return Err(FormatError::Pickle { file: display(path), got: file_name(path) });
        }
        let file = Arc::new(Mapped::open(path)?);
        if file.starts_with(b"GGUF") || has_extension(path, &["gguf"]) {
            return open_gguf(path, file);
        }
        if has_extension(path, &["safetensors"]) || looks_like_safetensors(&file) {
            let metadata = read_metadata(path.parent().unwrap_or(Path::new("")))?;
            return open_shards(metadata, &[(path.to_path_buf(), file)]);
        }
        Err(unknown(path, &file))
    }

    /// A whole GGUF or safetensors file in memory, told apart by its first bytes. Safetensors get an empty configuration.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Checkpoint, FormatError> {
        let (path, file) = (PathBuf::from("memory"), Arc::new(Mapped::from(bytes)));
        if file.starts_with(b"GGUF") {
            return open_gguf(&path, file);
        }
        if looks_like_safetensors(&file) {
            let config = serde_json::Value::Object(serde_json::Map::new());
            let metadata =
                HuggingFace { directory: PathBuf::new(), config, generation_config: None, tokenizer_config: None };
            return open_shards(metadata, &[(path, file)]);
        }
        Err(unknown(&path, &file))
    }

    /// Builds the index by name; the error is the second of two tensors of one name.
    fn new(metadata: Metadata, files: Vec<Arc<Mapped>>, mut tensors: Vec<Tensor>) -> Result<Checkpoint, Tensor> {
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        let name = |at: u32| &tensors[at as usize].name;
        by_name.sort_by(|&a, &b| name(a).cmp(name(b)));
        let twice = by_name.windows(2).find(|pair| name(pair[0]) == name(pair[1])).map(|pair| pair[1] as usize);
        match twice {
            Some(at) => Err(tensors.swap_remove(at)),
            None => Ok(Checkpoint { metadata, files, tensors, by_name }),
        }
    }

    /// The tensor of this name, as the file spells it.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let found = self.by_name.binary_search_by(|&at| (*self.tensors[at as usize].name).cmp(name)).ok()?;
        Some(self.view(&self.tensors[self.by_name[found] as usize]))
    }

    /// The tensor of this name and shape (outermost first), or an error that names what there is instead.
    pub fn require(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, FormatError> {
        let tensor = self.tensor(name);
        let missing = || FormatError::MissingTensor { tensor: name.to_string(), expected: shape.to_vec() };
        let tensor = tensor.ok_or_else(missing)?;
        if tensor.shape() != shape {
            let (got, expected) = (tensor.shape().to_vec(), shape.to_vec());
            return Err(FormatError::TensorShape { tensor: name.to_string(), got, expected });
        }
        Ok(tensor)
    }

    /// The tensor `name`, whose rows and columns must be these; several dimensions may count the rows, or none.
    pub fn require_rows(&self, name: &str, [rows, columns]: [usize; 2]) -> Result<TensorView<'_>, FormatError> {
        match self.tensor(name) {
            Some(tensor) if (tensor.rows(), tensor.shape().last()) == (rows, Some(&columns)) => Ok(tensor),
            _ => self.require(name, &[rows, columns]),
        }
    }

    /// All tensors, in the order of their data.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        self.tensors.iter().map(|tensor| self.view(tensor))
    }

    /// Bytes of all files.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.len() as u64).sum()
    }

    /// The first of its files, or the directory of them.
    pub(crate) fn path(&self) -> &Path {
        match &self.metadata {
            Metadata::HuggingFace(files) => &files.directory,
            Metadata::Gguf(_) => self.files.first().map_or(Path::new(""), |file| file.path()),
        }
    }

    /// A line for each file that changes when the file does, without reading the whole of it.
    pub(crate) fn identity(&self) -> String {
        self.files.iter().map(|file| file.identity()).collect()
    }

    fn view<'a>(&'a self, tensor: &'a Tensor) -> TensorView<'a> {
        TensorView { tensor, file: &self.files[tensor.file as usize] }
    }
}

/// A tensor in its file.
///
/// A row is the innermost dimension; rows are numbered through all outer ones, so that a matrix of shape `(n, k)` has `n`
/// rows of `k` columns. Values are as stored: a scale that is infinite or not a number is passed on, and packing refuses it.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    tensor: &'a Tensor,
    file: &'a Mapped,
}

impl<'a> TensorView<'a> {
    /// The name as the file spells it.
    pub fn name(&self) -> &'a str {
        &self.tensor.name
    }

    /// The dimensions, outermost first; `(n, k)` for a matrix that maps `k` inputs to `n` outputs.
    pub fn shape(&self) -> &'a [usize] {
        &self.tensor.shape
    }

    /// How elements are stored.
    pub fn kind(&self) -> TensorKind {
        self.tensor.kind
    }

    /// Bytes in the file.
    pub fn nbytes(&self) -> usize {
        self.tensor.range.len()
    }

    /// Number of rows: the product of all dimensions but the innermost.
    pub fn rows(&self) -> usize {
        if self.tensor.range.is_empty() { 0 } else { self.tensor.shape.iter().rev().skip(1).product() }
    }

    /// All elements of a tensor of signed integers (I32 or I64), as tables of tokens have.
    pub fn integers(&self) -> Result<Vec<i64>, FormatError> {
        let bytes = &self.file[self.tensor.range.clone()];
        match self.kind().name() {
            "I64" => Ok(bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()),
            "I32" => Ok(bytes.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes).into()).collect()),
            _ => Err(self.unsupported("I32 and I64")),
        }
    }

    /// Drops the tensor's pages from memory once it is packed; reading it again is correct but fetches them anew.
    pub fn release(&self) {
        self.file.release(self.tensor.range.clone());
    }

    pub(super) fn row_bytes(&self, i: usize) -> &'a [u8] {
        assert!(i < self.rows(), "row {i} of {}, which has {}", self.name(), self.rows());
        let bytes = self.nbytes() / self.rows();
        let start = self.tensor.range.start + i * bytes;
        &self.file[start..start + bytes]
    }

    fn unsupported(&self, expected: &'static str) -> FormatError {
        FormatError::UnsupportedType { tensor: self.name().to_string(), got: self.kind().name(), expected }
    }
}

/// Rows of weights, wherever a file has them.
pub trait Rows: Sync {
    /// Elements of a row.
    fn columns(&self) -> usize;

    /// The packed format that holds them exactly, in the fewest bytes; for quantised activations.
    fn natural_format(&self) -> Result<Format, FormatError>;

    /// The packed format that holds them exactly and also meets activations that are not quantised.
    fn exact_format(&self) -> Result<Format, FormatError>;

    /// For ternary rows with one scale each, the format that stores it once; else nothing.
    fn ternary_rows(&self) -> Option<Format> {
        None
    }

    /// Row `i` as f32. `out: (columns,)`
    fn row(&self, i: usize, out: &mut [f32]) -> Result<(), FormatError>;

    /// Codes, scales and offsets of row `i` in one of the formats above; only the fields that it has are set.
    fn codes(&self, i: usize, format: Format, out: &mut RowCodes) -> Result<(), FormatError>;
}

impl Rows for TensorView<'_> {
    fn columns(&self) -> usize {
        self.tensor.shape.last().copied().unwrap_or(1)
    }

    fn natural_format(&self) -> Result<Format, FormatError> {
        match (float(self.kind()), blocks(self.kind())) {
            (Some(kind), _) => Ok(Format::Float(kind)),
            (None, Some(blocks)) => Ok(blocks.format()),
            (None, None) => Err(self.unsupported(SUPPORTED)),
        }
    }

    fn exact_format(&self) -> Result<Format, FormatError> {
        match blocks(self.kind()) {
            Some(blocks) => Ok(blocks.exact_format()),
            None => self.natural_format(),
        }
    }

    /// Reads all scales.
    fn ternary_rows(&self) -> Option<Format> {
        let blocks = blocks(self.kind()).filter(|_| self.columns() <= 1 << 16)?;
        let format = blocks.ternary_rows()?;
        (0..self.rows()).all(|i| blocks.has_one_scale(self.row_bytes(i))).then_some(format)
    }

    /// Bit for bit what ggml's reference gives.
    ///
    /// # Panics
    /// If `i` is not below [`rows`](TensorView::rows) or `out` has another length than [`columns`](TensorView::columns).
    fn row(&self, i: usize, out: &mut [f32]) -> Result<(), FormatError> {
        assert_eq!(out.len(), self.columns(), "row of {}", self.name());
        match (float(self.kind()), blocks(self.kind())) {
            (Some(kind), _) => widen(kind, self.row_bytes(i), out),
            (None, Some(blocks)) => blocks.dequantize(self.row_bytes(i), out),
            (None, None) => return Err(self.unsupported(SUPPORTED)),
        }
        Ok(())
    }

    /// An error when the tensor is not of an integer type.
    ///
    /// # Panics
    /// If `i` is not below [`rows`](TensorView::rows).
    fn codes(&self, i: usize, format: Format, out: &mut RowCodes) -> Result<(), FormatError> {
        let blocks = blocks(self.kind()).ok_or_else(|| self.unsupported("an integer type"))?;
        blocks.codes(self.row_bytes(i), format, out);
        Ok(())
    }
}

impl std::fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {:?}", self.name(), self.kind(), self.shape())
    }
}

fn float(kind: TensorKind) -> Option<FloatType> {
    match kind {
        TensorKind::F32 => Some(FloatType::F32),
        TensorKind::F16 => Some(FloatType::F16),
        TensorKind::Bf16 => Some(FloatType::Bf16),
        _ => None,
    }
}

fn display(path: &Path) -> String {
    path.display().to_string()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|found| extensions.iter().any(|extension| found.eq_ignore_ascii_case(extension)))
}

/// A header length in bounds, then `{`.
fn looks_like_safetensors(bytes: &[u8]) -> bool {
    bytes.get(8) == Some(&b'{')
}

/// The error for a file of neither format.
fn unknown(path: &Path, file: &Mapped) -> FormatError {
    // A zip archive, as torch.save writes it, or a bare pickle of protocol 2 to 5.
    if file.starts_with(b"PK\x03\x04") || (file.first() == Some(&0x80) && matches!(file.get(1), Some(2..=5))) {
        return FormatError::Pickle { file: display(path), got: file_name(path) };
    }
    FormatError::UnknownFile { file: display(path), got: file[..file.len().min(8)].to_vec() }
}

fn open_gguf(path: &Path, file: Arc<Mapped>) -> Result<Checkpoint, FormatError> {
    let wrap = |path: &Path, error| FormatError::Gguf { file: display(path), error };
    let first = gguf::parse(&file, 0).map_err(|error| wrap(path, error))?;
    let count: u64 = first.metadata.read("split.count")?.unwrap_or(1);
    if count <= 1 {
        return Checkpoint::new(Metadata::Gguf(first.metadata), vec![file], first.tensors)
            .map_err(|twice| wrap(path, GgufError::DuplicateTensor { tensor: twice.name.into() }));
    }
    let part: u64 = first.metadata.require("split.no")?;
    let name = file_name(path);
    let Some(prefix) = name.strip_suffix(&format!("-{:05}-of-{count:05}.gguf", part.saturating_add(1))) else {
        return Err(wrap(path, GgufError::SplitName { count, part: part.saturating_add(1), got: name }));
    };
    let mut metadata = None;
    let (mut files, mut paths, mut tensors) = (Vec::new(), Vec::new(), Vec::new());
    for part in 0..count {
        let name = format!("{prefix}-{:05}-of-{count:05}.gguf", part + 1);
        let path = path.with_file_name(&name);
        if !path.exists() {
            let directory = path.parent().map(display).unwrap_or_default();
            return Err(FormatError::MissingFile { directory, expected: name });
        }
        let file = Arc::new(Mapped::open(&path)?);
        let Gguf { metadata: table, tensors: mut found } =
            gguf::parse(&file, part as u32).map_err(|error| wrap(&path, error))?;
        for (key, expected) in [("split.count", count), ("split.no", part)] {
            let got = table.require(key)?;
            if got != expected {
                return Err(wrap(&path, GgufError::Split { key, got, expected }));
            }
        }
        metadata.get_or_insert(table);
        tensors.append(&mut found);
        files.push(file);
        paths.push(path);
    }
    let metadata = metadata.unwrap_or_default();
    let got = tensors.len() as u64;
    let expected = metadata.read("split.tensors.count")?.unwrap_or(got);
    if got != expected {
        return Err(wrap(&paths[0], GgufError::Split { key: "split.tensors.count", got, expected }));
    }
    Checkpoint::new(Metadata::Gguf(metadata), files, tensors)
        .map_err(|twice| wrap(&paths[twice.file as usize], GgufError::DuplicateTensor { tensor: twice.name.into() }))
}

fn open_directory(directory: &Path) -> Result<Checkpoint, FormatError> {
    let (single, sharded) = (directory.join("model.safetensors"), directory.join("model.safetensors.index.json"));
    if single.exists() {
        let file = Arc::new(Mapped::open(&single)?);
        return open_shards(read_metadata(directory)?, &[(single, file)]);
    }
    if !sharded.exists() {
        return Err(no_weights(directory));
    }
    let wrap = |error| FormatError::Index { file: display(&sharded), error };
    let index = index::parse(&Mapped::open(&sharded)?).map_err(wrap)?;
    let mut files = Vec::with_capacity(index.shards.len());
    for shard in &index.shards {
        let path = directory.join(shard);
        if !path.exists() {
            return Err(wrap(IndexError::MissingShard { shard: shard.clone() }));
        }
        let file = Arc::new(Mapped::open(&path)?);
        files.push((path, file));
    }
    let metadata = read_metadata(directory)?;
    let tensors = parse_shards(&files)?;
    // After this no name occurs twice: each is in the one shard the index names, and once there.
    index.check(&tensors).map_err(wrap)?;
    assemble(metadata, &files, tensors)
}

/// One safetensors file, which is its own index.
fn open_shards(metadata: HuggingFace, files: &[(PathBuf, Arc<Mapped>)]) -> Result<Checkpoint, FormatError> {
    assemble(metadata, files, parse_shards(files)?)
}

fn parse_shards(files: &[(PathBuf, Arc<Mapped>)]) -> Result<Vec<Tensor>, FormatError> {
    let mut tensors = Vec::new();
    for (number, (path, file)) in files.iter().enumerate() {
        let wrap = |error| FormatError::Safetensors { file: display(path), error };
        tensors.append(&mut safetensors::parse(file, number as u32).map_err(wrap)?);
    }
    Ok(tensors)
}

fn assemble(
    metadata: HuggingFace,
    files: &[(PathBuf, Arc<Mapped>)],
    tensors: Vec<Tensor>,
) -> Result<Checkpoint, FormatError> {
    let maps = files.iter().map(|(_, file)| file.clone()).collect();
    Checkpoint::new(Metadata::HuggingFace(Box::new(metadata)), maps, tensors).map_err(|twice| {
        FormatError::Safetensors {
            file: display(&files[twice.file as usize].0),
            error: super::error::SafetensorsError::Duplicate { name: twice.name.into() },
        }
    })
}

/// The error for a directory without safetensors: pickles, or what else lies there.
fn no_weights(directory: &Path) -> FormatError {
    let list = || -> std::io::Result<Vec<PathBuf>> {
        std::fs::read_dir(directory)?.take(1000).map(|entry| Ok(entry?.path())).collect()
    };
    let mut paths = match list() {
        Ok(paths) => paths,
        Err(error) => return FormatError::Io { file: display(directory), got: error.to_string() },
    };
    paths.sort();
    let names = |paths: &mut dyn Iterator<Item = &PathBuf>| {
        paths.take(8).map(|path| file_name(path)).collect::<Vec<_>>().join(", ")
    };
    let pickles = names(&mut paths.iter().filter(|path| has_extension(path, &PICKLES)));
    if !pickles.is_empty() {
        return FormatError::Pickle { file: display(directory), got: pickles };
    }
    let got = if paths.is_empty() { "an empty directory".to_string() } else { names(&mut paths.iter()) };
    FormatError::NoWeights { directory: display(directory), got }
}

fn read_metadata(directory: &Path) -> Result<HuggingFace, FormatError> {
    let config = read_json(directory, "config.json")?.ok_or_else(|| FormatError::MissingFile {
        directory: display(directory),
        expected: "config.json".to_string(),
    })?;
    Ok(HuggingFace {
        directory: directory.to_path_buf(),
        config,
        generation_config: read_json(directory, "generation_config.json")?,
        tokenizer_config: read_json(directory, "tokenizer_config.json")?,
    })
}

/// The JSON object in `name`, nothing when there is no such file.
fn read_json(directory: &Path, name: &str) -> Result<Option<serde_json::Value>, FormatError> {
    let path = directory.join(name);
    if !path.exists() {
        return Ok(None);
    }
    let file = || display(&path);
    let bytes = Mapped::open(&path)?;
    let got = bytes.len() as u64;
    if got > LONGEST_STRING {
        return Err(FormatError::JsonSize { file: file(), unit: "bytes", got, expected: LONGEST_STRING });
    }
    let got = survey(&bytes).values;
    if got > MOST_JSON_VALUES {
        return Err(FormatError::JsonSize { file: file(), unit: "values", got, expected: MOST_JSON_VALUES });
    }
    match serde_json::from_slice(&bytes) {
        Ok(value @ serde_json::Value::Object(_)) => Ok(Some(value)),
        Ok(_) => Err(FormatError::Json { file: file(), got: "another JSON value".to_string() }),
        Err(error) => Err(FormatError::Json { file: file(), got: error.to_string() }),
    }
}
