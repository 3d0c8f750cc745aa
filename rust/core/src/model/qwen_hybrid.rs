//! Qwen3-Next and Qwen3.5, dense or with experts: gated `DeltaNet` in most layers, gated attention in the others, norm weights stored as
//! `w - 1`.

use super::config::{BlockSpec, Config, Reader, Shape};
use super::feed_forward::FeedForwardSpec;
use super::feed_forward::router::RouterSpec;
use super::feed_forward::sparse::{SharedSpec, SparseSpec};
use super::gguf_config::SPLIT_INPUTS;
use super::mixer::MixerSpec;
use super::mixer::attention::HeadNorm;
use super::mixer::gated_delta::GatedDeltaSpec;
use super::names::{Names, Norm, Part, Role};
use super::rope;
use crate::error::Error;
use farthing_kernels::activation::Activation;

const NAMES: Names = Names {
    hugging_face: &[
        (Part::Matrix(Role::SharedGate), "mlp.shared_expert.gate_proj"),
        (Part::Matrix(Role::SharedUp), "mlp.shared_expert.up_proj"),
        (Part::Matrix(Role::SharedDown), "mlp.shared_expert.down_proj"),
    ],
    gguf: &[(Part::Norm(Norm::FeedForward), "post_attention_norm")],
};

/// Qwen3-Next packs the inputs of a delta rule into two tensors.
const PACKED: Names = Names {
    hugging_face: &[
        (Part::Matrix(Role::DeltaInput), "linear_attn.in_proj_qkvz"),
        (Part::Matrix(Role::DeltaGate), "linear_attn.in_proj_qkvz"),
        (Part::Matrix(Role::DeltaDecay), "linear_attn.in_proj_ba"),
        (Part::Matrix(Role::DeltaRate), "linear_attn.in_proj_ba"),
        (Part::Matrix(Role::SharedGate), "mlp.shared_expert.gate_proj"),
        (Part::Matrix(Role::SharedUp), "mlp.shared_expert.up_proj"),
        (Part::Matrix(Role::SharedDown), "mlp.shared_expert.down_proj"),
    ],
    gguf: &[
        (Part::Norm(Norm::FeedForward), "post_attention_norm"),
        (Part::Matrix(Role::DeltaDecay), "ssm_ba"),
        (Part::Matrix(Role::DeltaRate), "ssm_ba"),
    ],
};

/// Describes a model of type `qwen3_next`, `qwen3_5_text`, `qwen3_5_moe_text`, or `qwen3_5` or `qwen3_5_moe` (of which the
/// text model loads).
pub(super) fn describe(reader: &Reader<'_>, family: &str) -> Result<Config, Error> {
    let text = if matches!(family, "qwen3_5" | "qwen3_5_moe") { reader.object("text_config")? } else { None };
    let (outer, reader) = (reader, text.as_ref().unwrap_or(reader));
    // Where every layer has experts, nothing else has a width.
    let width = reader.count("moe_intermediate_size", Some(512), 1 << 20)?;
    let mut shape = reader.shape_around(reader.count("intermediate_size", Some(width), 1 << 20)?)?;
    shape.head_dim = reader.count("head_dim", Some(256), 1 << 12)?;
    shape.context = reader.count("max_position_embeddings", Some(32768), 1 << 28)?;
    let activation = reader.activation("hidden_act", "silu")?;
    if activation != Activation::Silu {
        return Err(Error::unsupported("a hidden_act other than silu in gated delta layers", "silu works"));
    }
    let mut attention = shape.attention();
    attention.head_norm = Some(HeadNorm::Each);
    attention.gated = true;
    attention.qkv_bias = reader.flag("attention_bias", false)?;
    attention.output_bias = attention.qkv_bias;
    let delta = delta(reader, family == "qwen3_next")?;
    let block = |attends: &bool, sparse: Option<&SparseSpec>| {
        let attend = || MixerSpec::Attention(attention.clone());
        let mixer = if *attends { attend() } else { MixerSpec::GatedDelta(delta.clone()) };
        let feed_forward = match sparse {
            Some(sparse) => FeedForwardSpec::Sparse(sparse.clone()),
            None => FeedForwardSpec::Dense(shape.dense(activation)),
        };
        BlockSpec::new(mixer, feed_forward)
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
    let dense = dense_layers(reader, family, shape.layers)?;
    let sparse = if dense.contains(&false) { Some(experts(reader, family == "qwen3_next", activation)?) } else { None };
    let blocks = attends.iter().zip(&dense).map(|(attends, &dense)| block(attends, sparse.as_ref().filter(|_| !dense)));
    let blocks = blocks.collect();
    let tied = outer.flag("tie_word_embeddings", reader.flag("tie_word_embeddings", false)?)?;
    let rope = rope::read_partial(reader, shape.head_dim, 0.25, shape.context, 10_000.0)?;
    let mut config = shape.config(family, tied, vec![rope], blocks);
    config.norm_offset = 1.0;
    config.names = if delta.packed_rates { PACKED } else { NAMES };
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
        packed: packed && !reader.flag(SPLIT_INPUTS, false)?,
        packed_rates: packed,
    })
}

/// Which layers are dense: those that `decoder_sparse_step` passes over, those listed, all when there are no experts.
fn dense_layers(reader: &Reader<'_>, family: &str, layers: usize) -> Result<Vec<bool>, Error> {
    Ok(match family {
        "qwen3_5" | "qwen3_5_text" => vec![true; layers],
        "qwen3_5_moe" | "qwen3_5_moe_text" => vec![false; layers],
        _ => {
            let experts = reader.count_or_zero("num_experts", 512, 1 << 16)?;
            let step = reader.count("decoder_sparse_step", Some(1), 1 << 12)?;
            let listed = reader.indices("mlp_only_layers", layers)?.unwrap_or_default();
            let sparse = |layer: usize| (layer + 1).is_multiple_of(step) && !listed.contains(&layer);
            (0..layers).map(|layer| experts == 0 || !sparse(layer)).collect()
        }
    })
}

/// Experts weighed by a softmax, and one that every row meets, weighed by a sigmoid.
fn experts(reader: &Reader<'_>, next: bool, activation: Activation) -> Result<SparseSpec, Error> {
    let experts = reader.experts(if next { 512 } else { 256 })?;
    let top_k = reader.count("num_experts_per_tok", Some(if next { 10 } else { 8 }), experts)?;
    let renormalize = (!next || reader.flag("norm_topk_prob", true)?).then_some(0.0);
    let router = RouterSpec { renormalize, ..RouterSpec::softmax(experts, top_k) };
    let width = reader.count("moe_intermediate_size", Some(512), 1 << 20)?;
    let intermediate = reader.count("shared_expert_intermediate_size", Some(512), 1 << 20)?;
    let shared = Some(SharedSpec { intermediate, gated: true });
    Ok(SparseSpec { shared, ..Shape::sparse(router, width, activation) })
}
