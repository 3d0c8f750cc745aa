//! The gated delta rule (arXiv 2412.06464): a matrix for each head that forgets, and is corrected towards each new value.
//!
//! Row by row, for each value head with state `S: (key_dim, value_dim)`:
//! `S = decay·S; δ = rate·(v − Sᵀk); S = S + k⊗δ; out = Sᵀq`. Sums over the keys' elements are fused and ascending, so the
//! chunks in which rows come change no bit. A head's columns do not meet: they are computed apart, 64 at a time, which
//! stay in the nearest cache from row to row.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::states::Shared;
use super::{PARALLEL, Segment, States};
use crate::isa::Isa;
use crate::pool::{Disjoint, Pool};
use crate::selftest::float_level;
use crate::vector::{Kernel, LANES, Simd, dispatch};

/// Vectors of columns that are computed together.
const BLOCK: usize = 4;

/// The heads of a layer.
///
/// ```
/// use farthing_kernels::{pool::Pool, recurrent::{DeltaInput, GatedDelta, Segment, States}};
/// let heads = GatedDelta { key_heads: 1, value_heads: 1, key_dim: 2, value_dim: 1, tiled: false };
/// let mut states = States::new(1, heads.state_floats())?;
/// // Two rows of query, key, value: the first stores 5 under a key, the second asks for it.
/// let input = DeltaInput {
///     qkv: &[0.0, 0.0, 1.0, 0.0, 5.0, 1.0, 0.0, 0.0, 1.0, 7.0],
///     decay: &[1.0, 1.0],
///     rate: &[1.0, 0.5],
/// };
/// let mut out = [0.0; 2];
/// let segment = Segment { first_row: 0, rows: 2, slot: 0 };
/// heads.run(&Pool::new(1), &input, &[segment], &mut states, 0, &mut out);
/// assert_eq!(out, [0.0, 5.0]);
/// # Ok::<(), farthing_kernels::memory::OutOfMemory>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatedDelta {
    /// Heads of queries and keys; divides `value_heads`.
    pub key_heads: usize,
    /// Heads of values, each with a state of its own.
    pub value_heads: usize,
    /// Elements of a query or key.
    pub key_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Whether value head `i` reads key head `i % key_heads`, not the one whose neighbours share it.
    pub tiled: bool,
}

/// What the rows of a step bring.
#[derive(Clone, Copy, Debug)]
pub struct DeltaInput<'a> {
    /// `(t, (2 · key_heads · key_dim) + value_heads · value_dim)`: queries, keys, values.
    pub qkv: &'a [f32],
    /// `(t, value_heads)`: what is left of the state.
    pub decay: &'a [f32],
    /// `(t, value_heads)`: how far the state goes towards the value.
    pub rate: &'a [f32],
}

impl GatedDelta {
    /// Columns of a row of queries, keys and values.
    pub fn width(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
    }

    /// Floats of a sequence's state: for each head, for each block of columns, its vectors for each element of a key.
    pub fn state_floats(&self) -> usize {
        self.value_heads * self.head_floats()
    }

    fn head_floats(&self) -> usize {
        self.key_dim * self.value_dim.next_multiple_of(LANES)
    }

    /// Computes the rows of each segment behind its state, which moves on and lies at float `at` of its slot;
    /// `out: (t, value_heads · value_dim)`. Rows outside the segments are left alone.
    ///
    /// # Panics
    /// When lengths don't fit, or segments overlap or share a state.
    pub fn run(
        &self,
        pool: &Pool,
        input: &DeltaInput<'_>,
        segments: &[Segment],
        states: &mut States,
        at: usize,
        out: &mut [f32],
    ) {
        self.run_with(float_level(), pool, input, segments, states, at, out);
    }

