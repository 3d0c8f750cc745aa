//! Tokens that are found in text before anything else: `<|im_start|>`, runs of newlines.

use super::error::TokenizerError;
use aho_corasick::{AhoCorasick, AhoCorasickKind, MatchKind};

/// The most added tokens, and the most bytes they may have together.
pub(in crate::load) const MOST_ADDED: usize = 1 << 16;
const MOST_BYTES: usize = 1 << 20;

/// An added token and what it takes along.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::load) struct Added {
    pub(in crate::load) id: u32,
    pub(in crate::load) text: String,
    /// Found only where no word character touches it.
    pub(in crate::load) single_word: bool,
    /// Takes the blanks before it.
    pub(in crate::load) left: bool,
    /// Takes the blanks behind it.
    pub(in crate::load) right: bool,
}

/// Finds added tokens: leftmost first, the longest of those.
pub(in crate::load) struct Matcher {
    automaton: AhoCorasick,
    tokens: Vec<Added>,
}

impl Matcher {
    /// Nothing when there is nothing to find.
    pub(in crate::load) fn new(mut tokens: Vec<Added>) -> Result<Option<Self>, TokenizerError> {
        tokens.retain(|token| !token.text.is_empty());
        let bytes: usize = tokens.iter().map(|token| token.text.len()).sum();
        let too_large = |unit, got: usize, expected: usize| {
            Err(TokenizerError::TooLarge { what: "added tokens", unit, got: got as u64, expected: expected as u64 })
        };
        if tokens.len() > MOST_ADDED {
            return too_large("tokens", tokens.len(), MOST_ADDED);
        }
        if bytes > MOST_BYTES {
            return too_large("bytes", bytes, MOST_BYTES);
        }
        if tokens.is_empty() {
            return Ok(None);
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .build(tokens.iter().map(|token| token.text.as_str()));
        match automaton {
            Ok(automaton) => Ok(Some(Self { automaton, tokens })),
            Err(_) => too_large("bytes", bytes, MOST_BYTES),
        }
    }

    /// Calls `found(start, end, token)` for the added tokens and the text between them, in order.
    pub(in crate::load) fn cut(&self, text: &str, mut found: impl FnMut(usize, usize, Option<u32>)) {
        let mut done = 0;
        for hit in self.automaton.find_iter(text) {
            let token = &self.tokens[hit.pattern().as_usize()];
            let (mut start, mut end) = (hit.start(), hit.end());
            if token.single_word && !stands_alone(text, start, end) {
                continue;
            }
            if token.left {
                start = text[..start].trim_end().len().max(done);
            }
            if token.right {
                end = text.len() - text[end..].trim_start().len();
            }
            // A token before this one may have taken its first characters along.
            if start < done {
                continue;
            }
            if done < start {
                found(done, start, None);
            }
            found(start, end, Some(token.id));
            done = end;
        }
        if done < text.len() {
            found(done, text.len(), None);
        }
    }
}

fn stands_alone(text: &str, start: usize, end: usize) -> bool {
    let word = |character: char| character.is_alphanumeric() || character == '_';
    !text[..start].chars().next_back().is_some_and(word) && !text[end..].chars().next().is_some_and(word)
}
