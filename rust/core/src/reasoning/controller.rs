//! One sequence's way through thinking.
//!
//! Six phases: before a span, inside it, in the budget's last part, beyond it, while the end is dictated, and behind it.
//! A token moves every marker's cursor by its own length and changes a few counters, however long the text is.

use super::lexicon::Lexicon;
use super::loops::LoopGuard;
use super::marker::{Hit, Length, MOST_MARKERS, Marker, Role, advance, fallback};
use super::policy::{Policy, Probe, Ramp, Reentry};
use super::spec::ThinkSpec;
use crate::error::Error;
use farthing_kernels::math::exp;
use std::sync::Arc;

/// Tokens whose lengths are remembered: no marker has more bytes.
const REMEMBERED: usize = 64;

/// Where a sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No span has begun.
    Idle,
    /// Inside a span.
    Think,
    /// Inside, near the budget: the ramp is at work.
    Soft,
    /// Inside, beyond the budget: the end of a sentence is awaited.
    Grace,
    /// The end is being dictated.
    Forcing,
    /// Behind a span.
    Answer,
}

impl Phase {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Idle => "idle",
            Phase::Think => "think",
            Phase::Soft => "soft",
            Phase::Grace => "grace",
            Phase::Forcing => "forcing",
            Phase::Answer => "answer",
        }
    }
}

/// Why thinking ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model wrote the end marker.
    Natural,
    /// The budget was spent.
    Budget,
    /// The budget was spent and the end of a sentence awaited.
    Grace,
    /// A probe found the answer settled.
    EarlyExit,
    /// The text went round in circles.
    Loop,
    /// The model wanted to end its answer without one.
    EosFix,
    /// No more tokens could be spared, or were left.
    Length,
}

impl Stop {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Stop::Natural => "natural",
            Stop::Budget => "budget",
            Stop::Grace => "grace",
            Stop::EarlyExit => "early_exit",
            Stop::Loop => "loop",
            Stop::EosFix => "eos_fix",
            Stop::Length => "length",
        }
    }
}

/// A marker that a token completed: where the text before it ends and the text behind it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// What it was.
    pub role: Role,
    /// The last so many tokens are the marker's, at least in part.
    pub tokens: usize,
    /// Bytes of the first of them that come before the marker.
    pub lead: usize,
    /// Bytes of the last of them that come behind it.
    pub tail: usize,
}

/// What stays the same while a sequence is written.
#[derive(Debug)]
struct Rules {
    spec: Arc<ThinkSpec>,
    /// Whether anything is to be steered; else the controller only follows.
    steers: bool,
    budget: u32,
    grace: u32,
    soft_ratio: f32,
    ramp: Option<Ramp>,
    margin: f32,
    min_think: u32,
    reserve: usize,
    max_tokens: usize,
    loop_guard: bool,
    reentry: Reentry,
    probe: Option<Probe>,
    ban: Vec<u32>,
    close_fallback: Vec<u16>,
}

/// What is dictated.
#[derive(Clone, Copy, Debug)]
enum Script {
    /// The specification's forced close.
    Close,
    /// The rest of a marker from a cursor on; so many tokens have been drawn, the first of which has a lead.
    Rest { marker: u8, cursor: u16, tokens: u8, lead: u8 },
}

