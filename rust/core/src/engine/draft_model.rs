//! A small model that drafts for a large one (Leviathan et al., arXiv 2211.17192).
//!
//! It draws its tokens by the request's own sampling with the same noise at the same positions, so that it is right as
//! often as two distributions allow without a word between them (Daliri et al., arXiv 2408.07978), and its drafts are
//! functions of the text and the seed: nothing has to be known of its probabilities to verify them.
//!
//! A model with another vocabulary reads the text in its own tokens. What it drafts for answers that are drawn are the
//! tokens that both have; for greedy answers it writes text, which is cut into the target's tokens (TLI and SLEM, Timor et
//! al., arXiv 2502.05202).

use super::cache::{Cache, Table};
use super::options::{Activations, Weights};
use crate::error::Error;
use crate::load::text::Text;
use crate::load::{Checkpoint, Tokenizer};
use crate::model::{Batch, Model, Row, Scratch};
use crate::speculative::align::{Aligned, common_tokens, continuation};
use crate::speculative::draft::{Draft, Drafter, Observed, Target};
use crate::speculative::tree::MOST_NODES;
use farthing_kernels::attention::{KvType, PAGE, Span};
use farthing_kernels::sample::{Sampling, TokenCounts, sample};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

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
    tokenizer: Option<Arc<Tokenizer>>,
    /// When the target has other tokens.
    other: Option<Other>,
    cache: Cache,
    scratch: Scratch,
    requests: HashMap<u64, Fed>,
}

/// A target with other tokens.
#[derive(Debug)]
struct Other {
    own: Arc<Tokenizer>,
    /// Its token of the same text, for each of ours.
    to_target: Vec<Option<u32>>,
    to_own: HashMap<u32, u32>,
}

/// What the model has seen of a request.
#[derive(Debug, Default)]
struct Fed {
    table: Table,
    /// Tokens of the text before the first that was read.
    skipped: usize,
    /// The text from there on in our tokens, when the target has others.
    aligned: Aligned,
    /// Tokens whose keys are in pages, drafted ones included.
    tokens: Vec<u32>,
}

impl Fed {
    /// The text of the target's `tokens`, as far as it is read, in our tokens; `None` while that cannot be told.
    fn text<'t>(&mut self, other: Option<&Other>, target: &dyn Target, tokens: &'t [u32]) -> Option<Cow<'t, [u32]>> {
        let tokens = &tokens[self.skipped..];
        let Some(other) = other else { return Some(Cow::Borrowed(tokens)) };
        let text = self.aligned.follow(&other.own, target.tokenizer()?, tokens)?;
        (!text.is_empty()).then(|| Cow::Owned(text.to_vec()))
    }
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
    /// Text for a target with other tokens: our tokens and their likelihoods.
    said: Option<Vec<(u32, f32)>>,
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
            other: None,
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

    /// The target's token drawn from row `row` of the last pass, and its likelihood under the model.
    fn draw(&mut self, row: usize, vocab: usize, sampling: &Sampling<'_>, counts: &TokenCounts) -> Option<(u32, f32)> {
        // By id, so that each token meets its own noise; tokens without a row are never drawn.
        let mut whole = vec![f32::NEG_INFINITY; vocab];
        let (logits, other) = self.row(row);
        for (token, logit) in logits {
            let token = other.map_or(Some(token), |other| other.to_target[token as usize]);
            if let Some(place) = token.and_then(|token| whole.get_mut(token as usize)) {
                *place = place.max(logit);
            }
        }
        // Logits that define no distribution draft nothing.
        let draw = sample(&mut whole, sampling, counts).ok()?;
        Some((draw.token, draw.logprob.exp()))
    }

    /// Our likeliest token in row `row` of the last pass, and how likely it is.
    fn likeliest(&mut self, row: usize) -> Option<(u32, f32)> {
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let mut whole = vec![f32::NEG_INFINITY; self.model.config().vocab];
        self.row(row).0.for_each(|(token, logit)| whole[token as usize] = logit);
        let draw = sample(&mut whole, &greedy, &TokenCounts::default()).ok()?;
        Some((draw.token, draw.logprob.exp()))
    }

    /// The tokens of the head and their logits in row `row` of the last pass; and the other vocabulary.
    fn row(&mut self, row: usize) -> (impl Iterator<Item = (u32, f32)>, Option<&Other>) {
        let DraftModel { head_tokens, scratch, model, other, .. } = self;
        let width = if head_tokens.is_empty() { model.config().vocab } else { head_tokens.len() };
        let logits = &scratch.logits()[row * width..(row + 1) * width];
        let token = |index: usize| head_tokens.get(index).copied().unwrap_or(index as u32);
        (logits.iter().enumerate().map(move |(index, &logit)| (token(index), logit)), other.as_ref())
    }

    /// Draws the next token of a chain into its tree, or into its text; ours, if it is worth going on.
    fn extend(&mut self, row: usize, vocab: usize, chain: &mut Chain, draft: &mut Draft<'_>) -> Option<u32> {
        let Draft { tree, sampling, least, tokens, budget, .. } = draft;
        let (own, probability) = if let Some(said) = &mut chain.said {
            let (own, probability) = self.likeliest(row)?;
            let other = self.other.as_ref()?;
            if other.own.is_special(own) && other.to_target[own as usize].is_none() {
                return None;
            }
            said.push((own, probability));
            (own, probability)
        } else {
            let position = (tokens.len() + *budget - chain.left) as u64;
            let sampling = Sampling { position, top_logprobs: 0, ..(*sampling).clone() };
            let (token, probability) = self.draw(row, vocab, &sampling, &chain.counts)?;
            chain.parent = Some(tree.push(chain.parent, token, class(probability), 1.0)?);
            chain.counts.push(token);
            (self.other.as_ref().map_or(Some(token), |other| other.to_own.get(&token).copied())?, probability)
        };
        chain.likelihood *= probability;
        chain.left -= 1;
        // The next one is worth its step if it will be likely enough, not if it turns out so.
        (chain.left > 0 && chain.likelihood * USUAL >= *least).then_some(own)
    }

    /// Cuts what a chain said into the target's tokens.
    fn cut(&self, target: &dyn Target, said: &[(u32, f32)], draft: &mut Draft<'_>) {
        let (Some(other), Some(tokenizer)) = (&self.other, target.tokenizer()) else { return };
        let (mut text, mut starts) = (Vec::new(), Vec::new());
        for &(own, probability) in said {
            starts.push((text.len(), probability));
            other.own.spell(own, false, &mut text);
        }
        let (mut parent, mut before) = (None, 0);
        for (token, end) in continuation(tokenizer, &text).into_iter().take(draft.budget) {
            let begun = starts.iter().filter(|(start, _)| (before..end).contains(start));
            let probability = begun.map(|(_, probability)| probability).product();
            parent = draft.tree.push(parent, token, class(probability), 1.0);
            before = end;
            if parent.is_none() {
                return;
            }
        }
    }
}

