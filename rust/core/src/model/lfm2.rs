//! LFM2 and LFM2.5 (arXiv 2511.23404), dense or with experts: short convolutions, and attention in a few layers.

use super::config::{BlockSpec, Config, Reader, Shape};
use super::feed_forward::FeedForwardSpec;
use super::feed_forward::router::RouterSpec;
use super::feed_forward::sparse::SparseSpec;
use super::mixer::MixerSpec;
use super::mixer::attention::HeadNorm;
use super::mixer::short_convolution::ShortConvolutionSpec;
use super::names::{Names, Norm, Part, Role};
use super::rope;
use crate::error::Error;
use crate::load::FormatError;
use farthing_kernels::activation::Activation;
use farthing_kernels::score::Score;

const NAMES: Names = Names {
    hugging_face: &[
        (Part::Matrix(Role::AttentionOutput), "self_attn.out_proj"),
        (Part::Matrix(Role::Gate), "feed_forward.w1"),
        (Part::Matrix(Role::Up), "feed_forward.w3"),
        (Part::Matrix(Role::Down), "feed_forward.w2"),
        (Part::Matrix(Role::Router), "feed_forward.gate"),
        (Part::Matrix(Role::ExpertGate), "feed_forward.experts.{}.w1"),
        (Part::Matrix(Role::ExpertUp), "feed_forward.experts.{}.w3"),
        (Part::Matrix(Role::ExpertDown), "feed_forward.experts.{}.w2"),
        (Part::GateUp, "feed_forward.experts.gate_up_proj"),
        (Part::Downs, "feed_forward.experts.down_proj"),
        (Part::SelectionBias, "feed_forward.expert_bias"),
        (Part::Norm(Norm::Mixer), "operator_norm"),
        (Part::Norm(Norm::FeedForward), "ffn_norm"),
        (Part::Norm(Norm::Query), "self_attn.q_layernorm"),
        (Part::Norm(Norm::Key), "self_attn.k_layernorm"),
        (Part::Norm(Norm::Final), "model.embedding_norm"),
    ],
    gguf: &[(Part::Norm(Norm::Final), "token_embd_norm")],
};

/// Describes a model of type `lfm2` or `lfm2_moe`.
pub(super) fn describe(reader: &Reader<'_>, family: &str) -> Result<Config, Error> {
    let (layers, most) = (reader.count("num_hidden_layers", None, 4096)?, 1 << 20);
    // Older files say block_ff_dim.
    let stated = reader.count("intermediate_size", Some(12288), most)?;
    let mixture = family == "lfm2_moe";
    let stated = reader.count("block_ff_dim", Some(stated), most)?;
    let intermediate = if mixture { stated } else { adjusted(reader, stated)? };
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
    let sparse = if mixture { Some(experts(reader)?) } else { None };
    let dense = reader.count_or_zero("num_dense_layers", 2, 4096)?;
    let block = |(layer, attends): (usize, &bool)| {
        let mixer = if *attends {
            MixerSpec::Attention(attention.clone())
        } else {
            MixerSpec::ShortConvolution(convolution.clone())
        };
        let feed_forward = match sparse.as_ref().filter(|_| layer >= dense) {
            Some(sparse) => FeedForwardSpec::Sparse(sparse.clone()),
            None => FeedForwardSpec::Dense(shape.dense(Activation::Silu)),
        };
        BlockSpec::new(mixer, feed_forward)
    };
    let blocks = attention_layers(reader, layers)?.iter().enumerate().map(block).collect();
    let tied = reader.flag("tie_embedding", reader.flag("tie_word_embeddings", true)?)?;
    let rope = rope::read(reader, "", shape.head_dim, shape.context, 1_000_000.0)?;
    let mut config = shape.config(family, tied, vec![rope], blocks);
    config.names = NAMES;
    Ok(config)
}

/// Experts chosen and weighed by a sigmoid each; a bias may take part in the choice.
fn experts(reader: &Reader<'_>) -> Result<SparseSpec, Error> {
    let experts = reader.experts(32)?;
    let top_k = reader.count("num_experts_per_tok", Some(4), experts)?;
    let router = RouterSpec {
        score: Score::Sigmoid,
        renormalize: reader.flag("norm_topk_prob", true)?.then_some(1e-6),
        scale: reader.positive("routed_scaling_factor", Some(1.0))? as f32,
        ..RouterSpec::softmax(experts, top_k)
    };
    let width = reader.count("moe_intermediate_size", Some(1792), 1 << 20)?;
    let selection_bias = reader.flag("use_expert_bias", true)?;
    Ok(SparseSpec { selection_bias, ..Shape::sparse(router, width, Activation::Silu) })
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
