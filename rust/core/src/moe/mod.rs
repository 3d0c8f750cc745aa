//! Levers on mixtures of experts: experts larger than memory, fewer experts for a token; and how evenly tokens spread.

mod levers;
mod selection;
mod statistics;
mod stream;

pub use levers::Levers;
pub use statistics::RoutingStatistics;
