//! Torch tensors as slices without a copy, by the DLPack C exchange API: a table of functions that the tensor type carries.
//!
//! This is the only file of the bindings with `unsafe` in it. A view of a tensor costs 80 ns, bfloat16 included; it is
//! good while the tensor is referenced and nobody resizes it, as any view of memory that Python owns.

use std::ffi::{CStr, c_int, c_void};
use std::slice;

use half::{bf16, f16};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyType};

use crate::errors::UnsupportedError;
use crate::floats::{Floats, FloatsMut};

const CAPSULE: &CStr = c"dlpack_exchange_api";
const MAJOR: u32 = 1;
const CPU: i32 = 1;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;

/// `DLTensor`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Raw {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

type View = unsafe extern "C" fn(tensor: *mut c_void, out: *mut Raw) -> c_int;

/// `DLPackExchangeAPI`; functions that are not called have no type here.
#[repr(C)]
struct Table {
    major: u32,
    minor: u32,
    previous: *const Table,
    allocate: *const c_void,
    managed_from_object: *const c_void,
    managed_to_object: *const c_void,
    view: Option<View>,
    current_stream: *const c_void,
}

/// What is needed of the torch in this process.
struct Torch {
    tensor: Py<PyType>,
    parameter: Py<PyType>,
    is_grad_enabled: Py<PyAny>,
    view: View,
}

impl Torch {
    fn of(py: Python<'_>) -> PyResult<&'static Torch> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let tensor = torch.getattr("Tensor")?.cast_into::<PyType>()?;
            let parameter = torch.getattr("nn")?.getattr("Parameter")?.cast_into::<PyType>()?;
            let too_old = || {
                let version = torch.getattr("__version__").map_or_else(|_| "unknown".to_owned(), |v| v.to_string());
                UnsupportedError::new_err(format!(
                    "torch {version} has no DLPack C exchange API of version {MAJOR}; torch 2.10 and later have"
                ))
            };
            let capsule = tensor.getattr("__dlpack_c_exchange_api__").map_err(|_| too_old())?;
            let table = capsule.cast_into::<PyCapsule>()?.pointer_checked(Some(CAPSULE))?;
            let mut table: *const Table = table.as_ptr().cast_const().cast();
            // SAFETY: the capsule's name promises such a table, of static life; `previous` leads to older ones or is
            // null, and the header of every version is that of this struct.
            while let Some(newer) = unsafe { table.as_ref() }.filter(|table| table.major != MAJOR) {
                table = newer.previous;
            }
            // SAFETY: as above; a table of this major version has the fields of this struct.
            let view = unsafe { table.as_ref() }.and_then(|table| table.view).ok_or_else(too_old)?;
            let is_grad_enabled = torch.getattr("is_grad_enabled")?.unbind();
            Ok(Torch { tensor: tensor.unbind(), parameter: parameter.unbind(), is_grad_enabled, view })
        })
    }

    /// Whether `object` is a tensor and no subclass of it; those may have no data, or a meaning of their own.
    fn owns(&self, object: &Bound<'_, PyAny>) -> bool {
        let kind = object.get_type();
        kind.is(&self.tensor) || kind.is(&self.parameter)
    }
}

/// Elements in row-major order that live as long as a tensor is referenced.
pub(crate) struct Tensor<'py> {
    object: Bound<'py, PyAny>,
    data: *mut c_void,
    kind: Kind,
    shape: Vec<usize>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    F32,
    F16,
    Bf16,
}

impl Kind {
    fn align(self) -> usize {
        if self == Kind::F32 { 4 } else { 2 }
    }
}

/// Whether `object` is a tensor of torch or of a subclass; torch is not imported to find out.
pub(crate) fn is_tensor(object: &Bound<'_, PyAny>) -> bool {
    object.hasattr(intern!(object.py(), "requires_grad")).unwrap_or(false)
}

impl<'py> Tensor<'py> {
    /// A view of a CPU tensor of floats; one that is strided, negated lazily or unaligned is copied first.
    ///
    /// With `detached`, gradients are not the caller's concern; else a tensor whose gradient is wanted is refused.
    pub(crate) fn of(name: &str, object: &Bound<'py, PyAny>, detached: bool) -> PyResult<Tensor<'py>> {
        let py = object.py();
        let torch = Torch::of(py)?;
        if !torch.owns(object) {
            let kind = object.get_type().fully_qualified_name()?;
            return Err(UnsupportedError::new_err(format!(
                "{name}: got {kind}, expected torch.Tensor itself: a subclass may have no data of its own"
            )));
        }
        if !detached
            && object.getattr(intern!(py, "requires_grad"))?.is_truthy()?
            && torch.is_grad_enabled.call0(py)?.is_truthy(py)?
        {
            return Err(UnsupportedError::new_err(format!(
                "{name}: got a tensor that requires a gradient, which this call does not record; \
                 use farthing.nn.Linear, or torch.no_grad()"
            )));
        }
        if object.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
            let object = object.call_method0("resolve_neg")?;
            return Tensor::of(name, &object, detached);
        }
        let (raw, kind) = look(torch, name, object)?;
        let aligned = (raw.data as usize).is_multiple_of(kind.align());
        // SAFETY: the exporter has filled `ndim` sizes and as many strides.
        let (shape, dense) = unsafe { dimensions(&raw) };
        if aligned && dense {
            return Ok(Tensor { object: object.clone(), data: raw.data, kind, shape });
        }
        let copy = if dense { object.call_method0("clone") } else { object.call_method0("contiguous") }?;
        Tensor::of(name, &copy, true)
    }

