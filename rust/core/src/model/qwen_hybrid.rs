//! Qwen3-Next and Qwen3.5, dense: gated `DeltaNet` in most layers, gated attention in the others, norm weights stored as
//! `w - 1`.

use super::config::{BlockSpec, Config, Reader};
use super::feed_forward::FeedForwardSpec;
use super::mixer::MixerSpec;
use super::mixer::attention::HeadNorm;
use super::mixer::gated_delta::GatedDeltaSpec;
use super::names::{Names, Norm, Part, Role};
use super::rope;
use crate::error::Error;

const NAMES: Names = Names { hugging_face: &[], gguf: &[(Part::Norm(Norm::FeedForward), "post_attention_norm")] };

/// Qwen3-Next packs the inputs of a delta rule into two tensors.
const PACKED: Names = Names {
    hugging_face: &[
        (Part::Matrix(Role::DeltaInput), "linear_attn.in_proj_qkvz"),
        (Part::Matrix(Role::DeltaGate), "linear_attn.in_proj_qkvz"),
        (Part::Matrix(Role::DeltaDecay), "linear_attn.in_proj_ba"),
        (Part::Matrix(Role::DeltaRate), "linear_attn.in_proj_ba"),
    ],
    ..NAMES
};

/// Describes a model of type `qwen3_next`, `qwen3_5_text`, or `qwen3_5` (of which the text model loads).
pub(super) fn describe(reader: &Reader<'_>, family: &str) -> Result<Config, Error> {
    let text = if family == "qwen3_5" { reader.object("text_config")? } else { None };
    let (outer, reader) = (reader, text.as_ref().unwrap_or(reader));
    let mut shape = reader.shape()?;
    shape.head_dim = reader.count("head_dim", Some(256), 1 << 12)?;
    shape.context = reader.count("max_position_embeddings", Some(32768), 1 << 28)?;
    let activation = reader.activation("hidden_act", "silu")?;
    if activation != farthing_kernels::activation::Activation::Silu {
        return Err(Error::unsupported("a hidden_act other than silu in gated delta layers", "silu works"));
    }
    let mut attention = shape.attention();
    attention.head_norm = Some(HeadNorm::Each);
    attention.gated = true;
    attention.qkv_bias = reader.flag("attention_bias", false)?;
    attention.output_bias = attention.qkv_bias;
    let delta = delta(reader, family == "qwen3_next")?;
    let block = |attends: &bool| BlockSpec {
        mixer: if *attends { MixerSpec::Attention(attention.clone()) } else { MixerSpec::GatedDelta(delta.clone()) },
        feed_forward: FeedForwardSpec::Dense(shape.dense(activation)),
        sandwich: false,
    };
    let interval = reader.count("full_attention_interval", Some(4), 4096)?;
    let listed = reader.list("layer_types", shape.layers, "linear_attention or full_attention", |value| match value
        .as_str()?
    {
        "full_attention" => Some(true),
        "linear_attention" => Some(false),
        _ => None,
    })?;
    let attends = listed.unwrap_or_else(|| (1..=shape.layers).map(|layer| layer % interval == 0).collect());
    if family == "qwen3_next" {
        refuse_experts(reader, shape.layers)?;
    }
    let blocks = attends.iter().map(block).collect();
    let tied = outer.flag("tie_word_embeddings", reader.flag("tie_word_embeddings", false)?)?;
    let rope = rope::read_partial(reader, shape.head_dim, 0.25, shape.context, 10_000.0)?;
    let mut config = shape.config(family, tied, vec![rope], blocks);
    config.norm_offset = 1.0;
    config.names = if delta.packed { PACKED } else { NAMES };
    Ok(config)
}

fn delta(reader: &Reader<'_>, packed: bool) -> Result<GatedDeltaSpec, Error> {
    let key_heads = reader.count("linear_num_key_heads", Some(16), 1 << 12)?;
    let value_heads = reader.count("linear_num_value_heads", Some(32), 1 << 12)?;
    if !value_heads.is_multiple_of(key_heads) {
        let expected = format!("a multiple of {key_heads} key heads");
        return Err(reader.wrong("linear_num_value_heads", value_heads, &expected).into());
    }
    Ok(GatedDeltaSpec {
        key_heads,
        value_heads,
        key_dim: reader.count("linear_key_head_dim", Some(128), 1 << 12)?,
        value_dim: reader.count("linear_value_head_dim", Some(128), 1 << 12)?,
        taps: reader.count("linear_conv_kernel_dim", Some(4), 64)?,
        packed,
    })
}

/// Qwen3-Next has experts in every `decoder_sparse_step`-th layer, unless it lists the layer as an exception or has none.
fn refuse_experts(reader: &Reader<'_>, layers: usize) -> Result<(), Error> {
    if reader.count_or_zero("num_experts", 512, 1 << 16)? == 0 {
        return Ok(());
    }
    let step = reader.count("decoder_sparse_step", Some(1), 1 << 12)?;
    let dense = reader.indices("mlp_only_layers", layers)?.unwrap_or_default();
    match (0..layers).find(|layer| (layer + 1).is_multiple_of(step) && !dense.contains(layer)) {
        Some(layer) => Err(Error::unsupported(
            format!("experts in layer {layer} of a qwen3_next model"),
            "models of this type without experts load",
        )),
        None => Ok(()),
    }
}
