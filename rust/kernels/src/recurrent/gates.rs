//! What stands around the gated delta rule: norms of queries and keys, decays and rates, and output gates.

use std::ops::Range;

use crate::isa::Isa;
use crate::math::{exp_lanes, log_lanes, log_of_parts};
use crate::pool::Pool;
use crate::selftest::float_level;
use crate::vector::{Arithmetic, Kernel, LANES, Simd, dispatch};

/// Scales each head of `dim` elements among the columns `heads` of `x: (t, width)` to a length of `length`:
/// `x · length / sqrt(Σx² + eps)`. The sum is 16 interleaved partial sums, fused, and one fixed tree.
///
/// # Panics
/// When the columns are no whole heads of a row.
///
/// ```
/// let mut x = [3.0, 4.0, 7.0];
/// farthing_kernels::recurrent::l2_norm(&farthing_kernels::pool::Pool::new(1), &mut x, 3, 0..2, 2, 0.0, 10.0);
/// assert_eq!(x, [6.0, 8.0, 7.0]);
/// ```
pub fn l2_norm(pool: &Pool, x: &mut [f32], width: usize, heads: Range<usize>, dim: usize, eps: f32, length: f32) {
    l2_norm_with(float_level(), pool, x, width, heads, dim, eps, length);
}

/// [`l2_norm`] on a given level.
pub(crate) fn l2_norm_with(
    isa: Isa,
    pool: &Pool,
    x: &mut [f32],
    width: usize,
    heads: Range<usize>,
    dim: usize,
    eps: f32,
    length: f32,
) {
    assert!(heads.end <= width && heads.len().is_multiple_of(dim), "heads of {dim} in {heads:?} of {width}");
    pool.rows(x, width, |_, x| dispatch(isa, L2Norm { x, width, heads: heads.clone(), dim, eps, length }));
}

struct L2Norm<'a> {
    x: &'a mut [f32],
    width: usize,
    heads: Range<usize>,
    dim: usize,
    eps: f32,
    length: f32,
}

impl Kernel for L2Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for row in self.x.chunks_exact_mut(self.width) {
            for head in row[self.heads.clone()].chunks_exact_mut(self.dim) {
                let (x, tail) = head.as_chunks_mut::<LANES>();
                let last = simd.load_part(tail);
                let mut sums = simd.splat(0.0);
                for x in x.iter() {
                    let x = simd.load(x);
                    sums = simd.mul_add(x, x, sums);
                }
                let sum = simd.sum(simd.mul_add(last, last, sums));
                let factor = simd.splat(self.length / (sum + self.eps).sqrt());
                for x in x {
                    simd.store(simd.mul(simd.load(x), factor), x);
                }
                simd.store_part(simd.mul(last, factor), tail);
            }
        }
    }
}

/// Decays and rates of the gated delta rule, in place, for `t` rows of `heads` heads:
/// `decay = e^(negative · softplus(decay + bias))`, `rate = sigmoid(rate)`.
///
/// `decay, rate: (t, heads)`; `negative, bias: (heads,)`, the former usually `-e^A_log`.
///
/// # Panics
/// When lengths don't fit.
///
/// ```
/// let (mut decay, mut rate) = ([0.0], [0.0]);
/// farthing_kernels::recurrent::delta_gates(&mut decay, &mut rate, &[-1.0], &[0.0]);
/// assert_eq!((decay, rate), ([0.5], [0.5]));
/// ```
pub fn delta_gates(decay: &mut [f32], rate: &mut [f32], negative: &[f32], bias: &[f32]) {
    delta_gates_with(float_level(), decay, rate, negative, bias);
}

/// [`delta_gates`] on a given level.
pub(crate) fn delta_gates_with(isa: Isa, decay: &mut [f32], rate: &mut [f32], negative: &[f32], bias: &[f32]) {
    let heads = bias.len();
    assert!(negative.len() == heads && decay.len().is_multiple_of(heads), "{} gates of {heads}", decay.len());
    assert_eq!(decay.len(), rate.len(), "as many rates as decays");
    dispatch(isa, DeltaGates { decay, rate, negative, bias });
}

struct DeltaGates<'a> {
    decay: &'a mut [f32],
    rate: &'a mut [f32],
    negative: &'a [f32],
    bias: &'a [f32],
}

impl Kernel for DeltaGates<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let heads = self.bias.len();
        for (decay, rate) in self.decay.chunks_exact_mut(heads).zip(self.rate.chunks_exact_mut(heads)) {
            let weights = self.negative.chunks(LANES).zip(self.bias.chunks(LANES));
            for ((decay, rate), (negative, bias)) in decay.chunks_mut(LANES).zip(rate.chunks_mut(LANES)).zip(weights) {
                let step = softplus(simd, simd.add(simd.load_part(decay), simd.load_part(bias)));
                simd.store_part(exp_lanes(simd, simd.mul(simd.load_part(negative), step)), decay);
                simd.store_part(sigmoid(simd, simd.load_part(rate)), rate);
            }
        }
    }
}

/// `gate = sigmoid(gate) · x`, element by element.
///
/// # Panics
/// When the lengths differ.
///
/// ```
/// let mut gate = [0.0, 50.0];
/// farthing_kernels::recurrent::sigmoid_multiply(&mut gate, &[4.0, 3.0]);
/// assert_eq!(gate, [2.0, 3.0]);
/// ```
pub fn sigmoid_multiply(gate: &mut [f32], x: &[f32]) {
    sigmoid_multiply_with(float_level(), gate, x);
}

