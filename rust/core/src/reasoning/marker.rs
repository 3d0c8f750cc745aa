//! Markers in a stream of tokens: by id where a marker is a token, else by the text that tokens spell, wherever they cut
//! it. Knuth–Morris–Pratt, so that no occurrence is missed and a token costs its own length.

use super::lexicon::Lexicon;
use std::sync::OnceLock;

/// Most markers of a specification.
pub const MOST_MARKERS: usize = 16;

/// What a marker stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Opens a thinking span.
    Start,
    /// Ends it.
    End,
    /// Stands between the end of thinking and the answer, part of neither.
    Header,
    /// Opens a tool call.
    ToolOpen,
    /// Ends it.
    ToolClose,
}

/// A marker and how it is recognised.
#[derive(Debug)]
pub struct Marker {
    /// What it stands for.
    pub role: Role,
    pattern: Pattern,
}

#[derive(Debug)]
enum Pattern {
    Ids { ids: Vec<u32>, fallback: Vec<u16> },
    Text { bytes: Vec<u8>, fallback: Vec<u16>, completing: OnceLock<Vec<Vec<u32>>> },
}

/// Where a marker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hit {
    pub(super) role: Role,
    /// Length of the marker: tokens, or bytes of text.
    pub(super) length: Length,
    /// Bytes of the token behind the marker.
    pub(super) tail: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Length {
    Tokens(usize),
    Bytes(usize),
}

impl Marker {
    /// A marker of these tokens, at least one.
    pub fn of_ids(role: Role, ids: &[u32]) -> Marker {
        Marker { role, pattern: Pattern::Ids { ids: ids.to_vec(), fallback: fallback(ids) } }
    }

    /// A marker of this text, at least one byte, however tokens cut it.
    pub fn of_text(role: Role, text: &str) -> Marker {
        let bytes = text.as_bytes().to_vec();
        Marker { role, pattern: Pattern::Text { fallback: fallback(&bytes), bytes, completing: OnceLock::new() } }
    }

    /// The tokens of a marker that is known by ids.
    pub fn ids(&self) -> Option<&[u32]> {
        match &self.pattern {
            Pattern::Ids { ids, .. } => Some(ids),
            Pattern::Text { .. } => None,
        }
    }

    pub(super) fn text(&self) -> Option<&[u8]> {
        match &self.pattern {
            Pattern::Ids { .. } => None,
            Pattern::Text { bytes, .. } => Some(bytes),
        }
    }

    /// Takes in a token at `cursor`; whether the marker is complete with it.
    pub(super) fn push_token(&self, cursor: &mut u16, token: u32) -> Option<Hit> {
        let Pattern::Ids { ids, fallback } = &self.pattern else { return None };
        *cursor = advance(ids, fallback, *cursor, token);
        let length = Length::Tokens(ids.len());
        (*cursor as usize == ids.len()).then_some(Hit { role: self.role, length, tail: 0 })
    }

    /// Takes in a byte at `cursor`, with `tail` more of the same token to come; whether the marker is complete with it.
    pub(super) fn push_byte(&self, cursor: &mut u16, byte: u8, tail: usize) -> Option<Hit> {
        let Pattern::Text { bytes, fallback, .. } = &self.pattern else { return None };
        *cursor = advance(bytes, fallback, *cursor, byte);
        let length = Length::Bytes(bytes.len());
        (*cursor as usize == bytes.len()).then_some(Hit { role: self.role, length, tail })
    }

    /// Calls `with` for each token that completes the marker at `cursor`.
    pub(super) fn completing(&self, cursor: u16, lexicon: &Lexicon, with: &mut dyn FnMut(u32)) {
        match &self.pattern {
            Pattern::Ids { ids, .. } => {
                if cursor as usize + 1 == ids.len() {
                    with(ids[cursor as usize]);
                }
            }
            Pattern::Text { bytes, fallback, completing } => {
                let lists = completing.get_or_init(|| completions(bytes, fallback, lexicon));
                lists[cursor as usize].iter().copied().for_each(with);
            }
        }
    }
}

/// For each cursor the tokens that complete the text from there.
fn completions(bytes: &[u8], fallback: &[u16], lexicon: &Lexicon) -> Vec<Vec<u32>> {
    let completes = |cursor: u16, token: u32| {
        let mut at = cursor;
        lexicon.spelling(token).iter().any(|&byte| {
            at = advance(bytes, fallback, at, byte);
            at as usize == bytes.len()
        })
    };
    let tokens = 0..lexicon.len() as u32;
    let from = |cursor| tokens.clone().filter(|&token| completes(cursor, token)).collect();
    (0..=bytes.len() as u16).map(from).collect()
}

/// For each prefix the longest proper one of which it ends in.
pub(super) fn fallback<T: Copy + Eq>(pattern: &[T]) -> Vec<u16> {
    let mut table = vec![0; pattern.len()];
    for index in 1..pattern.len() {
        // The table is complete up to here, and the state is below `index`.
        table[index] = advance(pattern, &table[..index], table[index - 1], pattern[index]);
    }
    table
}

/// Length of the longest prefix of `pattern` that the text ends in, when it was `state` before `symbol`.
pub(super) fn advance<T: Copy + Eq>(pattern: &[T], fallback: &[u16], mut state: u16, symbol: T) -> u16 {
    loop {
        if pattern.get(state as usize) == Some(&symbol) {
            return state + 1;
        }
        if state == 0 {
            return 0;
        }
        state = fallback[state as usize - 1];
    }
}
