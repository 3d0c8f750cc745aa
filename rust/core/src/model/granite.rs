//! Granite 3: four multipliers on embeddings, scores, residuals and logits; dense, or experts weighed by a softmax over
//! those chosen.

use super::config::{BlockSpec, Config, Reader, Shape};
use super::feed_forward::FeedForwardSpec;
use super::feed_forward::router::RouterSpec;
use super::mixer::MixerSpec;
use super::mixer::attention::AttentionSpec;
use super::names::{Names, Part, Role};
use super::rope;
use crate::error::Error;
use farthing_kernels::score::Score;

const NAMES: Names = Names {
    hugging_face: &[
        (Part::Matrix(Role::Router), "block_sparse_moe.router.layer"),
        (Part::GateUp, "block_sparse_moe.input_linear"),
        (Part::Downs, "block_sparse_moe.output_linear"),
    ],
    gguf: &[],
};

/// Describes a model of type `granite` or `granitemoe`.
pub(super) fn describe(reader: &Reader<'_>, family: &str) -> Result<Config, Error> {
    let shape = reader.shape()?;
    let bias = reader.flag("attention_bias", false)?;
    let scale = reader.positive("attention_multiplier", Some(1.0))? as f32;
    let attention = AttentionSpec { qkv_bias: bias, output_bias: bias, scale, ..shape.attention() };
    let activation = reader.activation("hidden_act", "silu")?;
    let feed_forward = if family == "granite" {
        let mut dense = shape.dense(activation);
        dense.bias = reader.flag("mlp_bias", false)?;
        FeedForwardSpec::Dense(dense)
    } else {
        let experts = reader.experts(8)?;
        let top_k = reader.count("num_experts_per_tok", Some(2), experts)?;
        let softmax = RouterSpec::softmax(experts, top_k);
        let router = RouterSpec { score: Score::Identity, post: Score::Softmax, ..softmax };
        FeedForwardSpec::Sparse(Shape::sparse(router, shape.intermediate, activation))
    };
    let block = BlockSpec::new(MixerSpec::Attention(attention), feed_forward);
    let tied = reader.flag("tie_word_embeddings", false)?;
    let rope = rope::read(reader, "", shape.head_dim, shape.context, 10_000.0)?;
    let blocks = vec![block; shape.layers];
    let config = shape.config(family, tied, vec![rope], blocks);
    Ok(Config {
        embedding_scale: reader.positive("embedding_multiplier", Some(1.0))? as f32,
        residual_scale: reader.positive("residual_multiplier", Some(1.0))? as f32,
        logit_scale: 1.0 / reader.positive("logits_scaling", Some(1.0))? as f32,
        names: NAMES,
        ..config
    })
}
