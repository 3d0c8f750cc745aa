//! Gemma 3 text models: norms on both sides of attention and feed-forward, five sliding layers to a full one, two rotary
//! embeddings, scaled embeddings, norm weights stored as `w - 1`.

use super::config::{BlockSpec, Config, Reader};
use super::mixer::attention::{AttentionSpec, HeadNorm};
use super::names::{Names, Norm, Part};
use super::rope;
use crate::error::Error;

const NAMES: Names = Names { hugging_face: &[(Part::Norm(Norm::FeedForward), "pre_feedforward_layernorm")], gguf: &[] };

/// Describes a model of type `gemma3_text`.
pub(super) fn describe(reader: &Reader<'_>) -> Result<Config, Error> {
    if reader.flag("use_bidirectional_attention", false)? {
        return Err(Error::unsupported("use_bidirectional_attention", "causal Gemma 3 text models load"));
    }
    let mut shape = reader.shape()?;
    shape.head_dim = reader.count("head_dim", Some(256), 1 << 12)?;
    let mut attention = shape.attention();
    let feed_forward = shape.dense(reader.activation("hidden_activation", "gelu_pytorch_tanh")?);
    attention.head_norm = Some(HeadNorm::Each);
    attention.qkv_bias = reader.flag("attention_bias", false)?;
    attention.output_bias = attention.qkv_bias;
    attention.scale = 1.0 / (reader.positive("query_pre_attn_scalar", Some(256.0))? as f32).sqrt();
    attention.softcap = reader.optional_positive("attn_logit_softcapping")?.map(|cap| cap as f32);
    let window = reader.count("sliding_window", Some(4096), 1 << 28)?;
    let pattern = reader.count("sliding_window_pattern", Some(6), 4096)?;
    let by_pattern = || (0..shape.layers).map(|layer| (layer + 1) % pattern != 0).collect();
    let sliding: Vec<bool> = reader.sliding_layers(shape.layers)?.unwrap_or_else(by_pattern);
    let ropes = vec![
        rope::read(reader, "full_attention", shape.head_dim, shape.context, 1_000_000.0)?,
        rope::read(reader, "sliding_attention", shape.head_dim, shape.context, 10_000.0)?,
    ];
    let blocks = sliding
        .iter()
        .map(|&sliding| {
            let window = sliding.then_some(window);
            let attention = AttentionSpec { window, rope: Some(usize::from(sliding)), ..attention.clone() };
            BlockSpec { sandwich: true, ..BlockSpec::dense(attention, feed_forward.clone()) }
        })
        .collect();
    let mut config = shape.config("gemma3_text", reader.flag("tie_word_embeddings", true)?, ropes, blocks);
    config.embedding_scale = (config.hidden as f32).sqrt();
    config.norm_offset = 1.0;
    config.names = NAMES;
    config.final_softcap = reader.optional_positive("final_logit_softcapping")?.map(|cap| cap as f32);
    Ok(config)
}
