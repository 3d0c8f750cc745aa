//! DeepSeek-V3 and Mistral 4: latent attention, experts behind a router with groups, one expert that every row meets.

use super::config::{BlockSpec, Config, Reader, Shape};
use super::feed_forward::FeedForwardSpec;
use super::feed_forward::router::{GroupScore, Groups, RouterSpec};
use super::feed_forward::sparse::{SharedSpec, SparseSpec};
use super::gguf_config::SPLIT_LATENT;
use super::mixer::MixerSpec;
use super::mixer::latent::{LatentAttentionSpec, Temperature};
use super::rope;
use crate::error::Error;
use farthing_kernels::score::Score;

/// Describes a model of type `deepseek_v3` or `mistral4`.
pub(super) fn describe(reader: &Reader<'_>, family: &str) -> Result<Config, Error> {
    let deepseek = family == "deepseek_v3";
    let shape = reader.shape()?;
    let rotated_dim = reader.even("qk_rope_head_dim", 64, 1 << 12)?;
    let plain_dim = reader.count("qk_nope_head_dim", Some(if deepseek { 128 } else { 64 }), 1 << 12)?;
    let rope = rope::read_whole(reader, rotated_dim, shape.context, 10_000.0)?;
    let parameters = reader.object("rope_parameters")?.or(reader.object("rope_scaling")?);
    let mut scale = 1.0 / ((plain_dim + rotated_dim) as f32).sqrt();
    let mut temperature = None;
    if let Some(parameters) = &parameters {
        if let Some(all) = parameters.optional_positive("mscale_all_dim")? {
            let factor = parameters.positive("factor", Some(1.0))?;
            let magnitude = if factor <= 1.0 { 1.0 } else { 0.1 * all * factor.ln() + 1.0 };
            scale *= (magnitude * magnitude) as f32;
        }
        if let Some(factor) = parameters.optional_positive("llama_4_scaling_beta")? {
            let every = parameters.count("original_max_position_embeddings", None, 1 << 28)?;
            temperature = Some(Temperature { factor: factor as f32, every });
        }
    }
    let attention = LatentAttentionSpec {
        heads: shape.heads,
        plain_dim,
        rotated_dim,
        value_dim: reader.count("v_head_dim", Some(128), 1 << 12)?,
        latent: reader.count("kv_lora_rank", Some(if deepseek { 512 } else { 256 }), 1 << 14)?,
        query_latent: reader.optional_count("q_lora_rank", 1 << 16)?,
        scale,
        temperature,
        rope: 0,
        interleaved: reader.flag("rope_interleave", true)?,
        bias: reader.flag("attention_bias", false)?,
        split: reader.flag(SPLIT_LATENT, false)?,
    };
    let activation = reader.activation("hidden_act", "silu")?;
    let width = reader.count("moe_intermediate_size", Some(2048), 1 << 20)?;
    let shared = reader.count("n_shared_experts", Some(1), 1 << 8)?;
    let sparse = SparseSpec {
        selection_bias: deepseek,
        shared: Some(SharedSpec { intermediate: width * shared, gated: false }),
        ..Shape::sparse(router(reader, deepseek)?, width, activation)
    };
    let dense = reader.count_or_zero("first_k_dense_replace", if deepseek { 3 } else { 0 }, 4096)?;
    let blocks = (0..shape.layers)
        .map(|layer| {
            let feed_forward = if layer < dense {
                FeedForwardSpec::Dense(shape.dense(activation))
            } else {
                FeedForwardSpec::Sparse(sparse.clone())
            };
            BlockSpec::new(MixerSpec::Latent(attention.clone()), feed_forward)
        })
        .collect();
    let tied = reader.flag("tie_word_embeddings", false)?;
    Ok(shape.config(family, tied, vec![rope], blocks))
}

fn router(reader: &Reader<'_>, deepseek: bool) -> Result<RouterSpec, Error> {
    let experts = reader.experts(if deepseek { 256 } else { 128 })?;
    let top_k = reader.count("num_experts_per_tok", Some(if deepseek { 8 } else { 4 }), experts)?;
    let count = reader.count("n_group", Some(if deepseek { 8 } else { 1 }), experts)?;
    let kept = reader.count("topk_group", Some(if deepseek { 4 } else { 1 }), count)?;
    let groups =
        Groups { count, kept, score: GroupScore::TopTwo, masked_fill: if deepseek { f32::NEG_INFINITY } else { 0.0 } };
    let router = RouterSpec {
        score: if deepseek { Score::Sigmoid } else { Score::Softmax },
        groups: (kept < count).then_some(groups),
        renormalize: reader.flag("norm_topk_prob", true)?.then_some(1e-20),
        scale: reader.positive("routed_scaling_factor", Some(if deepseek { 2.5 } else { 1.0 }))? as f32,
        ..RouterSpec::softmax(experts, top_k)
    };
    router.check()?;
    Ok(router)
}
