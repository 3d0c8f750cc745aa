//! The text side of a checkpoint: its tokenizer and its chat template, from JSON files or from GGUF metadata.

use super::template::{ChatTemplate, TemplateError};
use super::tokenizer::{Tokenizer, Vocabulary};
use super::{Checkpoint, FormatError, HuggingFace, Metadata, Table};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// Largest text file that is read whole.
const MOST_BYTES: u64 = 256 << 20;

/// What turns text into ids and messages into text; either may be missing.
#[derive(Debug)]
pub struct Text {
    /// `None` for checkpoints without a tokenizer: prompts are ids then.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// `None` for models that are no chat models; a template that doesn't compile fails only those who use it.
    pub template: Option<Result<ChatTemplate, TemplateError>>,
    /// The template as it is written.
    pub template_source: Option<String>,
    /// Tokens that end an answer, known even without a tokenizer.
    pub end_tokens: Vec<u32>,
}

impl Text {
    /// Reads what the checkpoint carries.
    pub fn of(checkpoint: &Checkpoint) -> Result<Text, FormatError> {
        let (tokenizer, source, stated) = match &checkpoint.metadata {
            Metadata::Gguf(table) => {
                let tokenizer = vocabulary(table)?.map(Tokenizer::from_vocabulary).transpose()?;
                (tokenizer, table.read::<&str>("tokenizer.chat_template")?.map(str::to_owned), Vec::new())
            }
            Metadata::HuggingFace(files) => (from_files(files)?, template_of(files)?, end_tokens(files)?),
        };
        let end_tokens = if stated.is_empty() {
            tokenizer.as_ref().map_or_else(Vec::new, |tokenizer| tokenizer.eos_ids().to_vec())
        } else {
            stated
        };
        let template = source.as_deref().map(ChatTemplate::new);
        Ok(Text { tokenizer: tokenizer.map(Arc::new), template, template_source: source, end_tokens })
    }
}

/// The vocabulary in GGUF metadata, if there is one.
fn vocabulary(table: &Table) -> Result<Option<Vocabulary>, FormatError> {
    let Some(model) = table.read::<&str>("tokenizer.ggml.model")? else { return Ok(None) };
    let tokens: Vec<&[u8]> = table.require("tokenizer.ggml.tokens")?;
    let id = |key: &str| table.read::<u32>(&format!("tokenizer.ggml.{key}_token_id"));
    let flag = |key: &str| table.read::<bool>(&format!("tokenizer.ggml.{key}"));
    Ok(Some(Vocabulary {
        model: model.to_owned(),
        pre: table.read::<&str>("tokenizer.ggml.pre")?.unwrap_or_default().to_owned(),
        tokens: tokens.iter().map(|token| String::from_utf8_lossy(token).into_owned()).collect(),
        scores: table.read("tokenizer.ggml.scores")?,
        types: table.read("tokenizer.ggml.token_type")?,
        merges: table
            .read::<Vec<&str>>("tokenizer.ggml.merges")?
            .map(|merges| merges.into_iter().map(str::to_owned).collect()),
        bos: id("bos")?,
        eos: id("eos")?,
        eot: id("eot")?,
        eom: id("eom")?,
        pad: id("padding")?,
        unk: id("unknown")?,
        add_bos: flag("add_bos_token")?,
        add_eos: flag("add_eos_token")?,
        add_space_prefix: flag("add_space_prefix")?,
    }))
}

/// The tokenizer of `tokenizer.json`.
fn from_files(files: &HuggingFace) -> Result<Option<Tokenizer>, FormatError> {
    let Some(bytes) = read(&files.directory.join("tokenizer.json"))? else { return Ok(None) };
    Ok(Some(Tokenizer::from_json(&bytes, files.tokenizer_config.as_ref())?))
}

/// `eos_token_id`, one or a list, of `generation_config.json`, else of `config.json`; empty when neither says.
fn end_tokens(files: &HuggingFace) -> Result<Vec<u32>, FormatError> {
    let stated = |json: &Value| json.get("eos_token_id").filter(|value| !value.is_null()).cloned();
    let Some(value) = files.generation_config.as_ref().and_then(stated).or_else(|| stated(&files.config)) else {
        return Ok(Vec::new());
    };
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let list = value.as_array().map_or_else(|| vec![id(&value)], |list| list.iter().map(id).collect());
    let wrong = || FormatError::Config {
        key: "eos_token_id".to_owned(),
        got: value.to_string(),
        expected: "a token id or a list of them".to_owned(),
    };
    list.into_iter().collect::<Option<_>>().ok_or_else(wrong)
}

/// The source of the chat template: a file of its own, or the entry of `tokenizer_config.json`, the one called
/// `default` where there are several.
fn template_of(files: &HuggingFace) -> Result<Option<String>, FormatError> {
    if let Some(bytes) = read(&files.directory.join("chat_template.jinja"))? {
        return Ok(Some(String::from_utf8_lossy(&bytes).into_owned()));
    }
    let Some(entry) = files.tokenizer_config.as_ref().and_then(|config| config.get("chat_template")) else {
        return Ok(None);
    };
    Ok(match entry {
        Value::String(source) => Some(source.clone()),
        Value::Array(list) => {
            let named = list.iter().find(|item| item.get("name").and_then(Value::as_str) == Some("default"));
            named.and_then(|item| item.get("template")?.as_str()).map(str::to_owned)
        }
        _ => None,
    })
}

/// A file's bytes; `None` when there is no such file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, FormatError> {
    let io = |error: std::io::Error| FormatError::Io { file: path.display().to_string(), got: error.to_string() };
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.len() > MOST_BYTES => Err(FormatError::JsonSize {
            file: path.display().to_string(),
            unit: "bytes",
            got: metadata.len(),
            expected: MOST_BYTES,
        }),
        Ok(_) => std::fs::read(path).map(Some).map_err(io),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io(error)),
    }
}
