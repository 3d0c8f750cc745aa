//! Products of Python's activations with packed matrices, on the threads that all matrices of the process share.

use std::cell::RefCell;
use std::sync::OnceLock;

use farthing_kernels::activation::Activation;
use farthing_kernels::format::PackedMatrix;
use farthing_kernels::matmul::{Input, Job, gated, matmul};
use farthing_kernels::norm::rms_norm;
use farthing_kernels::openmp::OpenMp;
use farthing_kernels::pool::{Pool, default_threads};
use pyo3::prelude::*;

use crate::floats::{Floats, FloatsMut, room};

/// Elements of a buffer of widened rows, at most: longer inputs go in parts, which changes no result.
pub(crate) const PART: usize = 1 << 24;
/// Rows of a part, at least.
const ROWS: usize = 64;

/// One product: `out = x · matrixᵀ + bias`.
pub(crate) struct Target<'a> {
    /// `(n, k)`.
    pub(crate) matrix: &'a PackedMatrix,
    /// `(n,)`.
    pub(crate) bias: Option<Floats<'a>>,
    /// `(m, n)`.
    pub(crate) out: FloatsMut<'a>,
}

/// Buffers that a thread keeps between calls.
#[derive(Default)]
struct Scratch {
    input: Input,
    inner_input: Input,
    x: Vec<f32>,
    y: Vec<f32>,
    biases: Vec<f32>,
    inner: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

/// Bytes of weights, and products of two numbers, that one thread reads and computes in about 100 µs. Between two calls
/// from Python the other threads park; to wake them for less takes longer than it saves.
pub(crate) const BYTES_ALONE: usize = 4 << 20;
pub(crate) const PRODUCTS_ALONE: usize = 1 << 25;

/// Threads that an OpenMP runtime lends, once [`share_threads`] has found one.
static LENT: OnceLock<Pool> = OnceLock::new();

/// The threads of this process's matrices; callers on several threads take turns. Little work stays with the caller.
fn pool(m: usize, matrices: &[&PackedMatrix]) -> &'static Pool {
    let bytes: usize = matrices.iter().map(|matrix| matrix.nbytes()).sum();
    let products: usize = matrices.iter().map(|matrix| matrix.rows() * matrix.columns()).sum();
    threads(bytes <= BYTES_ALONE && products.saturating_mul(m) <= PRODUCTS_ALONE)
}

/// The caller's thread alone, or all of them.
pub(crate) fn threads(alone: bool) -> &'static Pool {
    static ALL: OnceLock<Pool> = OnceLock::new();
    static ALONE: OnceLock<Pool> = OnceLock::new();
    if alone {
        ALONE.get_or_init(|| Pool::new(1))
    } else {
        LENT.get().unwrap_or_else(|| ALL.get_or_init(|| Pool::new(default_threads())))
    }
}

/// From now on this process's matrices use the threads of the OpenMP runtime that it has loaded, as many as that gives its
/// own regions now; whether there is one.
#[pyfunction]
pub(crate) fn share_threads() -> bool {
    let Some(runtime) = OpenMp::loaded() else { return false };
    LENT.get_or_init(|| Pool::lent(runtime, runtime.threads()));
    true
}

/// Rows of `x` computed together, for rows of `k` inputs and `n` outputs.
fn part(k: usize, n: usize) -> usize {
    (PART / k.max(n)).max(ROWS)
}

