//! From files to numbers: GGUF, directories of safetensors shards with their `config.json`, tokenizers and chat templates.
//!
//! Any bytes load or give a [`FormatError`]: no panic, no hang, and no more memory than twice the file and 64 MiB.

pub mod blocks;
pub mod checkpoint;
pub mod error;
mod gguf;
mod index;
mod json;
pub mod kind;
mod mapped;
mod mxfp4;
mod safetensors;
pub mod template;
pub mod text;
pub mod tokenizer;
pub mod value;

pub use checkpoint::{Checkpoint, HuggingFace, Metadata, Rows, TensorView};
pub use error::{FormatError, GgufError, IndexError, SafetensorsError};
pub use kind::TensorKind;
pub use mxfp4::Mxfp4Rows;
pub use template::{ChatTemplate, TemplateError, TemplateOptions, Uses};
pub use tokenizer::{Tokenizer, TokenizerError, Vocabulary};
pub use value::{Table, Value};
