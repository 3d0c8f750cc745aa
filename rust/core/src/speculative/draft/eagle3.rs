//! EAGLE-3 (Li et al., arXiv 2503.01840): a block over the embedding of a token and what three blocks of the target, or the
//! block itself, made of the text before it; with a head of its own over fewer tokens.
//!
//! Reads the layout of `speculators` (`speculators_config`, `transformer_layer_config`, `layers.0.*`) and that of EAGLE's
//! authors (`midlayer.*`). Trees grow by levels, as in EAGLE-2 (arXiv 2406.16858): the likeliest nodes of a level are
//! expanded together, and of all that have been seen the likeliest stay.

use super::block::{DraftBlock, Rows};
use super::head::{Likely, TokenHead, class, favour};
use super::weights::{Linear, matrix, vector};
use super::{Draft, Drafter, Heads, Observed, Target, Wants};
use crate::engine::{Activations, Weights};
use crate::error::Error;
use crate::load::{Checkpoint, FormatError, Metadata};
use crate::model::mixer::MixerSpec;
use crate::model::{Convention, Part, config, rms_norms};
use farthing_kernels::format::PackedMatrix;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;

/// Levels of a tree, and nodes of one that are expanded.
const LEVELS: usize = 4;
const BEAMS: usize = 10;
/// Most floats of states that wait for the next draft of a request; one with more is not drafted for.
const MOST_WAITING: usize = 1 << 27;
/// What configurations leave out because `LlamaConfig` says the same.
const DEFAULTS: [(&str, u32); 6] = [
    ("hidden_size", 4096),
    ("intermediate_size", 11008),
    ("num_attention_heads", 32),
    ("vocab_size", 32000),
    ("max_position_embeddings", 2048),
    ("num_hidden_layers", 1),
];

/// How the drafter is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Eagle3Options {
    /// Precision of the weights.
    pub weights: Weights,
    /// Precision of the activations.
    pub activations: Activations,
}

/// An EAGLE-3 drafter.
#[derive(Debug)]
pub struct Eagle3 {
    name: String,
    block: DraftBlock,
    /// `(hidden, 3 · target's hidden)`.
    fusion: Linear,
    /// Before it.
    input_norm: Option<Vec<f32>>,
    hidden_norm: Vec<f32>,
    /// `None` takes the target's.
    embedding: Option<PackedMatrix>,
    head: TokenHead,
    /// The stream begins with the normed state.
    norm_before_residual: bool,
    hidden: usize,
    /// Blocks whose inputs are fused, as the configuration states them.
    layers: Option<[usize; 3]>,
    /// Blocks whose outputs are wanted, and the place of each of the three among them.
    wanted: Vec<usize>,
    places: [usize; 3],
    target_hidden: usize,
    requests: HashMap<u64, Fed>,
}

/// What the block has seen of a request.
#[derive(Debug, Default)]
struct Fed {
    /// Rows of the text in its cache.
    rows: usize,
    /// `(t, wanted · target's hidden)`: states behind them.
    waiting: Vec<f32>,
    /// It has missed rows, or they were too many.
    lost: bool,
}

/// A row of the tree that the block has seen or may see.
#[derive(Debug)]
struct Node {
    token: u32,
    /// Index of the node before it; `None` stands behind the text.
    parent: Option<usize>,
    depth: usize,
    probability: f32,
    likelihood: f32,
    /// Place among the rows that have been expanded, the text's last being 0.
    row: Option<usize>,
}

/// A request while its tree grows.
struct Growth<'a, 'b> {
    draft: &'a mut Draft<'b>,
    nodes: Vec<Node>,
    /// Nodes that the block has seen, in the order of their rows.
    expanded: Vec<usize>,
    /// `(1 + expanded, hidden)`: what each row's state is made of, and what it becomes.
    inputs: Vec<f32>,
    outputs: Vec<f32>,
    /// Nodes that were sent last, in the last rows of `outputs`; `None` stands for the text's last row.
    last: Vec<Option<usize>>,
}

