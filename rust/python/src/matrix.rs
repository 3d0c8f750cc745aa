//! `farthing.matrix`: packed matrices, made from arrays and multiplied with arrays.

use std::convert::Infallible;

use farthing::engine::Activations;
use farthing::model::Role;
use farthing::model::precision::precision;
use farthing_kernels::activation::Activation;
use farthing_kernels::format::{self, Bits, FloatType, Format, Offset, PackError, Packing, Precision, RowCodes, Table};
use farthing_kernels::pool::default_threads;
use half::f16;
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray2};
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::array::{Array, Output, tuple};
use crate::errors::exception;
use crate::floats::Floats;
use crate::product::{Target, gated_product, normalize, product};

/// Type of scales and minima of the formats that [`quantize`] makes.
const SCALE: FloatType = FloatType::F16;
/// The formats by name; those of integers take a group and an offset.
const FORMATS: [(&str, Kind); 9] = [
    ("int4", Kind::Integer(Bits::Four)),
    ("int8", Kind::Integer(Bits::Eight)),
    ("ternary", Kind::Ternary),
    ("mxfp4", Kind::Lookup(Table::Mxfp4)),
    ("nf4", Kind::Lookup(Table::Nf4)),
    ("iq4_nl", Kind::Lookup(Table::Iq4Nl)),
    ("f32", Kind::Float(FloatType::F32)),
    ("f16", Kind::Float(FloatType::F16)),
    ("bf16", Kind::Float(FloatType::Bf16)),
];

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Integer(Bits),
    /// One scale a row.
    Ternary,
    Lookup(Table),
    Float(FloatType),
}

/// The format of that name.
pub(crate) fn named(name: &str, group: usize, symmetric: bool) -> PyResult<Format> {
    let kind = FORMATS.iter().find(|(known, _)| *known == name).map(|&(_, kind)| kind).ok_or_else(|| {
        let known: Vec<_> = FORMATS.iter().map(|(name, _)| *name).collect();
        PyValueError::new_err(format!("weights: got {name:?}, expected one of {}", known.join(", ")))
    })?;
    if !symmetric && matches!(kind, Kind::Ternary | Kind::Lookup(_)) {
        return Err(PyValueError::new_err(format!(
            "symmetric: got False, expected True for {name}, which has no minimum"
        )));
    }
    Ok(match kind {
        Kind::Integer(bits) => {
            let offset = if symmetric { Offset::Symmetric } else { Offset::Minimum };
            Format::Integer { bits, group, offset, scale: SCALE }
        }
        Kind::Ternary => Format::Ternary { packing: Packing::best(), group: None, scale: FloatType::F32 },
        // Powers of two fit bf16.
        Kind::Lookup(Table::Mxfp4) => Format::Lookup { table: Table::Mxfp4, group, scale: FloatType::Bf16 },
        Kind::Lookup(table) => Format::Lookup { table, group, scale: SCALE },
        Kind::Float(kind) => Format::Float(kind),
    })
}

/// `(name, group, symmetric)` of a format that [`named`] has made.
pub(crate) fn arguments(format: Format) -> PyResult<(&'static str, usize, bool)> {
    let (kind, group, symmetric) = match format {
        Format::Integer { bits, group, offset, .. } => (Kind::Integer(bits), group, offset == Offset::Symmetric),
        Format::Ternary { .. } => (Kind::Ternary, 0, true),
        Format::Lookup { table, group, .. } => (Kind::Lookup(table), group, true),
        Format::Float(kind) => (Kind::Float(kind), 0, true),
        Format::Super(_) => return Err(PyRuntimeError::new_err(format!("{format} has no name"))),
    };
    let known = FORMATS.iter().find(|(_, known)| *known == kind).map(|(name, _)| (*name, group, symmetric));
    known.ok_or_else(|| PyRuntimeError::new_err(format!("{format} has no name")))
}

/// The engine's policy for a matrix of that role; without a role, one that is not an attention output.
pub(crate) fn precision_of(format: Format, activations: &str, role: Option<&str>) -> PyResult<Precision> {
    let roles = || Role::IN_BLOCK.into_iter().chain([Role::Embedding, Role::Head]);
    let role = match role {
        None => Role::Head,
        Some(name) => roles().find(|role| role.name() == name).ok_or_else(|| {
            let known: Vec<_> = roles().map(Role::name).collect();
            PyValueError::new_err(format!("role: got {name:?}, expected one of {}", known.join(", ")))
        })?,
    };
    Ok(precision(role, format, Activations::parse(activations).map_err(exception)?))
}

