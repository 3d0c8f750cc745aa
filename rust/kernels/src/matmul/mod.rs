//! Products of activations with packed matrices: `y = x · Wᵀ`, with `x: (m, k)`, `W: (n, k)`, `y: (m, n)`.
//!
//! Integer weights meet activations quantised by groups: for each group in ascending order, with the exact integer
//! `acc = Σ (code - zero) · xq`, `y = fma(f32(acc) · sx, scale, y)`, and for a minimum, after that,
//! `y = fma(minimum, sx · f32(Σ xq), y)`. Super-blocks of 256 inputs first sum `sub_scale · Σ (code - zero) · xq` over their
//! sub-blocks as integers `h` and `l`, for `xq >> 7` and `xq & 127` (A8: all in `l`), then with `t = fma(f32(h), 128, f32(l))`
//! `y = fma(t · sx, d, y)`; for the minima, likewise from `sub_minimum · Σ xq`, `y = fma(-(t · sx), dmin, y)`. Float
//! weights, and integer weights of [`Precision::F32`] dequantised as by
//! [`PackedMatrix::row`], meet the activations themselves: `y = fma(w, x, y)`, inputs ascending. So an output depends on
//! its row of `x` and its row of `W` alone: not on m, threads, or instruction set.
//!
//! ```
//! use farthing_kernels::format::{FloatType, PackedMatrix};
//! use farthing_kernels::matmul::{Input, Job, matmul};
//! use farthing_kernels::pool::Pool;
//!
//! let identity = PackedMatrix::pack_float(3, 3, FloatType::F32, |n, row| {
//!     row[n] = 1.0;
//!     Ok::<(), std::convert::Infallible>(())
//! })?;
//! let (pool, x, mut y) = (Pool::new(1), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0; 6]);
//! let mut input = Input::new();
//! input.prepare(&pool, &x, 2, 3, &[&identity]);
//! matmul(&pool, &x, 2, &input, &mut [Job { matrix: &identity, bias: None, add: false, out: &mut y }]);
//! assert_eq!(x, y);
//! # Ok::<(), farthing_kernels::format::PackError<std::convert::Infallible>>(())
//! ```

mod block;
pub mod budget;
mod drive;
mod float;
mod heads;
mod input;
mod lanes;
mod panel;
mod scalar;
mod self_test;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(test)]
mod tests;

pub use heads::{Heads, HeadsMut, matmul_heads};
pub use input::Input;
pub use self_test::{SelfTest, SelfTestError, self_test, self_tests};

use crate::activation::Activation;
use crate::format::PackedMatrix;
use crate::pool::{Disjoint, Pool};
pub(crate) use drive::{CHUNK, Operand, SCRATCH, Scratch, TILES, prefetch, product};
use drive::{Gated, Target, drive};
pub(crate) use input::{Key, PARALLEL, Planes, blocks, most_tokens, tokens};
pub(crate) use self_test::best;

/// One product of a region: `out = x · matrixᵀ + bias`, or `out += …`.
pub struct Job<'a> {
    /// `(n, k)` weights.
    pub matrix: &'a PackedMatrix,
    /// `(n,)` added once at the end.
    pub bias: Option<&'a [f32]>,
    /// Adds to `out` instead of overwriting it.
    pub add: bool,
    /// `(m, n)` row-major, exactly `m * n` long.
    pub out: &'a mut [f32],
}

/// All `jobs` on the same `x: (m, k)`, in one parallel region; `input` was prepared from this `x` for every matrix.
///
/// # Panics
/// When shapes disagree or `input` was prepared for something else.
pub fn matmul(pool: &Pool, x: &[f32], m: usize, input: &Input, jobs: &mut [Job<'_>]) {
    let targets: Vec<Target<'_>> = jobs
        .iter_mut()
        .map(|job| Target {
            matrix: job.matrix,
            gated: None,
            bias: job.bias,
            add: job.add,
            out: Disjoint::new(&mut *job.out),
        })
        .collect();
    drive(pool, x, m, input, &targets);
}

/// `out = activation(x · gateᵀ) * (x · upᵀ)`, `out: (m, n)`, in one parallel region.
///
/// # Panics
/// When shapes disagree or `input` was prepared for something else.
pub fn gated(
    pool: &Pool,
    x: &[f32],
    m: usize,
    input: &Input,
    gate: &PackedMatrix,
    up: &PackedMatrix,
    activation: Activation,
    out: &mut [f32],
) {
    let gated = Some(Gated { up, activation });
    drive(pool, x, m, input, &[Target { matrix: gate, gated, bias: None, add: false, out: Disjoint::new(out) }]);
}
