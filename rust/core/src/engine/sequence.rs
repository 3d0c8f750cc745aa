//! One request on its way: its tokens, its pages, and what has become of them.

use super::cache::{Cache, Table};
use super::look::{Look, Verdict};
use super::request::{Completion, Embeddings, Event, FinishReason, SamplingParams, TokenLogprobs};
use super::thinking::{Piece, Thinking};
use crate::detokenize::{Detokenizer, StopStrings};
use crate::error::Error;
use crate::ledger::{Ledger, Pass};
use crate::model::Row;
use crate::reasoning::{Controller, Stop};
use crate::speculative::tree::DraftTree;
use crate::speculative::verify::{Shape, follow};
use farthing_kernels::sample::{Sampling, TokenCounts, sample};
use std::sync::mpsc::Sender;
use std::time::Instant;

/// What a sequence is for.
#[derive(Debug)]
pub(super) enum Purpose {
    /// An answer, streamed.
    Answer(Box<Answer>),
    /// The logits of every token.
    Logits {
        /// `(computed, vocab)` so far.
        rows: Vec<f32>,
        /// Where they go.
        reply: Sender<Result<Vec<f32>, Error>>,
    },
    /// The normed states of every token.
    States {
        /// `(computed, hidden)` so far.
        rows: Vec<f32>,
        /// Where they go.
        reply: Sender<Result<Vec<f32>, Error>>,
    },
}

/// The state of an answer under way.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) sampling: SamplingParams,
    pub(super) seed: u64,
    pub(super) counts: TokenCounts,
    pub(super) detokenizer: Option<Detokenizer>,
    pub(super) stops: StopStrings,
    pub(super) text: String,
    pub(super) logprobs: Vec<TokenLogprobs>,
    pub(super) events: Sender<Event>,
    pub(super) end_tokens: Vec<u32>,
    /// For models that mark their thinking, and for requests that say how.
    pub(super) thinking: Option<Thinking>,
    /// The listener has gone.
    pub(super) deaf: bool,
}

/// How a sequence ends.
#[derive(Debug)]
pub(super) enum Ending {
    /// With a result.
    Finished(FinishReason),
    /// Without one.
    Failed(Error),
}

/// A request in the engine.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: u64,
    /// Prompt, then output; a prompt of embeddings has zeros here.
    pub(super) tokens: Vec<u32>,
    pub(super) embeddings: Option<Embeddings>,
    pub(super) prompt: usize,
    /// Tokens whose keys and values are in pages.
    pub(super) computed: usize,
    pub(super) table: Table,
    /// What the next pass verifies behind the last token.
    pub(super) tree: DraftTree,
    pub(super) purpose: Purpose,
    pub(super) ledger: Ledger,
    pub(super) submitted: Instant,
    pub(super) started: Option<Instant>,
    pub(super) first_token: Option<Instant>,
}

impl Sequence {
    /// Tokens not yet computed.
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// What row `index` enters the model as, and its rotary position. `hidden`: width of an embedding.
    pub(super) fn row(&self, index: usize, hidden: usize) -> (Row<'_>, u32) {
        let token = Row::Token(self.tokens[index]);
        let Some(Embeddings { rows, positions }) = &self.embeddings else { return (token, index as u32) };
        if let Some(&position) = positions.get(index) {
            return (Row::Embedding(&rows[index * hidden..(index + 1) * hidden]), position);
        }
        let behind = positions.iter().max().map_or(0, |&last| last + 1);
        (token, behind + (index - positions.len()) as u32)
    }

    /// Whether every row's logits are wanted, not the last one's only.
    pub(super) fn wants_all(&self) -> bool {
        matches!(self.purpose, Purpose::Logits { .. })
    }

    /// Whether every row's normed state is wanted, and no logits.
    pub(super) fn wants_states(&self) -> bool {
        matches!(self.purpose, Purpose::States { .. })
    }

    /// Takes in the states `(rows, hidden)` of a pass, if they are wanted.
    pub(super) fn take_states(&mut self, states: impl Iterator<Item = f32>) {
        if let Purpose::States { rows, .. } = &mut self.purpose {
            rows.extend(states);
        }
    }

    /// Books a pass over `rows` of this sequence.
    pub(super) fn book(&mut self, pass: &Pass, kv_bytes: u64) {
        self.ledger.book(pass, kv_bytes);
    }

    /// How the next token is drawn, and what penalties count; `None` when none is.
    pub(super) fn sampling(&self) -> Option<(Sampling<'static>, &TokenCounts)> {
        match &self.purpose {
            Purpose::Answer(answer) => Some((answer.sampling(self.tokens.len()), &answer.counts)),
            Purpose::Logits { .. } | Purpose::States { .. } => None,
        }
    }

