//! What each tensor is called in Hugging Face checkpoints and in GGUF files.

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
    /// The gate of the feed-forward network.
    Gate,
    /// Its other half.
    Up,
    /// Back to the stream.
    Down,
}

/// Where an RMS norm stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Norm {
    /// Before attention.
    Attention,
    /// Behind attention (sandwich).
    AfterAttention,
    /// Before the feed-forward network.
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

/// The convention a checkpoint follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Convention {
    /// `model.layers.0.self_attn.q_proj.weight`.
    HuggingFace,
    /// `blk.0.attn_q.weight`.
    Gguf,
}

impl Role {
    /// Every role inside a block.
    pub const IN_BLOCK: [Role; 7] =
        [Role::Query, Role::Key, Role::Value, Role::AttentionOutput, Role::Gate, Role::Up, Role::Down];

    /// The name that reports and tables use.
    pub fn name(self) -> &'static str {
        match self {
            Role::Embedding => "embedding",
            Role::Head => "head",
            Role::Query => "query",
            Role::Key => "key",
            Role::Value => "value",
            Role::AttentionOutput => "attention_output",
            Role::Gate => "gate",
            Role::Up => "up",
            Role::Down => "down",
        }
    }

    /// Name of the tensor without `.weight` or `.bias`.
    pub(super) fn tensor(self, convention: Convention, layer: usize) -> String {
        let (hugging_face, gguf) = match self {
            Role::Embedding => ("model.embed_tokens", "token_embd"),
            Role::Head => ("lm_head", "output"),
            Role::Query => ("self_attn.q_proj", "attn_q"),
            Role::Key => ("self_attn.k_proj", "attn_k"),
            Role::Value => ("self_attn.v_proj", "attn_v"),
            Role::AttentionOutput => ("self_attn.o_proj", "attn_output"),
            Role::Gate => ("mlp.gate_proj", "ffn_gate"),
            Role::Up => ("mlp.up_proj", "ffn_up"),
            Role::Down => ("mlp.down_proj", "ffn_down"),
        };
        let outside = matches!(self, Role::Embedding | Role::Head);
        place(convention, outside, layer, hugging_face, gguf)
    }
}

impl Norm {
    /// Name of the weight; `sandwich` families name their norms differently.
    pub(super) fn tensor(self, convention: Convention, layer: usize, sandwich: bool) -> String {
        let (hugging_face, gguf) = match self {
            Norm::Attention => ("input_layernorm", "attn_norm"),
            Norm::AfterAttention => ("post_attention_layernorm", "post_attention_norm"),
            Norm::FeedForward if sandwich => ("pre_feedforward_layernorm", "ffn_norm"),
            Norm::FeedForward => ("post_attention_layernorm", "ffn_norm"),
            Norm::AfterFeedForward => ("post_feedforward_layernorm", "post_ffw_norm"),
            Norm::Query => ("self_attn.q_norm", "attn_q_norm"),
            Norm::Key => ("self_attn.k_norm", "attn_k_norm"),
            Norm::Final => ("model.norm", "output_norm"),
        };
        place(convention, self == Norm::Final, layer, hugging_face, gguf) + ".weight"
    }
}

fn place(convention: Convention, outside: bool, layer: usize, hugging_face: &str, gguf: &str) -> String {
    match (convention, outside) {
        (Convention::HuggingFace, true) => hugging_face.to_owned(),
        (Convention::HuggingFace, false) => format!("model.layers.{layer}.{hugging_face}"),
        (Convention::Gguf, true) => gguf.to_owned(),
        (Convention::Gguf, false) => format!("blk.{layer}.{gguf}"),
    }
}
