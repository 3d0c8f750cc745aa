//! Fewer tokens: reasoning effort that is honoured.

pub mod effort;
pub mod families;

pub use effort::{Effort, EffortPlan, Limits, Placement};
pub use families::Dialect;
