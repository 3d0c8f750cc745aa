//! What each tensor is called in Hugging Face checkpoints and in GGUF files.
//!
//! Most families agree: [`hugging_face`] and [`gguf`] name every part as they do. A family that differs says where, in a
//! small table of its own ([`Names`]).

use crate::load::{Checkpoint, Metadata};

/// What a matrix does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Token id to row.
    Embedding,
    /// Row to logits.
    Head,
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Concatenated heads back to the stream.
    AttentionOutput,
    /// Gates of the heads before they go back.
    AttentionGate,
    /// Queries, keys and values of a delta rule.
    DeltaInput,
    /// Gates of its heads before they go back to the stream.
    DeltaGate,
    /// How much its states forget.
    DeltaDecay,
    /// How much its states learn.
    DeltaRate,
    /// Its heads back to the stream.
    DeltaOutput,
    /// The stream to gates and channels of a short convolution.
    ConvolutionInput,
    /// Its channels back to the stream.
    ConvolutionOutput,
    /// The gate of the feed-forward network.
    Gate,
    /// Its other half.
    Up,
    /// Back to the stream.
    Down,
}

/// Where an RMS norm stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Norm {
    /// Before the mixer.
    Mixer,
    /// Behind it (sandwich).
    AfterMixer,
    /// Before the feed-forward part.
    FeedForward,
    /// Behind it (sandwich).
    AfterFeedForward,
    /// Over each head of the queries.
    Query,
    /// Over each head of the keys.
    Key,
    /// Before the head.
    Final,
}

/// A tensor of a model, without the ending `.weight` or `.bias`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// A matrix.
    Matrix(Role),
    /// The weights of a norm.
    Norm(Norm),
    /// The filters of a convolution.
    Convolution,
    /// The filters before a delta rule.
    DeltaConvolution,
    /// The norm of its heads' results.
    DeltaNorm,
    /// How fast its heads forget: `A_log`. Named in full.
    DeltaDecay,
    /// The bias of their decay: `dt_bias`. Named in full.
    DeltaTime,
}

/// Which parts a family names otherwise than [`hugging_face`] and [`gguf`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Names {
    pub(super) hugging_face: &'static [(Part, &'static str)],
    pub(super) gguf: &'static [(Part, &'static str)],
}

/// The convention a checkpoint follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Convention {
    /// `model.layers.0.self_attn.q_proj.weight`.
    HuggingFace,
    /// `model.language_model.layers.0.self_attn.q_proj.weight`: the text model is one part of several.
    Nested,
    /// `blk.0.attn_q.weight`.
    Gguf,
}

impl Convention {
    /// The convention of `checkpoint`.
    pub(super) fn of(checkpoint: &Checkpoint) -> Convention {
        match checkpoint.metadata {
            Metadata::Gguf(_) => Convention::Gguf,
            _ if checkpoint.tensor("model.language_model.embed_tokens.weight").is_some() => Convention::Nested,
            Metadata::HuggingFace(_) => Convention::HuggingFace,
        }
    }
}

impl Role {
    /// Every role inside a block.
    pub const IN_BLOCK: [Role; 15] = [
        Role::Query,
        Role::Key,
        Role::Value,
        Role::AttentionOutput,
        Role::AttentionGate,
        Role::DeltaInput,
        Role::DeltaGate,
        Role::DeltaDecay,
        Role::DeltaRate,
        Role::DeltaOutput,
        Role::ConvolutionInput,
        Role::ConvolutionOutput,
        Role::Gate,
        Role::Up,
        Role::Down,
    ];

    /// The name that reports and tables use.
    pub fn name(self) -> &'static str {
        match self {
            Role::Embedding => "embedding",
            Role::Head => "head",
            Role::Query => "query",
            Role::Key => "key",
            Role::Value => "value",
            Role::AttentionOutput => "attention_output",
            Role::AttentionGate => "attention_gate",
            Role::DeltaInput => "delta_input",
            Role::DeltaGate => "delta_gate",
            Role::DeltaDecay => "delta_decay",
            Role::DeltaRate => "delta_rate",
            Role::DeltaOutput => "delta_output",
            Role::ConvolutionInput => "convolution_input",
            Role::ConvolutionOutput => "convolution_output",
            Role::Gate => "gate",
            Role::Up => "up",
            Role::Down => "down",
        }
    }
}

