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
    /// Into the latent of queries.
    LatentQuery,
    /// Into the latent of keys and values, and the rotated key.
    LatentKey,
    /// From the latent to a head's keys.
    KeyUp,
    /// From the latent to a head's values.
    ValueUp,
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
    /// Scores the experts of a mixture.
    Router,
    /// The gate of an expert.
    ExpertGate,
    /// Its other half.
    ExpertUp,
    /// Back to the stream.
    ExpertDown,
    /// Weighs the expert that every row meets.
    SharedRouter,
    /// Its gate.
    SharedGate,
    /// Its other half.
    SharedUp,
    /// Back to the stream.
    SharedDown,
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
    /// Over the latent of the queries.
    LatentQuery,
    /// Over the latent of keys and values.
    LatentKey,
    /// Over each head of the queries.
    Query,
    /// Over each head of the keys.
    Key,
    /// Before the head.
    Final,
}

/// A tensor of a model, without the ending `.weight` or `.bias` unless said otherwise. `{}` stands for an expert's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// A matrix.
    Matrix(Role),
    /// The weights of a norm.
    Norm(Norm),
    /// From the latent of the queries to the queries.
    QueryUp,
    /// From the latent of keys and values to those of all heads.
    KeyValueUp,
    /// Gates and ups of all experts in one tensor.
    GateUp,
    /// Downs of all experts in one tensor.
    Downs,
    /// Logits of attention without a value; the whole name.
    Sinks,
    /// What is added to a router's logits; the whole name.
    RouterBias,
    /// What is added to its scores for the choice; the whole name.
    SelectionBias,
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
pub(crate) enum Convention {
    /// `model.layers.0.self_attn.q_proj.weight`.
    HuggingFace,
    /// `model.language_model.layers.0.self_attn.q_proj.weight`: the text model is one part of several.
    Nested,
    /// `blk.0.attn_q.weight`.
    Gguf,
    /// `mtp.layers.0.self_attn.q_proj.weight`: heads for further tokens (Qwen3-Next, Qwen3.5).
    Mtp,
    /// `layers.0.self_attn.q_proj.weight`: drafters in the layout of `speculators`.
    Layers,
    /// `midlayer.self_attn.q_proj.weight`: drafters as EAGLE's authors store them.
    Middle,
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

    /// Whether it is a matrix of the experts that rows are sent to.
    pub fn of_routed_experts(self) -> bool {
        matches!(self, Role::ExpertGate | Role::ExpertUp | Role::ExpertDown)
    }

    /// The name that reports and tables use.
    pub fn name(self) -> &'static str {
        match self {
            Role::Embedding => "embedding",
            Role::Head => "head",
            Role::Query => "query",
            Role::Key => "key",
            Role::Value => "value",
            Role::LatentQuery => "latent_query",
            Role::LatentKey => "latent_key",
            Role::KeyUp => "key_up",
            Role::ValueUp => "value_up",
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
            Role::Router => "router",
            Role::ExpertGate => "expert_gate",
            Role::ExpertUp => "expert_up",
            Role::ExpertDown => "expert_down",
            Role::SharedRouter => "shared_router",
            Role::SharedGate => "shared_gate",
            Role::SharedUp => "shared_up",
            Role::SharedDown => "shared_down",
        }
    }
}

impl Names {
    /// Name of `part` in block `layer` (of no meaning outside the blocks), without `.weight` or `.bias`.
    pub(super) fn tensor(&self, convention: Convention, part: Part, layer: usize) -> String {
        let (table, common) = match convention {
            Convention::Gguf => (self.gguf, gguf(part)),
            _ => (self.hugging_face, hugging_face(part)),
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
            (Convention::Mtp, _) => format!("mtp.layers.{layer}.{name}"),
            (Convention::Layers, _) => format!("layers.{layer}.{name}"),
            (Convention::Middle, _) => format!("midlayer.{name}"),
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
            Role::LatentQuery => "self_attn.q_a_proj",
            Role::LatentKey => "self_attn.kv_a_proj_with_mqa",
            Role::KeyUp | Role::ValueUp => "self_attn.kv_b_proj",
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
            Role::Router => "mlp.gate",
            Role::ExpertGate => "mlp.experts.{}.gate_proj",
            Role::ExpertUp => "mlp.experts.{}.up_proj",
            Role::ExpertDown => "mlp.experts.{}.down_proj",
            Role::SharedRouter => "mlp.shared_expert_gate",
            Role::SharedGate => "mlp.shared_experts.gate_proj",
            Role::SharedUp => "mlp.shared_experts.up_proj",
            Role::SharedDown => "mlp.shared_experts.down_proj",
        },
        Part::Norm(norm) => match norm {
            Norm::Mixer => "input_layernorm",
            Norm::AfterMixer | Norm::FeedForward => "post_attention_layernorm",
            Norm::AfterFeedForward => "post_feedforward_layernorm",
            Norm::LatentQuery => "self_attn.q_a_layernorm",
            Norm::LatentKey => "self_attn.kv_a_layernorm",
            Norm::Query => "self_attn.q_norm",
            Norm::Key => "self_attn.k_norm",
            Norm::Final => "model.norm",
        },
        Part::QueryUp => "self_attn.q_b_proj",
        Part::KeyValueUp => "self_attn.kv_b_proj",
        Part::GateUp => "mlp.experts.gate_up_proj",
        Part::Downs => "mlp.experts.down_proj",
        Part::Sinks => "self_attn.sinks",
        Part::RouterBias => "mlp.router.bias",
        Part::SelectionBias => "mlp.gate.e_score_correction_bias",
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
            Role::LatentQuery => "attn_q_a",
            Role::LatentKey => "attn_kv_a_mqa",
            Role::KeyUp => "attn_k_b",
            Role::ValueUp => "attn_v_b",
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
            Role::Router => "ffn_gate_inp",
            Role::ExpertGate => "ffn_gate_exps",
            Role::ExpertUp => "ffn_up_exps",
            Role::ExpertDown => "ffn_down_exps",
            Role::SharedRouter => "ffn_gate_inp_shexp",
            Role::SharedGate => "ffn_gate_shexp",
            Role::SharedUp => "ffn_up_shexp",
            Role::SharedDown => "ffn_down_shexp",
        },
        Part::Norm(norm) => match norm {
            Norm::Mixer => "attn_norm",
            Norm::AfterMixer => "post_attention_norm",
            Norm::FeedForward => "ffn_norm",
            Norm::AfterFeedForward => "post_ffw_norm",
            Norm::LatentQuery => "attn_q_a_norm",
            Norm::LatentKey => "attn_kv_a_norm",
            Norm::Query => "attn_q_norm",
            Norm::Key => "attn_k_norm",
            Norm::Final => "output_norm",
        },
        Part::QueryUp => "attn_q_b",
        Part::KeyValueUp => "attn_kv_b",
        Part::GateUp => "ffn_gate_up_exps",
        Part::Downs => "ffn_down_exps",
        Part::Sinks => "attn_sinks.weight",
        Part::RouterBias => "ffn_gate_inp.bias",
        Part::SelectionBias => "exp_probs_b.bias",
        Part::Convolution => "shortconv.conv",
        Part::DeltaConvolution => "ssm_conv1d",
        Part::DeltaNorm => "ssm_norm",
        Part::DeltaDecay => "ssm_a",
        Part::DeltaTime => "ssm_dt.bias",
    }
}
