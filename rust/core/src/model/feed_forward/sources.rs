//! Where a checkpoint keeps the matrices of a layer's experts: one tensor for each, or one for all.

use super::super::names::{Convention, Part, Role};
use super::super::weights::Loader;
use crate::error::Error;
use crate::load::{Checkpoint, FormatError, Mxfp4Rows, Rows, TensorView};
use farthing_kernels::format::{Format, PackedMatrix, RowCodes};

/// How a Hugging Face checkpoint joins gate and up when one tensor holds all experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// `(experts, 2 · width, hidden)`: all rows of the gate, then all of up.
    Concatenated,
    /// `(experts, hidden, 2 · width)`: columns of gate and up by turns (gpt-oss).
    Interleaved,
}

/// One kind of matrix, `(n, k)`, of every expert of a layer.
pub(in crate::model) struct Source<'a> {
    pub(in crate::model) role: Role,
    pub(in crate::model) n: usize,
    pub(in crate::model) k: usize,
    kind: Kind<'a>,
}

enum Kind<'a> {
    /// A tensor `(n, k)` for each expert.
    Each(Vec<TensorView<'a>>),
    /// `(experts, rows, k)`, of which every `step`th row from `first` on is ours.
    Stacked { tensor: TensorView<'a>, rows: usize, first: usize, step: usize },
    /// `(experts, k, rows)`, of which every `step`th column from `first` on is a row of ours.
    Transposed { tensor: TensorView<'a>, rows: usize, first: usize, step: usize },
    /// As stacked, in blocks of 4-bit floats with scales of their own.
    Blocks { tensor: Mxfp4Rows<'a>, rows: usize, first: usize, step: usize },
}

/// What a source is looked for with.
#[derive(Clone, Copy)]
pub(in crate::model) struct Search<'a> {
    pub(in crate::model) checkpoint: &'a Checkpoint,
    pub(in crate::model) convention: Convention,
    pub(in crate::model) names: &'a super::super::names::Names,
    pub(in crate::model) layer: usize,
    pub(in crate::model) experts: usize,
    pub(in crate::model) joined: Joined,
}

impl<'a> Search<'a> {
    fn name(&self, part: Part) -> String {
        self.names.tensor(self.convention, part, self.layer)
    }

    /// The matrices `(n, k)` that the experts use as `role`.
    pub(in crate::model) fn source(&self, role: Role, n: usize, k: usize) -> Result<Source<'a>, Error> {
        let source = |kind| Source { role, n, k, kind };
        let experts = self.experts;
        let own = self.name(Part::Matrix(role));
        if self.convention == Convention::Gguf {
            let tensor = self.checkpoint.require(&(own + ".weight"), &[experts, n, k])?;
            return Ok(source(Kind::Stacked { tensor, rows: n, first: 0, step: 1 }));
        }
        let (part, rows, first) = match role {
            Role::ExpertGate => (Part::GateUp, 2 * n, 0),
            Role::ExpertUp => (Part::GateUp, 2 * n, 1),
            _ => (Part::Downs, n, 0),
        };
        let joined = self.name(part);
        let (first, step) = match (part, self.joined) {
            (Part::GateUp, Joined::Concatenated) => (first * n, 1),
            (Part::GateUp, Joined::Interleaved) => (first, 2),
            _ => (0, 1),
        };
        let whole = [format!("{joined}.weight"), joined.clone()];
        if let Some(name) = whole.iter().find(|name| self.checkpoint.tensor(name).is_some()) {
            return Ok(source(match self.joined {
                Joined::Concatenated => {
                    Kind::Stacked { tensor: self.checkpoint.require(name, &[experts, rows, k])?, rows, first, step }
                }
                Joined::Interleaved => {
                    Kind::Transposed { tensor: self.checkpoint.require(name, &[experts, k, rows])?, rows, first, step }
                }
            }));
        }
        if let Some(tensor) = Mxfp4Rows::find(self.checkpoint, &joined, &[experts, rows], k)? {
            return Ok(source(Kind::Blocks { tensor, rows, first, step }));
        }
        let each =
            |expert: usize| self.checkpoint.require(&(own.replace("{}", &expert.to_string()) + ".weight"), &[n, k]);
        Ok(source(Kind::Each((0..experts).map(each).collect::<Result<_, _>>()?)))
    }

    /// What is added to the products of `role`: `(experts, n)`.
    pub(in crate::model) fn biases(&self, role: Role, n: usize) -> Result<Vec<Vec<f32>>, Error> {
        let read = |name: &str, length: usize, first: usize, step: usize| {
            let tensor = self.checkpoint.require(name, &[self.experts, length])?;
            let mut row = vec![0.0; length];
            (0..self.experts)
                .map(|expert| {
                    tensor.row(expert, &mut row)?;
                    if let Some(index) = row.iter().position(|value| !value.is_finite()) {
                        return Err(FormatError::NonFinite { tensor: name.to_owned(), index }.into());
                    }
                    Ok(row.iter().copied().skip(first).step_by(step).take(n).collect())
                })
                .collect()
        };
        let (part, first) = match role {
            Role::ExpertGate => (Part::GateUp, 0),
            Role::ExpertUp => (Part::GateUp, 1),
            _ => (Part::Downs, 0),
        };
        match (self.convention, part, self.joined) {
            (Convention::Gguf, ..) => read(&(self.name(Part::Matrix(role)) + ".bias"), n, 0, 1),
            (_, Part::GateUp, Joined::Interleaved) => read(&(self.name(part) + "_bias"), 2 * n, first, 2),
            (_, Part::GateUp, Joined::Concatenated) => read(&(self.name(part) + "_bias"), 2 * n, first * n, 1),
            _ => read(&(self.name(part) + "_bias"), n, 0, 1),
        }
    }
}

impl Source<'_> {
    /// Bytes in the file that belong to one expert.
    pub(in crate::model) fn file_bytes(&self) -> u64 {
        (match &self.kind {
            Kind::Each(tensors) => tensors.first().map_or(0, TensorView::nbytes),
            Kind::Stacked { tensor, .. } => tensor.nbytes() / tensor.rows() * self.n,
            Kind::Transposed { tensor, rows, .. } => tensor.nbytes() / tensor.rows() * self.k * self.n / rows,
            Kind::Blocks { tensor, rows, .. } => tensor.nbytes() / tensor.experts() * self.n / rows,
        }) as u64
    }

    /// What tells sources apart that give matrices of one shape.
    pub(in crate::model) fn name(&self) -> String {
        match &self.kind {
            Kind::Each(tensors) => format!("{} of each", tensors[0].name()),
            Kind::Stacked { tensor, first, step, .. } => format!("rows {first} by {step} of {}", tensor.name()),
            Kind::Transposed { tensor, first, step, .. } => format!("columns {first} by {step} of {}", tensor.name()),
            Kind::Blocks { tensor, first, step, .. } => format!("blocks {first} by {step} of {}", tensor.name()),
        }
    }

    /// The format that all of them are packed in.
    pub(in crate::model) fn format(
        &self,
        pick: impl Fn(&dyn Rows) -> Result<Format, FormatError>,
    ) -> Result<Format, Error> {
        let format = match &self.kind {
            Kind::Each(tensors) => {
                let first = pick(&tensors[0])?;
                for tensor in &tensors[1..] {
                    let (got, expected) = (tensor.kind().name(), tensors[0].kind().name());
                    if got != expected {
                        let tensor = tensor.name().to_owned();
                        return Err(FormatError::UnsupportedType { tensor, got, expected }.into());
                    }
                }
                first
            }
            Kind::Stacked { tensor, .. } | Kind::Transposed { tensor, .. } => pick(tensor)?,
            Kind::Blocks { tensor, .. } => pick(tensor)?,
        };
        Ok(format)
    }

    /// The matrix of `expert`, packed in `format`.
    pub(in crate::model) fn pack(
        &self,
        loader: &Loader<'_>,
        format: Format,
        expert: usize,
    ) -> Result<PackedMatrix, Error> {
        let (n, k) = (self.n, self.k);
        let packed = match &self.kind {
            Kind::Each(tensors) => {
                let tensor = &tensors[expert];
                loader.pack(tensor.name(), self.role, (n, k), format, tensor, |row| row)?
            }
            Kind::Stacked { tensor, rows, first, step } => {
                let start = expert * rows + first;
                loader.pack(tensor.name(), self.role, (n, k), format, tensor, |row| start + step * row)?
            }
            Kind::Blocks { tensor, rows, first, step } => {
                let start = expert * rows + first;
                loader.pack(tensor.name(), self.role, (n, k), format, tensor, |row| start + step * row)?
            }
            Kind::Transposed { tensor, rows, first, step } => {
                let turned = Turned::read(tensor, expert, (n, k), *rows, *first, *step)?;
                loader.pack(tensor.name(), self.role, (n, k), format, &turned, |row| row)?
            }
        };
        match &self.kind {
            Kind::Each(tensors) => tensors[expert].release(),
            // Pages of the experts before are not read again.
            Kind::Stacked { tensor, .. } | Kind::Transposed { tensor, .. } if expert + 1 == tensor.shape()[0] => {
                tensor.release();
            }
            Kind::Stacked { .. } | Kind::Transposed { .. } | Kind::Blocks { .. } => {}
        }
        loader.read(self.file_bytes());
        Ok(packed)
    }
}

