//! Token ids to text while they are generated, and the texts that end an answer.

use crate::load::Tokenizer;
use std::sync::Arc;

/// Turns tokens into text one by one.
///
/// A character comes out when its last byte is there, never in part, and the pieces joined are `decode(all, true)`:
/// bytes that turn out not to be UTF-8 become U+FFFD. A token costs its own length, however many came before.
///
/// ```
/// use farthing::detokenize::Detokenizer;
/// use farthing::load::{Tokenizer, Vocabulary};
/// use std::sync::Arc;
///
/// let vocabulary = Vocabulary {
///     model: "gpt2".into(),
///     pre: "gpt-2".into(),
///     tokens: ["Ã", "©", "a"].map(String::from).into(),
///     merges: Some(Vec::new()),
///     ..Vocabulary::default()
/// };
/// let mut detokenizer = Detokenizer::new(Arc::new(Tokenizer::from_vocabulary(vocabulary)?));
/// assert_eq!([detokenizer.push(0), detokenizer.push(1), detokenizer.push(2)], ["", "é", "a"]);
/// # Ok::<(), farthing::load::TokenizerError>(())
/// ```
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Bytes of a character that is not complete.
    pending: Vec<u8>,
    /// Whether the next character, if it is a blank, is the one that decoding drops.
    at_start: bool,
}

impl Detokenizer {
    /// A text without tokens yet; special tokens will leave no trace in it.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        let at_start = tokenizer.strips_blank();
        Self { tokenizer, pending: Vec::new(), at_start }
    }

    /// The text that `token` completes, often the token's own, sometimes nothing.
    pub fn push(&mut self, token: u32) -> String {
        self.tokenizer.spell(token, true, &mut self.pending);
        let mut text = String::with_capacity(self.pending.len());
        let mut done = 0;
        while done < self.pending.len() {
            match std::str::from_utf8(&self.pending[done..]) {
                Ok(valid) => {
                    text.push_str(valid);
                    done = self.pending.len();
                }
                Err(error) => {
                    let valid = done + error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[done..valid]));
                    done = valid;
                    let Some(invalid) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    done += invalid;
                }
            }
        }
        self.pending.drain(..done);
        self.strip(text)
    }

    /// The end of the text: U+FFFD if its last character stayed incomplete.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        self.strip(text)
    }

    fn strip(&mut self, text: String) -> String {
        if !self.at_start || text.is_empty() {
            return text;
        }
        self.at_start = false;
        text.strip_prefix(' ').map(str::to_owned).unwrap_or(text)
    }
}

/// A stop text that would end every answer at once.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("an empty text at position {index}")]
pub struct EmptyStop {
    /// Its position in the list.
    pub index: usize,
}

/// Where an answer stopped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StopMatch {
    /// Position of the stop text in the list.
    pub index: usize,
    /// Bytes of the answer before the stop text.
    pub offset: usize,
}

/// Text that is safe to show, and whether the answer ends with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Text before any stop text.
    pub text: String,
    /// Whether a stop text follows.
    pub stopped: bool,
}

/// Ends a text at the first of several stop texts, wherever the pieces it comes in are cut.
///
/// The stop text that is complete first wins; of two that are complete at once, the longer. Text is held back only
/// while it may still become a stop text.
///
/// ```
/// use farthing::detokenize::StopStrings;
///
/// let mut stops = StopStrings::new(&["\n\n".into(), "User:".into()])?;
/// assert_eq!(stops.push("Yes. Us").text, "Yes. ");
/// assert_eq!(stops.push("e it.\nUser").text, "Use it.\n");
/// let found = stops.push(": and");
/// assert!(found.stopped && found.text.is_empty());
/// # Ok::<(), farthing::detokenize::EmptyStop>(())
/// ```
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text that was not let out: it ends with the beginning of a stop text.
    held: String,
    /// Bytes let out.
    shown: usize,
    matched: Option<StopMatch>,
}

impl StopStrings {
    /// Stop texts, each of at least one character.
    ///
    /// # Errors
    ///
    /// [`EmptyStop`] for a text without characters.
    pub fn new(stops: &[String]) -> Result<Self, EmptyStop> {
        match stops.iter().position(String::is_empty) {
            Some(index) => Err(EmptyStop { index }),
            None => Ok(Self { stops: stops.to_vec(), held: String::new(), shown: 0, matched: None }),
        }
    }

    /// Takes in a piece. After a match, nothing more comes out.
    pub fn push(&mut self, piece: &str) -> Found {
        if self.stopped() {
            return Found { text: String::new(), stopped: true };
        }
        self.held.push_str(piece);
        let occurrences = self.stops.iter().enumerate().filter_map(|(index, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        });
        if let Some((_, start, index)) = occurrences.min() {
            self.matched = Some(StopMatch { index, offset: self.shown + start });
            self.held.truncate(start);
            return Found { text: self.finish(), stopped: true };
        }
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let earliest = self.held.len().saturating_sub(longest.saturating_sub(1));
        let may_stop = |start: &usize| {
            self.held.is_char_boundary(*start) && self.stops.iter().any(|stop| stop.starts_with(&self.held[*start..]))
        };
        let keep = (earliest..self.held.len()).find(may_stop).unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        let text = std::mem::replace(&mut self.held, rest);
        self.shown += text.len();
        Found { text, stopped: false }
    }

    /// The text held back, when the answer ends without a stop text.
    pub fn finish(&mut self) -> String {
        self.shown += self.held.len();
        std::mem::take(&mut self.held)
    }

    /// Whether a stop text was found.
    pub fn stopped(&self) -> bool {
        self.matched.is_some()
    }

    /// The stop text that was found, and where.
    pub fn matched(&self) -> Option<StopMatch> {
        self.matched
    }
}