impl Names {
    /// Name of `part` in block `layer` (of no meaning outside the blocks), without `.weight` or `.bias`.
    pub(super) fn tensor(&self, convention: Convention, part: Part, layer: usize) -> String {
        let (table, common) = match convention {
            Convention::HuggingFace | Convention::Nested => (self.hugging_face, hugging_face(part)),
            Convention::Gguf => (self.gguf, gguf(part)),
        };
        let name = table.iter().find(|(named, _)| *named == part).map_or(common, |&(_, name)| name);
        match (convention, part) {
            (Convention::Nested, Part::Matrix(Role::Embedding) | Part::Norm(Norm::Final)) => {
                name.replacen("model.", "model.language_model.", 1)
            }
            (_, Part::Matrix(Role::Embedding | Role::Head) | Part::Norm(Norm::Final)) => name.to_owned(),
            (Convention::HuggingFace, _) => format!("model.layers.{layer}.{name}"),
            (Convention::Nested, _) => format!("model.language_model.layers.{layer}.{name}"),
            (Convention::Gguf, _) => format!("blk.{layer}.{name}"),
        }
    }
}

/// Names as Llama has them, and what later families added.
fn hugging_face(part: Part) -> &'static str {
    match part {
        Part::Matrix(role) => match role {
            Role::Embedding => "model.embed_tokens",
            Role::Head => "lm_head",
            Role::Query | Role::AttentionGate => "self_attn.q_proj",
            Role::Key => "self_attn.k_proj",
            Role::Value => "self_attn.v_proj",
            Role::AttentionOutput => "self_attn.o_proj",
            Role::DeltaInput => "linear_attn.in_proj_qkv",
            Role::DeltaGate => "linear_attn.in_proj_z",
            Role::DeltaDecay => "linear_attn.in_proj_a",
            Role::DeltaRate => "linear_attn.in_proj_b",
            Role::DeltaOutput => "linear_attn.out_proj",
            Role::ConvolutionInput => "conv.in_proj",
            Role::ConvolutionOutput => "conv.out_proj",
            Role::Gate => "mlp.gate_proj",
            Role::Up => "mlp.up_proj",
            Role::Down => "mlp.down_proj",
        },
        Part::Norm(norm) => match norm {
            Norm::Mixer => "input_layernorm",
            Norm::AfterMixer | Norm::FeedForward => "post_attention_layernorm",
            Norm::AfterFeedForward => "post_feedforward_layernorm",
            Norm::Query => "self_attn.q_norm",
            Norm::Key => "self_attn.k_norm",
            Norm::Final => "model.norm",
        },
        Part::Convolution => "conv.conv",
        Part::DeltaConvolution => "linear_attn.conv1d",
        Part::DeltaNorm => "linear_attn.norm",
        Part::DeltaDecay => "linear_attn.A_log",
        Part::DeltaTime => "linear_attn.dt_bias",
    }
}

/// Names as llama.cpp's converters write them.
fn gguf(part: Part) -> &'static str {
    match part {
        Part::Matrix(role) => match role {
            Role::Embedding => "token_embd",
            Role::Head => "output",
            Role::Query | Role::AttentionGate => "attn_q",
            Role::Key => "attn_k",
            Role::Value => "attn_v",
            Role::AttentionOutput => "attn_output",
            Role::DeltaInput => "attn_qkv",
            Role::DeltaGate => "attn_gate",
            Role::DeltaDecay => "ssm_alpha",
            Role::DeltaRate => "ssm_beta",
            Role::DeltaOutput => "ssm_out",
            Role::ConvolutionInput => "shortconv.in_proj",
            Role::ConvolutionOutput => "shortconv.out_proj",
            Role::Gate => "ffn_gate",
            Role::Up => "ffn_up",
            Role::Down => "ffn_down",
        },
        Part::Norm(norm) => match norm {
            Norm::Mixer => "attn_norm",
            Norm::AfterMixer => "post_attention_norm",
            Norm::FeedForward => "ffn_norm",
            Norm::AfterFeedForward => "post_ffw_norm",
            Norm::Query => "attn_q_norm",
            Norm::Key => "attn_k_norm",
            Norm::Final => "output_norm",
        },
        Part::Convolution => "shortconv.conv",
        Part::DeltaConvolution => "ssm_conv1d",
        Part::DeltaNorm => "ssm_norm",
        Part::DeltaDecay => "ssm_a",
        Part::DeltaTime => "ssm_dt.bias",
    }
}