    /// Longest branch of drafts that is of use: the answer goes on no further than one token behind it. 0 when nothing can
    /// be drafted.
    pub(super) fn room(&self, limit: usize) -> usize {
        match &self.purpose {
            Purpose::Answer(answer) if self.embeddings.is_none() && self.computed >= self.prompt => {
                let most = limit.min(self.prompt.saturating_add(answer.sampling.max_tokens));
                most.saturating_sub(self.tokens.len() + 1)
            }
            _ => 0,
        }
    }

    /// Whether a look ahead is under way: what is computed is not the text.
    pub(super) fn looking(&self) -> bool {
        self.thinking().is_some_and(|thinking| thinking.look.is_some())
    }

    fn thinking(&self) -> Option<&Thinking> {
        match &self.purpose {
            Purpose::Answer(answer) => answer.thinking.as_ref(),
            Purpose::Logits { .. } | Purpose::States { .. } => None,
        }
    }

    /// Begins the look ahead that is due, unless it has no room in `limit` tokens.
    pub(super) fn look_ahead(&mut self, cache: &Cache, limit: usize) {
        let Purpose::Answer(answer) = &mut self.purpose else { return };
        let Some(thinking) = answer.thinking.as_mut().filter(|thinking| thinking.controller.probe_due()) else {
            return;
        };
        thinking.controller.probed();
        let Some(probe) = thinking.controller.probe() else { return };
        let suffix = thinking.controller.spec().probe();
        if self.tokens.len() + suffix.len() + probe.answer_tokens as usize > limit {
            return;
        }
        let states = (cache.stateful() && self.computed > 0).then(|| cache.snapshot(&self.table, self.computed));
        thinking.look = Some(Look::new(self.tokens.len(), self.computed, states, cache.stateful()));
        self.tokens.extend_from_slice(suffix);
    }

    /// Goes on with the look ahead after a pass, from the logits `(vocab,)` behind the last token.
    fn look_on(&mut self, logits: &[f32]) {
        let Purpose::Answer(answer) = &mut self.purpose else { return };
        let Some(thinking) = &mut answer.thinking else { return };
        let (Some(look), Some(probe)) = (&mut thinking.look, thinking.controller.probe()) else { return };
        let lexicon = thinking.controller.spec().lexicon();
        let verdict = look.judge(logits, probe, &mut thinking.settled, lexicon, &answer.end_tokens);
        if let Verdict::On(token) = verdict {
            self.tokens.push(token);
            return;
        }
        look.over = true;
        self.ledger.probe_tokens += (self.tokens.len() - look.text) as u64;
        self.tokens.truncate(look.text);
        if verdict == Verdict::Over(true) {
            // The text's own next pass dictates the end: its drafters hear of that.
            thinking.controller.close(Stop::EarlyExit);
        }
    }

    /// Cuts what was read to look ahead from the pages, once the look is over.
    pub(super) fn look_back(&mut self, cache: &mut Cache) {
        let Purpose::Answer(answer) = &mut self.purpose else { return };
        let Some(thinking) = &mut answer.thinking else { return };
        let over = thinking.look.take_if(|look| look.over);
        if let Some(look) = over {
            self.computed = look.undo(cache, &mut self.table);
        }
    }

    /// Takes drafts away that may not stand where they are, whatever the model says.
    pub(super) fn prune(&mut self) {
        let Purpose::Answer(answer) = &self.purpose else { return };
        let Some(Thinking { controller, .. }) = answer.thinking.as_ref().filter(|it| it.controller.steers()) else {
            return;
        };
        let mut ahead: Vec<Option<Controller>> = Vec::with_capacity(self.tree.len());
        for node in self.tree.nodes() {
            let before = node.parent.map_or(Some(controller), |parent| ahead[parent as usize].as_ref());
            // What is dictated comes in a pass of its own, without drafts, as a look ahead does.
            let next = before
                .filter(|before| before.forced().is_none() && !before.probe_due() && before.permits(node.token))
                .map(|before| {
                    let mut next = before.clone();
                    next.push(node.token);
                    next
                });
            ahead.push(next);
        }
        self.tree.retain(|node| ahead[node].is_some());
    }

    /// Takes in what is dictated before anything is drawn, as far as one token can still be drawn; `limit`: tokens of the
    /// longest sequence.
    pub(super) fn admit(&mut self, limit: usize) {
        let Purpose::Answer(answer) = &mut self.purpose else { return };
        let most = limit.min(self.prompt.saturating_add(answer.sampling.max_tokens)).saturating_sub(1);
        while self.tokens.len() < most
            && let Some(token) = answer.dictated()
        {
            self.tokens.push(token);
            // A stop text can't be in what is dictated before the answer.
            answer.accept(token, true);
        }
    }