/// The class of confidence of a token of this likelihood.
fn class(probability: f32) -> u8 {
    (probability * 10.0).clamp(0.0, 9.0) as u8
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
        let (Some(own), Some(other)) = (&self.tokenizer, target.tokenizer()) else {
            if self.model.config().vocab == target.vocabulary() {
                return Ok(());
            }
            let got = format!("{} with another vocabulary than the model's, and a tokenizer missing", self.name);
            return Err(Error::unsupported(got, "models with the same tokens, or with their tokenizers, draft"));
        };
        if own.same_tokens(other) {
            return Ok(());
        }
        let common = common_tokens(own, other);
        if common.is_empty() {
            let got = format!("{} with no token that the model has", self.name);
            return Err(Error::unsupported(got, "models with tokens in common draft"));
        }
        let pairs =
            common.tokens().iter().enumerate().filter_map(|(own, to)| Some((to.as_ref().copied()?, own as u32)));
        // Of several with the same text the first.
        let mut to_own = HashMap::new();
        pairs.for_each(|(to, own)| _ = to_own.entry(to).or_insert(own));
        let mut to_target = common.tokens().to_vec();
        to_target.resize(self.model.config().vocab.max(to_target.len()), None);
        self.other = Some(Other { own: own.clone(), to_target, to_own });
        Ok(())
    }

    fn begin(&mut self, request: u64, _: &[u32]) -> Result<(), Error> {
        self.requests.insert(request, Fed::default());
        Ok(())
    }

    fn catch_up(&mut self, target: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        let mut feed = Vec::new();
        for draft in drafts.iter() {
            let Some(fed) = self.requests.get_mut(&draft.request) else { continue };
            let context = self.model.config().context;
            let other = self.other.as_ref();
            let Some(mut rest) = fed.text(other, target, draft.tokens) else { continue };
            if fed.tokens.is_empty() || fed.tokens.len() + BACKLOG < rest.len() || rest.len() + MOST_NODES > context {
                // The last tokens say nearly all: a long text is not read whole for some drafts.
                self.cache.truncate(&mut fed.table, 0);
                let skipped = draft.tokens.len().saturating_sub(WINDOW.min(context / 2));
                *fed = Fed { skipped, ..Fed::default() };
                let Some(again) = fed.text(other, target, draft.tokens) else { continue };
                rest = again;
            }
            // What was drafted and right need not be computed again.
            let same = fed.tokens.iter().zip(rest.iter()).take_while(|(a, b)| a == b).count().min(rest.len() - 1);
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
            let Some(rest) = fed.text(self.other.as_ref(), target, draft.tokens) else { continue };
            let tokens = rest.len() + draft.budget;
            if draft.budget == 0
                || fed.tokens.len() >= rest.len()
                || tokens > self.model.config().context
                || !self.cache.reserve(&mut fed.table, tokens)
            {
                continue;
            }
            let (counts, left) = (draft.counts.clone(), draft.budget);
            // Noise is the target's, by its own tokens; without any the likeliest text is what counts.
            let said = (self.other.is_some() && draft.sampling.temperature == 0.0).then(Vec::new);
            let (request, parent, likelihood) = (draft.request, None, 1.0);
            chains.push(Chain { draft: index, request, counts, parent, left, likelihood, said });
            feed.push((draft.request, rest[fed.tokens.len()..].to_vec()));
        }
        while !chains.is_empty() {
            self.pass(target, &feed, true)?;
            feed.clear();
            let mut open = Vec::new();
            for (row, mut chain) in chains.drain(..).enumerate() {
                let draft = &mut drafts[chain.draft];
                match (self.extend(row, vocab, &mut chain, draft), &chain.said) {
                    (Some(token), _) => {
                        feed.push((chain.request, vec![token]));
                        open.push(chain);
                    }
                    (None, Some(said)) => self.cut(target, said, draft),
                    (None, None) => {}
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
