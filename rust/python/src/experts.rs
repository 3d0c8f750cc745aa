//! `farthing.moe`: the experts of a layer, packed from arrays and run on arrays.

use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

use farthing_kernels::activation::Activation;
use farthing_kernels::experts::{
    Biases, Expert, ExpertActivation, ExpertScratch, PackedExperts as Experts, Statistics,
};
use farthing_kernels::format;
use numpy::{PyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::{PyIndexError, PyMemoryError, PyValueError};
use pyo3::prelude::*;

use crate::array::{Array, tuple};
use crate::floats::{Floats, FloatsMut, room};
use crate::matrix::{self, PackedMatrix, arguments, named, precision_of};
use crate::product::{BYTES_ALONE, PART, PRODUCTS_ALONE, threads};

/// Tokens of a step of the kernels: parts of a run are multiples of it, so that each reads an expert as often as the whole.
const STEP: usize = 512;

/// Buffers that a thread keeps between calls.
#[derive(Default)]
struct Scratch {
    experts: ExpertScratch,
    x: Vec<f32>,
    y: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

/// Gate, up, down, and what is added to the product of each.
type Parts<'py> = (
    Option<Bound<'py, PyAny>>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
);

/// How matrices are packed that are not yet.
#[derive(Clone, Copy)]
struct Wish<'a> {
    weights: &'a str,
    group: usize,
    symmetric: bool,
    activations: &'a str,
}

impl Wish<'_> {
    /// `w` packed, or a copy of a packed one.
    fn pack(self, w: &Bound<'_, PyAny>) -> PyResult<format::PackedMatrix> {
        if let Ok(packed) = w.cast::<PackedMatrix>() {
            let copy = packed.get().0.try_clone();
            return copy.map_err(|error| PyMemoryError::new_err(error.to_string()));
        }
        let Wish { weights, group, symmetric, activations } = self;
        Ok(matrix::quantize(w.py(), w, weights, group, symmetric, activations, None)?.0)
    }
}

/// `error` with a word on where it is from.
fn located(py: Python<'_>, error: &PyErr, name: &str, expert: usize) -> PyErr {
    PyErr::from_type(error.get_type(py), format!("{name} of expert {expert}: {}", error.value(py)))
}

fn bias_of(bias: Option<&Bound<'_, PyAny>>, length: usize) -> PyResult<Vec<f32>> {
    let mut wide = vec![0.0; length];
    if let Some(bias) = bias {
        let bias = Array::of("bias", bias, true)?;
        if bias.shape() != [length] {
            let got = tuple(bias.shape());
            return Err(PyValueError::new_err(format!("bias: got shape {got}, expected ({length},)")));
        }
        bias.floats()?.widen(&mut wide);
        if let Some(at) = wide.iter().position(|value| !value.is_finite()) {
            return Err(PyValueError::new_err(format!("bias: got {} at {at}, expected finite numbers", wide[at])));
        }
    }
    Ok(wide)
}

fn expert_of(py: Python<'_>, number: usize, parts: &Parts<'_>, wish: Wish<'_>) -> PyResult<Expert> {
    let (gate, up, down, gate_bias, up_bias, down_bias) = parts;
    let pack = |name: &str, w: &Bound<'_, PyAny>| wish.pack(w).map_err(|error| located(py, &error, name, number));
    let bias = |name: &str, bias: &Option<Bound<'_, PyAny>>, length: usize| {
        bias_of(bias.as_ref(), length).map_err(|error| located(py, &error, name, number))
    };
    let gate = gate.as_ref().map(|gate| pack("gate", gate)).transpose()?;
    let (up, down) = (pack("up", up)?, pack("down", down)?);
    let biases = if gate_bias.is_some() || up_bias.is_some() || down_bias.is_some() {
        Some(Biases {
            gate: bias("gate", gate_bias, if gate.is_some() { up.rows() } else { 0 })?,
            up: bias("up", up_bias, up.rows())?,
            down: bias("down", down_bias, down.rows())?,
        })
    } else {
        None
    };
    Ok(Expert { gate, up, down, biases })
}