/// Runs `pack` on threads of its own: those of rayon's global pool do not survive a fork.
fn packed<E: Send + std::fmt::Display>(
    py: Python<'_>,
    pack: impl FnOnce() -> Result<format::PackedMatrix, PackError<E>> + Send,
) -> PyResult<PackedMatrix> {
    let packers = rayon::ThreadPoolBuilder::new().num_threads(default_threads()).build();
    let packers = packers.map_err(|error| PyRuntimeError::new_err(format!("no threads to pack with: {error}")))?;
    match py.detach(|| packers.install(pack)) {
        Ok(matrix) => Ok(PackedMatrix(matrix)),
        Err(PackError::OutOfMemory(error)) => Err(PyMemoryError::new_err(error.to_string())),
        Err(error) => Err(PyValueError::new_err(format!("weights: {error}"))),
    }
}

/// Packs `w: (N, K)`.
#[pyfunction]
#[pyo3(signature = (w, weights, *, group, symmetric, activations, role))]
pub(crate) fn quantize(
    py: Python<'_>,
    w: &Bound<'_, PyAny>,
    weights: &str,
    group: usize,
    symmetric: bool,
    activations: &str,
    role: Option<&str>,
) -> PyResult<PackedMatrix> {
    let format = named(weights, group, symmetric)?;
    let precision = precision_of(format, activations, role)?;
    let w = Array::of("w", w, true)?;
    let (n, k) = w.matrix("w")?;
    let floats = w.floats()?;
    packed(py, || {
        let row = |n: usize, out: &mut [f32]| {
            floats.slice(n * k..(n + 1) * k).widen(out);
            Ok::<(), Infallible>(())
        };
        match format {
            Format::Float(kind) => format::PackedMatrix::pack_float(n, k, kind, row),
            _ => format::PackedMatrix::quantize(n, k, format, precision, row),
        }
    })
}

/// Codes of a stored byte; the first in its lowest bits.
fn codes_per_byte(format: Format) -> usize {
    match format {
        Format::Integer { bits: Bits::Four, .. } | Format::Lookup { .. } => 2,
        Format::Ternary { .. } => 4,
        _ => 1,
    }
}

/// A matrix from what [`PackedMatrix::parts`] gave, bit for bit.
#[pyfunction]
#[pyo3(signature = (codes, scales, minima, *, weights, group, symmetric, activations, columns))]
pub(crate) fn from_parts(
    py: Python<'_>,
    codes: PyReadonlyArray2<'_, u8>,
    scales: &Bound<'_, PyAny>,
    minima: &Bound<'_, PyAny>,
    weights: &str,
    group: usize,
    symmetric: bool,
    activations: &str,
    columns: usize,
) -> PyResult<PackedMatrix> {
    let format = named(weights, group, symmetric)?;
    let refused =
        |name, got: &str, expected| Err(PyValueError::new_err(format!("{name}: got {got:?}, expected {expected}")));
    let Some(inputs) = format.activation_group(columns) else {
        return refused("weights", weights, "a format with codes");
    };
    if activations == "auto" {
        return refused("activations", activations, "a8, a16 or f32");
    }
    let precision = precision_of(format, activations, None)?;
    let codes = codes.as_array();
    let (scales, minima) = (Array::of("scales", scales, true)?, Array::of("minima", minima, true)?);
    let (n, each) = (codes.nrows(), codes_per_byte(format));
    let groups = columns.div_ceil(inputs.max(1));
    let lengths = [
        ("codes", codes.dim(), (n, columns.div_ceil(each))),
        ("scales", scales.matrix("scales")?, (n, groups)),
        ("minima", minima.matrix("minima")?, (n, if symmetric { 0 } else { groups })),
    ];
    if let Some((name, got, expected)) = lengths.iter().find(|(_, got, expected)| got != expected) {
        return Err(PyValueError::new_err(format!("{name}: got shape {got:?}, expected {expected:?}")));
    }
    let (scales, minima) = (scales.floats()?, minima.floats()?);
    let bits = 8 / each;
    packed(py, || {
        format::PackedMatrix::pack_codes(n, columns, format, precision, |n, row: &mut RowCodes| {
            for (k, code) in row.codes.iter_mut().enumerate() {
                *code = codes[[n, k / each]] >> (bits * (k % each)) & (0xff >> (8 - bits));
            }
            for (values, stored) in [(&mut row.scales, scales), (&mut row.offsets, minima)] {
                stored.slice(n * values.len()..(n + 1) * values.len()).widen(values);
            }
            Ok::<(), Infallible>(())
        })
    })
}

