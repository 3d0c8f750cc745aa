//! `OLMoE`: norms over all heads of queries and keys together, softmax routing whose weights need not sum to 1.

use super::config::{BlockSpec, Config, Reader, Shape};
use super::feed_forward::router::RouterSpec;
use super::mixer::attention::{AttentionSpec, HeadNorm};
use super::rope;
use crate::error::Error;

/// Describes a model of type `olmoe`.
pub(super) fn describe(reader: &Reader<'_>) -> Result<Config, Error> {
    if let Some(bound) = reader.optional_positive("clip_qkv")? {
        return Err(Error::unsupported(format!("clip_qkv {bound}"), "OLMoE models without clip_qkv load"));
    }
    let shape = reader.shape()?;
    let bias = reader.flag("attention_bias", false)?;
    let attention =
        AttentionSpec { head_norm: Some(HeadNorm::Together), qkv_bias: bias, output_bias: bias, ..shape.attention() };
    let experts = reader.experts(64)?;
    let top_k = reader.count("num_experts_per_tok", Some(8), experts)?;
    let renormalize = reader.flag("norm_topk_prob", false)?.then_some(0.0);
    let router = RouterSpec { renormalize, ..RouterSpec::softmax(experts, top_k) };
    let sparse = Shape::sparse(router, shape.intermediate, reader.activation("hidden_act", "silu")?);
    let block = BlockSpec::sparse(attention, sparse);
    let tied = reader.flag("tie_word_embeddings", false)?;
    let rope = rope::read(reader, "", shape.head_dim, shape.context, 10_000.0)?;
    let blocks = vec![block; shape.layers];
    Ok(shape.config("olmoe", tied, vec![rope], blocks))
}