    /// [`GatedDelta::run`] on a given level.
    #[doc(hidden)]
    pub fn run_with(
        &self,
        isa: Isa,
        pool: &Pool,
        input: &DeltaInput<'_>,
        segments: &[Segment],
        states: &mut States,
        at: usize,
        out: &mut [f32],
    ) {
        let GatedDelta { value_heads, value_dim, .. } = *self;
        assert!(value_heads.is_multiple_of(self.key_heads), "{value_heads} heads over {}", self.key_heads);
        let rows = out.len() / (value_heads * value_dim);
        assert_eq!(out.len(), rows * value_heads * value_dim, "whole rows");
        assert_eq!(input.qkv.len(), rows * self.width(), "queries, keys and values of {rows} rows");
        assert!([input.decay, input.rate].map(<[f32]>::len) == [rows * value_heads; 2], "gates of {rows} rows");
        let states = states.share(segments, at..at + self.state_floats(), rows);
        let (groups, work) = (value_dim.div_ceil(BLOCK * LANES), rows * value_heads * self.head_floats());
        let (out, next) = (Disjoint::new(out), AtomicUsize::new(0));
        // Units are taken in order, the rows of a unit one after the other: who computes one does not matter.
        let compute = |_| {
            loop {
                let unit = next.fetch_add(1, Ordering::Relaxed);
                let Some(&segment) = segments.get(unit / (groups * value_heads)) else { return };
                let (head, group) = (unit / groups % value_heads, unit % groups);
                let columns = group * BLOCK * LANES..((group + 1) * BLOCK * LANES).min(value_dim);
                dispatch(isa, Unit { heads: self, input, segment, head, columns, states: states.clone(), out });
            }
        };
        if work < PARALLEL { compute(0) } else { pool.run(compute) }
    }
}

/// Some columns of one head of one sequence.
struct Unit<'a> {
    heads: &'a GatedDelta,
    input: &'a DeltaInput<'a>,
    segment: Segment,
    head: usize,
    columns: Range<usize>,
    states: Shared<'a>,
    out: Disjoint<'a, f32>,
}

impl Kernel for Unit<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.columns.len().div_ceil(LANES) {
            1 => self.compute::<S, 1>(simd),
            2 => self.compute::<S, 2>(simd),
            3 => self.compute::<S, 3>(simd),
            _ => self.compute::<S, BLOCK>(simd),
        }
    }
}

impl Unit<'_> {
    #[inline(always)]
    fn compute<S: Simd, const N: usize>(self, simd: S) {
        let GatedDelta { key_heads, value_heads, key_dim, value_dim, tiled } = *self.heads;
        let key_head = if tiled { self.head % key_heads } else { self.head / (value_heads / key_heads) };
        let start = self.head * self.heads.head_floats() + self.columns.start * key_dim;
        // SAFETY: the columns of this unit alone, in the slot of its segment.
        let state = unsafe { self.states.slice(self.segment.slot, start..start + N * LANES * key_dim) };
        let (state, _) = state.as_chunks_mut::<LANES>();
        let (state, _) = state.as_chunks_mut::<N>();
        let row = |row: usize| {
            let qkv = &self.input.qkv[row * self.heads.width()..][..self.heads.width()];
            let gate = row * value_heads + self.head;
            Row {
                query: &qkv[key_head * key_dim..][..key_dim],
                key: &qkv[(key_heads + key_head) * key_dim..][..key_dim],
                value: &qkv[2 * key_heads * key_dim + self.head * value_dim..][..value_dim][self.columns.clone()],
                decay: self.input.decay[gate],
                rate: self.input.rate[gate],
            }
        };
        let rows = self.segment.range();
        if rows.is_empty() {
            return;
        }
        let mut now = row(rows.start);
        let mut known = recall::<S, N>(simd, state, &now);
        for index in rows.clone() {
            let first = (index * value_heads + self.head) * value_dim;
            // SAFETY: the columns of this unit alone, in a row of its segment.
            let out = unsafe { self.out.slice(first + self.columns.start..first + self.columns.end) };
            let delta = correction::<S, N>(simd, &now, known);
            if index + 1 < rows.end {
                let next = row(index + 1);
                known = learn_and_recall::<S, N>(simd, state, &now, delta, &next, out);
                now = next;
            } else {
                learn::<S, N>(simd, state, &now, delta, out);
            }
        }
    }
}

