//! Fewer tokens: how long a model may think, known for every sequence in a fixed number of operations a token.
//!
//! A [`ThinkSpec`] says how a model marks its thinking, a [`Policy`] how much of it a request wants, and a
//! [`Controller`] follows one sequence: which tokens may come next, which must, and what each token was.
//!
//! A [`Dialect`] says how a model is told how much to think, and makes an [`EffortPlan`] of one word.

mod controller;
mod effort;
mod families;
mod lexicon;
mod loops;
mod marker;
mod pairs;
mod policy;
mod settled;
mod spec;

pub use controller::{Change, Controller, Phase, Stop};
pub use effort::{Effort, EffortPlan, Limits, Placement};
pub use families::{Dialect, Levels, Switch};
pub use lexicon::{BitSet, Lexicon};
pub use loops::LoopGuard;
pub use marker::{MOST_MARKERS, Marker, Role};
pub use pairs::{PAIRS, Pair};
pub use policy::{Policy, Probe, Ramp, Reentry};
pub use settled::{Settled, entropy};
pub use spec::{ThinkSpec, Wishes};

#[cfg(test)]
mod tests;
