//! Products in which each head of a row meets a matrix of its own (latent attention).

use std::cell::RefCell;
use std::sync::OnceLock;

use super::{Input, Job, matmul};
use crate::format::PackedMatrix;
use crate::pool::{Disjoint, Pool, share};

/// Inputs of all heads: `rows: (t, heads * width)`, of which a head reads its numbers from `offset` on.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// `(t, heads * width)`.
    pub rows: &'a [f32],
    /// Numbers of a head that are skipped.
    pub offset: usize,
    /// Numbers of a head.
    pub width: usize,
}

/// Outputs of all heads: `rows: (t, heads * width)`, of which a head writes its numbers from `offset` on.
#[derive(Debug)]
pub struct HeadsMut<'a> {
    /// `(t, heads * width)`.
    pub rows: &'a mut [f32],
    /// Numbers of a head that are left as they are.
    pub offset: usize,
    /// Numbers of a head.
    pub width: usize,
}

/// What a thread needs for the heads that it takes.
#[derive(Default)]
struct Scratch {
    input: Input,
    x: Vec<f32>,
    y: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `out = x · Wᵀ` for each of `t` rows and each head, whose matrix is `(n, k)`.
///
/// # Panics
/// When shapes disagree.
///
/// ```
/// use farthing_kernels::format::{FloatType, PackError, PackedMatrix};
/// use farthing_kernels::matmul::{Heads, HeadsMut, matmul_heads};
/// use farthing_kernels::pool::Pool;
///
/// let matrix = |value: f32| {
///     PackedMatrix::pack_float(1, 2, FloatType::F32, |_, row| {
///         row.fill(value);
///         Ok::<(), std::convert::Infallible>(())
///     })
/// };
/// let (x, mut out) = ([1.0, 2.0, 3.0, 4.0], [0.0; 2]);
/// let (x, y) = (Heads { rows: &x, offset: 0, width: 2 }, HeadsMut { rows: &mut out, offset: 0, width: 1 });
/// matmul_heads(&Pool::new(2), &[matrix(1.0)?, matrix(10.0)?], 1, x, y);
/// assert_eq!(out, [3.0, 70.0]);
/// # Ok::<(), PackError<std::convert::Infallible>>(())
/// ```
pub fn matmul_heads(pool: &Pool, matrices: &[PackedMatrix], t: usize, x: Heads<'_>, out: HeadsMut<'_>) {
    static ALONE: OnceLock<Pool> = OnceLock::new();
    let (heads, alone) = (matrices.len(), ALONE.get_or_init(|| Pool::new(1)));
    assert_eq!(x.rows.len(), t * heads * x.width, "length of x: ({t}, {heads} * {})", x.width);
    assert_eq!(out.rows.len(), t * heads * out.width, "length of out: ({t}, {heads} * {})", out.width);
    for matrix in matrices {
        let (n, k) = (matrix.rows(), matrix.columns());
        assert!(x.offset + k <= x.width && out.offset + n <= out.width, "a head's matrix is ({n}, {k})");
    }
    let rows = Disjoint::new(out.rows);
    pool.run(|thread| {
        SCRATCH.with_borrow_mut(|Scratch { input, x: inputs, y }| {
            for head in share(heads, thread, pool.threads()) {
                let matrix = &matrices[head];
                let (n, k) = (matrix.rows(), matrix.columns());
                inputs.clear();
                for token in 0..t {
                    inputs.extend_from_slice(&x.rows[(token * heads + head) * x.width + x.offset..][..k]);
                }
                y.resize(t * n, 0.0);
                input.prepare(alone, inputs, t, k, &[matrix]);
                matmul(alone, inputs, t, input, &mut [Job { matrix, bias: None, add: false, out: &mut *y }]);
                for (token, y) in y.chunks_exact(n).enumerate() {
                    let start = (token * heads + head) * out.width + out.offset;
                    // SAFETY: each head belongs to one thread, and heads do not overlap (asserted).
                    unsafe { rows.slice(start..start + n) }.copy_from_slice(y);
                }
            }
        });
    });
}