    /// Takes the logits of this sequence's wanted rows after a pass over `rows` rows and its tree; says how it ends, if
    /// it does.
    ///
    /// `logits: (wanted, vocab)`, the last token's and its tree's; empty while the prompt is unfinished. `path` gets the
    /// rows of the tree that the text goes through, the last token's, 0, first.
    pub(super) fn advance(
        &mut self,
        rows: usize,
        logits: &mut [f32],
        path: &mut Vec<usize>,
        limit: usize,
        now: Instant,
    ) -> Option<Ending> {
        self.computed += rows;
        let (finished, prompt) = (self.remaining() == 0, self.prompt);
        if finished && self.looking() {
            self.look_on(logits);
            return None;
        }
        let answer = match &mut self.purpose {
            Purpose::Logits { rows, .. } => {
                rows.extend_from_slice(logits);
                return finished.then_some(Ending::Finished(FinishReason::Length));
            }
            Purpose::States { .. } => return finished.then_some(Ending::Finished(FinishReason::Length)),
            Purpose::Answer(answer) => answer,
        };
        if !finished {
            answer.send(Event::Progress { computed: self.computed.min(prompt), total: prompt });
            return answer.deaf.then_some(Ending::Finished(FinishReason::Cancelled));
        }
        let vocab = logits.len() / (self.tree.len() + 1);
        let ended = follow(&Shape::from(&self.tree), |row, _| {
            path.push(row);
            let logits = &mut logits[row * vocab..(row + 1) * vocab];
            let token = answer.draw(logits, self.tokens.len()).map_err(|error| Some(Ending::Failed(error)))?;
            self.first_token.get_or_insert(now);
            let mut reason = None;
            if let Some(token) = token {
                self.tokens.push(token);
                let full = answer.full(self.tokens.len(), prompt, limit);
                reason = answer.accept(token, false).or(full.then_some(FinishReason::Length));
            }
            // What is dictated is known: it goes into the next pass together.
            let known = self.tokens.len();
            let reason = reason.or_else(|| answer.dictate(&mut self.tokens, prompt, limit));
            match (reason, token) {
                (Some(reason), _) => Err(Some(Ending::Finished(reason))),
                (None, _) if answer.deaf => Err(Some(Ending::Finished(FinishReason::Cancelled))),
                (None, Some(token)) if self.tokens.len() == known && !answer.probe_due() => Ok(token),
                (None, _) => Err(None),
            }
        });
        ended.err().flatten()
    }

    /// Ends the sequence and tells whoever waits for it.
    pub(super) fn finish(&mut self, finish_reason: FinishReason, now: Instant) {
        let started = self.started.unwrap_or(now);
        let first = self.first_token.unwrap_or(now);
        if let Some(look) = self.thinking().and_then(|thinking| thinking.look.as_ref()).filter(|look| !look.over) {
            let text = look.text;
            self.ledger.probe_tokens += (self.tokens.len() - text) as u64;
            self.tokens.truncate(text);
        }
        let generated = self.tokens.len() - self.prompt;
        self.ledger.prompt_tokens = self.prompt as u64;
        self.ledger.queue_seconds = (started - self.submitted).as_secs_f64();
        self.ledger.prefill_seconds = (first - started).as_secs_f64();
        self.ledger.decode_seconds = (now - first).as_secs_f64();
        match &mut self.purpose {
            Purpose::Answer(answer) => {
                answer.flush(finish_reason);
                let (thinking, thinking_stop) = answer.thinking.as_mut().map(Thinking::outcome).unwrap_or_default();
                if let Some(Thinking { controller, .. }) = &answer.thinking {
                    self.ledger.thinking_tokens = controller.thinking_tokens() as u64;
                    self.ledger.forced_tokens = controller.forced_tokens() as u64;
                }
                self.ledger.answer_tokens = generated as u64 - self.ledger.thinking_tokens - self.ledger.forced_tokens;
                let completion = Completion {
                    text: std::mem::take(&mut answer.text),
                    thinking,
                    thinking_stop,
                    token_ids: self.tokens[self.prompt..].to_vec(),
                    finish_reason,
                    ledger: self.ledger.clone(),
                    logprobs: answer.sampling.logprobs.map(|_| std::mem::take(&mut answer.logprobs)),
                };
                answer.send(Event::Done(Box::new(completion)));
            }
            Purpose::Logits { rows, reply } | Purpose::States { rows, reply } => {
                // A caller that has given up needs no answer.
                let _ = reply.send(Ok(std::mem::take(rows)));
            }
        }
    }

    /// Ends the sequence as `ending` says.
    pub(super) fn end(&mut self, ending: Ending, now: Instant) {
        match ending {
            Ending::Finished(reason) => self.finish(reason, now),
            Ending::Failed(error) => self.fail(error),
        }
    }

