//! Gated activations: `SiLU` (Elfwing et al. 2017) and the tanh form of GELU (Hendrycks & Gimpel 2016).

use crate::isa::Isa;
use crate::math::exp_lanes;
use crate::selftest::float_level;
use crate::vector::{Arithmetic, Kernel, LANES, Simd, dispatch};

/// The nonlinearity of a gated feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))`, transformers' `gelu_pytorch_tanh`.
    GeluTanh,
}

/// `gate = activation(gate) · up`, element by element.
///
/// # Panics
/// When the lengths differ.
///
/// ```
/// use farthing_kernels::activation::{Activation, activate_multiply};
/// let mut gate = [1.0, -2.0];
/// activate_multiply(Activation::Silu, &mut gate, &[2.0, 1.0]);
/// assert!((gate[0] - 1.462_117).abs() < 1e-6 && (gate[1] + 0.238_406).abs() < 1e-6);
/// ```
pub fn activate_multiply(activation: Activation, gate: &mut [f32], up: &[f32]) {
    activate_multiply_with(float_level(), activation, gate, up);
}

/// [`activate_multiply`] on a given level.
#[doc(hidden)]
pub fn activate_multiply_with(isa: Isa, activation: Activation, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "activate_multiply: gate and up differ in length");
    dispatch(isa, ActivateMultiply { activation, gate, up });
}

struct ActivateMultiply<'a> {
    activation: Activation,
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Kernel for ActivateMultiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (gate, gate_tail) = self.gate.as_chunks_mut::<LANES>();
        let (up, up_tail) = self.up.as_chunks::<LANES>();
        match self.activation {
            Activation::Silu => {
                for (gate, up) in gate.iter_mut().zip(up) {
                    simd.store(simd.mul(silu(simd, simd.load(gate)), simd.load(up)), gate);
                }
            }
            Activation::GeluTanh => {
                for (gate, up) in gate.iter_mut().zip(up) {
                    simd.store(simd.mul(gelu_tanh(simd, simd.load(gate)), simd.load(up)), gate);
                }
            }
        }
        let x = simd.load_part(gate_tail);
        let y = match self.activation {
            Activation::Silu => silu(simd, x),
            Activation::GeluTanh => gelu_tanh(simd, x),
        };
        simd.store_part(simd.mul(y, simd.load_part(up_tail)), gate_tail);
    }
}

#[inline(always)]
pub(crate) fn silu<A: Arithmetic>(a: A, x: A::F) -> A::F {
    let negated = a.sub(a.splat(0.0), x);
    a.div(x, a.add(a.splat(1.0), exp_lanes(a, negated)))
}

/// `(1 + tanh y) / 2 = 1 / (1 + e^-2y)`, which cancels nowhere.
#[inline(always)]
pub(crate) fn gelu_tanh<A: Arithmetic>(a: A, x: A::F) -> A::F {
    // -2·√(2/π)
    let factor = a.splat(-1.595_769);
    let cubic = a.mul_add(a.mul(a.splat(0.044_715), a.mul(x, x)), x, x);
    a.div(x, a.add(a.splat(1.0), exp_lanes(a, a.mul(factor, cubic))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::uniforms;

    fn exact(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
            }
        }
    }

    #[test]
    fn both_match_their_formulas() {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let x: Vec<f32> = (-30_000..30_000).map(|i| i as f32 * 1e-3).chain([0.0, -90.0, 90.0, 1e20]).collect();
            let mut y = x.clone();
            activate_multiply(activation, &mut y, &vec![1.0; x.len()]);
            for (&x, &y) in x.iter().zip(&y) {
                let exact = exact(activation, f64::from(x));
                assert!(
                    (f64::from(y) - exact).abs() <= 1e-6 * exact.abs().max(1.0),
                    "{activation:?}({x}) = {y}, {exact}"
                );
            }
        }
    }

    #[test]
    fn bits_depend_on_neither_level_nor_position() {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            for length in [0, 1, 15, 16, 17, 33, 100, 1536] {
                let gate: Vec<f32> = uniforms(length as u64, length).iter().map(|x| x * 20.0).collect();
                let up = uniforms(5, length);
                let mut one_by_one = gate.clone();
                for (gate, up) in one_by_one.chunks_mut(1).zip(up.chunks(1)) {
                    activate_multiply_with(Isa::Scalar, activation, gate, up);
                }
                for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                    let mut got = gate.clone();
                    activate_multiply_with(isa, activation, &mut got, &up);
                    assert_eq!(got, one_by_one, "{} {length}", isa.name());
                }
            }
        }
    }
}