/// `x · Wᵀ + bias` for several matrices that read the same `x`, which is quantised once.
#[pyfunction]
pub(crate) fn matmul_together<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    matrices: Vec<PyRef<'py, PackedMatrix>>,
    biases: Vec<Option<Bound<'py, PyAny>>>,
) -> PyResult<Vec<Bound<'py, PyAny>>> {
    if matrices.is_empty() || biases.len() != matrices.len() {
        let (got, expected) = (biases.len(), matrices.len());
        return Err(PyValueError::new_err(format!("biases: got {got}, expected one for each of {expected} matrices")));
    }
    let x = Array::of("x", x, false)?;
    let biases = biases.iter().map(|bias| bias.as_ref().map(|bias| Array::of("bias", bias, false)).transpose());
    let biases: Vec<Option<Array<'_>>> = biases.collect::<PyResult<_>>()?;
    let outs = matrices.iter().map(|matrix| x.like(py, &matrix.shape_for(&x)?));
    let mut outs: Vec<Output<'_>> = outs.collect::<PyResult<_>>()?;
    let mut targets = Vec::with_capacity(matrices.len());
    for ((matrix, bias), out) in matrices.iter().zip(&biases).zip(&mut outs) {
        targets.push(Target { matrix: &matrix.0, bias: matrix.bias_of(bias.as_ref())?, out: out.floats_mut()? });
    }
    let (floats, k) = (x.floats()?, matrices[0].0.columns());
    py.detach(|| product(floats, k, &mut targets));
    Ok(outs.into_iter().map(Output::into_object).collect())
}

/// `(activation(x · gateᵀ) * (x · upᵀ)) · downᵀ`.
#[pyfunction]
pub(crate) fn matmul_gated<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    gate: &Bound<'py, PackedMatrix>,
    up: &Bound<'py, PackedMatrix>,
    down: &Bound<'py, PackedMatrix>,
    activation: &str,
) -> PyResult<Bound<'py, PyAny>> {
    let activation = match activation {
        "silu" => Activation::Silu,
        "gelu_tanh" => Activation::GeluTanh,
        other => {
            return Err(PyValueError::new_err(format!("activation: got {other:?}, expected silu or gelu_tanh")));
        }
    };
    let (gate, up, down) = (gate.get(), up.get(), down.get());
    let x = Array::of("x", x, false)?;
    let mut shape = gate.shape_for(&x)?;
    let (wide, k) = gate.shape();
    if up.shape() != (wide, k) || down.0.columns() != wide {
        let (up, down) = (up.shape(), down.shape());
        return Err(PyValueError::new_err(format!(
            "up and down: got shapes {up:?} and {down:?}, expected ({wide}, {k}) and (N, {wide})"
        )));
    }
    if let Some(last) = shape.last_mut() {
        *last = down.0.rows();
    }
    let mut out = x.like(py, &shape)?;
    let (mut filled, floats) = (out.floats_mut()?, x.floats()?);
    py.detach(|| gated_product(floats, [&gate.0, &up.0, &down.0], activation, &mut filled));
    Ok(out.into_object())
}

/// `x / √(mean x² + eps) · weight` along the last axis.
#[pyfunction]
pub(crate) fn rms_norm<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    eps: f32,
) -> PyResult<Bound<'py, PyAny>> {
    let (x, weight) = (Array::of("x", x, false)?, Array::of("weight", weight, false)?);
    match (weight.shape(), x.shape().last()) {
        (&[k], Some(&last)) if k == last && k > 0 => {}
        (got, _) => {
            let (got, x) = (tuple(got), tuple(x.shape()));
            return Err(PyValueError::new_err(format!(
                "weight: got shape {got} for x of shape {x}, expected (K,) for (..., K)"
            )));
        }
    }
    let mut out = x.like(py, x.shape())?;
    let (floats, weight, mut filled) = (x.floats()?, weight.floats()?, out.floats_mut()?);
    py.detach(|| normalize(floats, weight, eps, &mut filled));
    Ok(out.into_object())
}

/// Codes, scales and minima, row-major.
type Parts<'py> = (Bound<'py, PyArray2<u8>>, Bound<'py, PyAny>, Bound<'py, PyAny>);

/// A matrix of low-bit weights, ready to be multiplied with.
#[pyclass(frozen, weakref, module = "farthing")]
pub(crate) struct PackedMatrix(pub(crate) format::PackedMatrix);

