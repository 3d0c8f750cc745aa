//! One description of a decoder-only transformer, read from `config.json` or rebuilt from GGUF metadata.
//!
//! A family (`llama.rs`, `qwen.rs`, `gemma.rs`) turns the values of its configuration into a [`Config`]; from there on
//! nobody asks for the family again.

use super::feed_forward::FeedForwardSpec;
use super::feed_forward::dense::DenseSpec;
use super::feed_forward::router::RouterSpec;
use super::feed_forward::sources::Joined;
use super::feed_forward::sparse::SparseSpec;
use super::mixer::MixerSpec;
use super::mixer::attention::AttentionSpec;
use super::names::Names;
use super::rope::RopeSpec;
use crate::error::Error;
use crate::load::FormatError;
use farthing_kernels::activation::Activation;
use farthing_kernels::experts::ExpertActivation;
use serde_json::{Map, Value};

/// A whole model: what is common to its blocks, and the blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `model_type`, as transformers names it.
    pub family: String,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Longest sequence the model was made for.
    pub context: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Factor on embedding rows.
    pub embedding_scale: f32,
    /// Factor on what each half of a block adds to the stream (Granite).
    pub residual_scale: f32,
    /// Factor on logits.
    pub logit_scale: f32,
    /// Added to every norm weight (families that store `w - 1`).
    pub norm_offset: f32,
    /// Epsilon of every RMS norm.
    pub epsilon: f32,
    /// `c * tanh(logits / c)`, if any.
    pub final_softcap: Option<f32>,
    /// Rotary embeddings; blocks refer to them by index.
    pub ropes: Vec<RopeSpec>,
    /// The blocks, first to last.
    pub blocks: Vec<BlockSpec>,
    /// What the family calls its tensors.
    pub names: Names,
}

/// One block: a mixer, then a feed-forward part, each behind an RMS norm and added to the stream.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSpec {
    /// How its rows learn of the rows before them.
    pub mixer: MixerSpec,
    /// What happens to each row alone.
    pub feed_forward: FeedForwardSpec,
    /// Norms behind both of them too (Gemma).
    pub sandwich: bool,
}

impl BlockSpec {
    /// A block of any two halves.
    pub(super) fn new(mixer: MixerSpec, feed_forward: FeedForwardSpec) -> BlockSpec {
        BlockSpec { mixer, feed_forward, sandwich: false }
    }

    /// A block of attention and one gated network.
    pub(super) fn dense(attention: AttentionSpec, feed_forward: DenseSpec) -> BlockSpec {
        BlockSpec::new(MixerSpec::Attention(attention), FeedForwardSpec::Dense(feed_forward))
    }

    /// A block of attention and a mixture of experts.
    pub(super) fn sparse(attention: AttentionSpec, feed_forward: SparseSpec) -> BlockSpec {
        BlockSpec::new(MixerSpec::Attention(attention), FeedForwardSpec::Sparse(feed_forward))
    }
}

/// Reads a model's description from its configuration.
pub fn read(config: &Map<String, Value>) -> Result<Config, Error> {
    let reader = Reader { map: config, prefix: String::new() };
    let family = reader.string("model_type", None)?;
    let described = match family.as_str() {
        "llama" | "mistral" | "smollm3" => super::llama::describe(&reader, &family)?,
        "qwen2" | "qwen3" => super::qwen::describe(&reader, &family)?,
        "gemma3_text" => super::gemma::describe(&reader)?,
        "mixtral" => super::mixtral::describe(&reader)?,
        "qwen2_moe" | "qwen3_moe" => super::qwen_moe::describe(&reader, &family)?,
        "olmoe" => super::olmoe::describe(&reader)?,
        "granite" | "granitemoe" => super::granite::describe(&reader, &family)?,
        "gpt_oss" => super::gpt_oss::describe(&reader)?,
        "deepseek_v3" | "mistral4" => super::deepseek::describe(&reader, &family)?,
        "lfm2" | "lfm2_moe" => super::lfm2::describe(&reader, &family)?,
        "qwen3_next" | "qwen3_5" | "qwen3_5_text" | "qwen3_5_moe" | "qwen3_5_moe_text" => {
            super::qwen_hybrid::describe(&reader, &family)?
        }
        other => {
            return Err(Error::unsupported(
                format!("model_type {other:?}"),
                "the families llama, mistral, smollm3, qwen2, qwen3, qwen3_next, qwen3_5, gemma3_text, lfm2, granite, mixtral, \
                 qwen2_moe, qwen3_moe, qwen3_5_moe, olmoe, granitemoe, lfm2_moe, gpt_oss, deepseek_v3 and mistral4 load",
            ));
        }
    };
    if let Some(quantization) = config.get("quantization_config").filter(|value| !value.is_null()) {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
        if family == "gpt_oss" && method == "mxfp4" {
            return Ok(described);
        }
        return Err(Error::unsupported(
            format!("quantization_config of method {method:?}"),
            "load the unquantised checkpoint or a GGUF file of it",
        ));
    }
    Ok(described)
}

