//! A mixture of experts (Shazeer et al. 2017): a router, the experts that it chooses from, and perhaps one for all rows.

use super::super::forward::{Pass, Stream, sized};
use super::super::names::{Part, Role};
use super::super::precision::precision;
use super::super::weights::{Linear, Loader, MatrixSpec};
use super::FeedForwardSpec;
use super::levers::{LayerShape, MatrixShape, Mixtures, Supply, Waves};
use super::router::{Router, RouterScratch, RouterSpec};
use super::sources::{Joined, Search, Source};
use crate::engine::Activations;
use crate::error::Error;
use crate::load::Metadata;
use farthing_kernels::experts::{Biases, Expert, ExpertActivation, ExpertScratch, PackedExperts};
use farthing_kernels::format::{Format, PackedMatrix};
use farthing_kernels::matmul::{Input, Job, matmul};
use farthing_kernels::score::{Score, score};
use std::path::Path;

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
    /// Where those to choose from come and go.
    supply: Option<Box<dyn Supply>>,
}

/// Buffers of the forward pass.
#[derive(Default)]
pub(super) struct Buffers {
    router: RouterScratch,
    input: Input,
    experts: ExpertScratch,
    waves: Waves,
    /// `(t, k)`: what the next layer may choose.
    guessed_ids: Vec<u32>,
    guessed_weights: Vec<f32>,
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
        let router =
            Router::new(self.router, weight, logit_bias, selection_bias, None)?.selected_by(loader.selection.clone());
        let mut packed = PackedExperts::new(config.hidden, self.activation);
        let (sources, formats) = self.described(loader, layer)?;
        let biases = |source: &Source<'_>| search.biases(source.role, source.n);
        let mut biases = self.bias.then(|| sources.iter().map(biases).collect::<Result<Vec<_>, _>>()).transpose()?;
        for expert in 0..experts {
            let matrices = match loader.store {
                Some(store) => store.matrices(layer, expert),
                None => pack(loader, &sources, &formats, expert)?,
            };
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
        let supply = loader.store.and_then(|store| store.supply(layer, experts));
        Ok(Sparse { spec: self.clone(), router, shared_router, experts: packed, supply })
    }

    /// The experts of block `layer`, whose matrices `sources` gives and `formats` pack.
    pub(in crate::model) fn shape(
        &self,
        layer: usize,
        sources: &[Source<'_>],
        formats: &[Format],
        activations: Activations,
    ) -> LayerShape {
        let shape = |(source, &format): (&Source<'_>, _)| {
            let precision = precision(source.role, format, activations);
            MatrixShape { n: source.n, k: source.k, format, precision }
        };
        let names: Vec<String> = sources.iter().map(Source::name).collect();
        LayerShape {
            layer,
            experts: self.router.experts,
            top_k: self.router.top_k,
            source: names.join(" and "),
            matrices: sources.iter().zip(formats).map(shape).collect(),
        }
    }

    /// Where the experts' matrices lie, and the formats that they are packed in.
    fn described<'a>(&self, loader: &'a Loader<'_>, layer: usize) -> Result<(Vec<Source<'a>>, Vec<Format>), Error> {
        let sources = self.sources(loader.search(layer, self), loader.config.hidden)?;
        let format = |source: &Source<'_>| source.format(|rows| loader.format(rows));
        let formats = sources.iter().map(format).collect::<Result<_, _>>()?;
        Ok((sources, formats))
    }
}

impl Loader<'_> {
    /// The layers with experts.
    fn mixtures(&self) -> impl Iterator<Item = (usize, &SparseSpec)> {
        self.config.blocks.iter().enumerate().filter_map(|(layer, block)| match &block.feed_forward {
            FeedForwardSpec::Sparse(spec) => Some((layer, spec)),
            FeedForwardSpec::Dense(_) => None,
        })
    }

    /// Where the experts of block `layer` lie, and the formats that they are packed in.
    fn described(&self, layer: usize) -> Result<(&SparseSpec, Vec<Source<'_>>, Vec<Format>), Error> {
        let (_, spec) = self.mixtures().find(|(found, _)| *found == layer).expect("a layer with experts");
        let (sources, formats) = spec.described(self, layer)?;
        Ok((spec, sources, formats))
    }
}