/// One expert of a transposed tensor, turned: `(n, k)` floats.
struct Turned<'a> {
    tensor: &'a TensorView<'a>,
    k: usize,
    weights: Vec<f32>,
}

impl<'a> Turned<'a> {
    fn read(
        tensor: &'a TensorView<'a>,
        expert: usize,
        (n, k): (usize, usize),
        rows: usize,
        first: usize,
        step: usize,
    ) -> Result<Turned<'a>, FormatError> {
        let (mut weights, mut columns) = (vec![0.0; n * k], vec![0.0; rows]);
        for input in 0..k {
            tensor.row(expert * k + input, &mut columns)?;
            for (output, &weight) in columns.iter().skip(first).step_by(step).take(n).enumerate() {
                weights[output * k + input] = weight;
            }
        }
        Ok(Turned { tensor, k, weights })
    }
}

impl Rows for Turned<'_> {
    fn columns(&self) -> usize {
        self.k
    }

    fn natural_format(&self) -> Result<Format, FormatError> {
        Rows::natural_format(self.tensor)
    }

    fn exact_format(&self) -> Result<Format, FormatError> {
        Rows::exact_format(self.tensor)
    }

    fn row(&self, i: usize, out: &mut [f32]) -> Result<(), FormatError> {
        out.copy_from_slice(&self.weights[i * self.k..][..self.k]);
        Ok(())
    }

    fn codes(&self, i: usize, format: Format, out: &mut RowCodes) -> Result<(), FormatError> {
        Rows::codes(self.tensor, i, format, out)
    }
}
