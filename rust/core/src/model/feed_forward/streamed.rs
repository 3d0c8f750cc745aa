//! A mixture whose experts come and go: those of a step are fetched in waves that fit in memory, experts ascending.
//!
//! A row's experts are added in the order of their numbers, so that waves change no bit of the sum.

use std::sync::Arc;

use super::super::weights::Loader;
use super::FeedForwardSpec;
use crate::error::Error;
use crate::load::Metadata;
use crate::moe::stream::{Layout, Residency, Store, Writer, store_path};
use farthing_kernels::format::PackedMatrix;

/// Experts that are guessed for each row.
const GUESSES: usize = 2;

/// A model's experts on disk.
#[derive(Debug)]
pub(in crate::model) struct ExpertStore {
    layout: Layout,
    store: Store,
    residency: Arc<Residency>,
}

/// One layer's part of it.
#[derive(Debug)]
pub(super) struct Streamed {
    residency: Arc<Residency>,
    /// Number of the layer's first expert in the store.
    first: usize,
    experts: usize,
    /// Most experts of a wave, where all come in one.
    at_once: usize,
    /// The same where the next wave is fetched while one computes.
    half: usize,
}

/// Buffers of the forward pass.
#[derive(Default)]
pub(super) struct Buffers {
    /// The experts of the step, ascending.
    wanted: Vec<usize>,
    /// Experts of a wave, so many from the front of what is left.
    wave: usize,
    /// `(t, k)`: choices of other waves are no expert's.
    ids: Vec<u32>,
    pub(super) guess: Guess,
}

/// What the next layer may choose.
#[derive(Default)]
pub(super) struct Guess {
    /// `(t, k)`.
    pub(super) ids: Vec<u32>,
    pub(super) weights: Vec<f32>,
}

impl ExpertStore {
    /// Finds the store of the loader's model, or packs it, and promises to keep at most `budget` bytes of it in memory.
    pub(in crate::model) fn open(loader: &Loader<'_>, budget: u64) -> Result<ExpertStore, Error> {
        let mixtures = || {
            loader.config.blocks.iter().enumerate().filter_map(|(layer, block)| match &block.feed_forward {
                FeedForwardSpec::Sparse(spec) => Some((layer, spec)),
                FeedForwardSpec::Dense(_) => None,
            })
        };
        if mixtures().next().is_none() {
            return Err(Error::unsupported("expert_memory for a model without experts", "leave it out"));
        }
        let shapes = mixtures().map(|(layer, spec)| spec.shape(loader, layer)).collect::<Result<_, _>>()?;
        let config = match &loader.checkpoint.metadata {
            Metadata::HuggingFace(_) => "directory",
            Metadata::Gguf(_) => "GGUF",
        };
        let identity = format!("{} {config}\n{}", loader.config.family, loader.checkpoint.identity());
        let layout = Layout::new(&identity, shapes)?;
        let (least, layer) = layout.largest_token();
        if budget < least as u64 {
            let expected = format!("at least {least} bytes, which the experts of one token take in block {layer}");
            return Err(Error::argument("expert_memory", format!("{budget} bytes"), expected));
        }
        let how = format!("{:?} {:?}", loader.weights, loader.activations);
        let path = store_path(loader.checkpoint.path(), &how)?;
        let store = if let Some(store) = Store::open(&path, &layout) {
            for (layer, spec) in mixtures() {
                loader.read(spec.file_bytes(loader, layer)?);
            }
            store
        } else {
            let mut writer = Writer::create(&path, &layout)?;
            for (layer, spec) in mixtures() {
                spec.store(loader, layer, &mut writer)?;
            }
            writer.finish(&layout)?;
            let file = path.display().to_string();
            Store::open(&path, &layout)
                .ok_or_else(|| Error::Store { file, reason: "it was changed while it was written".to_owned() })?
        };
        let residency = Arc::new(Residency::new(&store, &layout, budget)?);
        Ok(ExpertStore { layout, store, residency })
    }

    /// Bytes of experts that are in memory at most.
    pub(in crate::model) fn resident_bytes(&self) -> u64 {
        (self.residency.budget() as u64).min(self.layout.expert_bytes())
    }

    /// What fills and empties the memory.
    pub(in crate::model) fn residency(&self) -> &Arc<Residency> {
        &self.residency
    }

    /// The matrices of `expert` of block `layer`, in the order in which they were packed.
    pub(super) fn matrices(&self, layer: usize, expert: usize) -> Vec<PackedMatrix> {
        let matrices = self.layout.matrices(layer, expert);
        matrices
            .map(|(shape, range)| {
                let part = self.store.map.part(range).expect("a part of the layout");
                PackedMatrix::mapped(shape.n, shape.k, shape.format, shape.precision, part)
                    .expect("a shape that was packed")
            })
            .collect()
    }

    /// Block `layer`, if it has experts.
    pub(super) fn layer(&self, layer: usize, experts: usize) -> Option<Streamed> {
        let (first, bytes) = self.layout.layer(layer)?;
        let at_once = self.residency.budget() / bytes;
        Some(Streamed { residency: Arc::clone(&self.residency), first, experts, at_once, half: at_once / 2 })
    }
}

impl Streamed {
    /// Has the first experts fetched that `ids` names.
    pub(super) fn begin(&self, ids: &[u32], buffers: &mut Buffers) {
        let Buffers { wanted, wave, .. } = buffers;
        let mut seen = vec![false; self.experts];
        for &id in ids {
            seen[id as usize] = true;
        }
        wanted.clear();
        wanted.extend((0..self.experts).filter(|&expert| seen[expert]).map(|expert| self.first + expert));
        *wave = if wanted.len() <= self.at_once { wanted.len() } else { self.half.max(1) };
        self.residency.demand(&wanted[..*wave]);
    }

    /// Calls `run(ids, add)` for each wave: `ids: (t, k)` with only the wave's experts, and those that every row meets in
    /// the last.
    pub(super) fn run(
        &self,
        ids: &[u32],
        buffers: &mut Buffers,
        add: bool,
        mut run: impl FnMut(&[u32], bool),
    ) -> Result<(), Error> {
        let Buffers { wanted, wave, ids: masked, .. } = buffers;
        let mut waves = wanted.chunks((*wave).max(1)).peekable();
        let (mut add, mut before) = (add, 0);
        while let Some(experts) = waves.next() {
            self.residency.wait(experts)?;
            let next = waves.peek();
            let overlaps = experts.len() + next.map_or(0, |next| next.len()) <= self.at_once;
            if let Some(next) = next.filter(|_| overlaps) {
                self.residency.demand(next);
            }
            let end = if next.is_none() { u32::MAX } else { (experts[experts.len() - 1] - self.first) as u32 + 1 };
            if before == 0 && end == u32::MAX {
                run(ids, add);
            } else {
                masked.clear();
                let mine = |&id: &u32| if (before..end).contains(&id) { id } else { u32::MAX };
                masked.extend(ids.iter().map(mine));
                run(masked, add);
            }
            self.residency.release(experts);
            if let Some(next) = next.filter(|_| !overlaps) {
                self.residency.demand(next);
            }
            (add, before) = (true, end);
        }
        Ok(())
    }

    /// Has the experts fetched that stand first in each row of `ids`: (t, k).
    pub(super) fn guess(&self, ids: &[u32], k: usize) {
        for row in ids.chunks_exact(k) {
            row.iter().take(GUESSES).for_each(|&id| self.residency.guess(self.first + id as usize));
        }
    }
}
