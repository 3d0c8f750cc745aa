//! The engine of farthing: loaders, model families, the batched step and the ledger.
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod load;