impl Mixtures for Loader<'_> {
    fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    fn identity(&self) -> String {
        let container = match &self.checkpoint.metadata {
            Metadata::HuggingFace(_) => "directory",
            Metadata::Gguf(_) => "GGUF",
        };
        format!("{} {container}\n{}", self.config.family, self.checkpoint.identity())
    }

    fn wishes(&self) -> String {
        format!("{:?} {:?}", self.weights, self.activations)
    }

    fn layers(&self) -> Result<Vec<LayerShape>, Error> {
        let layers = self.mixtures().map(|(layer, spec)| {
            let (sources, formats) = spec.described(self, layer)?;
            Ok(spec.shape(layer, &sources, &formats, self.activations))
        });
        layers.collect()
    }

    fn pack(&self, layer: usize, each: &mut dyn FnMut(&[PackedMatrix]) -> Result<(), Error>) -> Result<(), Error> {
        let (spec, sources, formats) = self.described(layer)?;
        (0..spec.router.experts).try_for_each(|expert| each(&pack(self, &sources, &formats, expert)?))
    }

    fn found(&self, layer: usize) -> Result<(), Error> {
        let (spec, sources, _) = self.described(layer)?;
        self.read(sources.iter().map(|source| source.file_bytes() * spec.router.experts as u64).sum());
        Ok(())
    }
}

/// The matrices of `expert`, in the order of their sources.
fn pack(
    loader: &Loader<'_>,
    sources: &[Source<'_>],
    formats: &[Format],
    expert: usize,
) -> Result<Vec<PackedMatrix>, Error> {
    sources.iter().zip(formats).map(|(source, &format)| source.pack(loader, format, expert)).collect()
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

    /// Whether those to choose from come and go.
    pub(in crate::model) fn streamed(&self) -> bool {
        self.supply.is_some()
    }

    /// Those to choose from, then the shared one.
    pub(in crate::model) fn experts(&self) -> &PackedExperts {
        &self.experts
    }

    pub(super) fn linears(&self) -> Vec<(Role, &Linear)> {
        self.shared_router.iter().map(|linear| (Role::SharedRouter, linear)).collect()
    }

    /// Chooses the experts of each row of the stream, already normed, and has those fetched that are not in memory.
    pub(super) fn choose(&self, pass: &Pass<'_>, stream: &Stream, buffers: &mut Buffers) {
        let (t, k) = (pass.rows(), self.spec.router.top_k);
        buffers.ids.resize(t * k, 0);
        let (ids, weights) = (&mut buffers.ids[..t * k], sized(&mut buffers.weights, t * k));
        self.look(&mut buffers.router);
        let departures = self
            .router
            .route(pass.pool, &stream.normed, &[], &mut buffers.router, ids, weights)
            .expect("shapes checked at load");
        if let Some(selection) = self.router.selection() {
            selection.note((t * k) as u64, departures);
        }
        if let Some(supply) = &self.supply {
            supply.begin(ids, &mut buffers.waves);
        }
    }

    /// Has the experts fetched that rows would choose if they came here as they are: `rows` is `(t, hidden)`, normed.
    pub(super) fn guess(&self, pass: &Pass<'_>, rows: &[f32], buffers: &mut Buffers) {
        let (t, k) = (pass.rows(), self.spec.router.top_k);
        if let Some(supply) = &self.supply {
            let Buffers { guessed_ids: ids, guessed_weights: weights, router, .. } = buffers;
            ids.resize(t * k, 0);
            let (ids, weights) = (&mut ids[..t * k], sized(weights, t * k));
            self.look(router);
            self.router.route(pass.pool, rows, &[], router, ids, weights).expect("shapes checked at load");
            supply.guess(ids, k);
        }
    }

    /// Looks which experts are in memory, for a selection that asks.
    fn look(&self, scratch: &mut RouterScratch) {
        match (&self.supply, self.router.selection()) {
            (Some(supply), Some(selection)) if selection.asks_residency() => supply.resident(&mut scratch.resident),
            _ => scratch.resident.clear(),
        }
    }

    /// Adds to the stream what the experts that [`Sparse::choose`] chose make of its rows.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        stream: &mut Stream,
        buffers: &mut Buffers,
        after: Option<&[f32]>,
    ) -> Result<(), Error> {
        let (t, pool, k) = (pass.rows(), pass.pool, self.spec.router.top_k);
        let (mut ids, mut weights) = (&buffers.ids[..t * k], &mut buffers.weights[..t * k]);
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
        let (scratch, read) = (&mut buffers.experts, &mut buffers.read);
        pass.add_with(after, stream, |x, out, add| {
            let mut run = |ids: &[u32], add| {
                self.experts.run(pool, x, ids, weights, scratch, out, add);
                *read += scratch.statistics().weight_bytes as u64;
            };
            if let Some(supply) = &self.supply {
                return supply.run(ids, &mut buffers.waves, add, &mut run);
            }
            run(ids, add);
            Ok(())
        })
    }
}
