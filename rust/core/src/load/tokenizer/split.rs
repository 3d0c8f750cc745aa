//! Cutting text into the words that byte pair encoding works on.
//!
//! Patterns run in time linear in the text: `\s+(?!\S)|\s+`, the ending that nearly all tokenizers share, is the one
//! look-ahead they need, and it is done by hand: a run of blanks before a word gives its last blank to the word.

use super::error::{TokenizerError, shortened};
use regex_automata::{Anchored, Input, PatternID, meta, util::syntax};
use std::borrow::Cow;

/// GPT-2's pattern.
pub(in crate::load) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const LONGEST_PATTERN: usize = 4096;
/// Bytes a compiled pattern may take; a class such as `\p{L}` takes about 10 KB.
const COMPILED_BYTES: usize = 1 << 20;
const BLANKS: &str = r"|\s+(?!\S)|\s+";

/// What becomes of a match.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::load) enum Behavior {
    Isolated,
    Removed,
    MergedWithPrevious,
    MergedWithNext,
    Contiguous,
}

/// When a blank is put before text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::load) enum Prepend {
    Always,
    First,
    Never,
}

/// One step of the cutting; each works on the pieces the one before it left.
pub(in crate::load) enum Splitter {
    Pattern(Box<Pattern>),
    /// Every occurrence of a text is a match.
    Literal {
        text: String,
        behavior: Behavior,
        invert: bool,
    },
    /// Characters that are numbers are words of their own, or runs of them are.
    Digits {
        individual: bool,
    },
    /// A blank before text that does not start with one.
    PrefixSpace,
    /// Blanks become `replacement`, and words start with it.
    Metaspace {
        replacement: String,
        prepend: Prepend,
        split: bool,
    },
}

pub(in crate::load) struct Pattern {
    regex: meta::Regex,
    /// The regular expression that stands for `\s+(?!\S)|\s+`.
    blanks: Option<PatternID>,
    behavior: Behavior,
    invert: bool,
}

impl Pattern {
    pub(in crate::load) fn new(pattern: &str, behavior: Behavior, invert: bool) -> Result<Self, TokenizerError> {
        if pattern.len() > LONGEST_PATTERN {
            let (got, expected) = (pattern.len() as u64, LONGEST_PATTERN as u64);
            return Err(TokenizerError::TooLarge { what: "split pattern", unit: "bytes", got, expected });
        }
        let head = pattern.strip_suffix(BLANKS);
        let sources: &[&str] = match &head {
            Some(head) => &[head, r"\s+"],
            None => &[pattern],
        };
        let config = meta::Config::new().nfa_size_limit(Some(COMPILED_BYTES)).onepass_size_limit(Some(COMPILED_BYTES));
        let regex = meta::Builder::new()
            .configure(config)
            .syntax(syntax::Config::new().nest_limit(50))
            .build_many(sources)
            .map_err(|error| {
                use std::error::Error;
                let got = error.source().map_or_else(|| error.to_string(), ToString::to_string);
                let got = got.lines().next_back().unwrap_or_default().to_owned();
                TokenizerError::Pattern { pattern: shortened(pattern), got }
            })?;
        Ok(Self { regex, blanks: head.map(|_| PatternID::must(1)), behavior, invert })
    }

    /// Calls `segment(start, end, matched)` for each match and each gap, in order.
    fn segments(&self, text: &str, mut segment: impl FnMut(usize, usize, bool)) {
        let (mut gap, mut at) = (0, 0);
        while at <= text.len() {
            let Some(found) = self.regex.search(&Input::new(text).range(at..).anchored(Anchored::No)) else { break };
            let (start, mut end) = (found.start(), found.end());
            if end == start {
                // An empty match cuts nothing; go on behind the next character.
                at = end + text[end..].chars().next().map_or(1, char::len_utf8);
                continue;
            }
            if Some(found.pattern()) == self.blanks && end < text.len() {
                let last = text[start..end].chars().next_back().map_or(0, char::len_utf8);
                if start + last < end {
                    end -= last;
                }
            }
            if gap < start {
                segment(gap, start, self.invert);
            }
            segment(start, end, !self.invert);
            (gap, at) = (end, end);
        }
        if gap < text.len() {
            segment(gap, text.len(), self.invert);
        }
    }
}

