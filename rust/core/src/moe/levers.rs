//! What is done with a model's experts, as it was wished for.

use std::sync::Arc;

use super::selection::LossySelection;
use super::stream::{StreamedExperts, resident_bytes};
use crate::error::Error;
use crate::model::feed_forward::levers::{ExpertLevers, ExpertStore, LayerShape, Mixtures, Selection};

/// The wishes. All experts stay in memory, and routers have the last word, unless something else is said.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Levers {
    /// Most bytes of experts in memory, the others on disk. Lossless.
    pub memory: Option<u64>,
    /// Leaves out chosen experts whose weight is below this part of the token's largest. Lossy.
    pub skip: Option<f32>,
    /// Prefers experts in memory whose score is short of another's by at most this part of it. Lossy, and results depend
    /// on what is in memory.
    pub cache_margin: Option<f32>,
}

impl Levers {
    /// Whether they can be; the error names the first that can't.
    pub fn validate(&self) -> Result<(), Error> {
        if let Some(skip) = self.skip.filter(|skip| !(*skip > 0.0 && *skip <= 1.0)) {
            return Err(Error::argument("expert_skip", skip, "above 0 and at most 1"));
        }
        if let Some(margin) = self.cache_margin.filter(|margin| !(*margin > 0.0 && *margin < 1.0)) {
            return Err(Error::argument("expert_cache_margin", margin, "above 0 and below 1"));
        }
        if self.cache_margin.is_some() && self.memory.is_none() {
            let remedy = "give expert_memory too: without, all experts are in memory";
            return Err(Error::unsupported("expert_cache_margin without expert_memory", remedy));
        }
        Ok(())
    }

    /// Whether there is anything to do it with: a model's layers of experts.
    fn check(&self, layers: &[LayerShape]) -> Result<(), Error> {
        let wishes = [
            ("expert_memory", self.memory.is_some()),
            ("expert_skip", self.skip.is_some()),
            ("expert_cache_margin", self.cache_margin.is_some()),
        ];
        match wishes.iter().find(|(_, wished)| *wished) {
            Some((name, _)) if layers.is_empty() => {
                Err(Error::unsupported(format!("{name} for a model without experts"), "leave it out"))
            }
            _ => Ok(()),
        }
    }
}

impl ExpertLevers for Levers {
    fn resident_bytes(&self, layers: Vec<LayerShape>) -> Result<Option<u64>, Error> {
        self.check(&layers)?;
        self.memory.map(|budget| resident_bytes(layers, budget)).transpose()
    }

    fn store(&self, mixtures: &dyn Mixtures) -> Result<Option<Box<dyn ExpertStore>>, Error> {
        if *self == Levers::default() {
            return Ok(None);
        }
        let layers = mixtures.layers()?;
        self.check(&layers)?;
        let Some(budget) = self.memory else { return Ok(None) };
        Ok(Some(Box::new(StreamedExperts::open(mixtures, layers, budget)?)))
    }

    fn selection(&self) -> Option<Arc<dyn Selection>> {
        let lossy = self.skip.is_some() || self.cache_margin.is_some();
        lossy.then(|| -> Arc<dyn Selection> { Arc::new(LossySelection::new(self.skip, self.cache_margin)) })
    }
}
