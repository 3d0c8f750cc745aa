//! Arrays of floats from Python, numpy or torch, and new ones of the same kind.

use half::f16;
use numpy::{
    PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::dlpack::{Tensor, is_tensor};
use crate::floats::{Floats, FloatsMut};

/// A row-major array of floats.
pub(crate) enum Array<'py> {
    Numpy32(PyReadonlyArrayDyn<'py, f32>),
    Numpy16(PyReadonlyArrayDyn<'py, f16>),
    Torch(Tensor<'py>),
}

impl<'py> Array<'py> {
    /// The array `object`, copied only where its elements are not in row-major order. See [`Tensor::of`] for `detached`.
    pub(crate) fn of(name: &str, object: &Bound<'py, PyAny>, detached: bool) -> PyResult<Array<'py>> {
        if let Ok(array) = object.cast::<PyUntypedArray>() {
            return Array::of_numpy(name, array);
        }
        if is_tensor(object) {
            return Ok(Array::Torch(Tensor::of(name, object, detached)?));
        }
        let got = object.get_type().fully_qualified_name()?;
        Err(PyTypeError::new_err(format!("{name}: got {got}, expected a numpy.ndarray or a torch.Tensor")))
    }

    fn of_numpy(name: &str, array: &Bound<'py, PyUntypedArray>) -> PyResult<Array<'py>> {
        let kind = array.get_type();
        // Subclasses change what elements mean (a mask) or how they multiply; maps of files change nothing.
        if !array.is_exact_instance_of::<PyUntypedArray>() && kind.name()? != "memmap" {
            let got = kind.fully_qualified_name()?;
            return Err(PyTypeError::new_err(format!("{name}: got {got}, expected a plain numpy.ndarray")));
        }
        if let Ok(array) = array.cast::<PyArrayDyn<f32>>() {
            if array.is_c_contiguous() && array.data().is_aligned() {
                return Ok(Array::Numpy32(array.try_readonly()?));
            }
        } else if let Ok(array) = array.cast::<PyArrayDyn<f16>>() {
            if array.is_c_contiguous() && array.data().is_aligned() {
                return Ok(Array::Numpy16(array.try_readonly()?));
            }
        } else {
            let got = array.dtype();
            return Err(PyTypeError::new_err(format!("{name}: got {got}, expected float32 or float16")));
        }
        let copy = array.call_method0("copy")?;
        Array::of_numpy(name, copy.cast()?)
    }

    pub(crate) fn shape(&self) -> &[usize] {
        match self {
            Array::Numpy32(array) => array.shape(),
            Array::Numpy16(array) => array.shape(),
            Array::Torch(tensor) => tensor.shape(),
        }
    }

    /// The elements, row-major.
    pub(crate) fn floats(&self) -> PyResult<Floats<'_>> {
        Ok(match self {
            Array::Numpy32(array) => Floats::F32(array.as_slice()?),
            Array::Numpy16(array) => Floats::F16(array.as_slice()?),
            Array::Torch(tensor) => tensor.floats(),
        })
    }

    /// A new array of `shape`, of the kind and type of this one.
    pub(crate) fn like(&self, py: Python<'py>, shape: &[usize]) -> PyResult<Output<'py>> {
        Ok(match self {
            Array::Numpy32(_) => Output::Numpy32(PyArrayDyn::zeros(py, shape, false).try_readwrite()?),
            Array::Numpy16(_) => Output::Numpy16(PyArrayDyn::zeros(py, shape, false).try_readwrite()?),
            Array::Torch(tensor) => Output::Torch(tensor.empty_like(shape)?),
        })
    }

    /// A matrix `(n, k)`.
    pub(crate) fn matrix(&self, name: &str) -> PyResult<(usize, usize)> {
        match *self.shape() {
            [n, k] => Ok((n, k)),
            ref other => Err(PyValueError::new_err(format!("{name}: got shape {}, expected (N, K)", tuple(other)))),
        }
    }
}

/// A new array on its way to Python.
pub(crate) enum Output<'py> {
    Numpy32(PyReadwriteArrayDyn<'py, f32>),
    Numpy16(PyReadwriteArrayDyn<'py, f16>),
    Torch(Tensor<'py>),
}

impl<'py> Output<'py> {
    /// The elements, to be filled.
    pub(crate) fn floats_mut(&mut self) -> PyResult<FloatsMut<'_>> {
        Ok(match self {
            Output::Numpy32(array) => FloatsMut::F32(array.as_slice_mut()?),
            Output::Numpy16(array) => FloatsMut::F16(array.as_slice_mut()?),
            Output::Torch(tensor) => tensor.floats_mut(),
        })
    }

    pub(crate) fn into_object(self) -> Bound<'py, PyAny> {
        match self {
            Output::Numpy32(array) => array.as_any().clone(),
            Output::Numpy16(array) => array.as_any().clone(),
            Output::Torch(tensor) => tensor.into_object(),
        }
    }
}

/// A shape as Python writes it.
pub(crate) fn tuple(shape: &[usize]) -> String {
    match shape {
        [one] => format!("({one},)"),
        many => format!("({})", many.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
    }
}
