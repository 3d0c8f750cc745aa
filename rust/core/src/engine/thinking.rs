//! The thinking of one answer under way: what may be drawn, what is dictated, and which text belongs where.

use super::look::Look;
use crate::reasoning::{Change, Controller, Role, Settled, Stop};
use farthing_kernels::sample::{Lift, Sampling};
use std::collections::VecDeque;

/// A piece of text and where it belongs.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Piece {
    Thinking(String),
    Answer(String),
}

/// An answer's controller and the text that it divides.
#[derive(Clone, Debug)]
pub(super) struct Thinking {
    pub(super) controller: Controller,
    /// The look ahead that the text waits for.
    pub(super) look: Option<Look>,
    pub(super) settled: Settled,
    /// The texts of the last tokens, which may be part of a marker.
    held: VecDeque<String>,
    /// Whether what is let out is thinking.
    inside: bool,
    /// Whether blanks are left out, as those behind a marker are.
    fresh: bool,
    /// What was thought so far.
    text: String,
    /// Room for the allowed tokens.
    allowed: Vec<u64>,
}

impl Thinking {
    pub(super) fn new(controller: Controller) -> Thinking {
        // A close that is dictated from the first token on ends a span.
        let inside = controller.is_thinking() || controller.forced().is_some();
        Thinking {
            controller,
            look: None,
            settled: Settled::default(),
            held: VecDeque::new(),
            inside,
            fresh: inside,
            text: String::new(),
            allowed: Vec::new(),
        }
    }

    /// Puts into `sampling` what may be drawn of `vocab` tokens.
    pub(super) fn constrain<'a>(&'a mut self, sampling: &mut Sampling<'a>, vocab: usize) {
        if self.controller.bans() {
            let allowed = &mut self.allowed;
            allowed.clear();
            allowed.resize(vocab.div_ceil(64), u64::MAX);
            self.controller.banned(&mut |token| {
                if let Some(word) = allowed.get_mut(token as usize / 64) {
                    *word &= !(1 << (token % 64));
                }
            });
            sampling.allowed = Some(allowed);
        }
        let margin = self.controller.margin();
        sampling.lift = self.controller.ramp().map(|(token, strength)| Lift { token, strength, margin });
    }

    /// Takes in a token whose text is `piece`; whether it ended the thinking, and the text that is certain now.
    pub(super) fn take(&mut self, token: u32, piece: String) -> (bool, Vec<Piece>) {
        let change = self.controller.push(token);
        self.held.push_back(piece);
        let mut out = Vec::new();
        match change {
            None => self.let_out(self.controller.pending(), &mut out),
            Some(change) => self.turn(change, &mut out),
        }
        (change.is_some_and(|change| change.role == Role::End), out)
    }

    /// Lets out everything but the last `keep` pieces.
    fn let_out(&mut self, keep: usize, out: &mut Vec<Piece>) {
        let certain = self.held.len().saturating_sub(keep);
        let text: String = self.held.drain(..certain).collect();
        self.emit(text, out);
    }

    /// The last tokens were a marker: what stands before it goes out, it does not, what stands behind begins anew.
    fn turn(&mut self, change: Change, out: &mut Vec<Piece>) {
        self.let_out(change.tokens, out);
        let marker: String = self.held.drain(..).collect();
        let written = self.controller.spec().text_of(change.role);
        let place = written.and_then(|written| Some((marker.find(written)?, written.len())));
        let (lead, tail) = place.map_or(("", ""), |(at, length)| (&marker[..at], &marker[at + length..]));
        self.emit(lead.to_owned(), out);
        match change.role {
            Role::Start => self.inside = true,
            Role::End => self.inside = false,
            Role::Header | Role::ToolOpen | Role::ToolClose => {}
        }
        self.fresh = true;
        self.emit(tail.to_owned(), out);
    }

    fn emit(&mut self, text: String, out: &mut Vec<Piece>) {
        let text = if self.fresh { text.trim_start().to_owned() } else { text };
        if text.is_empty() {
            return;
        }
        self.fresh = false;
        if self.inside {
            self.text.push_str(&text);
            out.push(Piece::Thinking(text));
        } else {
            out.push(Piece::Answer(text));
        }
    }

    /// The text held back, `rest` behind it, when nothing more comes.
    pub(super) fn finish(&mut self, rest: String) -> Vec<Piece> {
        self.held.push_back(rest);
        let mut out = Vec::new();
        self.let_out(0, &mut out);
        out
    }

    /// What was thought and why it ended; nothing when no span was opened.
    pub(super) fn outcome(&mut self) -> (Option<String>, Option<Stop>) {
        if !self.controller.opened() {
            return (None, None);
        }
        let mut text = std::mem::take(&mut self.text);
        text.truncate(text.trim_end().len());
        (Some(text), Some(self.controller.stop().unwrap_or(Stop::Length)))
    }
}