impl Eagle3 {
    /// Loads a directory with `config.json` and `model.safetensors`. `sequences`, `context`: those of the engine.
    pub fn load(path: &Path, options: Eagle3Options, sequences: usize, context: usize) -> Result<Eagle3, Error> {
        let Eagle3Options { weights, activations } = options;
        let checkpoint = Checkpoint::open(path)?;
        let Metadata::HuggingFace(files) = &checkpoint.metadata else {
            return Err(Error::unsupported("EAGLE-3 in a GGUF file", "a directory of safetensors loads"));
        };
        let outer = files.config.as_object().cloned().unwrap_or_default();
        let mut config = config::read(&transformer(&outer))?;
        let several = checkpoint.tensor("layers.1.input_layernorm.weight").is_some();
        if several || config.blocks.len() != 1 {
            return Err(Error::unsupported("EAGLE-3 with several blocks", "one block drafts"));
        }
        let Some(MixerSpec::Attention(spec)) = config.blocks.first_mut().map(|block| &mut block.mixer) else {
            return Err(Error::unsupported(
                "EAGLE-3 with a block without attention",
                "Llama's and Qwen3's blocks draft",
            ));
        };
        spec.doubled = true;
        let middle = checkpoint.tensor("midlayer.self_attn.q_proj.weight").is_some();
        let (convention, prefix) =
            if middle { (Convention::Middle, "midlayer.") } else { (Convention::Layers, "layers.0.") };
        let (hidden, vocabulary) = (config.hidden, config.vocab);
        let shape = |name: &str, place: usize| {
            let missing = || FormatError::MissingTensor { tensor: name.to_owned(), expected: Vec::new() };
            checkpoint.tensor(name).and_then(|tensor| tensor.shape().get(place).copied()).ok_or_else(missing)
        };
        let fused = shape("fc.weight", 1)?;
        let drafted = shape("lm_head.weight", 0)?;
        let part = Part::load(&checkpoint, config, convention, 0, "norm.weight", weights, activations)?;
        let optional = |name: &str| checkpoint.tensor(name).is_some();
        let input_norm =
            optional("input_norm.weight").then(|| vector(&checkpoint, "input_norm.weight", fused)).transpose()?;
        let embedding = optional("embed_tokens.weight")
            .then(|| matrix(&checkpoint, "embed_tokens.weight", [vocabulary, hidden], Weights::Auto));
        let tokens = checkpoint.tensor("d2t").map(|tensor| targets(&tensor.integers()?, drafted)).transpose()?;
        Ok(Eagle3 {
            name: format!("EAGLE-3 {}", path.file_name().unwrap_or_default().to_string_lossy()),
            fusion: Linear::load(&checkpoint, "fc", [hidden, fused], weights)?,
            input_norm,
            hidden_norm: vector(&checkpoint, &format!("{prefix}hidden_norm.weight"), hidden)?,
            embedding: embedding.transpose()?,
            head: TokenHead::own(
                Linear::load(&checkpoint, "lm_head", [drafted, hidden], weights)?,
                tokens.unwrap_or_default(),
            ),
            norm_before_residual: outer.get("norm_before_residual").and_then(Value::as_bool).unwrap_or(false),
            hidden,
            layers: layers(&outer)?,
            wanted: Vec::new(),
            places: [0; 3],
            target_hidden: fused / 3,
            requests: HashMap::new(),
            block: DraftBlock::new(part, weights, sequences, context)?,
        })
    }

    /// The normed embeddings of tokens, `(t, hidden)`.
    fn embeddings(&self, target: &dyn Target, tokens: &[u32]) -> Vec<f32> {
        let mut rows = vec![0.0; tokens.len() * self.hidden];
        for (&token, row) in tokens.iter().zip(rows.chunks_exact_mut(self.hidden)) {
            match &self.embedding {
                Some(embedding) => embedding.row(token as usize, row),
                None => target.embed(token, row),
            }
        }
        rms_norms(&rows, self.block.part.mixer_norm(), self.block.part.config().epsilon)
    }

    /// The rows that enter the block for tokens and the states beside them, `(t, hidden)`.
    fn rows(&self, target: &dyn Target, request: u64, start: usize, tokens: &[u32], states: &[f32]) -> Rows {
        let normed = rms_norms(states, &self.hidden_norm, self.block.part.config().epsilon);
        let embeddings = self.embeddings(target, tokens);
        let pairs = embeddings.chunks_exact(self.hidden).zip(normed.chunks_exact(self.hidden));
        Rows {
            request,
            start,
            positions: (start + 1..=start + tokens.len()).map(|position| position as u32).collect(),
            normed: pairs.flat_map(|(embedding, state)| [embedding, state].concat()).collect(),
            stream: if self.norm_before_residual { normed } else { states.to_vec() },
            ancestors: Vec::new(),
        }
    }

