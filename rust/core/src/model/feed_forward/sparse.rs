//! A mixture of experts (Shazeer et al. 2017): a router, the experts that it chooses from, and perhaps one for all rows.

use super::super::forward::{Pass, Stream, sized};
use super::super::names::{Part, Role};
use super::super::weights::{Linear, Loader, MatrixSpec};
use super::sources::{Joined, Search, Source};
use crate::error::Error;
use crate::moe::{Router, RouterScratch, RouterSpec, Score};
use farthing_kernels::experts::{Biases, Expert, ExpertActivation, ExpertScratch, PackedExperts};
use farthing_kernels::matmul::{Input, Job, matmul};
use farthing_kernels::score::score;

/// A mixture's description.
#[derive(Clone, Debug, PartialEq)]
pub struct SparseSpec {
    /// How rows are sent to experts.
    pub router: RouterSpec,
    /// A bias on the router's logits.
    pub logit_bias: bool,
    /// A bias that takes part in the choice alone.
    pub selection_bias: bool,
    /// Width of an expert.
    pub intermediate: usize,
    /// What stands between an expert's products.
    pub activation: ExpertActivation,
    /// Biases on each expert's products.
    pub bias: bool,
    /// How gate and up are joined where one tensor holds all experts.
    pub joined: Joined,
    /// An expert that every row meets.
    pub shared: Option<SharedSpec>,
}

/// An expert that every row meets, beside those it is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedSpec {
    /// Its width.
    pub intermediate: usize,
    /// Whether a sigmoid of its own weighs it (Qwen2-MoE); otherwise its weight is 1.
    pub gated: bool,
}

/// A mixture's tensors.
#[derive(Debug)]
pub(in crate::model) struct Sparse {
    spec: SparseSpec,
    router: Router,
    /// Weighs the shared expert: `(1, hidden)`.
    shared_router: Option<Linear>,
    /// Those to choose from, then the shared one.
    experts: PackedExperts,
}

/// Buffers of the forward pass.
#[derive(Default)]
pub(super) struct Buffers {
    router: RouterScratch,
    input: Input,
    experts: ExpertScratch,
    /// `(t, k)`.
    ids: Vec<u32>,
    weights: Vec<f32>,
    /// `(t, k + 1)`: with the shared expert.
    all_ids: Vec<u32>,
    all_weights: Vec<f32>,
    /// `(t,)`.
    shared: Vec<f32>,
    /// Bytes of experts read.
    pub(super) read: u64,
}

/// One kind of matrix of all experts, as `explain` and `plan` show it.
pub(in crate::model) struct Kind {
    pub(in crate::model) role: Role,
    pub(in crate::model) rows: usize,
    pub(in crate::model) columns: usize,
    /// Experts that have one.
    pub(in crate::model) count: usize,
    /// Of which a row uses so many.
    pub(in crate::model) used: usize,
}

impl SparseSpec {
    /// The matrices that every row meets, in the order of use.
    pub(super) fn matrices(&self, hidden: usize) -> Vec<MatrixSpec> {
        let mut all = vec![MatrixSpec::new(Role::Router, self.router.experts, hidden)];
        if let Some(shared) = self.shared {
            if shared.gated {
                all.push(MatrixSpec::new(Role::SharedRouter, 1, hidden));
            }
            all.extend(shared.matrices(hidden));
        }
        all
    }

    /// The matrices that experts have.
    pub(in crate::model) fn kinds(&self, hidden: usize) -> Vec<Kind> {
        let (count, used) = (self.router.experts, self.router.top_k);
        let kind = |role, rows, columns| Kind { role, rows, columns, count, used };
        let gate = self.activation.gated().then(|| kind(Role::ExpertGate, self.intermediate, hidden));
        let others =
            [kind(Role::ExpertUp, self.intermediate, hidden), kind(Role::ExpertDown, hidden, self.intermediate)];
        gate.into_iter().chain(others).collect()
    }

