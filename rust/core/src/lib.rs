//! The engine of farthing: loaders, model families, the batched step and the ledger.

mod checksum;
pub mod detokenize;
pub mod engine;
pub mod error;
pub mod ledger;
pub mod load;
pub mod model;
pub mod moe;
pub mod reasoning;
pub mod speculative;