/// Cuts `text` by all steps in turn. `first` says that it stands at the beginning.
pub(in crate::load) fn split(steps: &[Splitter], text: &str, first: bool, emit: &mut dyn FnMut(&str)) {
    let Some((step, rest)) = steps.split_first() else {
        if !text.is_empty() {
            emit(text);
        }
        return;
    };
    let mut next = |start: usize, end: usize| split(rest, &text[start..end], first && start == 0, emit);
    match step {
        Splitter::Pattern(pattern) => {
            regroup(pattern.behavior, |segment| pattern.segments(text, segment), &mut next);
        }
        Splitter::Literal { text: literal, behavior, invert } => {
            regroup(*behavior, |segment| occurrences(text, literal, *invert, segment), &mut next);
        }
        Splitter::Digits { individual } => {
            let behavior = if *individual { Behavior::Isolated } else { Behavior::Contiguous };
            regroup(behavior, |segment| digits(text, segment), &mut next);
        }
        Splitter::PrefixSpace => {
            if text.starts_with(' ') {
                split(rest, text, first, emit);
            } else {
                split(rest, &format!(" {text}"), first, emit);
            }
        }
        Splitter::Metaspace { replacement, prepend, split: cut } => {
            let mut text = Cow::Borrowed(text);
            if text.contains(' ') {
                text = Cow::Owned(text.replace(' ', replacement));
            }
            let wanted = *prepend == Prepend::Always || *prepend == Prepend::First && first;
            if wanted && !text.starts_with(replacement.as_str()) {
                text = Cow::Owned(format!("{replacement}{text}"));
            }
            let mut next = |start: usize, end: usize| split(rest, &text[start..end], first && start == 0, emit);
            if *cut {
                let found =
                    |segment: &mut dyn FnMut(usize, usize, bool)| occurrences(&text, replacement, false, segment);
                regroup(Behavior::MergedWithNext, found, &mut next);
            } else {
                next(0, text.len());
            }
        }
    }
}

/// Joins matches and gaps as `behavior` says.
fn regroup(
    behavior: Behavior,
    segments: impl FnOnce(&mut dyn FnMut(usize, usize, bool)),
    emit: &mut dyn FnMut(usize, usize),
) {
    // The group that is still growing: (start, end, whether its last segment matched).
    let mut open: Option<(usize, usize, bool)> = None;
    segments(&mut |start, end, matched| {
        let joins = open.is_some_and(|(_, _, before)| match behavior {
            Behavior::Isolated | Behavior::Removed => false,
            Behavior::MergedWithPrevious => matched && !before,
            Behavior::MergedWithNext => before && !matched,
            Behavior::Contiguous => matched == before,
        });
        match &mut open {
            Some(group) if joins => (group.1, group.2) = (end, matched),
            _ => {
                if let Some((start, end, matched)) = open.replace((start, end, matched))
                    && !(matched && behavior == Behavior::Removed)
                {
                    emit(start, end);
                }
            }
        }
    });
    if let Some((start, end, matched)) = open
        && !(matched && behavior == Behavior::Removed)
    {
        emit(start, end);
    }
}

fn occurrences(text: &str, literal: &str, invert: bool, segment: &mut dyn FnMut(usize, usize, bool)) {
    let mut gap = 0;
    for (start, found) in text.match_indices(literal).filter(|(_, found)| !found.is_empty()) {
        if gap < start {
            segment(gap, start, invert);
        }
        gap = start + found.len();
        segment(start, gap, !invert);
    }
    if gap < text.len() {
        segment(gap, text.len(), invert);
    }
}

fn digits(text: &str, segment: &mut dyn FnMut(usize, usize, bool)) {
    let mut gap = 0;
    for (start, character) in text.char_indices().filter(|(_, character)| character.is_numeric()) {
        if gap < start {
            segment(gap, start, false);
        }
        gap = start + character.len_utf8();
        segment(start, gap, true);
    }
    if gap < text.len() {
        segment(gap, text.len(), false);
    }
}
