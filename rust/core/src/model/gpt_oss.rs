//! gpt-oss: sinks in the softmax of attention, every other layer sliding, experts with biases and a clamped activation.

use super::config::{BlockSpec, Config, Reader, Shape};
use super::feed_forward::router::RouterSpec;
use super::feed_forward::sources::Joined;
use super::feed_forward::sparse::SparseSpec;
use super::mixer::attention::AttentionSpec;
use super::names::{Names, Norm, Part, Role};
use super::rope;
use crate::error::Error;
use farthing_kernels::activation::Activation;
use farthing_kernels::experts::ExpertActivation;
use farthing_kernels::score::Score;

const NAMES: Names = Names {
    hugging_face: &[(Part::Matrix(Role::Router), "mlp.router")],
    gguf: &[(Part::Norm(Norm::FeedForward), "post_attention_norm")],
};

/// Slope of the sigmoid, the same in every published model.
const ALPHA: f32 = 1.702;

/// Describes a model of type `gpt_oss`.
pub(super) fn describe(reader: &Reader<'_>) -> Result<Config, Error> {
    let mut shape = reader.shape()?;
    shape.head_dim = reader.count("head_dim", Some(64), 1 << 12)?;
    let mut attention = AttentionSpec { sinks: true, ..shape.attention() };
    attention.qkv_bias = reader.flag("attention_bias", true)?;
    attention.output_bias = attention.qkv_bias;
    let window = reader.count("sliding_window", Some(128), 1 << 28)?;
    let by_turns = || (0..shape.layers).map(|layer| layer % 2 == 0).collect();
    let sliding: Vec<bool> = reader.sliding_layers(shape.layers)?.unwrap_or_else(by_turns);
    let experts = reader.experts(128)?;
    let top_k = reader.count("num_experts_per_tok", Some(4), experts)?;
    let softmax = RouterSpec::softmax(experts, top_k);
    let router = RouterSpec { score: Score::Identity, post: Score::Softmax, ..softmax };
    let limit = reader.positive("swiglu_limit", Some(7.0))? as f32;
    let sparse = SparseSpec {
        activation: ExpertActivation::ClampedSwiglu { alpha: ALPHA, limit },
        logit_bias: true,
        bias: true,
        joined: Joined::Interleaved,
        ..Shape::sparse(router, shape.intermediate, Activation::Silu)
    };
    let blocks = sliding
        .iter()
        .map(|&sliding| {
            let attention = AttentionSpec { window: sliding.then_some(window), ..attention.clone() };
            BlockSpec::sparse(attention, sparse.clone())
        })
        .collect();
    let tied = reader.flag("tie_word_embeddings", false)?;
    let rope = rope::read(reader, "", shape.head_dim, shape.context, 150_000.0)?;
    Ok(Config { names: NAMES, ..shape.config("gpt_oss", tied, vec![rope], blocks) })
}
