//! Row-wise work of a step spread over the pool.

use crate::pool::{Disjoint, Pool, share};

/// Elements below which a parallel region costs more than it saves.
const PARALLEL: usize = 1 << 14;

impl Pool {
    /// Calls `body(first_row, rows)` for runs of whole rows of `x`: (t, `width`), one run a thread, or a single one when
    /// `x` is small. Rows must be independent: where the runs end is up to the pool.
    ///
    /// # Panics
    /// When `x` is no whole number of rows.
    ///
    /// ```
    /// let mut x = [1.0, 2.0, 3.0, 4.0];
    /// farthing_kernels::pool::Pool::new(2).rows(&mut x, 2, |first, rows| rows[0] = first as f32);
    /// assert_eq!(x[1], 2.0);
    /// ```
    pub fn rows<T: Send>(&self, x: &mut [T], width: usize, body: impl Fn(usize, &mut [T]) + Sync) {
        if x.is_empty() {
            return;
        }
        assert!(x.len().is_multiple_of(width), "rows: {} elements in rows of {width}", x.len());
        let rows = x.len() / width;
        if x.len() < PARALLEL || rows == 1 || self.threads() == 1 {
            return body(0, x);
        }
        let shared = Disjoint::new(x);
        self.run(|index| {
            let part = share(rows, index, self.threads());
            if !part.is_empty() {
                // SAFETY: the shares of the threads don't overlap.
                body(part.start, unsafe { shared.slice(part.start * width..part.end * width) });
            }
        });
    }

    /// [`Pool::rows`] for three slices of as many rows each, given with their widths; the first says whether it is small.
    ///
    /// # Panics
    /// When the numbers of rows differ or are not whole.
    ///
    /// ```
    /// let (mut x, mut sums, mut firsts) = ([1.0, 2.0, 3.0, 4.0], [0.0; 2], [0.0; 2]);
    /// let pool = farthing_kernels::pool::Pool::new(2);
    /// pool.rows_of_three((&mut x, 2), (&mut sums, 1), (&mut firsts, 1), |_, x, sums, firsts| {
    ///     for (row, (sum, first)) in x.chunks(2).zip(sums.iter_mut().zip(firsts)) {
    ///         (*sum, *first) = (row[0] + row[1], row[0]);
    ///     }
    /// });
    /// assert_eq!((sums, firsts), ([3.0, 7.0], [1.0, 3.0]));
    /// ```
    pub fn rows_of_three<A: Send, B: Send, C: Send>(
        &self,
        a: (&mut [A], usize),
        b: (&mut [B], usize),
        c: (&mut [C], usize),
        body: impl Fn(usize, &mut [A], &mut [B], &mut [C]) + Sync,
    ) {
        let lengths = [(a.0.len(), a.1), (b.0.len(), b.1), (c.0.len(), c.1)];
        let rows = lengths[0].0.checked_div(lengths[0].1).unwrap_or(0);
        assert!(lengths.iter().all(|&(length, width)| length == rows * width), "rows: {lengths:?} are not {rows} rows");
        if rows == 0 {
            return;
        }
        if lengths[0].0 < PARALLEL || rows == 1 || self.threads() == 1 {
            return body(0, a.0, b.0, c.0);
        }
        let shared = (Disjoint::new(a.0), Disjoint::new(b.0), Disjoint::new(c.0));
        self.run(|index| {
            let part = share(rows, index, self.threads());
            if !part.is_empty() {
                let range = |width: usize| part.start * width..part.end * width;
                // SAFETY: the shares of the threads don't overlap.
                let x = unsafe { shared.0.slice(range(a.1)) };
                // SAFETY: as above.
                let y = unsafe { shared.1.slice(range(b.1)) };
                // SAFETY: as above.
                let z = unsafe { shared.2.slice(range(c.1)) };
                body(part.start, x, y, z);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_visited_once() {
        for threads in 1..4 {
            let pool = Pool::new(threads);
            for (rows, width) in [(0, 3), (1, 50_000), (2, 20_000), (7, 5), (999, 33)] {
                let mut x = vec![0usize; rows * width];
                pool.rows(&mut x, width, |first, part| {
                    for (row, part) in part.chunks_exact_mut(width).enumerate() {
                        for x in part {
                            *x += first + row + 1;
                        }
                    }
                });
                assert!(x.iter().enumerate().all(|(i, x)| *x == i / width + 1));
                let (mut y, mut z) = (vec![0; rows], vec![0; 3 * rows]);
                pool.rows_of_three((&mut x, width), (&mut y, 1), (&mut z, 3), |first, x, y, z| {
                    assert_eq!((x.len() / width, z.len()), (y.len(), 3 * y.len()));
                    y.iter_mut().enumerate().for_each(|(row, y)| *y += first + row);
                    z.fill(first);
                });
                assert!(y.iter().enumerate().all(|(i, y)| *y == i));
            }
        }
    }
}
