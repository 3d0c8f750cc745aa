//! Tests of tokenizers, chat templates and the text that comes out while it is generated.

mod corpus;
mod detokenizer;
mod dialects;
mod hostile_templates;
mod malformed_tokenizers;
mod shared;
mod templates;
mod tokenizers;