/// What one row brings to some columns of one head.
#[derive(Clone, Copy)]
struct Row<'a> {
    /// `(key_dim,)`.
    query: &'a [f32],
    key: &'a [f32],
    /// Up to N vectors.
    value: &'a [f32],
    decay: f32,
    rate: f32,
}

/// Forgets; returns what the state, `(key_dim, N)` vectors, has under the row's key.
#[inline(always)]
fn recall<S: Simd, const N: usize>(simd: S, state: &mut [[[f32; LANES]; N]], row: &Row<'_>) -> [S::F; N] {
    let decay = simd.splat(row.decay);
    let mut known = [simd.splat(0.0); N];
    for (state, &key) in state.iter_mut().zip(row.key) {
        let key = simd.splat(key);
        for n in 0..N {
            let s = simd.mul(simd.load(&state[n]), decay);
            simd.store(s, &mut state[n]);
            known[n] = simd.mul_add(s, key, known[n]);
        }
    }
    known
}

/// `rate · (value − known)`.
#[inline(always)]
fn correction<S: Simd, const N: usize>(simd: S, row: &Row<'_>, known: [S::F; N]) -> [S::F; N] {
    let rate = simd.splat(row.rate);
    let mut delta = known;
    for n in 0..N {
        let value = simd.load_part(&row.value[n * LANES..((n + 1) * LANES).min(row.value.len())]);
        delta[n] = simd.mul(simd.sub(value, known[n]), rate);
    }
    delta
}

/// Takes the correction in and answers the row's query.
#[inline(always)]
fn learn<S: Simd, const N: usize>(
    simd: S,
    state: &mut [[[f32; LANES]; N]],
    row: &Row<'_>,
    delta: [S::F; N],
    out: &mut [f32],
) {
    let mut answer = [simd.splat(0.0); N];
    for ((state, &key), &query) in state.iter_mut().zip(row.key).zip(row.query) {
        let (key, query) = (simd.splat(key), simd.splat(query));
        for n in 0..N {
            let s = simd.mul_add(key, delta[n], simd.load(&state[n]));
            simd.store(s, &mut state[n]);
            answer[n] = simd.mul_add(s, query, answer[n]);
        }
    }
    put(simd, answer, out);
}

/// [`learn`] for a row and [`recall`] for the next, touching the state once.
#[inline(always)]
fn learn_and_recall<S: Simd, const N: usize>(
    simd: S,
    state: &mut [[[f32; LANES]; N]],
    row: &Row<'_>,
    delta: [S::F; N],
    next: &Row<'_>,
    out: &mut [f32],
) -> [S::F; N] {
    let decay = simd.splat(next.decay);
    let (mut answer, mut known) = ([simd.splat(0.0); N], [simd.splat(0.0); N]);
    for (((state, &key), &query), &next) in state.iter_mut().zip(row.key).zip(row.query).zip(next.key) {
        let (key, query, next) = (simd.splat(key), simd.splat(query), simd.splat(next));
        for n in 0..N {
            let s = simd.mul_add(key, delta[n], simd.load(&state[n]));
            answer[n] = simd.mul_add(s, query, answer[n]);
            let s = simd.mul(s, decay);
            simd.store(s, &mut state[n]);
            known[n] = simd.mul_add(s, next, known[n]);
        }
    }
    put(simd, answer, out);
    known
}