/// Follows one sequence and says what may come next, what must, and what each token was.
///
/// ```
/// use farthing::reasoning::{Controller, Lexicon, Policy, Role, ThinkSpec};
/// use std::sync::Arc;
/// // 1 opens, 2 closes, 3 2 is written to close by force.
/// let markers = [(Role::Start, vec![1]), (Role::End, vec![2])];
/// let spec = ThinkSpec::of_ids(Arc::new(Lexicon::default()), &markers, vec![3, 2], vec![], false)?;
/// let mut controller = Controller::new(Arc::new(spec), Some(&Policy::hard(2)), &[1], 100)?;
/// controller.push(7);
/// assert_eq!(controller.forced(), None);
/// controller.push(8);
/// assert_eq!(controller.forced(), Some(3));
/// assert_eq!(controller.peek(&[3, 2, 9]), 3);
/// assert_eq!(controller.peek(&[3, 9]), 1);
/// # Ok::<(), farthing::error::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Controller {
    rules: Arc<Rules>,
    phase: Phase,
    cursors: [u16; MOST_MARKERS],
    /// How much of the forced close the text ends in.
    close_cursor: u16,
    /// Thinking tokens, those of a span that was open in the prompt included.
    count: u32,
    carried: u32,
    forced: u32,
    generated: u32,
    /// The budget of the span under way, as `max_tokens` leaves it.
    budget: u32,
    script: Script,
    at: u32,
    /// Spans that were opened.
    spans: u32,
    stop: Option<Stop>,
    at_boundary: bool,
    missing_bytes: u8,
    /// Line breaks at the end of the text.
    line_breaks: u8,
    in_tool: bool,
    looks: u32,
    probe_due: bool,
    loops: LoopGuard,
    /// Bytes of the last tokens, a ring.
    lengths: [u8; REMEMBERED],
    seen: u32,
}

impl Controller {
    /// A sequence that goes on behind `prompt` with at most `max_tokens` tokens. Without a policy it is followed only.
    ///
    /// # Errors
    ///
    /// [`Policy::validate`]'s; banned tokens of which the forced close is made.
    pub fn new(
        spec: Arc<ThinkSpec>,
        policy: Option<&Policy>,
        prompt: &[u32],
        max_tokens: usize,
    ) -> Result<Controller, Error> {
        let steers = policy.is_some();
        let free = Policy { budget: None, ramp: None, loop_guard: false, ..Policy::default() };
        let policy = policy.unwrap_or(&free);
        policy.validate()?;
        let (budget, grace) = policy.limits();
        let mut ban = policy.ban.clone();
        ban.extend(spec.lexicon().variants(&policy.ban_words));
        ban.sort_unstable();
        ban.dedup();
        let ends = spec.markers().iter().filter(|marker| marker.role == Role::End).filter_map(Marker::ids).flatten();
        if let Some(id) = ends.copied().find(|id| ban.binary_search(id).is_ok()) {
            return Err(Error::argument("ban", format!("token {id}"), "tokens that no end marker is made of"));
        }
        let rules = Rules {
            steers,
            budget,
            grace,
            soft_ratio: policy.soft_ratio,
            ramp: policy.ramp,
            margin: policy.margin,
            min_think: policy.min_think,
            reserve: if steers { policy.reserve(max_tokens) } else { 0 },
            max_tokens,
            loop_guard: policy.loop_guard,
            reentry: policy.reentry,
            probe: policy.probe.clone(),
            ban,
            close_fallback: fallback(spec.forced_close()),
            spec,
        };
        let mut controller = Controller {
            rules: Arc::new(rules),
            phase: Phase::Idle,
            cursors: [0; MOST_MARKERS],
            close_cursor: 0,
            count: 0,
            carried: 0,
            forced: 0,
            generated: 0,
            budget: u32::MAX,
            script: Script::Close,
            at: 0,
            spans: 0,
            stop: None,
            at_boundary: false,
            missing_bytes: 0,
            line_breaks: 0,
            in_tool: false,
            looks: 0,
            probe_due: false,
            loops: LoopGuard::default(),
            lengths: [0; REMEMBERED],
            seen: 0,
        };
        controller.admit(prompt);
        Ok(controller)
    }

