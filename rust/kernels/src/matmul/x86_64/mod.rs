//! Kernels with the vector instructions of x86-64.

// Loops over registers read best by index, and the intrinsics are a vocabulary of their own.
#![allow(clippy::needless_range_loop, clippy::wildcard_imports)]

pub(super) mod avx2;
pub(super) mod avx512;
