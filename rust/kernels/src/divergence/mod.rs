//! Divergences between two rows of logits, with their gradients by the first: what distillation sums over a vocabulary.
//!
//! A row is read once from memory and then stays in the caches: greatest logit, sums, gradient. The gradient takes the
//! place of the student's logits. Sums are 16 interleaved partial sums over [`CHUNK`] elements and the fixed tree, chunks
//! added ascending in double precision, so that a row has the same bits on every level and in any company.

mod row;
mod vectors;

use std::sync::{Mutex, PoisonError};

use half::bf16;

use crate::isa::Isa;
use crate::pool::{Disjoint, Pool, share};
use crate::selftest::float_level;
use crate::vector::LANES;
use row::{Scratch, divergence_of_row};
use vectors::Number;

/// Elements whose sum is made in the logits' own precision; sums of chunks are added in double precision.
pub const CHUNK: usize = 64 * LANES;

/// Which divergence of the student `p` and the teacher `q`, in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Divergence {
    /// `KL(p‖q)`.
    ReverseKl,
    /// `KL(q‖p)`.
    ForwardKl,
    /// `β·KL(q‖m) + (1-β)·KL(p‖m)` for `m = β·q + (1-β)·p`, `0 < β < 1`.
    JensenShannon(f64),
    /// `-Σ q·log p`.
    CrossEntropy,
}

/// How the products of a head become logits: `cap·tanh(scale·(z + bias) / cap) / temperature`, without a cap
/// `scale·(z + bias) / temperature`.
#[derive(Clone, Copy, Debug)]
pub struct Transform<'a> {
    /// `(v,)`.
    pub bias: Option<&'a [f64]>,
    /// Above zero.
    pub scale: f64,
    /// Above zero.
    pub cap: Option<f64>,
    /// Above zero.
    pub temperature: f64,
}

impl Transform<'_> {
    /// Logits as they are.
    pub const NONE: Transform<'static> = Transform { bias: None, scale: 1.0, cap: None, temperature: 1.0 };
}

/// Products of a head, `(r, v)`, in the type that they were computed in.
#[derive(Clone, Copy, Debug)]
pub enum Products<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half the bytes; computed with in single precision.
    Bf16(&'a [bf16]),
    /// Double precision, for references.
    F64(&'a [f64]),
}

/// [`Products`] that give way to gradients.
#[derive(Debug)]
pub enum ProductsMut<'a> {
    /// See [`Products::F32`].
    F32(&'a mut [f32]),
    /// See [`Products::Bf16`]; gradients are rounded to nearest even.
    Bf16(&'a mut [bf16]),
    /// See [`Products::F64`].
    F64(&'a mut [f64]),
}

/// What a student's rows are compared with.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// A teacher's rows, `(r, v)`.
    Teacher(Products<'a>, Transform<'a>),
    /// One token a row, `(r,)`, each below `v`: a teacher that is sure of it. Takes [`Divergence::CrossEntropy`].
    Labels(&'a [usize]),
}

/// Whether gradients are wanted, and which of them may be left out.
#[derive(Clone, Copy, Debug)]
pub enum Gradient {
    /// Figures alone.
    None,
    /// Columns in which no row's gradient, divided by the row's weight, reaches this in magnitude, are no
    /// [`Divergences::columns`]; 0 keeps all.
    Filtered(f64),
}

/// Figures of one row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Row {
    /// The divergence in nats, without the row's weight.
    pub divergence: f64,
    /// Entropy of the student in nats.
    pub entropy: f64,
    /// `Σ|g|` over gradients below the filter, weight included: at least what leaving out columns takes from the row.
    pub dropped: f64,
    /// Logits of minus infinity where the other side has probability; their logarithm counts as -10,000.
    pub clamped: u32,
}

/// What [`divergences`] returns.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Divergences {
    /// `(r,)`.
    pub rows: Vec<Row>,
    /// Columns that the filter keeps, ascending; all of them when it is 0, none without gradients.
    pub columns: Vec<usize>,
}

/// The divergence of each row of `student`: (r, v) from `target`, with `weights`: (r,).
///
/// With gradients, `student` becomes `weight · d(divergence)/d(student)`, all of it, also where the filter would not
/// look. A row's figures and gradient depend on that row alone; the columns kept depend on all rows.
///
/// ```
/// use farthing_kernels::divergence::{Divergence, Gradient, Products, ProductsMut, Target, Transform, divergences};
/// let (mut student, teacher) = ([0.0f32, 0.0], [0.0f32, 3f32.ln()]);
/// let target = Target::Teacher(Products::F32(&teacher), Transform::NONE);
/// let pool = farthing_kernels::pool::Pool::new(1);
/// let (rows, weights) = (ProductsMut::F32(&mut student), [1.0]);
/// let found =
///     divergences(&pool, Divergence::ReverseKl, rows, Transform::NONE, target, &weights, Gradient::Filtered(0.0));
/// // ½·ln(½/¼) + ½·ln(½/¾)
/// assert!((found.rows[0].divergence - 0.5 * (4f64 / 3.0).ln()).abs() < 1e-6);
/// assert_eq!(student[0], -student[1]);
/// ```
///
/// # Panics
/// When sizes disagree, a label is out of range, labels meet another divergence, or one side alone is in double precision.
pub fn divergences(
    pool: &Pool,
    kind: Divergence,
    student: ProductsMut<'_>,
    of_student: Transform<'_>,
    target: Target<'_>,
    weights: &[f64],
    gradient: Gradient,
) -> Divergences {
    divergences_with(float_level(), pool, kind, student, of_student, target, weights, gradient)
}

/// [`divergences`] on a given level; double precision has one.
#[doc(hidden)]
pub fn divergences_with(
    isa: Isa,
    pool: &Pool,
    kind: Divergence,
    student: ProductsMut<'_>,
    of_student: Transform<'_>,
    target: Target<'_>,
    weights: &[f64],
    gradient: Gradient,
) -> Divergences {
    use {Products as P, ProductsMut as M, Target as T};
    let job = |versus| Job { isa, pool, kind, of_student, versus, weights, gradient };
    match (student, target) {
        (M::F32(x), T::Teacher(P::F32(y), by)) => run(&job(Some(by)), x, Versus::Teacher(y)),
        (M::F32(x), T::Teacher(P::Bf16(y), by)) => run(&job(Some(by)), x, Versus::Teacher(y)),
        (M::Bf16(x), T::Teacher(P::F32(y), by)) => run(&job(Some(by)), x, Versus::Teacher(y)),
        (M::Bf16(x), T::Teacher(P::Bf16(y), by)) => run(&job(Some(by)), x, Versus::Teacher(y)),
        (M::F64(x), T::Teacher(P::F64(y), by)) => run(&job(Some(by)), x, Versus::Teacher(y)),
        (M::F32(x), T::Labels(labels)) => run(&job(None), x, Versus::<f32>::Labels(labels)),
        (M::Bf16(x), T::Labels(labels)) => run(&job(None), x, Versus::<bf16>::Labels(labels)),
        (M::F64(x), T::Labels(labels)) => run(&job(None), x, Versus::<f64>::Labels(labels)),
        _ => panic!("divergences: one side alone is in double precision"),
    }
}

/// What all rows share.
struct Job<'a> {
    isa: Isa,
    pool: &'a Pool,
    kind: Divergence,
    of_student: Transform<'a>,
    /// Of the teacher's products.
    versus: Option<Transform<'a>>,
    weights: &'a [f64],
    gradient: Gradient,
}