    /// Where the prompt leaves the sequence: the last marker decides.
    fn admit(&mut self, prompt: &[u32]) {
        let rules = Arc::clone(&self.rules);
        let spec = &rules.spec;
        if spec.at_once() {
            self.open();
            self.settle();
            return;
        }
        let mut behind = 0;
        let mut closed = false;
        for (index, &token) in prompt.iter().enumerate() {
            let hit = self.read(token, |role| matches!(role, Role::Start | Role::End));
            self.note(token);
            match hit.map(|hit| hit.role) {
                Some(Role::Start) => (self.phase, closed, behind) = (Phase::Think, false, index + 1),
                Some(Role::End) => (self.phase, closed, behind) = (Phase::Idle, true, index + 1),
                _ => {}
            }
        }
        let rest = &prompt[behind..];
        if self.phase == Phase::Think {
            self.carried = rest.len() as u32;
            self.count = self.carried;
            let at_boundary = self.at_boundary || rest.is_empty();
            self.open();
            self.at_boundary = at_boundary;
            // A start marker that was begun inside the span is none.
            self.forget(|role| role != Role::End);
            self.settle();
        } else {
            // A template that closes thinking itself leaves blanks behind it; an earlier turn leaves its answer.
            let blank = !spec.lexicon().is_spelled() || spec.lexicon().spell(rest).trim_ascii().is_empty();
            self.phase = if closed && blank { Phase::Answer } else { Phase::Idle };
            self.forget(|role| role != Role::Start);
        }
    }

    /// Takes in a token that the sequence goes on with; the marker that it completed, if any.
    pub fn push(&mut self, token: u32) -> Option<Change> {
        self.generated += 1;
        match self.phase {
            Phase::Forcing => self.dictated(token),
            Phase::Idle | Phase::Answer => {
                let hit = self.read(token, |role| matches!(role, Role::Start | Role::Header))?;
                let change = self.change(hit);
                if hit.role == Role::Start {
                    self.open();
                    // The rest of the token belongs to the span.
                    self.read_rest(token, hit.tail);
                    self.settle();
                }
                Some(change)
            }
            Phase::Think | Phase::Soft | Phase::Grace => self.think(token),
        }
    }

    fn think(&mut self, token: u32) -> Option<Change> {
        self.count += 1;
        let rules = Arc::clone(&self.rules);
        let hit = self.read(token, |role| matches!(role, Role::End | Role::ToolOpen | Role::ToolClose));
        match hit.map(|hit| hit.role) {
            Some(Role::End) => {
                let change = hit.map(|hit| self.change(hit));
                if let Some(change) = change {
                    self.take_back(change);
                }
                self.phase = Phase::Answer;
                self.stop = Some(Stop::Natural);
                return change;
            }
            Some(role) => self.in_tool = role == Role::ToolOpen,
            None => {}
        }
        if rules.steers {
            self.note(token);
            let circles = rules.loop_guard && self.loops.push(token);
            self.close_cursor = advance(rules.spec.forced_close(), &rules.close_fallback, self.close_cursor, token);
            if circles {
                self.close(Stop::Loop);
            } else {
                self.settle();
                self.look(token);
            }
        }
        None
    }

    fn dictated(&mut self, token: u32) -> Option<Change> {
        let script = self.dictation();
        let (length, expected) = (script.len(), script[self.at as usize]);
        if token != expected {
            // Whoever draws did not obey; what came instead is thinking, and the end is dictated anew.
            self.count += 1;
            (self.script, self.at) = (Script::Close, 0);
            return None;
        }
        self.forced += 1;
        self.at += 1;
        if (self.at as usize) < length {
            return None;
        }
        let (tokens, lead) = match self.script {
            Script::Close => (length - self.rules.spec.message_tokens(), 0),
            Script::Rest { tokens, lead, .. } => (length + tokens as usize, lead as usize),
        };
        self.phase = Phase::Answer;
        self.forget(|_| true);
        Some(Change { role: Role::End, tokens, lead, tail: 0 })
    }