/// All `targets` on the same `x: (m, k)`, whose rows are quantised once.
pub(crate) fn product(x: Floats<'_>, k: usize, targets: &mut [Target<'_>]) {
    let matrices: Vec<&PackedMatrix> = targets.iter().map(|target| target.matrix).collect();
    let widths: Vec<usize> = matrices.iter().map(|matrix| matrix.rows()).collect();
    let (m, n) = (x.len() / k, widths.iter().sum());
    let pool = pool(m, &matrices);
    SCRATCH.with_borrow_mut(|scratch| {
        let mut biases: Vec<Option<&[f32]>> = Vec::with_capacity(targets.len());
        let mut space = room(&mut scratch.biases, n);
        for target in &*targets {
            let (own, rest) = std::mem::take(&mut space).split_at_mut(target.matrix.rows());
            space = rest;
            biases.push(target.bias.map(|bias| {
                bias.widen(own);
                &*own
            }));
        }
        for first in (0..m).step_by(part(k, n)) {
            let rows = part(k, n).min(m - first);
            let x = x.slice(first * k..(first + rows) * k).as_f32(pool, k, &mut scratch.x);
            scratch.input.prepare(pool, x, rows, k, &matrices);
            let wide = targets.iter().any(|target| !matches!(target.out, FloatsMut::F32(_)));
            let mut space = if wide { room(&mut scratch.y, rows * n) } else { &mut [] };
            let mut jobs: Vec<Job<'_>> = Vec::with_capacity(targets.len());
            for (target, &bias) in targets.iter_mut().zip(&biases) {
                let width = target.matrix.rows();
                let out = if let FloatsMut::F32(out) = &mut target.out {
                    &mut out[first * width..(first + rows) * width]
                } else {
                    let (own, rest) = std::mem::take(&mut space).split_at_mut(rows * width);
                    space = rest;
                    own
                };
                jobs.push(Job { matrix: target.matrix, bias, add: false, out });
            }
            matmul(pool, x, rows, &scratch.input, &mut jobs);
            if wide {
                let mut from = 0;
                for target in &mut *targets {
                    let width = target.matrix.rows();
                    target.out.narrow(pool, width, first * width, &scratch.y[from..from + rows * width]);
                    from += rows * width;
                }
            }
        }
    });
}

/// `out = (activation(x · gateᵀ) * (x · upᵀ)) · downᵀ` for `x: (m, k)`, `out: (m, n)`.
pub(crate) fn gated_product(
    x: Floats<'_>,
    [gate, up, down]: [&PackedMatrix; 3],
    activation: Activation,
    out: &mut FloatsMut<'_>,
) {
    let (k, wide, n) = (gate.columns(), gate.rows(), down.rows());
    let m = x.len() / k;
    let pool = pool(m, &[gate, up, down]);
    SCRATCH.with_borrow_mut(|scratch| {
        for first in (0..m).step_by(part(k, wide)) {
            let rows = part(k, wide).min(m - first);
            let x = x.slice(first * k..(first + rows) * k).as_f32(pool, k, &mut scratch.x);
            let inner = room(&mut scratch.inner, rows * wide);
            scratch.input.prepare(pool, x, rows, k, &[gate, up]);
            gated(pool, x, rows, &scratch.input, gate, up, activation, inner);
            scratch.inner_input.prepare(pool, inner, rows, wide, &[down]);
            let multiply = |y: &mut [f32]| {
                let mut job = [Job { matrix: down, bias: None, add: false, out: y }];
                matmul(pool, inner, rows, &scratch.inner_input, &mut job);
            };
            if let FloatsMut::F32(out) = out {
                multiply(&mut out[first * n..(first + rows) * n]);
            } else {
                let y = room(&mut scratch.y, rows * n);
                multiply(y);
                out.narrow(pool, n, first * n, y);
            }
        }
    });
}

/// `out = x / √(mean x² + eps) · weight` for each row of `x: (m, k)`, `weight: (k,)`.
pub(crate) fn normalize(x: Floats<'_>, weight: Floats<'_>, eps: f32, out: &mut FloatsMut<'_>) {
    let k = weight.len();
    SCRATCH.with_borrow_mut(|scratch| {
        let pool = pool(0, &[]);
        let weight = weight.as_f32(pool, k, &mut scratch.biases);
        for (row, first) in (0..x.len()).step_by(k).enumerate() {
            let x = x.slice(first..first + k).as_f32(pool, k, &mut scratch.x);
            if let FloatsMut::F32(out) = out {
                rms_norm(x, weight, eps, &mut out[row * k..(row + 1) * k]);
            } else {
                let y = room(&mut scratch.y, k);
                rms_norm(x, weight, eps, y);
                out.narrow(pool, k, first, y);
            }
        }
    });
}
