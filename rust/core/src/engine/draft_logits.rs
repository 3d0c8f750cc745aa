//! What a drafter's heads say behind a text: to compare them with another implementation of the same weights.

use super::cache::{Cache, Table};
use super::options::{Activations, Weights};
use super::speculation::Host;
use crate::error::Error;
use crate::load::Checkpoint;
use crate::load::text::Text;
use crate::model::{Batch, Model, Row, Scratch};
use crate::speculative::draft::{Draft, Heads, Observed};
use crate::speculative::tree::DraftTree;
use farthing_kernels::attention::{KvType, PAGE, Span};
use farthing_kernels::pool::{Pool, default_threads};
use farthing_kernels::sample::{Sampling, TokenCounts};
use std::path::Path;

/// Lets `drafter` draft `count` tokens, greedily, behind all but the last of `tokens` as computed and the last as just drawn
/// by the model at `path`, whose weights become f32. Returns the logits of its heads, row after row, and the drafts.
///
/// The text comes in two parts, as a prompt in chunks does.
pub fn draft_logits(
    path: &Path,
    drafter: &mut dyn Heads,
    tokens: &[u32],
    count: usize,
) -> Result<(Vec<f32>, DraftTree), Error> {
    let checkpoint = Checkpoint::open(path)?;
    let text = Text::of(&checkpoint)?;
    let mut model = Model::load(&checkpoint, Weights::F32, Activations::F32, None, &|_| ())?;
    let vocabulary = model.config().vocab;
    if tokens.len() < 2 || tokens.iter().any(|&token| token as usize >= vocabulary) {
        return Err(Error::argument("tokens", format!("{tokens:?}"), format!("at least two below {vocabulary}")));
    }
    let pool = Pool::new(default_threads());
    let (computed, mut scratch) = (tokens.len() - 1, Scratch::default());
    let mut cache = Cache::new(model.config(), computed.div_ceil(PAGE), KvType::F32, 1)?;
    let mut table = Table::default();
    if !cache.reserve(&mut table, computed) {
        return Err(Error::argument("tokens", tokens.len(), "as many as fit the pages"));
    }
    drafter.attach(&Host { model: &model, pool: &pool, tokenizer: text.tokenizer.as_deref() })?;
    let capture = drafter.wants().hidden;
    drafter.begin(0, tokens)?;
    drafter.keep_logits();
    let half = computed / 2;
    for (start, end) in [(0, half), (half, computed)].into_iter().filter(|(start, end)| start < end) {
        let rows: Vec<Row<'_>> = tokens[start..end].iter().map(|&token| Row::Token(token)).collect();
        let positions: Vec<u32> = (start as u32..end as u32).collect();
        let batch = Batch {
            rows: &rows,
            positions: &positions,
            spans: &[Span { first_row: 0, rows: rows.len(), start, pages: table.pages(), ancestors: &[] }],
            slots: &[table.slot()],
            logit_rows: &[],
            capture: &capture,
        };
        model.forward(&pool, &batch, &mut cache, &mut scratch)?;
        let hidden = &scratch.take_captured()[..];
        drafter.observe(&Observed { start, following: &tokens[start + 1..=end], hidden, ..Observed::default() })?;
    }
    let host = Host { model: &model, pool: &pool, tokenizer: text.tokenizer.as_deref() };
    let (mut tree, counts) = (DraftTree::default(), TokenCounts::default());
    let sampling = &Sampling { temperature: 0.0, ..Sampling::default() };
    let draft = Draft { request: 0, tokens, budget: count, least: 0.0, sampling, counts: &counts, tree: &mut tree };
    drafter.draft(&host, &mut [draft])?;
    Ok((drafter.kept_logits(), tree))
}