    /// Ends thinking by force from the next token on; does nothing outside of it.
    pub fn close(&mut self, stop: Stop) {
        if !self.is_thinking() {
            return;
        }
        let spec = &self.rules.spec;
        let begun = |(index, marker): (usize, &Marker)| {
            let cursor = self.cursors[index];
            let fits = marker.role == Role::End && spec.rest(index, cursor).is_some();
            fits.then_some((cursor, index as u8))
        };
        let begun = spec.markers().iter().enumerate().filter_map(begun).max();
        (self.script, self.at) = match begun {
            Some((cursor, marker)) => {
                let drawn = self.begun(marker as usize);
                self.take_back(drawn);
                (Script::Rest { marker, cursor, tokens: drawn.tokens as u8, lead: drawn.lead as u8 }, 0)
            }
            // A message that does not fit beside the answer's reserve is left out.
            None if self.close_cursor == 0 && self.left() < self.needed() => {
                (Script::Close, self.rules.spec.message_tokens() as u32)
            }
            None => (Script::Close, u32::from(self.close_cursor)),
        };
        self.phase = Phase::Forcing;
        self.stop = Some(stop);
    }

    /// What a drawn token that ends the answer becomes: inside thinking it ends the thinking instead, and must not be
    /// pushed. Whether it was such a token.
    pub fn redirect(&mut self, token: u32) -> bool {
        let redirected = self.rules.steers && self.is_thinking() && self.is_eos(token);
        if redirected {
            self.close(Stop::EosFix);
        }
        redirected
    }

    /// Whether `token` ends the answer, as the specification has it, and is no end of thinking.
    fn is_eos(&self, token: u32) -> bool {
        let spec = &self.rules.spec;
        let ends = |marker: &Marker| marker.role == Role::End && marker.ids() == Some(&[token][..]);
        spec.eos().contains(&token) && !spec.markers().iter().any(ends)
    }

    /// A span begins behind what was pushed.
    fn open(&mut self) {
        let rules = Arc::clone(&self.rules);
        self.phase = Phase::Think;
        self.spans += 1;
        self.stop = None;
        // Nothing has been said that could be cut.
        (self.close_cursor, self.in_tool, self.at_boundary) = (0, false, true);
        self.loops = LoopGuard::default();
        let spare = self.left().saturating_sub(self.needed());
        self.budget = rules.budget.min(self.count.saturating_add(u32::try_from(spare).unwrap_or(u32::MAX)));
    }

    /// Whether the place behind `token` is one to look ahead from.
    fn look(&mut self, token: u32) {
        let Some(probe) = &self.rules.probe else { return };
        let (line_breaks, paragraph) = self.rules.spec.lexicon().line_breaks(self.line_breaks, token);
        let here = match probe.every {
            Some(every) => self.count.is_multiple_of(every),
            None => paragraph,
        };
        self.line_breaks = line_breaks;
        self.probe_due = here
            && self.is_thinking()
            && self.looks < probe.most
            && self.count >= self.rules.min_think
            && self.missing_bytes == 0
            && !self.in_tool;
    }

    /// Whether the answer is to be looked for before the next token is drawn.
    pub fn probe_due(&self) -> bool {
        self.probe_due
    }

    /// How it is looked for.
    pub fn probe(&self) -> Option<&Probe> {
        self.rules.probe.as_ref()
    }

    /// A look has been taken, or can't be.
    pub fn probed(&mut self) {
        self.probe_due = false;
        self.looks += 1;
    }

    /// The phase that the counters ask for.
    fn settle(&mut self) {
        let rules = &self.rules;
        if !rules.steers || !self.is_thinking() {
            return;
        }
        if self.left() <= self.needed() {
            return self.close(if self.count < rules.budget { Stop::Length } else { Stop::Budget });
        }
        let beyond = self.count.saturating_sub(rules.budget);
        let sentence = self.at_boundary && self.missing_bytes == 0 && !self.in_tool;
        if self.count >= rules.budget && (beyond >= rules.grace || sentence) {
            return self.close(if beyond == 0 || rules.grace == 0 { Stop::Budget } else { Stop::Grace });
        }
        self.phase = if self.count >= rules.budget {
            Phase::Grace
        } else if rules.ramp.is_some() && self.count as f32 >= self.soft_from() {
            Phase::Soft
        } else {
            Phase::Think
        };
    }

