//! Llama 2 and 3, SmolLM2 (a Llama), Mistral (a window), SmolLM3 (every fourth layer unrotated).

use super::config::{BlockSpec, Config, Reader};
use super::mixer::attention::AttentionSpec;
use super::rope;
use crate::error::Error;

/// Describes a model of type `llama`, `mistral` or `smollm3`.
pub(super) fn describe(reader: &Reader<'_>, family: &str) -> Result<Config, Error> {
    let shape = reader.shape()?;
    let mut attention = shape.attention();
    let mut feed_forward = shape.dense(reader.activation("hidden_act", "silu")?);
    let mut sliding = vec![false; shape.layers];
    let mut rotated = vec![true; shape.layers];
    match family {
        "mistral" => {
            attention.window = reader.optional_count("sliding_window", 1 << 28)?;
            sliding.fill(attention.window.is_some());
        }
        "smollm3" => {
            attention.qkv_bias = reader.flag("attention_bias", false)?;
            attention.output_bias = attention.qkv_bias;
            feed_forward.bias = reader.flag("mlp_bias", false)?;
            if reader.flag("use_sliding_window", false)? {
                attention.window = reader.optional_count("sliding_window", 1 << 28)?;
                sliding = reader.sliding_layers(shape.layers)?.unwrap_or(sliding);
            }
            let interval = reader.count("no_rope_layer_interval", Some(4), 4096)?;
            let listed = reader.list("no_rope_layers", shape.layers, "0 or 1", |value| match value.as_u64()? {
                0 => Some(false),
                1 => Some(true),
                _ => None,
            })?;
            rotated = listed.unwrap_or_else(|| (0..shape.layers).map(|layer| (layer + 1) % interval != 0).collect());
        }
        _ => {
            attention.qkv_bias = reader.flag("attention_bias", false)?;
            attention.output_bias = attention.qkv_bias;
            feed_forward.bias = reader.flag("mlp_bias", false)?;
        }
    }
    let blocks = sliding
        .iter()
        .zip(&rotated)
        .map(|(&sliding, &rotated)| {
            let window = attention.window.filter(|_| sliding);
            let attention = AttentionSpec { window, rope: rotated.then_some(0), ..attention.clone() };
            BlockSpec::dense(attention, feed_forward.clone())
        })
        .collect();
    let tied = reader.flag("tie_word_embeddings", family == "smollm3")?;
    Ok(shape.config(family, tied, vec![rope::read(reader, "", shape.head_dim, shape.context, 10_000.0)?], blocks))
}