#[pymethods]
impl PackedMatrix {
    /// `x · Wᵀ + bias`.
    #[pyo3(signature = (x, bias = None))]
    fn matmul<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        bias: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let x = Array::of("x", x, false)?;
        let bias = bias.map(|bias| Array::of("bias", bias, false)).transpose()?;
        let mut out = x.like(py, &self.shape_for(&x)?)?;
        let mut target = [Target { matrix: &self.0, bias: self.bias_of(bias.as_ref())?, out: out.floats_mut()? }];
        let floats = x.floats()?;
        py.detach(|| product(floats, self.0.columns(), &mut target));
        Ok(out.into_object())
    }

    /// The weights that the codes stand for, float32 `(N, K)`.
    fn dequantize<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let weights = py.detach(|| self.0.dequantize());
        PyArray1::from_vec(py, weights).reshape([self.0.rows(), self.0.columns()])
    }

    /// Codes, as many to a byte as it holds and the first in its lowest bits; scales and minima, in f16 if that is their
    /// type, else in f32.
    fn parts<'py>(&self, py: Python<'py>) -> PyResult<Parts<'py>> {
        let (n, format) = (self.0.rows(), self.0.format());
        let _ = arguments(format)?;
        let each = codes_per_byte(format);
        let (mut codes, mut scales, mut minima) = (Vec::new(), Vec::new(), Vec::new());
        py.detach(|| {
            let mut row = RowCodes::default();
            for n in 0..n {
                self.0.codes(n, &mut row);
                codes.extend(
                    row.codes
                        .chunks(each)
                        .map(|some| some.iter().enumerate().fold(0, |byte, (i, code)| byte | code << (8 / each * i))),
                );
                scales.extend_from_slice(&row.scales);
                minima.extend_from_slice(&row.offsets);
            }
        });
        let half = matches!(
            format,
            Format::Integer { scale: FloatType::F16, .. } | Format::Lookup { scale: FloatType::F16, .. }
        );
        let floats = |values: Vec<f32>| -> PyResult<Bound<'py, PyAny>> {
            let shape = [n, values.len() / n];
            Ok(if half {
                let values = values.into_iter().map(f16::from_f32).collect();
                PyArray1::<f16>::from_vec(py, values).reshape(shape)?.into_any()
            } else {
                PyArray1::from_vec(py, values).reshape(shape)?.into_any()
            })
        };
        let shape = [n, codes.len() / n];
        Ok((PyArray1::from_vec(py, codes).reshape(shape)?, floats(scales)?, floats(minima)?))
    }

    /// Bytes of the packed weights: what one product reads.
    #[getter]
    fn nbytes(&self) -> usize {
        self.0.nbytes()
    }

    /// `(N, K)`: outputs and inputs.
    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.0.rows(), self.0.columns())
    }

    /// What the stored bytes mean.
    #[getter]
    fn format(&self) -> String {
        self.0.format().to_string()
    }

    /// Precision of what the matrix is multiplied with.
    #[getter]
    fn activations(&self) -> &'static str {
        self.0.precision().name()
    }

    fn __repr__(&self) -> String {
        let (n, k) = self.shape();
        format!(
            "PackedMatrix({n} × {k}, {}, {}, {} bytes)",
            self.0.format(),
            self.0.precision().name(),
            self.0.nbytes()
        )
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyAny>,))> {
        let module = slf.py().import("farthing.matrix")?;
        Ok((module.getattr("restore")?, (module.call_method1("state", (slf,))?,)))
    }

    /// Nothing can change the matrix, so a copy may share it.
    fn __copy__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __deepcopy__<'py>(slf: Bound<'py, Self>, _memo: &Bound<'py, PyAny>) -> Bound<'py, Self> {
        slf
    }

    /// `(weights, group, symmetric)` as [`quantize`] took them.
    #[getter]
    fn arguments(&self) -> PyResult<(&'static str, usize, bool)> {
        arguments(self.0.format())
    }
}

impl PackedMatrix {
    /// The shape of the product with `x`.
    fn shape_for(&self, x: &Array<'_>) -> PyResult<Vec<usize>> {
        let mut shape = x.shape().to_vec();
        let k = self.0.columns();
        match shape.last_mut() {
            Some(last) if *last == k => {
                *last = self.0.rows();
                Ok(shape)
            }
            _ => {
                let got = tuple(x.shape());
                Err(PyValueError::new_err(format!(
                    "x: got shape {got}, expected (..., {k}) for {} weights",
                    tuple(&[self.0.rows(), k])
                )))
            }
        }
    }

    /// The elements of a bias for this matrix.
    fn bias_of<'a>(&self, bias: Option<&'a Array<'_>>) -> PyResult<Option<Floats<'a>>> {
        let Some(bias) = bias else { return Ok(None) };
        let n = self.0.rows();
        if bias.shape() == [n] {
            return Ok(Some(bias.floats()?));
        }
        Err(PyValueError::new_err(format!("bias: got shape {}, expected ({n},)", tuple(bias.shape()))))
    }
}