    /// Tokens that may still be generated.
    fn left(&self) -> usize {
        self.rules.max_tokens.saturating_sub(self.generated as usize)
    }

    /// Tokens that the end of thinking and the answer take.
    fn needed(&self) -> usize {
        self.rules.reserve + self.rules.spec.forced_close().len()
    }

    fn soft_from(&self) -> f32 {
        self.rules.soft_ratio * self.budget as f32
    }

    /// Moves the cursors of the markers in question over a token; the first that is complete, behind which all cursors
    /// begin anew.
    fn read(&mut self, token: u32, active: impl Fn(Role) -> bool) -> Option<Hit> {
        let rules = Arc::clone(&self.rules);
        let spelling = rules.spec.lexicon().spelling(token);
        self.lengths[self.seen as usize % REMEMBERED] = spelling.len().min(255) as u8;
        self.seen = self.seen.wrapping_add(1);
        let markers = rules.spec.markers();
        let mut found = None;
        for (marker, cursor) in markers.iter().zip(&mut self.cursors) {
            if active(marker.role) {
                found = found.or(marker.push_token(cursor, token));
            }
        }
        if found.is_none() && markers.iter().any(|marker| marker.text().is_some() && active(marker.role)) {
            found = self.read_bytes(spelling, active);
        }
        if found.is_some() {
            self.cursors = [0; MOST_MARKERS];
        }
        found
    }

    fn read_bytes(&mut self, bytes: &[u8], active: impl Fn(Role) -> bool) -> Option<Hit> {
        let markers = self.rules.spec.markers();
        for (index, &byte) in bytes.iter().enumerate() {
            let tail = bytes.len() - index - 1;
            for (marker, cursor) in markers.iter().zip(&mut self.cursors) {
                if active(marker.role)
                    && let Some(hit) = marker.push_byte(cursor, byte, tail)
                {
                    return Some(hit);
                }
            }
        }
        None
    }

    /// Moves the end markers' cursors over what follows a start marker in its token.
    fn read_rest(&mut self, token: u32, tail: usize) {
        if tail > 0 {
            let rules = Arc::clone(&self.rules);
            let spelling = rules.spec.lexicon().spelling(token);
            // An end in the same token is the answer's business no more than the start: it is text.
            self.read_bytes(&spelling[spelling.len() - tail..], |role| role == Role::End);
        }
    }

    /// Where the marker of `hit` lies among the last tokens.
    fn change(&self, hit: Hit) -> Change {
        let Hit { role, length, tail } = hit;
        let bytes = match length {
            Length::Tokens(tokens) => return Change { role, tokens, lead: 0, tail },
            Length::Bytes(bytes) => bytes + tail,
        };
        let (mut tokens, mut covered) = (0, 0);
        while covered < bytes && tokens < REMEMBERED {
            tokens += 1;
            covered += self.lengths[self.seen.wrapping_sub(tokens as u32) as usize % REMEMBERED] as usize;
        }
        Change { role, tokens, lead: covered.saturating_sub(bytes), tail }
    }

    /// What there is of marker `index` at the end of the text.
    fn begun(&self, index: usize) -> Change {
        let (marker, cursor) = (&self.rules.spec.markers()[index], self.cursors[index] as usize);
        let length = if marker.text().is_some() { Length::Bytes(cursor) } else { Length::Tokens(cursor) };
        self.change(Hit { role: marker.role, length, tail: 0 })
    }

    /// Tokens of an end marker are no thinking; those in the prompt were never counted as ours.
    fn take_back(&mut self, marker: Change) {
        let whole = marker.tokens - usize::from(marker.lead > 0);
        self.count -= (whole as u32).min(self.count - self.carried);
    }

    fn note(&mut self, token: u32) {
        let lexicon: &Lexicon = self.rules.spec.lexicon();
        self.at_boundary = lexicon.ends_sentence(token);
        self.missing_bytes = lexicon.missing_bytes(self.missing_bytes, token);
    }

