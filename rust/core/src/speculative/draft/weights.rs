//! Tensors of drafters that carry weights of their own.

use crate::engine::Weights;
use crate::error::Error;
use crate::load::{Checkpoint, FormatError, Rows};
use crate::model;
use farthing_kernels::format::{Format, PackError, PackedMatrix, Precision};
use farthing_kernels::matmul::{Input, Job, matmul};
use farthing_kernels::pool::Pool;

/// A matrix, its bias if any, and the buffer of its input.
pub(super) struct Linear {
    matrix: PackedMatrix,
    bias: Option<Vec<f32>>,
    input: Input,
}

impl std::fmt::Debug for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Linear({} x {})", self.matrix.rows(), self.matrix.columns())
    }
}

impl Linear {
    pub(super) fn new(matrix: PackedMatrix, bias: Option<Vec<f32>>) -> Linear {
        Linear { matrix, bias, input: Input::default() }
    }

    /// The tensor `name` + `.weight`, `(rows, columns)`, with the bias beside it if there is one.
    pub(super) fn load(
        checkpoint: &Checkpoint,
        name: &str,
        shape: [usize; 2],
        weights: Weights,
    ) -> Result<Linear, Error> {
        let matrix = matrix(checkpoint, &format!("{name}.weight"), shape, weights)?;
        let bias = format!("{name}.bias");
        let bias = checkpoint.tensor(&bias).map(|_| vector(checkpoint, &bias, shape[0])).transpose()?;
        Ok(Linear::new(matrix, bias))
    }

    pub(super) fn rows(&self) -> usize {
        self.matrix.rows()
    }

    /// Bytes of its weights.
    pub(super) fn nbytes(&self) -> usize {
        self.matrix.nbytes()
    }

    /// `out = x · Wᵀ + bias`; `x: (t, columns)`, `out: (t, rows)`.
    pub(super) fn multiply(&mut self, pool: &Pool, x: &[f32], out: &mut [f32]) {
        let (t, columns) = (x.len() / self.matrix.columns(), self.matrix.columns());
        self.input.prepare(pool, x, t, columns, &[&self.matrix]);
        let bias = self.bias.as_deref();
        matmul(pool, x, t, &self.input, &mut [Job { matrix: &self.matrix, bias, add: false, out }]);
    }
}

/// The whole tensor `name`, packed as `weights` says; as it is stored under `auto`.
pub(super) fn matrix(
    checkpoint: &Checkpoint,
    name: &str,
    shape: [usize; 2],
    weights: Weights,
) -> Result<PackedMatrix, Error> {
    let tensor = checkpoint.require(name, &shape)?;
    let format = model::packed_format(weights, crate::engine::Activations::Auto, &tensor)?;
    let [n, k] = shape;
    let packed = match format {
        Format::Float(float) => PackedMatrix::pack_float(n, k, float, |row, out| tensor.row(row, out)),
        _ => PackedMatrix::quantize(n, k, format, Precision::A8, |row, out| tensor.row(row, out)),
    };
    packed.map_err(|error| match error {
        PackError::Source(error) => Error::from(error),
        PackError::OutOfMemory(error) => Error::OutOfMemory(error),
        other => FormatError::Pack { tensor: name.to_owned(), reason: other.to_string() }.into(),
    })
}

/// The finite values of a tensor of one dimension.
pub(super) fn vector(checkpoint: &Checkpoint, name: &str, length: usize) -> Result<Vec<f32>, Error> {
    let tensor = checkpoint.require(name, &[length])?;
    let mut out = vec![0.0; length];
    tensor.row(0, &mut out)?;
    match out.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(FormatError::NonFinite { tensor: name.to_owned(), index }.into()),
        None => Ok(out),
    }
}
