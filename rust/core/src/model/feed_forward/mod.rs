//! What a block does to each row alone: its second half.

pub mod dense;
pub mod sparse;

pub mod levers;
pub mod router;
pub mod sources;

use super::forward::{Pass, Stream};
use super::names::Role;
use super::weights::{Linear, Loader, MatrixSpec};
use crate::error::Error;
use dense::{Dense, DenseSpec};
use sparse::{Sparse, SparseSpec};

/// A feed-forward part's description.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForwardSpec {
    /// One gated network for all rows.
    Dense(DenseSpec),
    /// A mixture of experts.
    Sparse(SparseSpec),
}

/// A feed-forward part's tensors.
#[derive(Debug)]
pub(super) enum FeedForward {
    Dense(Dense),
    Sparse(Sparse),
}

/// Buffers of every kind of feed-forward part.
#[derive(Default)]
pub(super) struct Buffers {
    dense: dense::Buffers,
    sparse: sparse::Buffers,
}

impl Buffers {
    /// Bytes of experts that have been read since the last call.
    pub(super) fn take_expert_bytes(&mut self) -> u64 {
        std::mem::take(&mut self.sparse.read)
    }
}

impl FeedForwardSpec {
    /// Every matrix, in the order of use.
    pub(super) fn matrices(&self, hidden: usize) -> Vec<MatrixSpec> {
        match self {
            FeedForwardSpec::Dense(spec) => spec.matrices(hidden).into(),
            FeedForwardSpec::Sparse(spec) => spec.matrices(hidden),
        }
    }

    pub(super) fn load(&self, loader: &Loader<'_>, layer: usize) -> Result<FeedForward, Error> {
        Ok(match self {
            FeedForwardSpec::Dense(spec) => FeedForward::Dense(spec.load(loader, layer)?),
            FeedForwardSpec::Sparse(spec) => FeedForward::Sparse(spec.load(loader, layer)?),
        })
    }
}

impl FeedForward {
    /// The matrices with their roles, in the order of use.
    pub(super) fn linears(&self) -> Vec<(Role, &Linear)> {
        match self {
            FeedForward::Dense(part) => part.linears().into(),
            FeedForward::Sparse(part) => part.linears(),
        }
    }

    /// The mixture, if it is one.
    pub(super) fn sparse(&self) -> Option<&Sparse> {
        match self {
            FeedForward::Dense(_) => None,
            FeedForward::Sparse(part) => Some(part),
        }
    }

    /// Does what comes before [`FeedForward::forward`]: a mixture chooses its experts, so that they can be fetched.
    pub(super) fn choose(&self, pass: &Pass<'_>, stream: &Stream, buffers: &mut Buffers) {
        if let FeedForward::Sparse(part) = self {
            part.choose(pass, stream, &mut buffers.sparse);
        }
    }

    /// Has those experts fetched that `rows`, `(t, hidden)` and normed, would choose.
    pub(super) fn guess(&self, pass: &Pass<'_>, rows: &[f32], buffers: &mut Buffers) {
        if let FeedForward::Sparse(part) = self {
            part.guess(pass, rows, &mut buffers.sparse);
        }
    }

    /// Adds to the stream what becomes of its rows, already normed; `after`: the norm of what is added.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        stream: &mut Stream,
        buffers: &mut Buffers,
        after: Option<&[f32]>,
    ) -> Result<(), Error> {
        match self {
            FeedForward::Dense(part) => {
                part.forward(pass, stream, &mut buffers.dense, after);
                Ok(())
            }
            FeedForward::Sparse(part) => part.forward(pass, stream, &mut buffers.sparse, after),
        }
    }
}