/// [`Target`] with the type of the teacher's products.
#[derive(Clone, Copy)]
enum Versus<'a, B> {
    Teacher(&'a [B]),
    Labels(&'a [usize]),
}

fn run<A: Number, B: Number<Wide = A::Wide>>(job: &Job<'_>, x: &mut [A], versus: Versus<'_, B>) -> Divergences {
    let count = job.weights.len();
    let mut rows = vec![Row::default(); count];
    let v = x.len().checked_div(count).unwrap_or(0);
    if v == 0 {
        assert!(x.is_empty(), "divergences: {} logits and no rows", x.len());
        return Divergences { rows, columns: Vec::new() };
    }
    assert_eq!(x.len(), count * v, "divergences: {} logits in {count} rows", x.len());
    match versus {
        Versus::Teacher(y) => assert_eq!(y.len(), x.len(), "divergences: the teacher's logits beside the student's"),
        Versus::Labels(labels) => {
            assert!(labels.len() == count && labels.iter().all(|&label| label < v), "divergences: labels");
            assert_eq!(job.kind, Divergence::CrossEntropy, "divergences: what labels take");
        }
    }
    let kept = Mutex::new(vec![0u16; v.div_ceil(LANES)]);
    let (all_x, all_rows, threads) = (Disjoint::new(x), Disjoint::new(&mut rows), job.pool.threads());
    job.pool.run(|index| {
        let part = share(count, index, threads);
        if part.is_empty() {
            return;
        }
        let mut scratch = Scratch::new(v);
        for i in part {
            // SAFETY: the shares of the threads don't overlap, nor do rows.
            let (x, row) = unsafe { (all_x.slice(i * v..(i + 1) * v), &mut all_rows.slice(i..i + 1)[0]) };
            match versus {
                Versus::Teacher(y) => {
                    let by = job.versus.unwrap_or(Transform::NONE);
                    scratch.teacher(job.isa, &y[i * v..(i + 1) * v], &by);
                }
                Versus::Labels(labels) => scratch.label(labels[i]),
            }
            *row = divergence_of_row(job, x, job.weights[i], &mut scratch);
        }
        let mut all = kept.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter_mut().zip(&scratch.kept).for_each(|(all, own)| *all |= own);
    });
    let kept = kept.into_inner().unwrap_or_else(PoisonError::into_inner);
    let columns = match job.gradient {
        Gradient::None => Vec::new(),
        Gradient::Filtered(filter) if filter > 0.0 => {
            (0..v).filter(|&column| kept[column / LANES] >> (column % LANES) & 1 == 1).collect()
        }
        Gradient::Filtered(_) => (0..v).collect(),
    };
    Divergences { rows, columns }
}

#[cfg(test)]
mod tests;
