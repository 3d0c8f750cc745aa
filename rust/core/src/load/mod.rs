//! From files to numbers: model files, tokenizers and chat templates. Any bytes load or give a typed error.

pub mod error;