#[inline(always)]
fn put<S: Simd, const N: usize>(simd: S, answer: [S::F; N], out: &mut [f32]) {
    for (answer, out) in answer.into_iter().zip(out.chunks_mut(LANES)) {
        simd.store_part(answer, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::uniforms;

    /// One sequence, head by head, in f64.
    fn plain(heads: &GatedDelta, input: &DeltaInput<'_>, rows: usize) -> Vec<f64> {
        let GatedDelta { key_heads, value_heads, key_dim, value_dim, tiled } = *heads;
        let mut out = vec![0.0; rows * value_heads * value_dim];
        for head in 0..value_heads {
            let key_head = if tiled { head % key_heads } else { head * key_heads / value_heads };
            let mut state = vec![vec![0.0; value_dim]; key_dim];
            for row in 0..rows {
                let at = |column: usize| f64::from(input.qkv[row * heads.width() + column]);
                let key = |i| at((key_heads + key_head) * key_dim + i);
                let (decay, rate) = (input.decay[row * value_heads + head], input.rate[row * value_heads + head]);
                for column in 0..value_dim {
                    for state in &mut state {
                        state[column] *= f64::from(decay);
                    }
                    let known: f64 = (0..key_dim).map(|i| state[i][column] * key(i)).sum();
                    let value = at(2 * key_heads * key_dim + head * value_dim + column);
                    let delta = f64::from(rate) * (value - known);
                    for (i, state) in state.iter_mut().enumerate() {
                        state[column] += key(i) * delta;
                    }
                    out[(row * value_heads + head) * value_dim + column] =
                        (0..key_dim).map(|i| state[i][column] * at(key_head * key_dim + i)).sum();
                }
            }
        }
        out
    }

    #[test]
    fn levels_chunks_and_company_give_the_bits_of_the_formula() {
        for (key_heads, value_heads, key_dim, value_dim, rows, tiled) in
            [(1, 1, 3, 1, 4, false), (2, 4, 16, 40, 9, false), (2, 4, 16, 40, 9, true), (1, 3, 20, 150, 23, true)]
        {
            let heads = GatedDelta { key_heads, value_heads, key_dim, value_dim, tiled };
            let scaled = |seed, count, low: f32, high: f32| -> Vec<f32> {
                uniforms(seed, count).iter().map(|x| low + (high - low) * (x + 1.0) / 2.0).collect()
            };
            let limit = (key_dim as f32).sqrt().recip();
            let qkv = scaled(1, rows * heads.width(), -limit, limit);
            let (decay, rate) = (scaled(2, rows * value_heads, 0.5, 1.0), scaled(3, rows * value_heads, 0.0, 1.0));
            let input = DeltaInput { qkv: &qkv, decay: &decay, rate: &rate };
            let exact = plain(&heads, &input, rows);
            let mut expected = Vec::new();
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                for (threads, chunk) in [(1, rows), (2, rows), (1, 1), (2, 2), (2, 7)] {
                    let pool = Pool::new(threads);
                    let mut states = States::new(3, 5 + heads.state_floats()).unwrap();
                    states.slot_mut(2)[..5].fill(9.0);
                    let mut out = Vec::new();
                    for first in (0..rows).step_by(chunk) {
                        // Another sequence stands before ours, with two rows of its own.
                        let piece = |x: &[f32], width: usize| {
                            let mine = &x[first * width..(first + chunk).min(rows) * width];
                            [&uniforms(4, 2 * width)[..], mine].concat()
                        };
                        let (qkv, decay) = (piece(&qkv, heads.width()), piece(&decay, value_heads));
                        let rate = piece(&rate, value_heads);
                        let count = decay.len() / value_heads;
                        let segments = [
                            Segment { first_row: 0, rows: 2, slot: 0 },
                            Segment { first_row: 2, rows: count - 2, slot: 2 },
                        ];
                        let width = value_heads * value_dim;
                        let mut both = vec![0.0; count * width];
                        let input = DeltaInput { qkv: &qkv, decay: &decay, rate: &rate };
                        heads.run_with(isa, &pool, &input, &segments, &mut states, 5, &mut both);
                        out.extend_from_slice(&both[2 * width..]);
                    }
                    for (got, exact) in out.iter().zip(&exact) {
                        assert!((f64::from(*got) - exact).abs() < 1e-5, "{heads:?}: {got} {exact}");
                    }
                    let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
                    if expected.is_empty() {
                        expected.clone_from(&bits);
                    }
                    assert_eq!(bits, expected, "{} {threads} {chunk}", isa.name());
                    assert!(states.slot(1).iter().all(|&x| x == 0.0));
                    assert!(states.slot(2)[..5].iter().all(|&x| x == 9.0));
                }
            }
        }
    }
}
