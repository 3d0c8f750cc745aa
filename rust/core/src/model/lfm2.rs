//! LFM2 and LFM2.5 (arXiv 2511.23404), dense: short convolutions, and attention in a few layers.

use super::config::{BlockSpec, Config, Reader};
use super::feed_forward::FeedForwardSpec;
use super::mixer::MixerSpec;
use super::mixer::attention::HeadNorm;
use super::mixer::short_convolution::ShortConvolutionSpec;
use super::names::{Names, Norm, Part, Role};
use super::rope;
use crate::error::Error;
use crate::load::FormatError;
use farthing_kernels::activation::Activation;

const NAMES: Names = Names {
    hugging_face: &[
        (Part::Matrix(Role::AttentionOutput), "self_attn.out_proj"),
        (Part::Matrix(Role::Gate), "feed_forward.w1"),
        (Part::Matrix(Role::Up), "feed_forward.w3"),
        (Part::Matrix(Role::Down), "feed_forward.w2"),
        (Part::Norm(Norm::Mixer), "operator_norm"),
        (Part::Norm(Norm::FeedForward), "ffn_norm"),
        (Part::Norm(Norm::Query), "self_attn.q_layernorm"),
        (Part::Norm(Norm::Key), "self_attn.k_layernorm"),
        (Part::Norm(Norm::Final), "model.embedding_norm"),
    ],
    gguf: &[(Part::Norm(Norm::Final), "token_embd_norm")],
};

/// Describes a model of type `lfm2`.
pub(super) fn describe(reader: &Reader<'_>) -> Result<Config, Error> {
    let (layers, most) = (reader.count("num_hidden_layers", None, 4096)?, 1 << 20);
    // Older files say block_ff_dim.
    let stated = reader.count("intermediate_size", Some(12288), most)?;
    let intermediate = adjusted(reader, reader.count("block_ff_dim", Some(stated), most)?)?;
    let mut shape = reader.shape_around(intermediate)?;
    shape.context = reader.count("max_position_embeddings", Some(128_000), 1 << 28)?;
    shape.epsilon = reader.positive("norm_eps", Some(1e-5))? as f32;
    let mut attention = shape.attention();
    attention.head_norm = Some(HeadNorm::Each);
    let convolution = ShortConvolutionSpec {
        channels: shape.hidden,
        taps: reader.count("conv_L_cache", Some(3), 64)?,
        bias: reader.flag("conv_bias", false)?,
    };
    let block = |attends: &bool| BlockSpec {
        mixer: if *attends {
            MixerSpec::Attention(attention.clone())
        } else {
            MixerSpec::ShortConvolution(convolution.clone())
        },
        feed_forward: FeedForwardSpec::Dense(shape.dense(Activation::Silu)),
        sandwich: false,
    };
    let blocks = attention_layers(reader, layers)?.iter().map(block).collect();
    let tied = reader.flag("tie_embedding", reader.flag("tie_word_embeddings", true)?)?;
    let rope = rope::read(reader, "", shape.head_dim, shape.context, 1_000_000.0)?;
    let mut config = shape.config("lfm2", tied, vec![rope], blocks);
    config.names = NAMES;
    Ok(config)
}

/// Which layers attend: by `layer_types`, else by the older `full_attn_idxs`; all without either.
fn attention_layers(reader: &Reader<'_>, layers: usize) -> Result<Vec<bool>, FormatError> {
    let types = reader.list("layer_types", layers, "conv or full_attention", |value| match value.as_str()? {
        "full_attention" => Some(true),
        "conv" => Some(false),
        _ => None,
    })?;
    if let Some(types) = types {
        return Ok(types);
    }
    let Some(indices) = reader.indices("full_attn_idxs", layers)? else { return Ok(vec![true; layers]) };
    Ok((0..layers).map(|layer| indices.contains(&layer)).collect())
}

/// The width between that a stated width means: two thirds of it, times a factor, in whole multiples.
fn adjusted(reader: &Reader<'_>, stated: usize) -> Result<usize, FormatError> {
    if !reader.flag("block_auto_adjust_ff_dim", true)? {
        return Ok(stated);
    }
    let multiple = reader.count("block_multiple_of", Some(256), 1 << 20)?;
    let factor = reader.positive("block_ffn_dim_multiplier", Some(1.0))?;
    let width = (factor * (2 * stated / 3) as f64) as usize;
    Ok(width.clamp(1, 1 << 20).next_multiple_of(multiple))
}
