//! What each matrix is packed as, which kernel multiplies it, and what it weighs.

use super::{Model, Role};
use farthing_kernels::format::PackedMatrix;
use farthing_kernels::isa::Isa;

/// One matrix as `explain` shows it.
#[derive(Clone, Debug)]
pub struct MatrixReport {
    /// Block index; `None` for embedding and head.
    pub layer: Option<usize>,
    /// What the matrix does.
    pub role: Role,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// Packed format: code width, group, meaning of the codes, type of the scales.
    pub format: String,
    /// Precision of the activations it meets: `a8`, `a16` or `f32`.
    pub activations: &'static str,
    /// Instruction set of the kernel that multiplies it.
    pub kernel: &'static str,
    /// Resident bytes.
    pub bytes: usize,
}

impl Model {
    /// Every matrix, in the order of use.
    pub fn explain(&self) -> Vec<MatrixReport> {
        let embedding = if self.head.is_some() { Role::Embedding } else { Role::Head };
        let mut reports = vec![report(None, embedding, &self.embedding)];
        for (layer, block) in self.blocks.iter().enumerate() {
            reports.extend(block.linears().map(|(role, linear)| report(Some(layer), role, &linear.matrix)));
        }
        reports.extend(self.head.as_ref().map(|head| report(None, Role::Head, head)));
        reports
    }
}

fn report(layer: Option<usize>, role: Role, matrix: &PackedMatrix) -> MatrixReport {
    MatrixReport {
        layer,
        role,
        rows: matrix.rows(),
        columns: matrix.columns(),
        format: matrix.format().to_string(),
        activations: matrix.precision().name(),
        kernel: Isa::active().name(),
        bytes: matrix.nbytes(),
    }
}
