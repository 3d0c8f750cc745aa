//! How a row learns of the rows before it: the first half of a block.
//!
//! A kind of mixer is a file: its description, its tensors, its forward pass. What it remembers of a sequence is in the
//! cache, as pages of keys and values or as a state of fixed size.

pub mod attention;
pub mod gated_delta;
pub mod latent;
pub mod short_convolution;

use super::forward::{Pass, Stream};
use super::names::Role;
use super::weights::{Linear, Loader, MatrixSpec};
use crate::engine::cache::Cache;
use crate::error::Error;
use attention::{Attention, AttentionSpec};
use farthing_kernels::format::PackedMatrix;
use gated_delta::{GatedDelta, GatedDeltaSpec};
use latent::{LatentAttention, LatentAttentionSpec};
use short_convolution::{ShortConvolution, ShortConvolutionSpec};

/// A mixer's description.
#[derive(Clone, Debug, PartialEq)]
pub enum MixerSpec {
    /// Softmax attention over the keys and values of all rows before.
    Attention(AttentionSpec),
    /// Attention whose keys and values are maps of one latent for each token.
    Latent(LatentAttentionSpec),
    /// A gated convolution over a few rows before.
    ShortConvolution(ShortConvolutionSpec),
    /// A state for each head that the gated delta rule corrects.
    GatedDelta(GatedDeltaSpec),
}

/// A mixer's tensors.
#[derive(Debug)]
// One for each block: what the smaller ones waste is nothing beside their matrices.
#[allow(clippy::large_enum_variant)]
pub(super) enum Mixer {
    Attention(Attention),
    Latent(LatentAttention),
    ShortConvolution(ShortConvolution),
    GatedDelta(GatedDelta),
}

/// Buffers of every kind of mixer.
#[derive(Default)]
pub(super) struct Buffers {
    attention: attention::Buffers,
    latent: latent::Buffers,
    short_convolution: short_convolution::Buffers,
    gated_delta: gated_delta::Buffers,
}

impl MixerSpec {
    /// `(heads, width of a head)` of the keys and values that a sequence keeps for each token.
    pub fn keys(&self) -> (usize, usize) {
        match self {
            MixerSpec::Attention(spec) => (spec.kv_heads, spec.head_dim),
            MixerSpec::Latent(spec) => (1, spec.row()),
            MixerSpec::ShortConvolution(_) | MixerSpec::GatedDelta(_) => (0, 0),
        }
    }

    /// Tokens of keys that a row reads, itself included; `None` is all before it.
    pub fn window(&self) -> Option<usize> {
        match self {
            MixerSpec::Attention(spec) => spec.window,
            MixerSpec::Latent(_) | MixerSpec::ShortConvolution(_) | MixerSpec::GatedDelta(_) => None,
        }
    }

    /// Floats of the state that a sequence keeps, however long it is.
    pub fn state_floats(&self) -> usize {
        match self {
            MixerSpec::Attention(_) | MixerSpec::Latent(_) => 0,
            MixerSpec::ShortConvolution(spec) => spec.state_floats(),
            MixerSpec::GatedDelta(spec) => spec.state_floats(),
        }
    }

    /// Every matrix, in the order of use.
    pub(super) fn matrices(&self, hidden: usize) -> Vec<MatrixSpec> {
        match self {
            MixerSpec::Attention(spec) => spec.matrices(hidden),
            MixerSpec::Latent(spec) => spec.matrices(hidden),
            MixerSpec::ShortConvolution(spec) => spec.matrices().into(),
            MixerSpec::GatedDelta(spec) => spec.matrices(hidden).into(),
        }
    }

    pub(super) fn load(&self, loader: &Loader<'_>, layer: usize) -> Result<Mixer, Error> {
        Ok(match self {
            MixerSpec::Attention(spec) => Mixer::Attention(spec.load(loader, layer)?),
            MixerSpec::Latent(spec) => Mixer::Latent(spec.load(loader, layer)?),
            MixerSpec::ShortConvolution(spec) => Mixer::ShortConvolution(spec.load(loader, layer)?),
            MixerSpec::GatedDelta(spec) => Mixer::GatedDelta(spec.load(loader, layer)?),
        })
    }
}

impl Mixer {
    /// The matrices with their roles, in the order of use.
    pub(super) fn matrices(&self) -> Vec<(Role, &PackedMatrix)> {
        match self {
            Mixer::Attention(mixer) => bare(mixer.linears()),
            Mixer::Latent(mixer) => mixer.matrices(),
            Mixer::ShortConvolution(mixer) => bare(mixer.linears()),
            Mixer::GatedDelta(mixer) => bare(mixer.linears()),
        }
    }

    /// Adds to the stream what its rows, already normed, take from the rows before them; `after`: the norm of what is
    /// added.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        layer: usize,
        cache: &mut Cache,
        stream: &mut Stream,
        buffers: &mut Buffers,
        after: Option<&[f32]>,
    ) {
        match self {
            Mixer::Attention(mixer) => mixer.forward(pass, layer, cache, stream, &mut buffers.attention, after),
            Mixer::Latent(mixer) => mixer.forward(pass, layer, cache, stream, &mut buffers.latent, after),
            Mixer::ShortConvolution(mixer) => {
                mixer.forward(pass, cache.states(layer), stream, &mut buffers.short_convolution, after);
            }
            Mixer::GatedDelta(mixer) => {
                mixer.forward(pass, cache.states(layer), stream, &mut buffers.gated_delta, after);
            }
        }
    }
}

/// The matrices without their biases.
fn bare<'a>(linears: impl IntoIterator<Item = (Role, &'a Linear)>) -> Vec<(Role, &'a PackedMatrix)> {
    linears.into_iter().map(|(role, linear)| (role, &linear.matrix)).collect()
}