    /// Ends the sequence with an error.
    pub(super) fn fail(&mut self, error: Error) {
        match &mut self.purpose {
            Purpose::Answer(answer) => answer.send(Event::Failed(error)),
            // A caller that has given up needs no answer.
            Purpose::Logits { reply, .. } | Purpose::States { reply, .. } => drop(reply.send(Err(error))),
        }
    }
}

impl Answer {
    fn send(&mut self, event: Event) {
        self.deaf |= self.events.send(event).is_err();
    }

    /// How the token at `position` is drawn.
    fn sampling(&self, position: usize) -> Sampling<'static> {
        self.sampling.at(self.seed, position)
    }

    /// Draws the token at `position` from its logits `(vocab,)`; none when the draw ends thinking, or something else is
    /// dictated there.
    fn draw(&mut self, logits: &mut [f32], position: usize) -> Result<Option<u32>, Error> {
        if self.dictated().is_some() {
            return Ok(None);
        }
        let mut sampling = self.sampling(position);
        if let Some(thinking) = &mut self.thinking {
            thinking.constrain(&mut sampling, logits.len());
        }
        let draw = sample(logits, &sampling, &self.counts).map_err(|error| Error::NoToken { position, error })?;
        if self.thinking.as_mut().is_some_and(|thinking| thinking.controller.redirect(draw.token)) {
            return Ok(None);
        }
        if self.sampling.logprobs.is_some() {
            self.logprobs.push(TokenLogprobs { token: draw.token, logprob: draw.logprob, top: draw.top });
        }
        Ok(Some(draw.token))
    }

    /// Whether nothing more may follow a text of `tokens` tokens, `prompt` of them the prompt's.
    fn full(&self, tokens: usize, prompt: usize, limit: usize) -> bool {
        tokens - prompt >= self.sampling.max_tokens || tokens >= limit
    }

    /// Appends what is dictated now to `tokens`; says why the answer ends with it, if it does.
    fn dictate(&mut self, tokens: &mut Vec<u32>, prompt: usize, limit: usize) -> Option<FinishReason> {
        while let Some(token) = self.dictated() {
            tokens.push(token);
            let full = self.full(tokens.len(), prompt, limit);
            if let Some(reason) = self.accept(token, true).or(full.then_some(FinishReason::Length)) {
                return Some(reason);
            }
        }
        None
    }

    /// Whether the answer is to be looked for before the next token is drawn.
    fn probe_due(&self) -> bool {
        self.thinking.as_ref().is_some_and(|thinking| thinking.controller.probe_due())
    }

    /// The token that must come next.
    pub(super) fn dictated(&self) -> Option<u32> {
        self.thinking.as_ref()?.controller.forced()
    }

    /// Takes in a token, drawn or dictated; says why the answer ends with it, if it does.
    pub(super) fn accept(&mut self, token: u32, dictated: bool) -> Option<FinishReason> {
        self.counts.push(token);
        if dictated && self.sampling.logprobs.is_some() {
            self.logprobs.push(TokenLogprobs { token, logprob: 0.0, top: Vec::new() });
        }
        let ends = !dictated && !self.sampling.ignore_eos && self.end_tokens.contains(&token);
        let detokenizer = self.detokenizer.as_mut().filter(|_| !ends);
        let piece = detokenizer.map(|detokenizer| detokenizer.push(token)).unwrap_or_default();
        let (ends_thinking, pieces) = match &mut self.thinking {
            Some(thinking) => thinking.take(token, piece),
            None => (false, vec![Piece::Answer(piece)]),
        };
        if ends && !ends_thinking {
            return Some(FinishReason::Stop);
        }
        self.write(pieces)
    }

    /// Lets out text; says whether a stop text ends the answer.
    fn write(&mut self, pieces: Vec<Piece>) -> Option<FinishReason> {
        for piece in pieces {
            match piece {
                Piece::Thinking(text) => self.send(Event::Thinking(text)),
                Piece::Answer(text) => {
                    let found = self.stops.push(&text);
                    self.emit(found.text);
                    if found.stopped {
                        return Some(FinishReason::Stop);
                    }
                }
            }
        }
        None
    }

    fn emit(&mut self, text: String) {
        if !text.is_empty() {
            self.text.push_str(&text);
            self.send(Event::Text(text));
        }
    }

    /// Lets out the text held back for half characters and half stop texts.
    fn flush(&mut self, reason: FinishReason) {
        if reason == FinishReason::Stop && self.stops.stopped() {
            return;
        }
        let rest = self.detokenizer.as_mut().map(Detokenizer::finish).unwrap_or_default();
        let pieces = match &mut self.thinking {
            Some(thinking) => thinking.finish(rest),
            None => vec![Piece::Answer(rest)],
        };
        self.write(pieces);
        let held = self.stops.finish();
        self.emit(held);
    }
}
