//! Tests of the file formats: malformed files, odd but valid ones, block decoders and random bytes.

mod blocks;
mod corpus;
mod directories;
mod malformed_gguf;
mod malformed_safetensors;
mod odd;
mod properties;
mod real;
#[path = "../support/mod.rs"]
mod support;