    /// What the block reads of the target's states. `waiting: (t, wanted · target's hidden)`, `(t, hidden)` out.
    fn fuse(&mut self, target: &dyn Target, waiting: &[f32]) -> Vec<f32> {
        let width = self.target_hidden;
        let rows = waiting.chunks_exact(self.wanted.len() * width);
        let places = self.places;
        let mut three: Vec<f32> =
            rows.flat_map(|row| places.map(|place| &row[place * width..][..width]).concat()).collect();
        if let Some(norm) = &self.input_norm {
            three = rms_norms(&three, norm, self.block.part.config().epsilon);
        }
        let mut out = vec![0.0; three.len() / (3 * width) * self.hidden];
        self.fusion.multiply(target.pool(), &three, &mut out);
        out
    }

    /// Adds the likeliest children of the rows that were sent through the block last.
    fn branch(&mut self, target: &dyn Target, growths: &mut [Growth<'_, '_>]) {
        let mut states = Vec::new();
        for Growth { outputs, last, .. } in &*growths {
            states.extend_from_slice(&outputs[outputs.len() - last.len() * self.hidden..]);
        }
        let normed = self.block.part.normalise(&states);
        self.head.compute(target, &normed);
        let rows = || growths.iter().flat_map(|growth| growth.last.iter().map(move |&node| (growth, node)));
        let depth = |nodes: &[Node], node: Option<usize>| node.map_or(1, |node| nodes[node].depth + 1);
        let draw = |(row, (growth, node)): (usize, (&Growth<'_, '_>, Option<usize>))| {
            let draws = growth.draft.sampling.temperature > 0.0;
            draws.then(|| self.head.draw(row, depth(&growth.nodes, node), growth.draft, target.vocabulary())).flatten()
        };
        let drawn: Vec<Option<Likely>> = rows().enumerate().map(draw).collect();
        self.head.normalise();
        let mut row = 0;
        for Growth { draft, nodes, last, .. } in growths {
            let width = draft.budget.min(BEAMS);
            for &node in &*last {
                let mut likely = self.head.likeliest(row, width);
                favour(&mut likely, drawn[row]);
                row += 1;
                let (depth, before) = (depth(nodes, node), node.map_or(1.0, |node| nodes[node].likelihood));
                nodes.extend(likely.into_iter().map(|Likely { token, probability }| Node {
                    token,
                    parent: node,
                    depth,
                    probability,
                    likelihood: before * probability,
                    row: None,
                }));
            }
        }
    }

    /// Chooses the nodes of depth `depth` to expand, and sends each tree through the block; what is left has some.
    fn expand<'a, 'b>(
        &mut self,
        target: &dyn Target,
        growths: Vec<Growth<'a, 'b>>,
        depth: usize,
        done: &mut Vec<Growth<'a, 'b>>,
    ) -> Result<Vec<Growth<'a, 'b>>, Error> {
        let (mut open, mut all) = (Vec::new(), Vec::new());
        for mut growth in growths {
            let level = (0..growth.nodes.len()).filter(|&node| growth.nodes[node].depth == depth);
            let mut beams: Vec<usize> =
                level.filter(|&node| growth.nodes[node].likelihood >= growth.draft.least).collect();
            beams.sort_by(|&a, &b| growth.nodes[b].likelihood.total_cmp(&growth.nodes[a].likelihood));
            beams.truncate(growth.draft.budget.min(BEAMS));
            if beams.is_empty() || growth.draft.budget <= depth {
                done.push(growth);
                continue;
            }
            for &node in &beams {
                let parent = growth.nodes[node].parent.and_then(|parent| growth.nodes[parent].row).unwrap_or(0);
                let state = growth.outputs[parent * self.hidden..][..self.hidden].to_vec();
                growth.inputs.extend(state);
                growth.expanded.push(node);
                growth.nodes[node].row = Some(growth.expanded.len());
            }
            let (text, request) = (growth.draft.tokens, growth.draft.request);
            let tokens: Vec<u32> = std::iter::once(text[text.len() - 1])
                .chain(growth.expanded.iter().map(|&node| growth.nodes[node].token))
                .collect();
            let start = text.len() - 2;
            let mut rows = self.rows(target, request, start, &tokens, &growth.inputs);
            rows.ancestors.push(1);
            for (index, &node) in growth.expanded.iter().enumerate() {
                let Node { parent, depth, .. } = growth.nodes[node];
                let before = parent.and_then(|parent| growth.nodes[parent].row).unwrap_or(0);
                rows.ancestors.push(rows.ancestors[before] | 1 << (index + 1));
                rows.positions[index + 1] = (start + 1 + depth) as u32;
            }
            all.push(rows);
            growth.last = beams.into_iter().map(Some).collect();
            open.push(growth);
        }
        let out = self.block.run(target, &all)?;
        let mut rest = &out[..];
        for growth in &mut open {
            let (mine, others) = rest.split_at(growth.inputs.len());
            growth.outputs = mine.to_vec();
            rest = others;
        }
        Ok(open)
    }
}