    fn forget(&mut self, of: impl Fn(Role) -> bool) {
        for (marker, cursor) in self.rules.spec.markers().iter().zip(&mut self.cursors) {
            if of(marker.role) {
                *cursor = 0;
            }
        }
    }

    fn dictation(&self) -> &[u32] {
        let spec = &self.rules.spec;
        match self.script {
            Script::Close => spec.forced_close(),
            Script::Rest { marker, cursor, .. } => spec.rest(marker as usize, cursor).unwrap_or_default(),
        }
    }

    /// All tokens that are known to come next.
    pub fn dictated_tokens(&self) -> &[u32] {
        if self.phase == Phase::Forcing { &self.dictation()[self.at as usize..] } else { &[] }
    }

    /// The token that must come next.
    pub fn forced(&self) -> Option<u32> {
        self.dictated_tokens().first().copied()
    }

    /// Tokens at the end of the text that may be part of a marker yet.
    pub fn pending(&self) -> usize {
        if self.phase == Phase::Forcing {
            // The message is thinking, what follows it is the marker.
            return match self.script {
                Script::Close => (self.at as usize).saturating_sub(self.rules.spec.message_tokens()),
                Script::Rest { tokens, .. } => tokens as usize + self.at as usize,
            };
        }
        let begun = (0..self.rules.spec.markers().len()).filter(|&index| self.cursors[index] > 0);
        begun.map(|index| self.begun(index).tokens).max().unwrap_or(0)
    }

    /// Calls `with` for each token that may not come next.
    pub fn banned(&self, with: &mut dyn FnMut(u32)) {
        let rules = &self.rules;
        let (spec, lexicon) = (&rules.spec, rules.spec.lexicon());
        let mut completing = |of: Role| {
            for (marker, &cursor) in spec.markers().iter().zip(&self.cursors) {
                if marker.role == of {
                    marker.completing(cursor, lexicon, with);
                }
            }
        };
        match self.phase {
            Phase::Think | Phase::Soft | Phase::Grace => {
                if self.count < rules.min_think {
                    completing(Role::End);
                    spec.eos().iter().copied().for_each(&mut *with);
                }
                rules.ban.iter().copied().for_each(with);
            }
            Phase::Answer if rules.reentry == Reentry::Ban && rules.steers => completing(Role::Start),
            Phase::Idle | Phase::Answer | Phase::Forcing => {}
        }
    }

    /// Whether [`Controller::banned`] names any token.
    pub fn bans(&self) -> bool {
        let rules = &self.rules;
        match self.phase {
            Phase::Think | Phase::Soft | Phase::Grace => !rules.ban.is_empty() || self.count < rules.min_think,
            Phase::Answer => rules.reentry == Reentry::Ban && rules.steers,
            Phase::Idle | Phase::Forcing => false,
        }
    }

    /// The next token of the end marker, and how much of the way to `greatest logit - margin` its logit is raised.
    pub fn ramp(&self) -> Option<(u32, f32)> {
        let rules = &self.rules;
        let ramp = rules.ramp?;
        if !matches!(self.phase, Phase::Soft | Phase::Grace) || self.count < rules.min_think {
            return None;
        }
        let (from, to) = (self.soft_from(), self.budget as f32);
        let share = if to > from { ((self.count as f32 - from) / (to - from)).clamp(0.0, 1.0) } else { 1.0 };
        let strength = match ramp {
            Ramp::Linear => share,
            Ramp::Sigmoid => {
                let curve = |x: f32| 1.0 / (1.0 + exp(-10.0 * (x - 0.5)));
                (curve(share) - curve(0.0)) / (curve(1.0) - curve(0.0))
            }
        };
        let (token, begun) = self.next_of_end()?;
        Some((token, strength * if self.at_boundary || begun { 1.0 } else { 0.25 }))
    }

    /// How far below the greatest logit the ramp ends.
    pub fn margin(&self) -> f32 {
        self.rules.margin
    }

