//! How a model is loaded and served.

use crate::error::Error;
use crate::moe::Levers;
use farthing_kernels::attention::KvType;

/// Precision of the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weights {
    /// As the file stores them.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16, rounded to nearest even.
    Bf16,
    /// 8-bit integers in groups of 32 with a minimum, rounded to nearest.
    Int8,
    /// 4-bit integers in groups of 32 with the scale and minimum that round best.
    Int4,
}

impl Weights {
    /// Parses the name used in Python and on the command line.
    pub fn parse(name: &str) -> Result<Weights, Error> {
        match name {
            "auto" => Ok(Weights::Auto),
            "f32" => Ok(Weights::F32),
            "bf16" => Ok(Weights::Bf16),
            "int8" => Ok(Weights::Int8),
            "int4" => Ok(Weights::Int4),
            "ternary" => {
                Err(Error::unsupported("weights=\"ternary\"", "use \"auto\", \"f32\", \"bf16\", \"int8\" or \"int4\""))
            }
            other => Err(Error::argument("weights", format!("{other:?}"), "auto, f32, bf16, int8 or int4")),
        }
    }
}

/// Precision of the activations that meet integer weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// The rule of [`crate::model::precision`].
    #[default]
    Auto,
    /// 8 bits, a scale per group.
    A8,
    /// 15 bits, a scale per group.
    A16,
    /// 32-bit floats, no rounding.
    F32,
}

impl Activations {
    /// Parses the name used in Python and on the command line.
    pub fn parse(name: &str) -> Result<Activations, Error> {
        match name {
            "auto" => Ok(Activations::Auto),
            "a8" => Ok(Activations::A8),
            "a16" => Ok(Activations::A16),
            "f32" => Ok(Activations::F32),
            other => Err(Error::argument("activations", format!("{other:?}"), "auto, a8, a16 or f32")),
        }
    }
}

/// Precision of cached keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kv {
    /// f16, or f32 under f32 weights.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Kv {
    /// The type of the pages under these weights.
    pub fn resolve(self, weights: Weights) -> KvType {
        match (self, weights) {
            (Kv::F32, _) | (Kv::Auto, Weights::F32) => KvType::F32,
            (Kv::F16 | Kv::Auto, _) => KvType::F16,
            (Kv::Bf16, _) => KvType::Bf16,
        }
    }

    /// Parses the name used in Python and on the command line.
    pub fn parse(name: &str) -> Result<Kv, Error> {
        match name {
            "auto" => Ok(Kv::Auto),
            "f32" => Ok(Kv::F32),
            "f16" => Ok(Kv::F16),
            "bf16" => Ok(Kv::Bf16),
            other => Err(Error::argument("kv", format!("{other:?}"), "auto, f32, f16 or bf16")),
        }
    }
}

/// Options of [`crate::engine::Llm::load`]; the defaults suit most models.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Precision of the weights.
    pub weights: Weights,
    /// Precision of the activations.
    pub activations: Activations,
    /// Precision of keys and values.
    pub kv: Kv,
    /// Threads; `None` takes what the environment, the affinity mask and the cgroup quota allow.
    pub threads: Option<usize>,
    /// Most sequences in one step.
    pub max_sequences: usize,
    /// Longest sequence, prompt and answer; `None` takes the model's own.
    pub context: Option<usize>,
    /// Most prompt tokens in one step; `None` takes 512.
    pub chunk: Option<usize>,
    /// Pages of 32 tokens for all sequences together; `None` takes what `max_sequences` full contexts need, up to a
    /// quarter of the memory.
    pub kv_pages: Option<usize>,
    /// What is done with the experts of a mixture.
    pub experts: Levers,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            weights: Weights::Auto,
            activations: Activations::Auto,
            kv: Kv::Auto,
            threads: None,
            max_sequences: 16,
            context: None,
            chunk: None,
            kv_pages: None,
            experts: Levers::default(),
        }
    }
}

impl Options {
    /// Whether every value is in range; the error names the first that is not.
    pub fn validate(&self) -> Result<(), Error> {
        let positive = |name, value: Option<usize>, most: usize| match value {
            Some(value) if value == 0 || value > most => Err(Error::argument(name, value, format!("1 to {most}"))),
            _ => Ok(()),
        };
        positive("threads", self.threads, 1024)?;
        positive("max_sequences", Some(self.max_sequences), 4096)?;
        positive("context", self.context, 1 << 24)?;
        positive("chunk", self.chunk, 1 << 24)?;
        positive("kv_pages", self.kv_pages, 1 << 24)?;
        self.experts.validate()
    }
}
