//! What somebody else may do with a model's experts: keep them outside of memory, and choose among them otherwise than
//! the router. The room `moe` does both.

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

use crate::error::Error;
use crate::ledger::ExpertCounts;
use farthing_kernels::format::{Format, PackedMatrix, Precision};
use farthing_kernels::score::Score;

/// One of an expert's matrices, `(n, k)`.
#[derive(Clone, Copy, Debug)]
pub struct MatrixShape {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// How it is packed.
    pub format: Format,
    /// What its activations are rounded to.
    pub precision: Precision,
}

/// The experts of one layer.
#[derive(Clone, Debug)]
pub struct LayerShape {
    /// Number of the block.
    pub layer: usize,
    /// e.
    pub experts: usize,
    /// Experts of one token.
    pub top_k: usize,
    /// What tells two sources of the same shapes apart.
    pub source: String,
    /// Of each expert.
    pub matrices: Vec<MatrixShape>,
}

/// A model's mixtures before they are loaded.
pub trait Mixtures {
    /// Where the model lies.
    fn path(&self) -> &Path;

    /// What tells the model from others.
    fn identity(&self) -> String;

    /// What is wished of its weights, and so of its packed experts.
    fn wishes(&self) -> String;

    /// The layers with experts, ascending.
    fn layers(&self) -> Result<Vec<LayerShape>, Error>;

    /// Calls `each` with the packed matrices of every expert of block `layer`, one expert after the other.
    fn pack(&self, layer: usize, each: &mut dyn FnMut(&[PackedMatrix]) -> Result<(), Error>) -> Result<(), Error>;

    /// Tells that nothing of block `layer` needs to be packed.
    fn found(&self, layer: usize) -> Result<(), Error>;
}

/// What is done with a model's experts; asked while it is planned and while it loads.
pub trait ExpertLevers {
    /// Bytes of experts in memory, at most, where the others are on disk; nothing where all are in memory.
    fn resident_bytes(&self, layers: Vec<LayerShape>) -> Result<Option<u64>, Error>;

    /// Where those are that do not stay in memory; nothing where all do.
    fn store(&self, mixtures: &dyn Mixtures) -> Result<Option<Box<dyn ExpertStore>>, Error>;

    /// Who chooses among them in place of the routers.
    fn selection(&self) -> Option<Arc<dyn Selection>>;
}

/// Experts that are not all in memory.
pub trait ExpertStore: Debug + Send + Sync {
    /// The matrices of `expert` of block `layer`, in the order in which they were packed.
    fn matrices(&self, layer: usize, expert: usize) -> Vec<PackedMatrix>;

    /// The part of it that belongs to block `layer`, which has `experts`.
    fn supply(&self, layer: usize, experts: usize) -> Option<Box<dyn Supply>>;

    /// Bytes of experts in memory at most.
    fn resident_bytes(&self) -> u64;

    /// What came and went so far.
    fn counts(&self) -> ExpertCounts;
}

/// The experts of one layer that are not all in memory.
pub trait Supply: Debug + Send + Sync {
    /// Has the first experts fetched that `ids` names: `(t, k)`, ids that are no expert's left out.
    fn begin(&self, ids: &[u32], waves: &mut Waves);

    /// Calls `run(ids, add)` for each wave: `ids: (t, k)` with only the wave's experts, and those that every row meets in
    /// the last.
    fn run(&self, ids: &[u32], waves: &mut Waves, add: bool, run: &mut dyn FnMut(&[u32], bool)) -> Result<(), Error>;

    /// Has the experts fetched, when there is time, that rows may choose: `(t, k)`, best first.
    fn guess(&self, ids: &[u32], k: usize);

    /// Which experts need not be fetched: `(e,)`.
    fn resident(&self, out: &mut Vec<bool>);
}

/// Buffers of a [`Supply`].
#[derive(Default)]
pub struct Waves {
    /// The experts of the step, ascending.
    pub wanted: Vec<usize>,
    /// Experts of a wave, so many from the front of what is left.
    pub wave: usize,
    /// `(t, k)`: choices of other waves are no expert's.
    pub ids: Vec<u32>,
}

/// Chooses experts otherwise than a router does, and so changes results.
pub trait Selection: Debug + Send + Sync {
    /// Whether it wants to know which experts are in memory.
    fn asks_residency(&self) -> bool;

    /// The experts `ids: (k,)` of a row with these `scores: (e,)` of the given kind; `best(scores, ids)` chooses as the
    /// router does. Returns how many the router would not have chosen.
    fn choose(
        &self,
        kind: Score,
        scores: &[f32],
        resident: &[bool],
        ids: &mut [u32],
        best: &dyn Fn(&[f32], &mut [u32]),
    ) -> u64;

    /// Makes [`LEFT_OUT`](super::router::LEFT_OUT) of the ids, and 0 of the weights, of a row's experts that it does
    /// without, before weights are renormalised. Returns how many.
    fn leave_out(&self, ids: &mut [u32], weights: &mut [f32]) -> u64;

    /// Hears what became of `choices` choices of a step.
    fn note(&self, choices: u64, departures: Departures);

    /// What it has heard so far.
    fn counts(&self) -> ExpertCounts;
}

/// How far a step's choices were from the routers'.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Departures {
    /// Experts that were chosen and left out.
    pub skipped: u64,
    /// Experts that the router would not have chosen.
    pub substituted: u64,
}
