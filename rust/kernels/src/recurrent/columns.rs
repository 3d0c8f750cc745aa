//! Products of columns: how gates meet what they gate when one matrix has made both.

use crate::isa::Isa;
use crate::pool::Pool;
use crate::selftest::float_level;
use crate::vector::{Kernel, LANES, Simd, dispatch};

/// Some neighbouring columns of a matrix `(t, stride)`, from `offset` on.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a> {
    /// `(t, stride)`.
    pub x: &'a [f32],
    /// Length of a row.
    pub stride: usize,
    /// First column.
    pub offset: usize,
}

impl<'a> Columns<'a> {
    /// All columns of `x: (t, width)`.
    pub fn all(x: &'a [f32], width: usize) -> Columns<'a> {
        Columns { x, stride: width, offset: 0 }
    }

    #[inline(always)]
    fn row(&self, row: usize, width: usize) -> &'a [f32] {
        &self.x[row * self.stride + self.offset..][..width]
    }
}

/// `out = a · b`, element by element; `out: (t, width)`.
///
/// # Panics
/// When `a` or `b` has fewer rows or columns than `out`.
///
/// ```
/// use farthing_kernels::{pool::Pool, recurrent::{Columns, multiply}};
/// let (x, mut out) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0; 2]);
/// let columns = |offset| Columns { x: &x, stride: 3, offset };
/// multiply(&Pool::new(1), columns(0), columns(2), &mut out, 1);
/// assert_eq!(out, [3.0, 24.0]);
/// ```
pub fn multiply(pool: &Pool, a: Columns<'_>, b: Columns<'_>, out: &mut [f32], width: usize) {
    multiply_with(float_level(), pool, a, b, out, width);
}

/// [`multiply`] on a given level.
pub(crate) fn multiply_with(isa: Isa, pool: &Pool, a: Columns<'_>, b: Columns<'_>, out: &mut [f32], width: usize) {
    let fits = |x: Columns<'_>| x.offset + width <= x.stride;
    assert!(
        fits(a) && fits(b),
        "multiply: {width} columns from {} of {}, {} of {}",
        a.offset,
        a.stride,
        b.offset,
        b.stride
    );
    pool.rows(out, width, |first, out| dispatch(isa, Multiply { a, b, first, out, width }));
}

struct Multiply<'a> {
    a: Columns<'a>,
    b: Columns<'a>,
    first: usize,
    out: &'a mut [f32],
    width: usize,
}

impl Kernel for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (row, out) in (self.first..).zip(self.out.chunks_exact_mut(self.width)) {
            let (a, a_tail) = self.a.row(row, self.width).as_chunks::<LANES>();
            let (b, b_tail) = self.b.row(row, self.width).as_chunks::<LANES>();
            let (out, out_tail) = out.as_chunks_mut::<LANES>();
            for ((a, b), out) in a.iter().zip(b).zip(out) {
                simd.store(simd.mul(simd.load(a), simd.load(b)), out);
            }
            for ((a, b), out) in a_tail.iter().zip(b_tail).zip(out_tail) {
                *out = a * b;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::uniforms;

    #[test]
    fn every_level_multiplies() {
        let pool = Pool::new(2);
        for (t, width, stride, offset) in [(1, 1, 1, 0), (3, 17, 60, 40), (2, 48, 48, 0), (70, 300, 900, 600)] {
            let (x, y) = (uniforms(1, t * stride), uniforms(2, t * width));
            let a = Columns { x: &x, stride, offset };
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                let mut out = vec![0.0; t * width];
                multiply_with(isa, &pool, a, Columns::all(&y, width), &mut out, width);
                let expected = (0..t * width).map(|i| x[i / width * stride + offset + i % width] * y[i]);
                assert!(out.iter().copied().eq(expected), "{} {t} {width}", isa.name());
            }
        }
    }
}
