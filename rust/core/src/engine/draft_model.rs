//! A small model that drafts for a large one with the same tokens (Leviathan et al., arXiv 2211.17192).
//!
//! It draws its tokens by the request's own sampling with the same noise at the same positions, so that it is right as
//! often as two distributions allow without a word between them (Daliri et al., arXiv 2408.07978), and its drafts are
//! functions of the text and the seed: nothing has to be known of its probabilities to verify them.

use super::cache::{Cache, Table};
use super::options::{Activations, Weights};
use crate::error::Error;
use crate::load::text::Text;
use crate::load::{Checkpoint, Tokenizer};
use crate::model::{Batch, Model, Row, Scratch};
use crate::speculative::draft::{Draft, Drafter, Observed, Target};
use crate::speculative::tree::MOST_NODES;
use farthing_kernels::attention::{KvType, PAGE, Span};
use farthing_kernels::sample::{Sampling, TokenCounts, sample};
use std::collections::HashMap;
use std::path::Path;

/// How a draft model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftModelOptions {
    /// Precision of the weights.
    pub weights: Weights,
    /// Precision of the activations.
    pub activations: Activations,
    /// Draft only the first so many token ids, and those that end an answer, by a head of their rows in 4 bits: ids of
    /// byte-pair vocabularies begin with the most frequent ones, and the head is most of a small model. `None` keeps
    /// the whole head as it is.
    pub vocabulary: Option<usize>,
}

impl Default for DraftModelOptions {
    fn default() -> Self {
        DraftModelOptions { weights: Weights::Auto, activations: Activations::A8, vocabulary: Some(32_768) }
    }
}

/// A model that drafts.
#[derive(Debug)]
pub struct DraftModel {
    name: String,
    model: Model,
    /// Of each row of the head; empty when the head is whole.
    head_tokens: Vec<u32>,
    tokenizer: Option<std::sync::Arc<Tokenizer>>,
    cache: Cache,
    scratch: Scratch,
    requests: HashMap<u64, Fed>,
}

/// What the model has seen of a request.
#[derive(Debug, Default)]
struct Fed {
    table: Table,
    /// Tokens of the text before the first that was read.
    skipped: usize,
    /// Tokens whose keys are in pages, drafted ones included.
    tokens: Vec<u32>,
}

/// One request while it is drafted for.
struct Chain {
    /// Index of the draft.
    draft: usize,
    request: u64,
    counts: TokenCounts,
    parent: Option<u8>,
    left: usize,
    likelihood: f32,
}

impl DraftModel {
    /// Loads a GGUF file or checkpoint directory. `sequences`, `context`: those of the engine it drafts for; `threads`
    /// pack the weights.
    pub fn load(
        path: &Path,
        options: DraftModelOptions,
        sequences: usize,
        context: usize,
    ) -> Result<DraftModel, Error> {
        let checkpoint = Checkpoint::open(path)?;
        let text = Text::of(&checkpoint)?;
        let mut model = Model::load(&checkpoint, options.weights, options.activations, None, &|_| ())?;
        let config = model.config();
        if Cache::state_bytes(config) > 0 {
            let got = format!("a {} model, which has recurrent states, as a draft model", config.family);
            return Err(Error::unsupported(got, "models with attention alone draft"));
        }
        let (vocab, context) = (config.vocab, context.min(config.context));
        let mut head_tokens = Vec::new();
        if let Some(most) = options.vocabulary.filter(|&most| most < vocab) {
            head_tokens = (0..most as u32).collect();
            head_tokens
                .extend(text.end_tokens.iter().filter(|&&token| token as usize >= most && (token as usize) < vocab));
            model.trim_head(&head_tokens)?;
        }
        let pages = (sequences * context.div_ceil(PAGE))
            .min(MOST_BYTES / Cache::page_bytes(model.config(), KvType::F16) as usize + 1);
        let cache = Cache::new(model.config(), pages, KvType::F16, sequences)?;
        let name = format!("draft model {}", path.file_name().unwrap_or_default().to_string_lossy());
        let tokenizer = text.tokenizer.clone();
        Ok(DraftModel {
            name,
            model,
            head_tokens,
            tokenizer,
            cache,
            scratch: Scratch::default(),
            requests: HashMap::new(),
        })
    }

    /// Bytes that a drafted token reads.
    pub fn token_bytes(&self) -> u64 {
        self.model.pass_bytes(1, 1)
    }

    /// Feeds requests their tokens; the logits `(requests, head rows)` behind the last of each, if wanted, are in scratch.
    fn pass(&mut self, target: &dyn Target, chains: &[(u64, Vec<u32>)], logits: bool) -> Result<(), Error> {
        let (mut rows, mut positions, mut spans, mut slots, mut logit_rows) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (request, tokens) in chains {
            let Fed { table, tokens: fed, .. } = &self.requests[request];
            let (start, first_row) = (fed.len(), rows.len());
            rows.extend(tokens.iter().map(|&token| Row::Token(token)));
            positions.extend((start..start + tokens.len()).map(|position| position as u32));
            spans.push(Span { first_row, rows: tokens.len(), start, pages: table.pages(), ancestors: &[] });
            slots.push(table.slot());
            if logits {
                logit_rows.push(rows.len() - 1);
            }
        }
        let batch = Batch {
            rows: &rows,
            positions: &positions,
            spans: &spans,
            slots: &slots,
            logit_rows: &logit_rows,
            capture: &[],
        };
        self.model.forward(target.pool(), &batch, &mut self.cache, &mut self.scratch)?;
        for (request, tokens) in chains {
            if let Some(fed) = self.requests.get_mut(request) {
                fed.tokens.extend_from_slice(tokens);
            }
        }
        Ok(())
    }