/// The block's own configuration, with what it leaves out.
fn transformer(outer: &Map<String, Value>) -> Map<String, Value> {
    let mut map = outer.get("transformer_layer_config").and_then(Value::as_object).unwrap_or(outer).clone();
    for (key, value) in DEFAULTS {
        map.entry(key).or_insert_with(|| value.into());
    }
    map.entry("model_type").or_insert_with(|| "llama".into());
    map
}

/// Blocks of the target whose inputs are fused, if the configuration states them.
fn layers(outer: &Map<String, Value>) -> Result<Option<[usize; 3]>, FormatError> {
    let key = "eagle_aux_hidden_state_layer_ids";
    let nested = outer.get("eagle_config").and_then(|config| config.get(key));
    let Some(value) = outer.get(key).or(nested).filter(|value| !value.is_null()) else { return Ok(None) };
    let ids = value.as_array().map(|ids| ids.iter().filter_map(Value::as_u64).map(|id| id as usize).collect());
    let ids = ids.and_then(|ids: Vec<usize>| <[usize; 3]>::try_from(ids).ok()).filter(|ids| !ids.contains(&0));
    let wrong = || FormatError::Config {
        key: key.to_owned(),
        got: value.to_string(),
        expected: "three numbers of blocks from 1 on".to_owned(),
    };
    ids.map(Some).ok_or_else(wrong)
}

/// The target's token for each of the drafter's, from their differences.
fn targets(differences: &[i64], drafted: usize) -> Result<Vec<u32>, FormatError> {
    let wrong = |got: String, expected: String| FormatError::Config { key: "d2t".to_owned(), got, expected };
    if differences.len() != drafted {
        return Err(wrong(format!("{} tokens", differences.len()), format!("{drafted} tokens")));
    }
    let target = |(own, &difference): (usize, &i64)| {
        let target = (own as i64).checked_add(difference).and_then(|target| u32::try_from(target).ok());
        target.ok_or_else(|| wrong(difference.to_string(), "differences to token ids from 0 on".to_owned()))
    };
    differences.iter().enumerate().map(target).collect()
}

impl Heads for Eagle3 {
    fn keep_logits(&mut self) {
        self.head.keep();
    }

    fn kept_logits(&mut self) -> Vec<f32> {
        self.head.kept()
    }
}

impl Drafter for Eagle3 {
    fn name(&self) -> &str {
        &self.name
    }

    fn wants(&self) -> Wants {
        Wants { hidden: self.wanted.clone(), top: 0 }
    }

    fn attach(&mut self, target: &dyn Target) -> Result<(), Error> {
        let vocabulary = target.vocabulary();
        let own = self.embedding.as_ref().map_or(vocabulary, PackedMatrix::rows);
        let width = if self.embedding.is_some() { target.hidden() } else { self.hidden };
        if self.target_hidden != target.hidden() || width != target.hidden() || own < vocabulary {
            let got = format!("{} for a model of {own} tokens and width {}", self.name, self.target_hidden);
            let works = format!("one for {vocabulary} tokens and width {} drafts", target.hidden());
            return Err(Error::unsupported(got, works));
        }
        let blocks = target.blocks();
        // As EAGLE's authors choose them.
        let layers = self.layers.unwrap_or([2, blocks / 2, blocks.saturating_sub(3)]);
        if layers.iter().any(|layer| !(1..=blocks).contains(layer)) {
            let got = format!("{}, which reads blocks {layers:?}", self.name);
            return Err(Error::unsupported(got, format!("blocks from 1 to {blocks} are there")));
        }
        // The input of a block is the output of the one before.
        let wanted = layers.map(|layer| layer - 1);
        self.wanted = wanted.to_vec();
        self.wanted.sort_unstable();
        self.wanted.dedup();
        self.places = wanted.map(|block| self.wanted.binary_search(&block).unwrap_or(0));
        Ok(())
    }

