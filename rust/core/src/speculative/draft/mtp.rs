//! Heads for further tokens that a checkpoint carries beside its model (DeepSeek-V3, arXiv 2412.19437; Qwen3-Next, Qwen3.5).
//!
//! Head `k` is a block over `W [norm(embedding of token p + 1 + k) ; norm(state of p)]`, where head 0 reads the model's
//! normed states and each later one the states of the one before; all share the model's output matrix. A single head
//! goes on with its own states. Rows of the text stay in each block's cache; those of drafts are taken back.

use super::block::{DraftBlock, Rows};
use super::head::{TokenHead, class, first_tokens};
use super::weights::{Linear, vector};
use super::{Draft, Drafter, Heads, Observed, Target, Wants};
use crate::engine::{Activations, Weights};
use crate::error::Error;
use crate::load::{Checkpoint, Metadata};
use crate::model::mixer::MixerSpec;
use crate::model::{Convention, Part, describe, rms_norms};
use std::collections::HashMap;
use std::path::Path;

/// Most floats of states that wait for the next draft of a request; one with more is not drafted for.
const MOST_WAITING: usize = 1 << 27;

/// How the heads are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MtpOptions {
    /// Precision of the weights.
    pub weights: Weights,
    /// Precision of the activations.
    pub activations: Activations,
    /// Draft only the first so many token ids, and those that end an answer, by a head of their rows in 4 bits. `None`
    /// drafts all, by the model's own head.
    pub vocabulary: Option<usize>,
}

/// The heads of a checkpoint.
#[derive(Debug)]
pub struct Mtp {
    name: String,
    layers: Vec<Layer>,
    hidden: usize,
    epsilon: f32,
    vocabulary: Option<usize>,
    head: TokenHead,
    requests: HashMap<u64, Vec<Fed>>,
    blocks: usize,
}

/// One head.
#[derive(Debug)]
struct Layer {
    block: DraftBlock,
    embedding_norm: Vec<f32>,
    hidden_norm: Vec<f32>,
    projection: Linear,
}

/// What one head has seen of a request.
#[derive(Debug, Default)]
struct Fed {
    /// Rows of the text in its cache.
    rows: usize,
    /// `(t, hidden)`: states of the rows behind them.
    waiting: Vec<f32>,
    /// Those have been read in this draft.
    read: bool,
    /// It has missed rows, or they were too many.
    lost: bool,
}

/// A request while it is drafted for.
struct Chain<'a, 'b> {
    draft: &'a mut Draft<'b>,
    /// The text and the drafts behind it.
    text: Vec<u32>,
    parent: Option<u8>,
    likelihood: f32,
    /// `(t, hidden)`: states of the rows that the next head reads, or the last one, and where they begin.
    states: Vec<f32>,
    start: usize,
}

impl Mtp {
    /// Loads the heads of the checkpoint directory that the model comes from. `sequences`, `context`: those of the engine.
    pub fn load(path: &Path, options: MtpOptions, sequences: usize, context: usize) -> Result<Mtp, Error> {
        let MtpOptions { weights, activations, vocabulary } = options;
        let checkpoint = Checkpoint::open(path)?;
        let mut config = describe(&checkpoint)?;
        let none = || Error::unsupported("a checkpoint without heads for further tokens", "another drafter drafts");
        if matches!(checkpoint.metadata, Metadata::Gguf(_)) {
            return Err(none());
        }
        let first = config.blocks.len();
        let deepseek = checkpoint.tensor(&format!("model.layers.{first}.eh_proj.weight")).is_some();
        // Heads attend, whatever most layers of the model do.
        let attends = |mixer: &MixerSpec| matches!(mixer, MixerSpec::Attention(_) | MixerSpec::Latent(_));
        let block = config.blocks.iter().rfind(|block| attends(&block.mixer)).cloned().ok_or_else(none)?;
        let (hidden, epsilon, offset) = (config.hidden, config.epsilon, config.norm_offset);
        let norm = |name: &str| -> Result<Vec<f32>, Error> {
            let mut weight = vector(&checkpoint, name, hidden)?;
            for weight in &mut weight {
                *weight += offset;
            }
            Ok(weight)
        };
        let mut layers = Vec::new();
        loop {
            let index = layers.len();
            let place = if deepseek { first + index } else { index };
            let own = format!("model.layers.{place}.");
            let (convention, names) = if deepseek {
                let names = ["enorm", "hnorm", "eh_proj", "shared_head.norm"];
                (Convention::HuggingFace, names.map(|name| format!("{own}{name}")))
            } else {
                let names = ["pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"];
                (Convention::Mtp, names.map(|name| format!("mtp.{name}")))
            };
            let present = if deepseek {
                format!("{}.weight", names[2])
            } else {
                format!("mtp.layers.{index}.input_layernorm.weight")
            };
            if checkpoint.tensor(&present).is_none() {
                break;
            }
            let [embedding_norm, hidden_norm, projection, last] = names;
            config.blocks.resize(place + 1, block.clone());
            config.blocks[place] = block.clone();
            let last = format!("{last}.weight");
            let part = Part::load(&checkpoint, config.clone(), convention, place, &last, weights, activations)?;
            layers.push(Layer {
                block: DraftBlock::new(part, weights, sequences, context)?,
                embedding_norm: norm(&format!("{embedding_norm}.weight"))?,
                hidden_norm: norm(&format!("{hidden_norm}.weight"))?,
                projection: Linear::load(&checkpoint, &projection, [hidden, 2 * hidden], weights)?,
            });
        }
        if layers.is_empty() {
            return Err(none());
        }
        let (head, requests) = (TokenHead::default(), HashMap::new());
        let name = format!("heads of {}", path.file_name().unwrap_or_default().to_string_lossy());
        Ok(Mtp { name, layers, hidden, epsilon, vocabulary, head, requests, blocks: first })
    }

