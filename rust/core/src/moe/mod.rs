//! Mixtures of experts: which experts a token goes to, and how evenly.

mod router;
mod statistics;
pub(crate) mod stream;

pub use farthing_kernels::score::Score;
pub use router::{Biases, GroupScore, Groups, Router, RouterScratch, RouterSpec};
pub use statistics::RoutingStatistics;
pub use stream::StreamStatistics;