    fn begin(&mut self, request: u64, _: &[u32]) -> Result<(), Error> {
        self.requests.insert(request, Fed::default());
        Ok(())
    }

    fn draft(&mut self, target: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        let row = self.wanted.len() * self.target_hidden;
        let (mut growths, mut all, mut begun) = (Vec::new(), Vec::new(), Vec::new());
        for draft in drafts {
            let tokens = draft.tokens.len();
            let Some(fed) = self.requests.get_mut(&draft.request) else { continue };
            let known = fed.rows + fed.waiting.len() / row;
            let room = tokens + LEVELS * BEAMS;
            if draft.budget == 0 || fed.lost || fed.waiting.is_empty() || known + 1 != tokens {
                continue;
            }
            if !self.block.reserve(draft.request, room) {
                continue;
            }
            let (start, waiting) = (fed.rows, std::mem::take(&mut fed.waiting));
            fed.rows = tokens - 1;
            begun.push((draft.request, tokens - 1));
            let states = self.fuse(target, &waiting);
            all.push(self.rows(target, draft.request, start, &draft.tokens[start + 1..], &states));
            let inputs = states[states.len() - self.hidden..].to_vec();
            let (nodes, expanded, outputs) = (Vec::new(), Vec::new(), Vec::new());
            growths.push(Growth { draft, nodes, expanded, inputs, outputs, last: vec![None] });
        }
        let out = self.block.run(target, &all)?;
        let mut end = 0;
        for (growth, rows) in growths.iter_mut().zip(&all) {
            end += rows.stream.len();
            growth.outputs = out[end - self.hidden..end].to_vec();
        }
        let mut done = Vec::new();
        for depth in 1..=LEVELS {
            if growths.is_empty() {
                break;
            }
            self.branch(target, &mut growths);
            if depth < LEVELS {
                growths = self.expand(target, growths, depth, &mut done)?;
            }
        }
        done.append(&mut growths);
        for Growth { draft, nodes, .. } in done {
            keep(draft, &nodes);
        }
        for (request, rows) in begun {
            self.block.truncate(request, rows);
        }
        Ok(())
    }

    fn observe(&mut self, observed: &Observed<'_>) -> Result<(), Error> {
        let row = self.wanted.len() * self.target_hidden;
        let Some(fed) = self.requests.get_mut(&observed.request) else { return Ok(()) };
        let (known, count) = (fed.rows + fed.waiting.len() / row, observed.hidden.len() / row);
        // Rows that are computed again are the same again.
        let again = known.saturating_sub(observed.start).min(count);
        fed.lost |= observed.start > known || fed.waiting.len() > MOST_WAITING;
        if !fed.lost {
            fed.waiting.extend_from_slice(&observed.hidden[again * row..]);
        }
        Ok(())
    }

    fn end(&mut self, request: u64) {
        self.requests.remove(&request);
        self.block.end(request);
    }
}

/// Puts the likeliest nodes into the tree, at most the budget.
fn keep(draft: &mut Draft<'_>, nodes: &[Node]) {
    let mut order: Vec<usize> = (0..nodes.len()).filter(|&node| nodes[node].likelihood >= draft.least).collect();
    // Stable: parents, which are no less likely and were seen before, come first.
    order.sort_by(|&a, &b| nodes[b].likelihood.total_cmp(&nodes[a].likelihood));
    let mut places = vec![None; nodes.len()];
    for node in order.into_iter().take(draft.budget) {
        let Node { token, parent, probability, .. } = nodes[node];
        let parent = parent.and_then(|parent| places[parent]);
        places[node] = draft.tree.push(parent, token, class(probability), 1.0);
        if places[node].is_none() {
            return;
        }
    }
}
