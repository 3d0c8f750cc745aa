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
            }
        }
    }
}
