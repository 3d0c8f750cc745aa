//! Mixtral: Mistral's attention, and eight experts of which two are weighed by a softmax over all.

use super::config::{BlockSpec, Config, Reader, Shape};
use super::feed_forward::router::RouterSpec;
use super::mixer::attention::AttentionSpec;
use super::names::{Names, Part, Role};
use super::rope;
use crate::error::Error;

const NAMES: Names = Names {
    hugging_face: &[
        (Part::Matrix(Role::Router), "block_sparse_moe.gate"),
        (Part::Matrix(Role::ExpertGate), "block_sparse_moe.experts.{}.w1"),
        (Part::Matrix(Role::ExpertUp), "block_sparse_moe.experts.{}.w3"),
        (Part::Matrix(Role::ExpertDown), "block_sparse_moe.experts.{}.w2"),
    ],
    gguf: &[],
};

/// Describes a model of type `mixtral`.
pub(super) fn describe(reader: &Reader<'_>) -> Result<Config, Error> {
    let shape = reader.shape()?;
    let window = reader.optional_count("sliding_window", 1 << 28)?;
    let attention = AttentionSpec { window, ..shape.attention() };
    let experts = reader.experts(8)?;
    let top_k = reader.count("num_experts_per_tok", Some(2), experts)?;
    let router = RouterSpec { renormalize: Some(0.0), ..RouterSpec::softmax(experts, top_k) };
    let sparse = Shape::sparse(router, shape.intermediate, reader.activation("hidden_act", "silu")?);
    let block = BlockSpec::sparse(attention, sparse);
    let tied = reader.flag("tie_word_embeddings", false)?;
    let rope = rope::read(reader, "", shape.head_dim, shape.context, 1_000_000.0)?;
    let blocks = vec![block; shape.layers];
    Ok(Config { names: NAMES, ..shape.config("mixtral", tied, vec![rope], blocks) })
}