/// Typed, range-checked access to a configuration's values.
pub(super) struct Reader<'a> {
    map: &'a Map<String, Value>,
    prefix: String,
}

impl<'a> Reader<'a> {
    /// An error about the value of `key`.
    pub(super) fn wrong(&self, key: &str, got: impl ToString, expected: &str) -> FormatError {
        let key = format!("{}{key}", self.prefix);
        FormatError::Config { key, got: got.to_string(), expected: expected.to_owned() }
    }

    fn missing(&self, key: &str, expected: &str) -> FormatError {
        FormatError::MissingKey { key: format!("{}{key}", self.prefix), expected: expected.to_owned() }
    }

    fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// A count in `1..=most`; absent, the default, or an error when there is none.
    pub(super) fn count(&self, key: &str, default: Option<usize>, most: usize) -> Result<usize, FormatError> {
        let expected = format!("an integer from 1 to {most}");
        let value = match self.value(key) {
            None => default.ok_or_else(|| self.missing(key, &expected))?,
            Some(value) => value
                .as_u64()
                .and_then(|value| usize::try_from(value).ok())
                .ok_or_else(|| self.wrong(key, value, &expected))?,
        };
        if value == 0 || value > most { Err(self.wrong(key, value, &expected)) } else { Ok(value) }
    }

    /// A count in `0..=most`; absent, the default.
    pub(super) fn count_or_zero(&self, key: &str, default: usize, most: usize) -> Result<usize, FormatError> {
        if self.value(key).and_then(Value::as_u64) == Some(0) {
            Ok(0)
        } else {
            self.count(key, Some(default.max(1)), most)
        }
    }

    /// An even count.
    pub(super) fn even(&self, key: &str, default: usize, most: usize) -> Result<usize, FormatError> {
        let count = self.count(key, Some(default), most)?;
        if count % 2 == 0 { Ok(count) } else { Err(self.wrong(key, count, "an even number")) }
    }

    /// Number of experts, under any of its names.
    pub(super) fn experts(&self, default: usize) -> Result<usize, FormatError> {
        let names = ["num_experts", "num_local_experts", "n_routed_experts"];
        let key = names.into_iter().find(|key| self.value(key).is_some()).unwrap_or(names[0]);
        self.count(key, Some(default), 1 << 16)
    }

    /// A count that may be absent.
    pub(super) fn optional_count(&self, key: &str, most: usize) -> Result<Option<usize>, FormatError> {
        self.value(key).map(|_| self.count(key, None, most)).transpose()
    }

    /// A positive finite number; absent, the default, or an error when there is none.
    pub(super) fn positive(&self, key: &str, default: Option<f64>) -> Result<f64, FormatError> {
        let expected = "a finite number above 0";
        let value = match self.value(key) {
            None => default.ok_or_else(|| self.missing(key, expected))?,
            Some(value) => value.as_f64().ok_or_else(|| self.wrong(key, value, expected))?,
        };
        if value.is_finite() && value > 0.0 { Ok(value) } else { Err(self.wrong(key, value, expected)) }
    }

    /// A positive finite number that may be absent.
    pub(super) fn optional_positive(&self, key: &str) -> Result<Option<f64>, FormatError> {
        self.value(key).map(|_| self.positive(key, None)).transpose()
    }

    /// A truth value.
    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, FormatError> {
        self.value(key)
            .map_or(Ok(default), |value| value.as_bool().ok_or_else(|| self.wrong(key, value, "true or false")))
    }

    /// A text; absent, the default, or an error when there is none.
    pub(super) fn string(&self, key: &str, default: Option<&str>) -> Result<String, FormatError> {
        match self.value(key) {
            None => default.map(str::to_owned).ok_or_else(|| self.missing(key, "a text")),
            Some(value) => value.as_str().map(str::to_owned).ok_or_else(|| self.wrong(key, value, "a text")),
        }
    }

