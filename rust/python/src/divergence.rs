//! Divergences of rows of logits, for `farthing.reasoning`.

use farthing_kernels::divergence::{Divergence, Gradient, Products, ProductsMut, Target, Transform, divergences};
use half::slice::HalfBitsSliceExt;
use numpy::{
    Element, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray2,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::array::tuple;
use crate::product::threads;

/// Logits that one thread works through in about 100 µs.
const LOGITS_ALONE: usize = 1 << 16;

/// Bias, scale, cap, temperature.
type Numbers<'py> = (Option<PyReadonlyArray1<'py, f64>>, f64, Option<f64>, f64);
/// Divergence, entropy and dropped gradient of each row, clamped logits of each row, columns kept.
type Found<'py> = (
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
);

/// Rows of products: float32, float64, or uint16 for the bits of bfloat16.
enum Rows<'py> {
    F32(PyReadonlyArray2<'py, f32>),
    Bits(PyReadonlyArray2<'py, u16>),
    F64(PyReadonlyArray2<'py, f64>),
}

enum RowsMut<'py> {
    F32(PyReadwriteArray2<'py, f32>),
    Bits(PyReadwriteArray2<'py, u16>),
    F64(PyReadwriteArray2<'py, f64>),
}

fn refused(name: &str, object: &Bound<'_, PyAny>) -> PyErr {
    let got = object.repr().map_or_else(|_| String::new(), |repr| repr.to_string().chars().take(80).collect());
    PyTypeError::new_err(format!(
        "{name}: got {got}, expected a row-major array (r, v) of float32, float64 or uint16 (bits of bfloat16)"
    ))
}

fn rows_of<'a, 'py, T: Element>(object: &'a Bound<'py, PyAny>) -> Option<&'a Bound<'py, PyArray2<T>>> {
    object.cast::<PyArray2<T>>().ok().filter(|array| array.is_c_contiguous())
}

impl<'py> Rows<'py> {
    fn of(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Rows<'py>> {
        if let Some(array) = rows_of::<f32>(object) {
            Ok(Rows::F32(array.try_readonly()?))
        } else if let Some(array) = rows_of::<u16>(object) {
            Ok(Rows::Bits(array.try_readonly()?))
        } else if let Some(array) = rows_of::<f64>(object) {
            Ok(Rows::F64(array.try_readonly()?))
        } else {
            Err(refused(name, object))
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Rows::F32(array) => array.shape(),
            Rows::Bits(array) => array.shape(),
            Rows::F64(array) => array.shape(),
        }
    }

    fn products(&self) -> PyResult<Products<'_>> {
        Ok(match self {
            Rows::F32(array) => Products::F32(array.as_slice()?),
            Rows::Bits(array) => Products::Bf16(array.as_slice()?.reinterpret_cast()),
            Rows::F64(array) => Products::F64(array.as_slice()?),
        })
    }
}

impl<'py> RowsMut<'py> {
    fn of(name: &str, object: &Bound<'py, PyAny>) -> PyResult<RowsMut<'py>> {
        if let Some(array) = rows_of::<f32>(object) {
            Ok(RowsMut::F32(array.try_readwrite()?))
        } else if let Some(array) = rows_of::<u16>(object) {
            Ok(RowsMut::Bits(array.try_readwrite()?))
        } else if let Some(array) = rows_of::<f64>(object) {
            Ok(RowsMut::F64(array.try_readwrite()?))
        } else {
            Err(refused(name, object))
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            RowsMut::F32(array) => array.shape(),
            RowsMut::Bits(array) => array.shape(),
            RowsMut::F64(array) => array.shape(),
        }
    }

    fn products(&mut self) -> PyResult<ProductsMut<'_>> {
        Ok(match self {
            RowsMut::F32(array) => ProductsMut::F32(array.as_slice_mut()?),
            RowsMut::Bits(array) => ProductsMut::Bf16(array.as_slice_mut()?.reinterpret_cast_mut()),
            RowsMut::F64(array) => ProductsMut::F64(array.as_slice_mut()?),
        })
    }
}

fn transform<'a>(name: &str, numbers: &'a Numbers<'_>, v: usize) -> PyResult<Transform<'a>> {
    let (bias, scale, cap, temperature) = numbers;
    for (what, x) in [("scale", *scale), ("softcap", cap.unwrap_or(1.0)), ("temperature", *temperature)] {
        if !(x > 0.0 && x.is_finite()) {
            return Err(PyValueError::new_err(format!("{what} of the {name}: got {x}, expected a number above 0")));
        }
    }
    let bias = bias.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
    if let Some(got) = bias.map(<[f64]>::len).filter(|&got| got != v) {
        return Err(PyValueError::new_err(format!("bias of the {name}: got shape ({got},), expected ({v},)")));
    }
    Ok(Transform { bias, scale: *scale, cap: *cap, temperature: *temperature })
}

/// Divergences of the rows of `student` from those of `teacher`, or from `labels`; gradients take the student's place.
#[pyfunction]
#[pyo3(signature = (student, teacher, labels, weights, *, kind, beta, of_student, of_teacher, threshold))]
pub(crate) fn row_divergences<'py>(
    py: Python<'py>,
    student: &Bound<'py, PyAny>,
    teacher: Option<&Bound<'py, PyAny>>,
    labels: Option<PyReadonlyArray1<'py, i64>>,
    weights: PyReadonlyArray1<'py, f64>,
    kind: &str,
    beta: f64,
    of_student: Numbers<'py>,
    of_teacher: Numbers<'py>,
    threshold: Option<f64>,
) -> PyResult<Found<'py>> {
    let mut student = RowsMut::of("student", student)?;
    let teacher = teacher.map(|teacher| Rows::of("teacher", teacher)).transpose()?;
    let (shape, v) = (student.shape().to_vec(), student.shape()[1]);
    let weights = weights.as_slice()?;
    if weights.len() != shape[0] {
        return Err(PyValueError::new_err(format!(
            "weights: got {}, expected one for each of {} rows",
            weights.len(),
            shape[0]
        )));
    }
    let kind = match kind {
        "reverse_kl" => Divergence::ReverseKl,
        "forward_kl" => Divergence::ForwardKl,
        "jsd" if beta > 0.0 && beta < 1.0 => Divergence::JensenShannon(beta),
        "jsd" => return Err(PyValueError::new_err(format!("beta: got {beta}, expected a number between 0 and 1"))),
        "cross_entropy" => Divergence::CrossEntropy,
        _ => {
            let kinds = "reverse_kl, forward_kl, jsd, cross_entropy";
            return Err(PyValueError::new_err(format!("kind: got {kind:?}, expected one of {kinds}")));
        }
    };
    let (by_student, by_teacher) = (transform("student", &of_student, v)?, transform("teacher", &of_teacher, v)?);
    let labels = labels.map(|labels| labels_below(&labels, v)).transpose()?;
    let target = match (&teacher, &labels) {
        (Some(teacher), None) => {
            if teacher.shape() != shape {
                let (got, expected) = (tuple(teacher.shape()), tuple(&shape));
                return Err(PyValueError::new_err(format!("teacher: got shape {got}, expected {expected}")));
            }
            if matches!(teacher, Rows::F64(_)) != matches!(student, RowsMut::F64(_)) {
                return Err(PyTypeError::new_err("teacher: expected float64 exactly where the student is float64"));
            }
            Target::Teacher(teacher.products()?, by_teacher)
        }
        (None, Some(labels)) if kind == Divergence::CrossEntropy && labels.len() == shape[0] => Target::Labels(labels),
        _ => return Err(PyValueError::new_err("expected a teacher, or for cross_entropy a label for each row")),
    };
    let gradient = threshold.map_or(Gradient::None, Gradient::Filtered);
    let pool = threads(shape[0] * v <= LOGITS_ALONE);
    let products = student.products()?;
    let found = py.detach(|| divergences(pool, kind, products, by_student, target, weights, gradient));
    let of_rows =
        |number: fn(&farthing_kernels::divergence::Row) -> f64| PyArray1::from_iter(py, found.rows.iter().map(number));
    Ok((
        of_rows(|row| row.divergence),
        of_rows(|row| row.entropy),
        of_rows(|row| row.dropped),
        PyArray1::from_iter(py, found.rows.iter().map(|row| i64::from(row.clamped))),
        PyArray1::from_iter(py, found.columns.iter().map(|&column| column as i64)),
    ))
}

fn labels_below(labels: &PyReadonlyArray1<'_, i64>, v: usize) -> PyResult<Vec<usize>> {
    let below = |&label: &i64| {
        let error = || PyValueError::new_err(format!("labels: got {label}, expected tokens below {v}"));
        usize::try_from(label).ok().filter(|&label| label < v).ok_or_else(error)
    };
    labels.as_slice()?.iter().map(below).collect()
}
