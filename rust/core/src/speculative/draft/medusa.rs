//! Heads that each guess one token ahead from the target's last state (Medusa, Cai et al., arXiv 2401.10774).
//!
//! Head `j` is a few blocks `h + SiLU(W h + b)` and an output matrix, and sees the token `j + 2` places behind the one whose
//! state it reads. The guesses of all heads come from one product; a tree is made of them best first, by the product of
//! their probabilities.
//!
//! The token between is known by the time heads are asked. Our own heads read it too: they begin with `h + P e`, `e` its
//! embedding divided by its root mean square (as Hydra's do, Ankner et al., arXiv 2402.05109, for the first head).

use super::head::{Likely, TokenHead, class, favour, first_tokens};
use super::weights::{Linear, matrix};
use super::{Draft, Drafter, Heads, Observed, Target, Wants};
use crate::engine::Weights;
use crate::error::Error;
use crate::load::{Checkpoint, FormatError, Metadata};
use crate::model::rms_norms;
use farthing_kernels::activation::{Activation, activate_multiply};
use farthing_kernels::norm::add;
use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::path::Path;

/// Most heads and blocks of a file, far above those of published ones.
const MOST: usize = 64;
/// Guesses of one head that a tree may hold.
const BRANCHES: usize = 10;
/// The weights' file, where a directory is given.
const FILE: &str = "medusa_lm_head.safetensors";
/// In our own files: the tokens that are drafted, likeliest first.
const TOKENS: &str = "tokens";
/// In our own files: what the token behind the state adds to it.
const TOKEN: &str = "token";
/// Added to the mean of an embedding's squares.
const EPSILON: f32 = 1e-6;

/// How heads are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MedusaOptions {
    /// Precision of the weights.
    pub weights: Weights,
    /// Draft only the first so many token ids, or of the tokens that the file lists, by a head of their rows in 4 bits.
    /// `None` drafts those that the file lists, and all if it lists none.
    pub vocabulary: Option<usize>,
}

/// Medusa heads.
#[derive(Debug)]
pub struct Medusa {
    name: String,
    vocabulary: Option<usize>,
    hidden: usize,
    /// What the token behind the state adds to it.
    token: Option<Linear>,
    /// For each head its blocks.
    heads: Vec<Vec<Linear>>,
    /// Of each head, when they have output matrices of their own.
    outputs: Vec<TokenHead>,
    /// The tokens that the file drafts.
    tokens: Option<Vec<u32>>,
    /// The output of all heads otherwise.
    shared: TokenHead,
    requests: HashMap<u64, State>,
    blocks: usize,
}

/// The last state of a request that is known.
#[derive(Debug, Default)]
struct State {
    /// Tokens in the text once the next one is drawn.
    tokens: usize,
    /// `(hidden,)`.
    hidden: Vec<f32>,
}