fn activation_of(name: &str, alpha: Option<f32>, limit: Option<f32>) -> PyResult<ExpertActivation> {
    let refused = |what: &str, got: f32, expected: &str| {
        Err(PyValueError::new_err(format!("{what}: got {got}, expected {expected} for {name}")))
    };
    if let Some(limit) = limit.filter(|limit| limit.is_nan() || *limit <= 0.0) {
        return refused("limit", limit, "a number above 0");
    }
    match (alpha, name) {
        (Some(alpha), "swiglu") if !alpha.is_finite() => return refused("alpha", alpha, "a finite number"),
        (Some(alpha), other) if other != "swiglu" => return refused("alpha", alpha, "None"),
        _ => {}
    }
    Ok(match (name, limit) {
        ("silu", None) => ExpertActivation::Gated(Activation::Silu),
        ("silu", Some(limit)) => ExpertActivation::ClampedSilu { limit },
        ("swiglu", limit) => {
            ExpertActivation::ClampedSwiglu { alpha: alpha.unwrap_or(1.702), limit: limit.unwrap_or(f32::INFINITY) }
        }
        ("gelu_tanh", None) => ExpertActivation::Gated(Activation::GeluTanh),
        ("relu_squared", None) => ExpertActivation::ReluSquared,
        ("gelu_tanh" | "relu_squared", Some(limit)) => return refused("limit", limit, "None"),
        _ => {
            return Err(PyValueError::new_err(format!(
                "activation: got {name:?}, expected one of silu, gelu_tanh, swiglu, relu_squared"
            )));
        }
    })
}

/// Packs what an iterator gives, expert by expert.
#[pyfunction]
#[pyo3(signature = (experts, *, activation, alpha, limit, weights, group, symmetric, activations))]
pub(crate) fn pack_experts(
    py: Python<'_>,
    experts: &Bound<'_, PyAny>,
    activation: &str,
    alpha: Option<f32>,
    limit: Option<f32>,
    weights: &str,
    group: usize,
    symmetric: bool,
    activations: &str,
) -> PyResult<PackedExperts> {
    let activation = activation_of(activation, alpha, limit)?;
    // What no matrix can be packed as is an error of the call, not of its first matrix.
    precision_of(named(weights, group, symmetric)?, activations, None)?;
    let wish = Wish { weights, group, symmetric, activations };
    let mut packed: Option<Experts> = None;
    for (number, parts) in experts.try_iter()?.enumerate() {
        let parts: Parts<'_> = parts?.extract()?;
        let expert = expert_of(py, number, &parts, wish)?;
        let layer = packed.get_or_insert_with(|| Experts::new(expert.up.columns(), activation));
        layer.push(expert).map_err(|error| PyValueError::new_err(error.to_string()))?;
    }
    let experts = packed.ok_or_else(|| PyValueError::new_err("experts: got none, expected at least one"))?;
    Ok(PackedExperts { experts, last: Mutex::default() })
}

/// The experts of a layer, ready to be run.
#[pyclass(frozen, weakref, module = "farthing._core")]
pub(crate) struct PackedExperts {
    experts: Experts,
    /// Counts of the last run.
    last: Mutex<Statistics>,
}