    /// The token drawn from row `row` of the last pass, and its likelihood under the model.
    fn draw(&mut self, row: usize, vocab: usize, sampling: &Sampling<'_>, counts: &TokenCounts) -> Option<(u32, f32)> {
        let width = if self.head_tokens.is_empty() { self.model.config().vocab } else { self.head_tokens.len() };
        let logits = &self.scratch.logits()[row * width..(row + 1) * width];
        // By id, so that each token meets its own noise; tokens without a row are never drawn.
        let mut whole = vec![f32::NEG_INFINITY; vocab];
        if self.head_tokens.is_empty() {
            let both = width.min(vocab);
            whole[..both].copy_from_slice(&logits[..both]);
        } else {
            self.head_tokens.iter().zip(logits).for_each(|(&token, &logit)| whole[token as usize] = logit);
        }
        // Logits that define no distribution draft nothing.
        let draw = sample(&mut whole, sampling, counts).ok()?;
        Some((draw.token, draw.logprob.exp()))
    }
}

/// Likelihood of a token that a draft model is likely to name.
const USUAL: f32 = 0.75;
/// Tokens of a text that are read before the first draft.
const WINDOW: usize = 256;
/// A text that has gone on by more tokens without drafts is begun anew.
const BACKLOG: usize = 512;
/// Most bytes of keys and values.
const MOST_BYTES: usize = 4 << 30;

impl Drafter for DraftModel {
    fn name(&self) -> &str {
        &self.name
    }

    fn attach(&mut self, target: &dyn Target) -> Result<(), Error> {
        let same = match (&self.tokenizer, target.tokenizer()) {
            (Some(own), Some(other)) => own.same_tokens(other),
            _ => self.model.config().vocab == target.vocabulary(),
        };
        if same {
            return Ok(());
        }
        Err(Error::unsupported(
            format!("{} with another vocabulary than the model's", self.name),
            "a draft model with the same tokenizer drafts",
        ))
    }

    fn begin(&mut self, request: u64, _: &[u32]) -> Result<(), Error> {
        self.requests.insert(request, Fed::default());
        Ok(())
    }

    fn catch_up(&mut self, target: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        let mut feed = Vec::new();
        for draft in drafts.iter() {
            let Some(fed) = self.requests.get_mut(&draft.request) else { continue };
            let text = draft.tokens.len();
            let context = self.model.config().context;
            let full = text - fed.skipped + MOST_NODES > context;
            if fed.tokens.is_empty() || fed.skipped + fed.tokens.len() + BACKLOG < text || full {
                // The last tokens say nearly all: a long text is not read whole for some drafts.
                self.cache.truncate(&mut fed.table, 0);
                *fed = Fed { skipped: text.saturating_sub(WINDOW.min(context / 2)), ..Fed::default() };
            }
            // What was drafted and right need not be computed again.
            let rest = &draft.tokens[fed.skipped..];
            let same = fed.tokens.iter().zip(rest).take_while(|(a, b)| a == b).count().min(rest.len() - 1);
            fed.tokens.truncate(same);
            self.cache.truncate(&mut fed.table, same);
            let missing = &rest[same..rest.len() - 1];
            if missing.len() > 1 && self.cache.reserve(&mut fed.table, rest.len()) {
                feed.push((draft.request, missing.to_vec()));
            }
        }
        if feed.is_empty() { Ok(()) } else { self.pass(target, &feed, false) }
    }

    fn draft(&mut self, target: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        let vocab = target.vocabulary();
        let (mut chains, mut feed) = (Vec::new(), Vec::new());
        for (index, draft) in drafts.iter().enumerate() {
            let Some(fed) = self.requests.get_mut(&draft.request) else { continue };
            let rest = &draft.tokens[fed.skipped..];
            let tokens = rest.len() + draft.budget;
            if draft.budget == 0 || tokens > self.model.config().context || !self.cache.reserve(&mut fed.table, tokens)
            {
                continue;
            }
            let (counts, left) = (draft.counts.clone(), draft.budget);
            chains.push(Chain { draft: index, request: draft.request, counts, parent: None, left, likelihood: 1.0 });
            feed.push((draft.request, rest[fed.tokens.len()..].to_vec()));
        }
        while !chains.is_empty() {
            self.pass(target, &feed, true)?;
            feed.clear();
            let mut open = Vec::new();
            for (row, mut chain) in chains.drain(..).enumerate() {
                let Draft { tree, sampling, least, tokens, budget, .. } = &mut drafts[chain.draft];
                let position = (tokens.len() + *budget - chain.left) as u64;
                let sampling = Sampling { position, top_logprobs: 0, ..(*sampling).clone() };
                let Some((token, probability)) = self.draw(row, vocab, &sampling, &chain.counts) else { continue };
                chain.likelihood *= probability;
                let class = (probability * 10.0).clamp(0.0, 9.0) as u8;
                chain.parent = tree.push(chain.parent, token, class, 1.0);
                chain.counts.push(token);
                chain.left -= 1;
                // The next one is worth its step if it will be likely enough, not if it turns out so.
                let next = chain.likelihood * USUAL;
                if chain.parent.is_some() && chain.left > 0 && next >= *least {
                    feed.push((chain.request, vec![token]));
                    open.push(chain);
                }
            }
            chains = open;
        }
        Ok(())
    }

    fn observe(&mut self, _: &Observed<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn end(&mut self, request: u64) {
        if let Some(mut fed) = self.requests.remove(&request) {
            self.cache.truncate(&mut fed.table, 0);
        }
    }
}
