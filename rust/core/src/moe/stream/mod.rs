//! Experts larger than memory: packed once into a file, fetched when a token is sent to them, the rest given back.
//!
//! The file is a map of which the kernels read as they read memory, so that results cannot depend on what is there. Those
//! that a step needs are fetched first, by several readers at once; the least recently used ones leave.

mod experts;
mod file;
mod layout;
mod residency;
#[cfg(test)]
mod tests;

pub(crate) use experts::{StreamedExperts, resident_bytes};
