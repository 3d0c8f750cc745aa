//! Qwen2-MoE (a shared expert, weighed by a sigmoid) and Qwen3-MoE.

use super::config::{BlockSpec, Config, Reader, Shape};
use super::feed_forward::router::RouterSpec;
use super::feed_forward::sparse::SharedSpec;
use super::mixer::attention::{AttentionSpec, HeadNorm};
use super::names::{Names, Part, Role};
use super::rope;
use crate::error::Error;

const NAMES: Names = Names {
    hugging_face: &[
        (Part::Matrix(Role::SharedGate), "mlp.shared_expert.gate_proj"),
        (Part::Matrix(Role::SharedUp), "mlp.shared_expert.up_proj"),
        (Part::Matrix(Role::SharedDown), "mlp.shared_expert.down_proj"),
    ],
    gguf: &[],
};

/// Describes a model of type `qwen2_moe` or `qwen3_moe`.
pub(super) fn describe(reader: &Reader<'_>, family: &str) -> Result<Config, Error> {
    let shape = reader.shape()?;
    let third = family == "qwen3_moe";
    let mut attention = shape.attention();
    attention.qkv_bias = reader.flag(if third { "attention_bias" } else { "qkv_bias" }, !third)?;
    attention.output_bias = third && attention.qkv_bias;
    if third {
        attention.head_norm = Some(HeadNorm::Each);
    }
    let window = if reader.flag("use_sliding_window", false)? {
        Some(reader.count("sliding_window", Some(4096), 1 << 28)?)
    } else {
        None
    };
    let full = reader.count_or_zero("max_window_layers", if third { 0 } else { 28 }, 1 << 20)?;
    let by_depth = (0..shape.layers).map(|layer| third || layer >= full).collect();
    let sliding = reader.sliding_layers(shape.layers)?.unwrap_or(by_depth);
    let activation = reader.activation("hidden_act", "silu")?;
    let experts = reader.experts(if third { 128 } else { 60 })?;
    let top_k = reader.count("num_experts_per_tok", Some(if third { 8 } else { 4 }), experts)?;
    let renormalize = reader.flag("norm_topk_prob", false)?.then_some(0.0);
    let router = RouterSpec { renormalize, ..RouterSpec::softmax(experts, top_k) };
    let width = reader.count("moe_intermediate_size", Some(if third { 768 } else { 1408 }), 1 << 20)?;
    let mut sparse = Shape::sparse(router, width, activation);
    if !third {
        let intermediate = reader.count("shared_expert_intermediate_size", Some(5632), 1 << 20)?;
        sparse.shared = Some(SharedSpec { intermediate, gated: true });
    }
    let dense = reader.indices("mlp_only_layers", shape.layers)?.unwrap_or_default();
    let step = reader.count("decoder_sparse_step", Some(1), 4096)?;
    let blocks = sliding
        .iter()
        .enumerate()
        .map(|(layer, &sliding)| {
            let attention = AttentionSpec { window: window.filter(|_| sliding), ..attention.clone() };
            if !dense.contains(&layer) && (layer + 1) % step == 0 {
                BlockSpec::sparse(attention, sparse.clone())
            } else {
                BlockSpec::dense(attention, shape.dense(activation))
            }
        })
        .collect();
    let tied = reader.flag("tie_word_embeddings", false)?;
    let rope = rope::read(reader, "", shape.head_dim, shape.context, 10_000.0)?;
    Ok(Config { names: NAMES, ..shape.config(family, tied, vec![rope], blocks) })
}