    /// Sends the chains' rows through head `layer`; each is left with their normed states.
    fn pass(&mut self, target: &dyn Target, layer: usize, chains: &mut [Chain<'_, '_>]) -> Result<(), Error> {
        let (hidden, epsilon) = (self.hidden, self.epsilon);
        let Layer { block, embedding_norm, hidden_norm, projection } = &mut self.layers[layer];
        let mut all = Vec::with_capacity(chains.len());
        for chain in &*chains {
            let count = chain.states.len() / hidden;
            let ahead = chain.start + 1 + layer;
            let tokens = &chain.text[ahead..ahead + count];
            let mut embeddings = vec![0.0; count * hidden];
            tokens.iter().zip(embeddings.chunks_exact_mut(hidden)).for_each(|(&token, out)| target.embed(token, out));
            let embeddings = rms_norms(&embeddings, embedding_norm, epsilon);
            let states = rms_norms(&chain.states, hidden_norm, epsilon);
            let pairs = embeddings.chunks_exact(hidden).zip(states.chunks_exact(hidden));
            let pairs: Vec<f32> = pairs.flat_map(|(embedding, state)| [embedding, state].concat()).collect();
            let mut stream = vec![0.0; count * hidden];
            projection.multiply(target.pool(), &pairs, &mut stream);
            all.push(Rows {
                request: chain.draft.request,
                start: chain.start,
                positions: (ahead..ahead + count).map(|position| position as u32).collect(),
                stream,
                normed: Vec::new(),
                ancestors: Vec::new(),
            });
        }
        let out = block.run(target, &all)?;
        let mut rest = &block.part.normalise(&out)[..];
        for chain in chains {
            let (mine, others) = rest.split_at(chain.states.len());
            chain.states.copy_from_slice(mine);
            rest = others;
        }
        Ok(())
    }

    /// Adds to each tree the token that the last of its states says; keeps the chains that may go on.
    fn extend(&mut self, target: &dyn Target, depth: usize, chains: &mut Vec<Chain<'_, '_>>) {
        let last = |chain: &Chain<'_, '_>| chain.states[chain.states.len() - self.hidden..].to_vec();
        let states: Vec<f32> = chains.iter().flat_map(last).collect();
        self.head.compute(target, &states);
        let (head, mut row) = (&self.head, 0);
        chains.retain_mut(|chain| {
            let likely = head.draw(row, depth, chain.draft, target.vocabulary());
            row += 1;
            // Logits that define no distribution draft nothing.
            let Some(likely) = likely else { return false };
            chain.likelihood *= likely.probability;
            if chain.likelihood < chain.draft.least {
                return false;
            }
            chain.parent = chain.draft.tree.push(chain.parent, likely.token, class(likely.probability), 1.0);
            chain.text.push(likely.token);
            chain.parent.is_some() && depth < chain.draft.budget
        });
    }