    /// A new tensor of `shape` with the type of this one.
    pub(crate) fn empty_like(&self, shape: &[usize]) -> PyResult<Tensor<'py>> {
        let py = self.object.py();
        let object = self.object.call_method1(intern!(py, "new_empty"), (shape,))?;
        let made = Tensor::of("the new tensor", &object, true)?;
        if made.object.is(&object) && made.kind == self.kind && made.shape == shape {
            Ok(made)
        } else {
            Err(UnsupportedError::new_err("torch made no plain tensor: a mode or default of it is in the way"))
        }
    }

    pub(crate) fn into_object(self) -> Bound<'py, PyAny> {
        self.object
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(crate) fn floats(&self) -> Floats<'_> {
        let length: usize = self.shape.iter().product();
        if length == 0 {
            return Floats::F32(&[]);
        }
        // SAFETY: a dense CPU tensor of that many elements of that type, aligned (`of` has checked all of it), alive
        // while `object` is. That nobody resizes or writes it meanwhile is the caller's word, as for all of torch.
        unsafe {
            match self.kind {
                Kind::F32 => Floats::F32(slice::from_raw_parts(self.data.cast::<f32>(), length)),
                Kind::F16 => Floats::F16(slice::from_raw_parts(self.data.cast::<f16>(), length)),
                Kind::Bf16 => Floats::Bf16(slice::from_raw_parts(self.data.cast::<bf16>(), length)),
            }
        }
    }

    /// The elements of a tensor that [`Tensor::empty_like`] has made and nobody else has seen.
    pub(crate) fn floats_mut(&mut self) -> FloatsMut<'_> {
        let length: usize = self.shape.iter().product();
        if length == 0 {
            return FloatsMut::F32(&mut []);
        }
        // SAFETY: as in `floats`; the memory is new and only ours, and any bits are valid floats.
        unsafe {
            match self.kind {
                Kind::F32 => FloatsMut::F32(slice::from_raw_parts_mut(self.data.cast::<f32>(), length)),
                Kind::F16 => FloatsMut::F16(slice::from_raw_parts_mut(self.data.cast::<f16>(), length)),
                Kind::Bf16 => FloatsMut::Bf16(slice::from_raw_parts_mut(self.data.cast::<bf16>(), length)),
            }
        }
    }
}

/// The exporter's description of a tensor on the CPU, with its type of floats.
fn look(torch: &Torch, name: &str, object: &Bound<'_, PyAny>) -> PyResult<(Raw, Kind)> {
    let device = object.getattr(intern!(object.py(), "device"))?;
    let refused = |what: String| PyValueError::new_err(format!("{name}: got a tensor on {what}, expected one on cpu"));
    let mut raw = Raw {
        data: std::ptr::null_mut(),
        device_type: 0,
        device_id: 0,
        ndim: 0,
        code: 0,
        bits: 0,
        lanes: 0,
        shape: std::ptr::null(),
        strides: std::ptr::null(),
        byte_offset: 0,
    };
    // SAFETY: the table is that of this very type (`owns`), and we hold the interpreter lock.
    if unsafe { (torch.view)(object.as_ptr().cast(), &raw mut raw) } != 0 {
        let reason = PyErr::fetch(object.py()).value(object.py()).to_string();
        if device.getattr("type")?.extract::<String>()? != "cpu" {
            return Err(refused(device.to_string()));
        }
        let reason = reason.lines().next().unwrap_or_default().to_owned();
        return Err(UnsupportedError::new_err(format!("{name}: got a tensor without data to read: {reason}")));
    }
    if raw.device_type != CPU {
        return Err(refused(device.to_string()));
    }
    let kind = match (raw.code, raw.bits, raw.lanes) {
        (FLOAT, 32, 1) => Kind::F32,
        (FLOAT, 16, 1) => Kind::F16,
        (BFLOAT, 16, 1) => Kind::Bf16,
        _ => {
            let got = object.getattr("dtype")?;
            return Err(PyTypeError::new_err(format!(
                "{name}: got {got}, expected torch.float32, torch.bfloat16 or torch.float16"
            )));
        }
    };
    raw.data = raw.data.wrapping_byte_add(raw.byte_offset as usize);
    Ok((raw, kind))
}

/// The sizes, and whether the elements lie in row-major order without gaps.
///
/// # Safety
/// `shape` has `ndim` sizes, and `strides` is null or has as many.
unsafe fn dimensions(raw: &Raw) -> (Vec<usize>, bool) {
    let ndim = raw.ndim as usize;
    if ndim == 0 {
        return (Vec::new(), true);
    }
    // SAFETY: the caller's promise.
    let sizes = unsafe { slice::from_raw_parts(raw.shape, ndim) };
    let shape: Vec<usize> = sizes.iter().map(|&size| size as usize).collect();
    if raw.strides.is_null() || shape.contains(&0) {
        return (shape, true);
    }
    // SAFETY: the caller's promise.
    let strides = unsafe { slice::from_raw_parts(raw.strides, ndim) };
    let mut expected = 1;
    let mut dense = true;
    for (&size, &stride) in sizes.iter().zip(strides).rev() {
        dense &= size == 1 || stride == expected;
        expected *= size;
    }
    (shape, dense)
}