    /// A nested object that may be absent.
    pub(super) fn object(&self, key: &str) -> Result<Option<Reader<'a>>, FormatError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.wrong(key, value, "an object"))?;
        Ok(Some(Reader { map, prefix: format!("{}{key}.", self.prefix) }))
    }

    /// A list of exactly `length` elements, each converted by `convert`, that may be absent.
    pub(super) fn list<T>(
        &self,
        key: &str,
        length: usize,
        expected: &str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, FormatError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let array = value.as_array().ok_or_else(|| self.wrong(key, value, "a list"))?;
        if array.len() != length {
            return Err(self.wrong(key, format!("{} elements", array.len()), &format!("{length} elements")));
        }
        let convert = |value| convert(value).ok_or_else(|| self.wrong(key, value, expected));
        array.iter().map(convert).collect::<Result<_, _>>().map(Some)
    }

    /// For each layer, whether its attention slides over a window, as `layer_types` says.
    pub(super) fn sliding_layers(&self, layers: usize) -> Result<Option<Vec<bool>>, FormatError> {
        self.list("layer_types", layers, "full_attention or sliding_attention", |value| match value.as_str()? {
            "full_attention" => Some(false),
            "sliding_attention" => Some(true),
            _ => None,
        })
    }

    /// A list of indices below `length`, that may be absent.
    pub(super) fn indices(&self, key: &str, length: usize) -> Result<Option<Vec<usize>>, FormatError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let array = value.as_array().ok_or_else(|| self.wrong(key, value, "a list"))?;
        let index = |value: &Value| usize::try_from(value.as_u64()?).ok().filter(|&index| index < length);
        let convert = |value| index(value).ok_or_else(|| self.wrong(key, value, &format!("indices below {length}")));
        array.iter().map(convert).collect::<Result<_, _>>().map(Some)
    }

    /// The values every family names alike.
    pub(super) fn shape(&self) -> Result<Shape, FormatError> {
        self.shape_around(self.count("intermediate_size", None, 1 << 20)?)
    }

    /// [`Reader::shape`] with another width of the feed-forward network than `intermediate_size`.
    pub(super) fn shape_around(&self, intermediate: usize) -> Result<Shape, FormatError> {
        let hidden = self.count("hidden_size", None, 1 << 17)?;
        let heads = self.count("num_attention_heads", None, 1 << 14)?;
        let kv_heads = self.count("num_key_value_heads", Some(heads), 1 << 14)?;
        if heads % kv_heads != 0 {
            return Err(self.wrong("num_key_value_heads", kv_heads, &format!("a divisor of {heads} attention heads")));
        }
        let head_dim = match self.optional_count("head_dim", 1 << 12)? {
            Some(head_dim) => head_dim,
            None if hidden % heads == 0 => hidden / heads,
            None => return Err(self.wrong("hidden_size", hidden, &format!("a multiple of {heads} attention heads"))),
        };
        if head_dim % 2 != 0 {
            return Err(self.wrong("head_dim", head_dim, "an even number"));
        }
        Ok(Shape {
            hidden,
            heads,
            kv_heads,
            head_dim,
            layers: self.count("num_hidden_layers", None, 4096)?,
            intermediate,
            vocab: self.count("vocab_size", None, 1 << 24)?,
            context: self.count("max_position_embeddings", Some(2048), 1 << 28)?,
            epsilon: self.positive("rms_norm_eps", Some(1e-6))? as f32,
        })
    }

    /// The activation of the feed-forward network.
    pub(super) fn activation(&self, key: &str, default: &str) -> Result<Activation, Error> {
        match self.string(key, Some(default))?.as_str() {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
            other => Err(Error::unsupported(format!("{key} {other:?}"), "silu and gelu_pytorch_tanh work")),
        }
    }
}

/// Sizes that every family states.
pub(super) struct Shape {
    pub(super) hidden: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) layers: usize,
    pub(super) intermediate: usize,
    pub(super) vocab: usize,
    pub(super) context: usize,
    pub(super) epsilon: f32,
}

impl Shape {
    /// The plain attention of this shape: causal, with rotary embedding 0, no biases, no extra norms.
    pub(super) fn attention(&self) -> AttentionSpec {
        AttentionSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            softcap: None,
            window: None,
            rope: Some(0),
            qkv_bias: false,
            output_bias: false,
            head_norm: None,
            sinks: false,
            gated: false,
            doubled: false,
        }
    }

    /// The plain gated network of this shape: no biases.
    pub(super) fn dense(&self, activation: Activation) -> DenseSpec {
        DenseSpec { intermediate: self.intermediate, activation, bias: false }
    }

    /// Experts of width `intermediate` behind `router`, without biases or a shared one.
    pub(super) fn sparse(router: RouterSpec, intermediate: usize, activation: Activation) -> SparseSpec {
        SparseSpec {
            router,
            logit_bias: false,
            selection_bias: false,
            intermediate,
            activation: ExpertActivation::Gated(activation),
            bias: false,
            joined: Joined::Concatenated,
            shared: None,
        }
    }

    /// A model of this shape with the given blocks and rotary embeddings, norms and embeddings unscaled.
    pub(super) fn config(&self, family: &str, tied: bool, ropes: Vec<RopeSpec>, blocks: Vec<BlockSpec>) -> Config {
        Config {
            family: family.to_owned(),
            vocab: self.vocab,
            hidden: self.hidden,
            context: self.context,
            tied,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            norm_offset: 0.0,
            epsilon: self.epsilon,
            final_softcap: None,
            ropes,
            blocks,
            names: Names::default(),
        }
    }
}