#[pymethods]
impl PackedExperts {
    /// `(t, h)` from `hidden: (t, h)`, `ids: (t, k)` and `weights: (t, k)`.
    fn run<'py>(
        &self,
        py: Python<'py>,
        hidden: &Bound<'py, PyAny>,
        ids: PyReadonlyArray2<'py, i64>,
        weights: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (x, weights) = (Array::of("hidden", hidden, false)?, Array::of("weights", weights, false)?);
        let h = self.experts.hidden();
        let t = match *x.shape() {
            [t, columns] if columns == h => t,
            ref other => {
                let got = tuple(other);
                return Err(PyValueError::new_err(format!("hidden: got shape {got}, expected (T, {h})")));
            }
        };
        let &[rows, k] = ids.shape() else { unreachable!("an array of two axes") };
        if rows != t {
            let got = tuple(ids.shape());
            return Err(PyValueError::new_err(format!(
                "ids: got shape {got}, expected ({t}, K), a row for each token"
            )));
        }
        if weights.shape() != [t, k] {
            let got = tuple(weights.shape());
            return Err(PyValueError::new_err(format!("weights: got shape {got}, expected ({t}, {k}), that of ids")));
        }
        // Whatever is no expert stays none.
        let ids: Vec<u32> = ids.as_array().iter().map(|&id| u32::try_from(id).unwrap_or(u32::MAX)).collect();
        let mut wide = vec![0.0; t * k];
        weights.floats()?.widen(&mut wide);
        let mut out = x.like(py, x.shape())?;
        let (floats, mut filled) = (x.floats()?, out.floats_mut()?);
        let statistics = py.detach(|| self.compute(floats, &ids, &wide, &mut filled));
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = statistics;
        Ok(out.into_object())
    }

    /// Rows of each expert, experts with any, and bytes of weights that were read, in the last run of any thread.
    #[getter]
    fn last<'py>(&self, py: Python<'py>) -> (Bound<'py, PyArray1<u32>>, usize, usize) {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (PyArray1::from_vec(py, last.tokens), last.distinct, last.weight_bytes)
    }

    /// Copies of the matrices and biases of one expert.
    fn expert<'py>(&self, py: Python<'py>, number: usize) -> PyResult<Parts<'py>> {
        let count = self.experts.experts().len();
        let Some(expert) = self.experts.experts().get(number) else {
            return Err(PyIndexError::new_err(format!("expert: got {number}, expected 0 to {}", count - 1)));
        };
        let matrix = |matrix: &format::PackedMatrix| -> PyResult<Bound<'py, PyAny>> {
            let copy = matrix.try_clone().map_err(|error| PyMemoryError::new_err(error.to_string()))?;
            Ok(Bound::new(py, PackedMatrix(copy))?.into_any())
        };
        let bias = |of: fn(&Biases) -> &Vec<f32>| {
            let bias = expert.biases.as_ref().map(of).filter(|bias| !bias.is_empty());
            bias.map(|bias| PyArray1::from_slice(py, bias).into_any())
        };
        let gate = expert.gate.as_ref().map(matrix).transpose()?;
        let biases = (bias(|biases| &biases.gate), bias(|biases| &biases.up), bias(|biases| &biases.down));
        Ok((gate, matrix(&expert.up)?, matrix(&expert.down)?, biases.0, biases.1, biases.2))
    }

    /// `(E, I, H)`: experts, outputs of the up matrix of the first, inputs.
    #[getter]
    fn shape(&self) -> (usize, usize, usize) {
        (self.experts.experts().len(), self.first().width(), self.experts.hidden())
    }

    /// Bytes of all packed weights.
    #[getter]
    fn nbytes(&self) -> usize {
        self.experts.nbytes()
    }

    /// What the stored bytes mean.
    #[getter]
    fn format(&self) -> String {
        self.first().up.format().to_string()
    }

    /// Precision of what the weights are multiplied with.
    #[getter]
    fn activations(&self) -> &'static str {
        self.first().up.precision().name()
    }

    /// `(weights, group, symmetric)` as the packer took them.
    #[getter]
    fn arguments(&self) -> PyResult<(&'static str, usize, bool)> {
        arguments(self.first().up.format())
    }

    /// Word, alpha and limit.
    #[getter]
    fn activation(&self) -> (&'static str, Option<f32>, Option<f32>) {
        match self.experts.activation() {
            ExpertActivation::Gated(Activation::Silu) => ("silu", None, None),
            ExpertActivation::Gated(Activation::GeluTanh) => ("gelu_tanh", None, None),
            ExpertActivation::ClampedSilu { limit } => ("silu", None, Some(limit)),
            ExpertActivation::ClampedSwiglu { alpha, limit } => {
                ("swiglu", Some(alpha), Some(limit).filter(|limit| limit.is_finite()))
            }
            ExpertActivation::ReluSquared => ("relu_squared", None, None),
        }
    }
}

impl PackedExperts {
    /// There is one.
    fn first(&self) -> &Expert {
        &self.experts.experts()[0]
    }

    /// `out: (t, h)` from `x: (t, h)`, in parts that bound the buffers of other types and change no result.
    fn compute(&self, x: Floats<'_>, ids: &[u32], weights: &[f32], out: &mut FloatsMut<'_>) -> Statistics {
        let (h, count) = (self.experts.hidden(), self.experts.experts().len());
        let (t, k) = (x.len() / h, ids.len() / (x.len() / h).max(1));
        let first = self.first();
        let matrices = 2 + usize::from(first.gate.is_some());
        let bytes = self.experts.nbytes() / count * count.min(t * k);
        let products = matrices * first.width() * h * t * k;
        let pool = threads(bytes <= BYTES_ALONE && products <= PRODUCTS_ALONE);
        let part = (PART / h / STEP).max(1) * STEP;
        let mut total = Statistics { tokens: vec![0; count], ..Statistics::default() };
        SCRATCH.with_borrow_mut(|Scratch { experts: scratch, x: wide, y }| {
            for start in (0..t).step_by(part) {
                let end = (start + part).min(t);
                let (floats, choices) = (start * h..end * h, start * k..end * k);
                let x = x.slice(floats.clone()).as_f32(pool, h, wide);
                let mut run = |out: &mut [f32]| {
                    let (ids, weights) = (&ids[choices.clone()], &weights[choices.clone()]);
                    self.experts.run(pool, x, ids, weights, scratch, out, false);
                };
                if let FloatsMut::F32(out) = out {
                    run(&mut out[floats]);
                } else {
                    let y = room(y, floats.len());
                    run(y);
                    out.narrow(pool, h, floats.start, y);
                }
                let seen = scratch.statistics();
                total.tokens.iter_mut().zip(&seen.tokens).for_each(|(total, seen)| *total += seen);
                total.weight_bytes += seen.weight_bytes;
            }
        });
        total.distinct = total.tokens.iter().filter(|tokens| **tokens > 0).count();
        total
    }
}
