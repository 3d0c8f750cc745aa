//! A mixture whose experts come and go: those of a step are fetched in waves that fit in memory, experts ascending.
//!
//! A row's experts are added in the order of their numbers, so that waves change no bit of the sum.

use std::sync::Arc;

use super::file::{Store, Writer, store_path};
use super::layout::Layout;
use super::residency::Residency;
use crate::error::Error;
use crate::ledger::ExpertCounts;
use crate::model::feed_forward::levers::{ExpertStore, LayerShape, Mixtures, Supply, Waves};
use crate::model::feed_forward::router::LEFT_OUT;
use farthing_kernels::format::PackedMatrix;

/// Experts that are guessed for each row.
const GUESSES: usize = 2;

/// A model's experts on disk.
#[derive(Debug)]
pub(crate) struct StreamedExperts {
    layout: Layout,
    store: Store,
    residency: Arc<Residency>,
}

/// One layer's part of it.
#[derive(Debug)]
struct StreamedLayer {
    residency: Arc<Residency>,
    /// Number of the layer's first expert in the store.
    first: usize,
    experts: usize,
    /// Most experts of a wave, where all come in one.
    at_once: usize,
    /// The same where the next wave is fetched while one computes.
    half: usize,
}

/// Bytes of the experts of `layers` in memory, at most, under `budget`: it must hold the experts of one token of any.
pub(crate) fn resident_bytes(layers: Vec<LayerShape>, budget: u64) -> Result<u64, Error> {
    let layout = Layout::new("", layers)?;
    check(&layout, budget)?;
    Ok(budget.min(layout.expert_bytes()))
}

fn check(layout: &Layout, budget: u64) -> Result<(), Error> {
    let (least, layer) = layout.largest_token();
    if budget < least as u64 {
        let expected = format!("at least {least} bytes, which the experts of one token take in block {layer}");
        return Err(Error::argument("expert_memory", format!("{budget} bytes"), expected));
    }
    Ok(())
}

impl StreamedExperts {
    /// Finds the store of a model's experts, of these shapes, or packs it, and promises to keep at most `budget` bytes of it in memory.
    pub(crate) fn open(
        mixtures: &dyn Mixtures,
        shapes: Vec<LayerShape>,
        budget: u64,
    ) -> Result<StreamedExperts, Error> {
        let layers: Vec<usize> = shapes.iter().map(|shape| shape.layer).collect();
        let layout = Layout::new(&mixtures.identity(), shapes)?;
        check(&layout, budget)?;
        let path = store_path(mixtures.path(), &mixtures.wishes())?;
        let store = if let Some(store) = Store::open(&path, &layout) {
            layers.iter().try_for_each(|&layer| mixtures.found(layer))?;
            store
        } else {
            let mut writer = Writer::create(&path, &layout)?;
            for &layer in &layers {
                mixtures.pack(layer, &mut |matrices| {
                    let bytes: Vec<&[u8]> = matrices.iter().map(PackedMatrix::as_bytes).collect();
                    writer.push(&bytes)
                })?;
                writer.settle()?;
            }
            writer.finish(&layout)?;
            let file = path.display().to_string();
            Store::open(&path, &layout)
                .ok_or_else(|| Error::Store { file, reason: "it was changed while it was written".to_owned() })?
        };
        let residency = Arc::new(Residency::new(&store, &layout, budget)?);
        Ok(StreamedExperts { layout, store, residency })
    }
}

impl ExpertStore for StreamedExperts {
    fn matrices(&self, layer: usize, expert: usize) -> Vec<PackedMatrix> {
        let matrices = self.layout.matrices(layer, expert);
        matrices
            .map(|(shape, range)| {
                let part = self.store.map.part(range).expect("a part of the layout");
                PackedMatrix::mapped(shape.n, shape.k, shape.format, shape.precision, part)
                    .expect("a shape that was packed")
            })
            .collect()
    }

    fn supply(&self, layer: usize, experts: usize) -> Option<Box<dyn Supply>> {
        let (first, bytes) = self.layout.layer(layer)?;
        let at_once = self.residency.budget() / bytes;
        let residency = Arc::clone(&self.residency);
        Some(Box::new(StreamedLayer { residency, first, experts, at_once, half: at_once / 2 }))
    }

    fn resident_bytes(&self) -> u64 {
        (self.residency.budget() as u64).min(self.layout.expert_bytes())
    }

    fn counts(&self) -> ExpertCounts {
        self.residency.counts()
    }
}

impl Supply for StreamedLayer {
    fn begin(&self, ids: &[u32], waves: &mut Waves) {
        let Waves { wanted, wave, .. } = waves;
        let mut seen = vec![false; self.experts];
        for &id in ids.iter().filter(|&&id| id != LEFT_OUT) {
            seen[id as usize] = true;
        }
        wanted.clear();
        wanted.extend((0..self.experts).filter(|&expert| seen[expert]).map(|expert| self.first + expert));
        *wave = if wanted.len() <= self.at_once { wanted.len() } else { self.half.max(1) };
        self.residency.demand(&wanted[..*wave]);
    }

    fn run(&self, ids: &[u32], waves: &mut Waves, add: bool, run: &mut dyn FnMut(&[u32], bool)) -> Result<(), Error> {
        let Waves { wanted, wave, ids: masked } = waves;
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
                let mine = |&id: &u32| if (before..end).contains(&id) { id } else { LEFT_OUT };
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

    fn guess(&self, ids: &[u32], k: usize) {
        let guesses = ids.chunks_exact(k).flat_map(|row| row.iter().take(GUESSES));
        guesses.filter(|&&id| id != LEFT_OUT).for_each(|&id| self.residency.guess(self.first + id as usize));
    }

    fn resident(&self, out: &mut Vec<bool>) {
        self.residency.resident(self.first..self.first + self.experts, out);
    }
}
