//! Ground floor of farthing: packed low-bit weights, SIMD kernels with run-time dispatch, and the thread pool.
//!
//! This crate knows numbers, not models. Each kernel has a scalar form that is its specification; every other form gives
//! the same bits. Matrix products accumulate the inputs ascending with fused multiply-add; sums along a row use 16
//! interleaved partial sums (index mod 16) and one fixed tree; so results do not depend on the number of rows, on
//! threads or on the instruction set.

// Generic kernel bodies must be inlined into the shell that enables the instruction set.
#![allow(clippy::inline_always)]

pub mod activation;
pub mod affinity;
pub mod attention;
pub mod cost;
pub mod divergence;
pub mod experts;
pub mod file_map;
pub mod format;
pub mod isa;
pub mod math;
pub mod matmul;
pub mod memory;
pub mod norm;
pub mod openmp;
pub mod philox;
pub mod pool;
pub mod probe;
pub mod recurrent;
pub mod rope;
mod rows;
pub mod sample;
pub mod score;
pub mod selftest;
pub mod topk;
mod vector;