/// [`sigmoid_multiply`] on a given level.
pub(crate) fn sigmoid_multiply_with(isa: Isa, gate: &mut [f32], x: &[f32]) {
    assert_eq!(gate.len(), x.len(), "sigmoid_multiply: gate and x differ in length");
    dispatch(isa, SigmoidMultiply { gate, x });
}

struct SigmoidMultiply<'a> {
    gate: &'a mut [f32],
    x: &'a [f32],
}

impl Kernel for SigmoidMultiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (gate, gate_tail) = self.gate.as_chunks_mut::<LANES>();
        let (x, x_tail) = self.x.as_chunks::<LANES>();
        for (gate, x) in gate.iter_mut().zip(x) {
            simd.store(simd.mul(sigmoid(simd, simd.load(gate)), simd.load(x)), gate);
        }
        let last = simd.mul(sigmoid(simd, simd.load_part(gate_tail)), simd.load_part(x_tail));
        simd.store_part(last, gate_tail);
    }
}

#[inline(always)]
fn sigmoid<A: Arithmetic>(a: A, x: A::F) -> A::F {
    let negated = a.sub(a.splat(0.0), x);
    a.div(a.splat(1.0), a.add(a.splat(1.0), exp_lanes(a, negated)))
}

/// `ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|)`, exact to the last places for very negative `x` too.
#[inline(always)]
fn softplus<A: Arithmetic>(a: A, x: A::F) -> A::F {
    let zero = a.splat(0.0);
    let small = exp_lanes(a, a.sub(zero, a.abs(x)));
    let near = log_of_parts(a, small, zero);
    let far = log_lanes(a, a.add(a.splat(1.0), small));
    a.add(a.max(zero, x), a.select(a.less(small, a.splat(0.4)), near, far))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::uniforms;

    fn levels() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.available())
    }

    #[test]
    fn heads_get_their_length_on_every_level() {
        let pool = Pool::new(2);
        for (rows, width, heads, dim) in [(1, 5, 2..5, 3), (4, 100, 0..64, 32), (150, 200, 10..180, 17)] {
            let x = uniforms(1, rows * width);
            let mut expected = x.clone();
            l2_norm_with(Isa::Scalar, &pool, &mut expected, width, heads.clone(), dim, 1e-6, 0.5);
            for (i, (&got, &x_i)) in expected.iter().zip(&x).enumerate() {
                let (row, column) = (i / width, i % width);
                let exact = if heads.contains(&column) {
                    let start = row * width + heads.start + (column - heads.start) / dim * dim;
                    let sum: f64 = x[start..start + dim].iter().map(|&x| f64::from(x).powi(2)).sum();
                    f64::from(x_i) * 0.5 / (sum + 1e-6).sqrt()
                } else {
                    f64::from(x_i)
                };
                assert!((f64::from(got) - exact).abs() <= 2e-7 * exact.abs().max(1e-3), "{got} {exact}");
            }
            for isa in levels() {
                let mut got = x.clone();
                l2_norm_with(isa, &pool, &mut got, width, heads.clone(), dim, 1e-6, 0.5);
                assert_eq!(got, expected, "{}", isa.name());
            }
        }
    }

    #[test]
    fn gates_match_their_formulas_on_every_level() {
        for (rows, heads) in [(1, 1), (3, 16), (40, 21)] {
            let wide = |seed, count| -> Vec<f32> { uniforms(seed, count).iter().map(|x| x * 30.0).collect() };
            let (decay, rate) = (wide(1, rows * heads), wide(2, rows * heads));
            let (negative, bias) = (wide(3, heads).iter().map(|x| -x.abs()).collect::<Vec<_>>(), wide(4, heads));
            let x = wide(5, rows * heads);
            let (mut decays, mut rates, mut gated) = (decay.clone(), rate.clone(), rate.clone());
            delta_gates_with(Isa::Scalar, &mut decays, &mut rates, &negative, &bias);
            sigmoid_multiply_with(Isa::Scalar, &mut gated, &x);
            for i in 0..rows * heads {
                let step = f64::from(decay[i] + bias[i % heads]).exp().ln_1p();
                let exact = (f64::from(negative[i % heads]) * step).exp();
                assert!((f64::from(decays[i]) - exact).abs() <= 1e-5 * exact + 1e-12, "{} {exact}", decays[i]);
                let exact = 1.0 / (1.0 + f64::from(-rate[i]).exp());
                assert!((f64::from(rates[i]) - exact).abs() <= 1e-6 * exact, "{} {exact}", rates[i]);
                assert_eq!(gated[i].to_bits(), (rates[i] * x[i]).to_bits());
            }
            for isa in levels() {
                let (mut d, mut r, mut g) = (decay.clone(), rate.clone(), rate.clone());
                delta_gates_with(isa, &mut d, &mut r, &negative, &bias);
                sigmoid_multiply_with(isa, &mut g, &x);
                assert_eq!((d, r, g), (decays.clone(), rates.clone(), gated.clone()), "{}", isa.name());
            }
        }
    }
}