    /// Where a checkpoint keeps them.
    pub(in crate::model) fn sources<'a>(&self, search: Search<'a>, hidden: usize) -> Result<Vec<Source<'a>>, Error> {
        self.kinds(hidden).iter().map(|kind| search.source(kind.role, kind.rows, kind.columns)).collect()
    }

    pub(super) fn load(&self, loader: &Loader<'_>, layer: usize) -> Result<Sparse, Error> {
        let (config, search) = (loader.config, loader.search(layer, self));
        let experts = self.router.experts;
        let vector = |part| loader.vector(&loader.name(part, layer), experts);
        let weight = loader.router(&MatrixSpec::new(Role::Router, experts, config.hidden), layer)?;
        let logit_bias = self.logit_bias.then(|| vector(Part::RouterBias)).transpose()?;
        let selection_bias = self.selection_bias.then(|| vector(Part::SelectionBias)).transpose()?;
        let router = Router::new(self.router, weight, logit_bias, selection_bias, None)?;
        let mut packed = PackedExperts::new(config.hidden, self.activation);
        let sources = self.sources(search, config.hidden)?;
        let formats =
            sources.iter().map(|source| source.format(|rows| loader.format(rows))).collect::<Result<Vec<_>, _>>()?;
        let biases = |source: &Source<'_>| search.biases(source.role, source.n);
        let mut biases = self.bias.then(|| sources.iter().map(biases).collect::<Result<Vec<_>, _>>()).transpose()?;
        for expert in 0..experts {
            let mut matrices = Vec::with_capacity(3);
            for (source, &format) in sources.iter().zip(&formats) {
                matrices.push(source.pack(loader, format, expert)?);
            }
            let mut matrices = matrices.into_iter();
            let mut biases = biases.iter_mut().flatten().map(|biases| std::mem::take(&mut biases[expert]));
            let gated = self.activation.gated();
            let mut bias = |wanted: bool| if wanted { biases.next().unwrap_or_default() } else { Vec::new() };
            let biases = self.bias.then(|| Biases { gate: bias(gated), up: bias(true), down: bias(true) });
            let mut matrix = || matrices.next().expect("a source for each matrix");
            let gate = gated.then(&mut matrix);
            packed.push(Expert { gate, up: matrix(), down: matrix(), biases }).expect("shapes that were asked for");
        }
        let mut shared_router = None;
        if let Some(shared) = self.shared {
            if shared.gated {
                shared_router = Some(loader.linear(&MatrixSpec::new(Role::SharedRouter, 1, config.hidden), layer)?);
            }
            let [gate, up, down] = shared.matrices(config.hidden).map(|spec| loader.matrix(&spec, layer));
            let expert = Expert { gate: Some(gate?), up: up?, down: down?, biases: None };
            packed.push(expert).expect("shapes that were asked for");
        }
        Ok(Sparse { spec: self.clone(), router, shared_router, experts: packed })
    }
}

impl SharedSpec {
    fn matrices(self, hidden: usize) -> [MatrixSpec; 3] {
        [
            MatrixSpec::new(Role::SharedGate, self.intermediate, hidden),
            MatrixSpec::new(Role::SharedUp, self.intermediate, hidden),
            MatrixSpec::new(Role::SharedDown, hidden, self.intermediate),
        ]
    }
}

impl Sparse {
    /// The description.
    pub(in crate::model) fn spec(&self) -> &SparseSpec {
        &self.spec
    }

    /// The router.
    pub(in crate::model) fn router(&self) -> &Router {
        &self.router
    }

    /// Those to choose from, then the shared one.
    pub(in crate::model) fn experts(&self) -> &PackedExperts {
        &self.experts
    }

    pub(super) fn linears(&self) -> Vec<(Role, &Linear)> {
        self.shared_router.iter().map(|linear| (Role::SharedRouter, linear)).collect()
    }

    pub(super) fn forward(&self, pass: &Pass<'_>, stream: &mut Stream, buffers: &mut Buffers, after: Option<&[f32]>) {
        let (t, pool, k) = (pass.rows(), pass.pool, self.spec.router.top_k);
        buffers.ids.resize(t * k, 0);
        let (ids, weights) = (&mut buffers.ids[..t * k], sized(&mut buffers.weights, t * k));
        self.router
            .route(pool, &stream.normed, &[], &mut buffers.router, ids, weights)
            .expect("shapes checked at load");
        let (mut ids, mut weights) = (&*ids, weights);
        if self.spec.shared.is_some() {
            let shared = sized(&mut buffers.shared, t);
            shared.fill(1.0);
            if let Some(router) = &self.shared_router {
                let hidden = router.matrix.columns();
                buffers.input.prepare(pool, &stream.normed, t, hidden, &[&router.matrix]);
                let job = Job { matrix: &router.matrix, bias: None, add: false, out: &mut *shared };
                matmul(pool, &stream.normed, t, &buffers.input, &mut [job]);
                score(Score::Sigmoid, shared, 1);
            }
            buffers.all_ids.clear();
            buffers.all_weights.clear();
            for ((ids, weights), &shared) in ids.chunks_exact(k).zip(weights.chunks_exact(k)).zip(&*shared) {
                buffers.all_ids.extend(ids);
                buffers.all_ids.push(self.spec.router.experts as u32);
                buffers.all_weights.extend(weights);
                buffers.all_weights.push(shared);
            }
            (ids, weights) = (&buffers.all_ids, &mut buffers.all_weights);
        }
        if pass.residual != 1.0 {
            for weight in &mut *weights {
                *weight *= pass.residual;
            }
        }
        pass.add_with(after, stream, |x, out, add| {
            self.experts.run(pool, x, ids, weights, &mut buffers.experts, out, add);
        });
        buffers.read += buffers.experts.statistics().weight_bytes as u64;
    }
}