    /// Takes back what is not of the text, whose first `tokens` tokens are committed.
    fn settle(&mut self, request: u64, tokens: usize) {
        let Some(fed) = self.requests.get_mut(&request) else { return };
        let mut before = tokens - 1;
        for (layer, (fed, Layer { block, .. })) in fed.iter_mut().zip(&mut self.layers).enumerate() {
            if std::mem::take(&mut fed.read) {
                // Its last rows met drafts, and will meet what the text says there.
                let keep = tokens.saturating_sub(1 + layer).max(fed.rows);
                fed.waiting.drain(..(keep - fed.rows) * self.hidden);
                fed.rows = keep;
            }
            block.truncate(request, fed.rows);
            fed.waiting.truncate(before.saturating_sub(fed.rows) * self.hidden);
            before = fed.rows;
        }
    }
}

impl Heads for Mtp {
    fn keep_logits(&mut self) {
        self.head.keep();
    }

    fn kept_logits(&mut self) -> Vec<f32> {
        self.head.kept()
    }
}

impl Drafter for Mtp {
    fn name(&self) -> &str {
        &self.name
    }

    fn wants(&self) -> Wants {
        Wants { hidden: vec![self.blocks], top: 0 }
    }

    fn attach(&mut self, target: &dyn Target) -> Result<(), Error> {
        if (self.hidden, self.blocks) != (target.hidden(), target.blocks()) {
            let got = format!("heads of a model of {} blocks of width {}", self.blocks, self.hidden);
            let works = format!("those of the checkpoint draft: {} blocks of {}", target.blocks(), target.hidden());
            return Err(Error::unsupported(got, works));
        }
        let tokens = self.vocabulary.and_then(|most| first_tokens(target, most));
        self.head = TokenHead::of_target(target, tokens)?;
        Ok(())
    }

    fn begin(&mut self, request: u64, _: &[u32]) -> Result<(), Error> {
        let fed = self.layers.iter().map(|_| Fed::default()).collect();
        self.requests.insert(request, fed);
        Ok(())
    }

    fn draft(&mut self, target: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        let mut chains = Vec::new();
        let mut begun = Vec::new();
        for draft in drafts {
            let tokens = draft.tokens.len();
            let Some(fed) = self.requests.get_mut(&draft.request) else { continue };
            let first = &mut fed[0];
            let known = first.rows + first.waiting.len() / self.hidden;
            if draft.budget == 0 || first.lost || first.waiting.is_empty() || known + 1 != tokens {
                continue;
            }
            let room = tokens + draft.budget;
            if !self.layers.iter_mut().all(|layer| layer.block.reserve(draft.request, room)) {
                continue;
            }
            begun.push((draft.request, tokens));
            let (start, states) = (first.rows, std::mem::take(&mut first.waiting));
            first.rows = tokens - 1;
            let text = draft.tokens.to_vec();
            chains.push(Chain { draft, text, parent: None, likelihood: 1.0, states, start });
        }
        let layers = self.layers.len();
        let mut depth = 1;
        while !chains.is_empty() {
            let layer = (depth - 1).min(layers - 1);
            self.pass(target, layer, &mut chains)?;
            // The next head reads what this one made of the text, its last token's drafts included.
            if let Some(next) = self.layers.get(layer + 1).map(|_| layer + 1) {
                for chain in &mut chains {
                    let Some(fed) = self.requests.get_mut(&chain.draft.request) else { continue };
                    fed[next].waiting.extend_from_slice(&chain.states);
                }
            }
            self.extend(target, depth, &mut chains);
            if layers > 1 && depth == layers {
                break;
            }
            for chain in &mut chains {
                if layers == 1 {
                    chain.start = chain.text.len() - 2;
                    chain.states.drain(..chain.states.len() - self.hidden);
                } else if let Some(fed) = self.requests.get_mut(&chain.draft.request) {
                    let next = &mut fed[depth];
                    chain.start = next.rows;
                    chain.states.clone_from(&next.waiting);
                    next.read = true;
                }
            }
            depth += 1;
        }
        for (request, tokens) in begun {
            self.settle(request, tokens);
        }
        Ok(())
    }

    fn observe(&mut self, observed: &Observed<'_>) -> Result<(), Error> {
        let Some(fed) = self.requests.get_mut(&observed.request) else { return Ok(()) };
        let (first, count) = (&mut fed[0], observed.hidden.len() / self.hidden);
        let known = first.rows + first.waiting.len() / self.hidden;
        // Rows that are computed again are the same again.
        let again = known.saturating_sub(observed.start).min(count);
        first.lost |= observed.start > known || first.waiting.len() > MOST_WAITING;
        if !first.lost {
            first.waiting.extend_from_slice(&observed.hidden[again * self.hidden..]);
        }
        Ok(())
    }

    fn end(&mut self, request: u64) {
        self.requests.remove(&request);
        self.layers.iter_mut().for_each(|layer| layer.block.end(request));
    }
}
