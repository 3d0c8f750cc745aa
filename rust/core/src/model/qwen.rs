//! Qwen2 (biases on queries, keys and values) and dense Qwen3 (norms over each head of queries and keys).

use super::config::{BlockSpec, Config, Reader};
use super::mixer::attention::{AttentionSpec, HeadNorm};
use super::rope;
use crate::error::Error;

/// Describes a model of type `qwen2` or `qwen3`.
pub(super) fn describe(reader: &Reader<'_>, family: &str) -> Result<Config, Error> {
    let mut shape = reader.shape()?;
    if family == "qwen3" {
        shape.head_dim = reader.count("head_dim", Some(128), 1 << 12)?;
    }
    let mut attention = shape.attention();
    let feed_forward = shape.dense(reader.activation("hidden_act", "silu")?);
    if family == "qwen3" {
        attention.head_norm = Some(HeadNorm::Each);
        attention.qkv_bias = reader.flag("attention_bias", false)?;
        attention.output_bias = attention.qkv_bias;
    } else {
        attention.qkv_bias = true;
    }
    let mut sliding = vec![false; shape.layers];
    if reader.flag("use_sliding_window", false)? {
        attention.window = Some(reader.count("sliding_window", Some(4096), 1 << 28)?);
        let full = reader.count("max_window_layers", Some(28), 1 << 20)?;
        let by_depth = (0..shape.layers).map(|layer| layer >= full).collect();
        sliding = reader.sliding_layers(shape.layers)?.unwrap_or(by_depth);
    }
    let blocks = sliding
        .iter()
        .map(|&sliding| {
            let window = attention.window.filter(|_| sliding);
            BlockSpec::dense(AttentionSpec { window, ..attention.clone() }, feed_forward.clone())
        })
        .collect();
    let tied = reader.flag("tie_word_embeddings", false)?;
    Ok(shape.config(family, tied, vec![rope::read(reader, "", shape.head_dim, shape.context, 10_000.0)?], blocks))
}