    /// The token with which the end marker goes on from where it is, or begins; and whether it has begun.
    fn next_of_end(&self) -> Option<(u32, bool)> {
        let spec = &self.rules.spec;
        let ends = spec.markers().iter().enumerate().filter(|(_, marker)| marker.role == Role::End);
        let begun = ends.filter_map(|(index, _)| {
            let cursor = self.cursors[index];
            Some((cursor, *spec.rest(index, cursor)?.first()?))
        });
        let begun = begun.max_by_key(|&(cursor, _)| cursor).map(|(_, token)| (token, true));
        begun.or_else(|| Some((*spec.forced_close().get(spec.message_tokens())?, false)))
    }

    /// Applies to `logits` `(vocab,)` what is known of the next token: a dictated one stands alone at 0; else banned ones
    /// go to -infinity, the end of the answer gives its logit to the end of thinking, and the ramp raises that.
    pub fn process(&self, logits: &mut [f32]) {
        if let Some(token) = self.forced() {
            logits.fill(f32::NEG_INFINITY);
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = 0.0;
            }
            return;
        }
        self.banned(&mut |token| {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        });
        if !self.rules.steers || !self.is_thinking() {
            return;
        }
        let end = self.next_of_end().map(|(token, _)| token as usize).filter(|&token| token < logits.len());
        let Some(end) = end.filter(|_| self.count >= self.rules.min_think) else { return };
        for &eos in self.rules.spec.eos() {
            if self.is_eos(eos) && (eos as usize) < logits.len() {
                logits[end] = logits[end].max(logits[eos as usize]);
                logits[eos as usize] = f32::NEG_INFINITY;
            }
        }
        if let Some((_, strength)) = self.ramp() {
            let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let raised = logits[end] + strength * (greatest - self.margin() - logits[end]);
            if raised > logits[end] {
                logits[end] = raised;
            }
        }
    }

    /// The first of `drafts` that may not stand: something else is dictated there, or it is banned, or it would end the
    /// answer inside thinking. Their number when all may.
    pub fn peek(&self, drafts: &[u32]) -> usize {
        let mut ahead = self.clone();
        let stands = |token: &u32| {
            let stands = ahead.permits(*token);
            ahead.push(*token);
            stands
        };
        drafts.iter().map(stands).position(|stands| !stands).unwrap_or(drafts.len())
    }

    /// Whether `token` may come next.
    pub fn permits(&self, token: u32) -> bool {
        if let Some(forced) = self.forced() {
            return forced == token;
        }
        if self.rules.steers && self.is_thinking() && self.is_eos(token) {
            return false;
        }
        let mut banned = false;
        if self.bans() {
            self.banned(&mut |other| banned |= other == token);
        }
        !banned
    }

    /// Whether anything is steered.
    pub fn steers(&self) -> bool {
        self.rules.steers
    }

    /// Whether the next token is thinking, unless it ends it.
    pub fn is_thinking(&self) -> bool {
        matches!(self.phase, Phase::Think | Phase::Soft | Phase::Grace)
    }

    /// Where the sequence is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether a span has been opened, by the model or in the prompt.
    pub fn opened(&self) -> bool {
        self.spans > 0
    }

    /// Why the last span ended; `None` before that.
    pub fn stop(&self) -> Option<Stop> {
        self.stop
    }

    /// Generated tokens inside thinking spans, drawn ones.
    pub fn thinking_tokens(&self) -> usize {
        (self.count - self.carried) as usize
    }

    /// Generated tokens that were dictated.
    pub fn forced_tokens(&self) -> usize {
        self.forced as usize
    }

    /// All other generated tokens: the answer, markers that the model wrote itself among it.
    pub fn answer_tokens(&self) -> usize {
        self.generated as usize - self.thinking_tokens() - self.forced_tokens()
    }

    /// What it follows.
    pub fn spec(&self) -> &Arc<ThinkSpec> {
        &self.rules.spec
    }
}