/// A node that may come next into the tree.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    likelihood: f32,
    /// Likelihood of the path before it.
    before: f32,
    parent: Option<u8>,
    /// Head and place among its guesses.
    head: usize,
    rank: usize,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    /// Likelier first; among equals the shallower, then the earlier guess.
    fn cmp(&self, other: &Candidate) -> Ordering {
        let place = |it: &Candidate| (it.head, it.rank);
        self.likelihood.total_cmp(&other.likelihood).then_with(|| place(other).cmp(&place(self)))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Candidate) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Medusa {
    /// Loads heads in the public layout: `medusa_lm_head.safetensors` (`{head}.{block}.linear.weight`, `.bias`, then
    /// `{head}.{blocks}.weight` unless the target's head is shared) beside a `config.json` with `medusa_num_heads` and
    /// `medusa_num_layers`. `path` is the directory or the file.
    pub fn load(path: &Path, options: MedusaOptions) -> Result<Medusa, Error> {
        let file = if path.is_dir() { path.join(FILE) } else { path.to_path_buf() };
        let checkpoint = Checkpoint::open(&file)?;
        let Metadata::HuggingFace(files) = &checkpoint.metadata else {
            return Err(Error::unsupported("Medusa heads in a GGUF file", "safetensors with a config.json load"));
        };
        let count = |key: &str, default: u64| -> Result<usize, FormatError> {
            let value = files.config.get(key).filter(|value| !value.is_null());
            let got = value.map_or(Some(default), serde_json::Value::as_u64);
            got.map(|count| count as usize).filter(|count| (1..=MOST).contains(count)).ok_or_else(|| {
                let got = value.map(ToString::to_string).unwrap_or_default();
                FormatError::Config { key: key.to_owned(), got, expected: format!("an integer from 1 to {MOST}") }
            })
        };
        let (heads, blocks) = (count("medusa_num_heads", 5)?, count("medusa_num_layers", 1)?);
        let prefix = if checkpoint.tensor("medusa_head.0.0.linear.weight").is_some() { "medusa_head." } else { "" };
        let first = format!("{prefix}0.0.linear.weight");
        let missing = || FormatError::MissingTensor { tensor: first.clone(), expected: Vec::new() };
        let hidden = checkpoint.tensor(&first).and_then(|tensor| tensor.shape().first().copied());
        let hidden = hidden.ok_or_else(missing)?;
        let load = |head: usize| -> Result<Vec<Linear>, Error> {
            let name = |block: usize| format!("{prefix}{head}.{block}.linear");
            (0..blocks).map(|block| Linear::load(&checkpoint, &name(block), [hidden; 2], options.weights)).collect()
        };
        let token = checkpoint.tensor(&format!("{TOKEN}.weight"));
        let token = token.map(|_| Linear::load(&checkpoint, TOKEN, [hidden; 2], options.weights)).transpose()?;
        let tokens = checkpoint.tensor(TOKENS).map(|tensor| ids(&tensor.integers()?)).transpose()?;
        let mut outputs = Vec::new();
        for head in 0..heads {
            let name = format!("{prefix}{head}.{blocks}.weight");
            if let Some(tensor) = checkpoint.tensor(&name) {
                let rows = tensor.shape().first().copied().unwrap_or(0);
                let matrix = matrix(&checkpoint, &name, [rows, hidden], options.weights)?;
                outputs.push(TokenHead::own(Linear::new(matrix, None), Vec::new()));
            }
        }
        if !outputs.is_empty() && outputs.len() != heads {
            let got = format!("{} output matrices for {heads} heads", outputs.len());
            return Err(Error::unsupported(got, "a matrix for each head, or none, loads"));
        }
        Ok(Medusa {
            name: format!("Medusa heads {}", path.file_name().unwrap_or_default().to_string_lossy()),
            vocabulary: options.vocabulary,
            hidden,
            token,
            heads: (0..heads).map(load).collect::<Result<_, _>>()?,
            outputs,
            tokens,
            shared: TokenHead::default(),
            requests: HashMap::new(),
            blocks: 0,
        })
    }

    /// Bytes that a draft reads, without a head that is the target's own.
    pub fn draft_bytes(&self) -> usize {
        let blocks: usize = self.heads.iter().flatten().chain(&self.token).map(Linear::nbytes).sum();
        blocks + self.shared.nbytes() + self.outputs.iter().map(TokenHead::nbytes).sum::<usize>()
    }

    /// What `depth` heads guess behind each of `states: (t, hidden)`, those of `drafts`: `(t, depth)` lists, likeliest
    /// first. Where tokens are drawn, the first is the one that the target's noise draws from the guess.
    fn guess(
        &mut self,
        target: &dyn Target,
        states: &[f32],
        drafts: &[&mut Draft<'_>],
        depth: usize,
        count: usize,
    ) -> Vec<Vec<Vec<Likely>>> {
        let (t, width) = (states.len() / self.hidden, self.hidden);
        let ones = vec![1.0; states.len()];
        let mut states = states.to_vec();
        if let Some(token) = &mut self.token {
            let mut embeddings = vec![0.0; states.len()];
            for (draft, embedding) in drafts.iter().zip(embeddings.chunks_exact_mut(width)) {
                target.embed(draft.tokens[draft.tokens.len() - 1], embedding);
            }
            let embeddings = rms_norms(&embeddings, &ones[..width], EPSILON);
            let mut product = vec![0.0; states.len()];
            token.multiply(target.pool(), &embeddings, &mut product);
            add(&mut states, &product);
        }
        let mut stream = Vec::with_capacity(depth * states.len());
        for blocks in &mut self.heads[..depth] {
            let mut x = states.clone();
            let mut gate = vec![0.0; x.len()];
            for block in blocks {
                block.multiply(target.pool(), &x, &mut gate);
                activate_multiply(Activation::Silu, &mut gate, &ones);
                add(&mut x, &gate);
            }
            stream.extend(x);
        }
        if self.outputs.is_empty() {
            self.shared.compute(target, &stream);
        }
        for (output, states) in self.outputs.iter_mut().zip(stream.chunks_exact(t * width)) {
            output.compute(target, states);
        }
        let place = |row: usize, head: usize| match self.outputs.get(head) {
            Some(output) => (output, row),
            None => (&self.shared, head * t + row),
        };
        let drawn = |row: usize, head: usize| {
            let (output, place) = place(row, head);
            let draws = drafts[row].sampling.temperature > 0.0;
            draws.then(|| output.draw(place, head + 1, drafts[row], target.vocabulary())).flatten()
        };
        let drawn: Vec<Vec<Option<Likely>>> =
            (0..t).map(|row| (0..depth).map(|head| drawn(row, head)).collect()).collect();
        self.shared.normalise();
        self.outputs.iter_mut().take(depth).for_each(TokenHead::normalise);
        let place = |row: usize, head: usize| match self.outputs.get(head) {
            Some(output) => output.likeliest(row, count),
            None => self.shared.likeliest(head * t + row, count),
        };
        let of = |row: usize, head: usize| {
            let mut likely = place(row, head);
            favour(&mut likely, drawn[row][head]);
            likely
        };
        (0..t).map(|row| (0..depth).map(|head| of(row, head)).collect()).collect()
    }
}

/// Token ids of a file's table.
fn ids(table: &[i64]) -> Result<Vec<u32>, FormatError> {
    let id = |&id: &i64| {
        let wrong = || FormatError::Config {
            key: TOKENS.to_owned(),
            got: id.to_string(),
            expected: "token ids from 0 on".to_owned(),
        };
        u32::try_from(id).map_err(|_| wrong())
    };
    table.iter().map(id).collect()
}

/// Adds the likeliest nodes to the tree, at most the budget. `guesses`: for each depth tokens, likeliest first.
fn grow(draft: &mut Draft<'_>, guesses: &[Vec<Likely>]) {
    let candidate = |before: f32, parent, head: usize, rank: usize| {
        let likely = guesses.get(head)?.get(rank)?;
        Some(Candidate { likelihood: before * likely.probability, before, parent, head, rank })
    };
    let mut open: BinaryHeap<Candidate> = candidate(1.0, None, 0, 0).into_iter().collect();
    for _ in 0..draft.budget {
        let Some(next) = open.pop().filter(|next| next.likelihood >= draft.least) else { return };
        let Likely { token, probability } = guesses[next.head][next.rank];
        let Some(node) = draft.tree.push(next.parent, token, class(probability), 1.0) else { return };
        open.extend(candidate(next.likelihood, Some(node), next.head + 1, 0));
        open.extend(candidate(next.before, next.parent, next.head, next.rank + 1));
    }
}

impl Heads for Medusa {
    fn keep_logits(&mut self) {
        self.shared.keep();
        self.outputs.iter_mut().for_each(TokenHead::keep);
    }

    fn kept_logits(&mut self) -> Vec<f32> {
        let own = self.outputs.iter_mut().flat_map(TokenHead::kept).collect::<Vec<f32>>();
        [self.shared.kept(), own].concat()
    }
}

impl Drafter for Medusa {
    fn name(&self) -> &str {
        &self.name
    }

    fn wants(&self) -> Wants {
        Wants { hidden: vec![self.blocks], top: 0 }
    }

    fn attach(&mut self, target: &dyn Target) -> Result<(), Error> {
        let vocabulary = target.vocabulary();
        if self.hidden != target.hidden() {
            let got = format!("{} for states of width {}", self.name, self.hidden);
            return Err(Error::unsupported(got, format!("heads of width {} draft", target.hidden())));
        }
        if self.outputs.iter().any(|output| output.rows() != vocabulary) {
            let got = format!("{} with another vocabulary than the model's", self.name);
            return Err(Error::unsupported(got, format!("heads of {vocabulary} tokens draft")));
        }
        if let Some(&token) = self.tokens.iter().flatten().find(|&&token| token as usize >= vocabulary) {
            let got = format!("{}, which drafts token {token},", self.name);
            return Err(Error::unsupported(got, format!("tokens below {vocabulary} are drafted")));
        }
        if self.outputs.is_empty() {
            let most = self.vocabulary.unwrap_or(usize::MAX);
            let listed = self.tokens.take().filter(|tokens| !tokens.is_empty());
            let tokens = match listed {
                Some(listed) => Some(listed.into_iter().take(most).collect()),
                None => first_tokens(target, most),
            };
            self.shared = TokenHead::of_target(target, tokens)?;
        }
        self.blocks = target.blocks();
        Ok(())
    }

    fn begin(&mut self, request: u64, _: &[u32]) -> Result<(), Error> {
        self.requests.insert(request, State::default());
        Ok(())
    }

    fn draft(&mut self, target: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        let (mut states, mut ready) = (Vec::new(), Vec::new());
        let mut most = 0;
        for draft in drafts {
            // The state behind the token before the last; anything older says nothing about what comes next.
            let Some(state) = self.requests.get(&draft.request) else { continue };
            if draft.budget > 0 && state.tokens == draft.tokens.len() {
                states.extend_from_slice(&state.hidden);
                most = most.max(draft.budget);
                ready.push(draft);
            }
        }
        if ready.is_empty() {
            return Ok(());
        }
        let guesses = self.guess(target, &states, &ready, self.heads.len().min(most), BRANCHES.min(most));
        ready.into_iter().zip(&guesses).for_each(|(draft, guesses)| grow(draft, guesses));
        Ok(())
    }

    fn observe(&mut self, observed: &Observed<'_>) -> Result<(), Error> {
        let Some(state) = self.requests.get_mut(&observed.request) else { return Ok(()) };
        if let Some(last) = observed.hidden.chunks_exact(self.hidden).last() {
            state.tokens = observed.start + observed.hidden.len() / self.hidden + 1;
            state.hidden.clear();
            state.hidden.extend_from_slice(last);
        }
        Ok(())
    }

    fn end(&mut self, request: u64) {
        self.requests.remove(&request);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::speculative::tree::DraftTree;
    use farthing_kernels::sample::{Sampling, TokenCounts};

    #[test]
    fn trees_grow_by_the_product_of_likelihoods() {
        let likely = |token, probability| Likely { token, probability };
        let guesses =
            [vec![likely(1, 0.6), likely(2, 0.3)], vec![likely(3, 0.8), likely(4, 0.1)], vec![likely(5, 0.5)]];
        let (sampling, counts) = (Sampling::default(), TokenCounts::default());
        let grown = |budget, least| {
            let mut tree = DraftTree::default();
            let (sampling, counts, tree_of) = (&sampling, &counts, &mut tree);
            let mut draft = Draft { request: 0, tokens: &[9], budget, least, sampling, counts, tree: tree_of };
            grow(&mut draft, &guesses);
            tree.nodes().iter().map(|node| (node.token, node.parent)).collect::<Vec<_>>()
        };
        // 0.6, 0.48, 0.3, 0.24 twice, the shallower first.
        assert_eq!(grown(5, 0.0), [(1, None), (3, Some(0)), (2, None), (3, Some(2)), (5, Some(1))]);
        assert_eq!(grown(5, 0.4), [(1, None), (3, Some(0))]);
        assert_eq!(grown(60, 0.0).len(), 10, "every combination of guesses, once");
    }
}
