//! What each matrix is packed as, which kernel multiplies it, and what it weighs.

use super::feed_forward::sparse::Sparse;
use super::{Model, Role};
use farthing_kernels::experts::Expert;
use farthing_kernels::format::PackedMatrix;
use farthing_kernels::isa::Isa;

/// One matrix as `explain` shows it.
#[derive(Clone, Debug)]
pub struct MatrixReport {
    /// Block index; `None` for embedding and head.
    pub layer: Option<usize>,
    /// What the matrix does.
    pub role: Role,
    /// Matrices of this kind: 1, or the number of experts.
    pub count: usize,
    /// Of which one row uses so many.
    pub used: usize,
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
    /// Bytes of all of them.
    pub bytes: usize,
    /// Whether they lie on disk, from where those come to memory that are needed.
    pub on_disk: bool,
}

impl Model {
    /// Every matrix, in the order of use.
    pub fn explain(&self) -> Vec<MatrixReport> {
        let embedding = if self.head.is_some() { Role::Embedding } else { Role::Head };
        let mut reports = vec![report(None, embedding, &self.embedding)];
        for (layer, block) in self.blocks.iter().enumerate() {
            reports.extend(block.matrices().map(|(role, matrix)| report(Some(layer), role, matrix)));
            if let Some(mixture) = block.feed_forward.sparse() {
                reports.push(report(Some(layer), Role::Router, mixture.router().weight()));
                reports.extend(experts(layer, mixture));
            }
        }
        reports.extend(self.head.as_ref().map(|head| report(None, Role::Head, head)));
        reports
    }
}

/// One of an expert's matrices.
type Part = fn(&Expert) -> Option<&PackedMatrix>;

/// One report for each kind of matrix of the experts, then the shared one's.
fn experts(layer: usize, mixture: &Sparse) -> impl Iterator<Item = MatrixReport> {
    let (all, routed) = (mixture.experts().experts(), mixture.spec().router.experts);
    let kind = move |role, of: Part, experts: &[Expert], used| {
        let bytes = experts.iter().filter_map(of).map(PackedMatrix::nbytes).sum();
        let first = report(Some(layer), role, of(experts.first()?)?);
        Some(MatrixReport { count: experts.len(), used, bytes, ..first })
    };
    let top_k = mixture.spec().router.top_k;
    let parts: [(Part, [Role; 2]); 3] = [
        (|expert| expert.gate.as_ref(), [Role::ExpertGate, Role::SharedGate]),
        (|expert| Some(&expert.up), [Role::ExpertUp, Role::SharedUp]),
        (|expert| Some(&expert.down), [Role::ExpertDown, Role::SharedDown]),
    ];
    let of_routed = parts.into_iter().filter_map(move |(of, roles)| {
        Some(MatrixReport { on_disk: mixture.streamed(), ..kind(roles[0], of, &all[..routed], top_k)? })
    });
    let of_shared = parts.into_iter().filter_map(move |(of, roles)| kind(roles[1], of, &all[routed..], 1));
    of_routed.chain(of_shared)
}

fn report(layer: Option<usize>, role: Role, matrix: &PackedMatrix) -> MatrixReport {
    MatrixReport {
        layer,
        role,
        count: 1,
        used: 1,
        rows: matrix.rows(),
        columns: matrix.columns(),
        format: matrix.format().to_string(),
        activations: matrix.precision().name(),
        kernel: Isa::active().name(),
        bytes: matrix.nbytes(),
        on_disk: false,
    }
}
