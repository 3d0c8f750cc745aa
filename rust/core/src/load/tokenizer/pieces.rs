//! The tokens of a vocabulary: id to text, text to id, id to bytes.
//!
//! Texts lie one after another in one string; the table is open addressing over ids. A vocabulary of 262,144 tokens
//! takes a few MB and builds in tens of milliseconds.

use super::error::{TokenizerError, shortened};
use std::hash::{BuildHasher, RandomState};

/// The most tokens a vocabulary may have; the largest real ones have a quarter of it.
pub(in crate::load) const MOST_TOKENS: usize = 1 << 20;
/// The longest token.
pub(in crate::load) const LONGEST_TOKEN: usize = 1 << 16;
const VACANT: u32 = u32::MAX;

/// How a token reads when it is decoded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::load) enum Kind {
    /// No token has this id.
    Absent,
    /// Spelled in the vocabulary's alphabet.
    Normal,
    /// Spelled as it is, matched in text before anything else.
    Added,
    /// As `Added`, but left out of text by `skip_special`.
    Special,
    /// One byte, `<0x0A>`.
    Byte(u8),
    /// A row without text.
    Unused,
}

/// How normal tokens spell text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::load) enum Alphabet {
    /// GPT-2's: one letter for each byte.
    Bytes,
    /// `SentencePiece`'s: `▁` is a blank.
    Blanks,
}

pub(in crate::load) struct Pieces {
    text: String,
    ends: Vec<u32>,
    kinds: Vec<Kind>,
    table: Vec<u32>,
    hasher: RandomState,
    letters: Box<[Option<u8>; 512]>,
}

impl Pieces {
    /// Tokens `0..kinds.len()`; `text(i)` is the text of token i.
    pub(in crate::load) fn new<'t>(kinds: Vec<Kind>, text: impl Fn(usize) -> &'t str) -> Result<Self, TokenizerError> {
        let count = kinds.len();
        if count == 0 {
            return Err(TokenizerError::Empty);
        }
        check_count(count)?;
        let mut pieces = Self {
            text: String::with_capacity((0..count).map(|id| text(id).len()).sum()),
            ends: Vec::with_capacity(count),
            kinds,
            table: vec![VACANT; (count * 2).next_power_of_two()],
            hasher: RandomState::new(),
            letters: letters(),
        };
        for id in 0..count {
            let piece = text(id);
            check_length(id as u32, piece.len())?;
            pieces.text.push_str(piece);
            pieces.ends.push(pieces.text.len() as u32);
            if pieces.kinds[id] != Kind::Absent && !piece.is_empty() {
                pieces.index(id as u32)?;
            }
        }
        Ok(pieces)
    }

    fn index(&mut self, id: u32) -> Result<(), TokenizerError> {
        let mut slot = self.slot(self.get(id));
        while self.table[slot] != VACANT {
            if self.get(self.table[slot]) == self.get(id) {
                let token = shortened(self.get(id));
                return Err(TokenizerError::DuplicateToken { token, first: self.table[slot], second: id });
            }
            slot = (slot + 1) & (self.table.len() - 1);
        }
        self.table[slot] = id;
        Ok(())
    }

    fn slot(&self, text: &str) -> usize {
        self.hasher.hash_one(text) as usize & (self.table.len() - 1)
    }

    pub(in crate::load) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of all tokens.
    pub(in crate::load) fn bytes(&self) -> usize {
        self.text.len()
    }

    /// The text of a token as the vocabulary has it; nothing for ids past the end.
    pub(in crate::load) fn get(&self, id: u32) -> &str {
        let id = id as usize;
        match self.ends.get(id) {
            Some(&end) => &self.text[id.checked_sub(1).map_or(0, |before| self.ends[before] as usize)..end as usize],
            None => "",
        }
    }

    pub(in crate::load) fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Absent)
    }

    pub(in crate::load) fn find(&self, text: &str) -> Option<u32> {
        let mut slot = self.slot(text);
        while self.table[slot] != VACANT {
            if self.get(self.table[slot]) == text {
                return Some(self.table[slot]);
            }
            slot = (slot + 1) & (self.table.len() - 1);
        }
        None
    }

    /// Appends the bytes a token stands for.
    pub(in crate::load) fn spell(&self, id: u32, alphabet: Alphabet, out: &mut Vec<u8>) {
        let text = self.get(id);
        match (self.kind(id), alphabet) {
            (Kind::Absent | Kind::Unused, _) => {}
            (Kind::Byte(byte), _) => out.push(byte),
            (Kind::Added | Kind::Special, _) => out.extend_from_slice(text.as_bytes()),
            (Kind::Normal, Alphabet::Bytes) => {
                let start = out.len();
                for letter in text.chars() {
                    let Some(byte) = self.letters.get(letter as usize).copied().flatten() else {
                        // A token outside the alphabet was added by hand and spells itself.
                        out.truncate(start);
                        out.extend_from_slice(text.as_bytes());
                        return;
                    };
                    out.push(byte);
                }
            }
            (Kind::Normal, Alphabet::Blanks) => {
                for (i, part) in text.split('▁').enumerate() {
                    if i > 0 {
                        out.push(b' ');
                    }
                    out.extend_from_slice(part.as_bytes());
                }
            }
        }
    }
}

pub(in crate::load) fn check_count(count: usize) -> Result<(), TokenizerError> {
    if count > MOST_TOKENS {
        let (got, expected) = (count as u64, MOST_TOKENS as u64);
        return Err(TokenizerError::TooLarge { what: "vocabulary", unit: "tokens", got, expected });
    }
    Ok(())
}

pub(in crate::load) fn check_length(id: u32, length: usize) -> Result<(), TokenizerError> {
    if length > LONGEST_TOKEN {
        return Err(TokenizerError::TokenLength { id, got: length as u64, expected: LONGEST_TOKEN as u64 });
    }
    Ok(())
}

/// The byte that `<0x0A>` names: two upper-case hexadecimal digits.
pub(in crate::load) fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let valid = digits.len() == 2 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'A'..=b'F'));
    valid.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// GPT-2's letter for a byte: printable bytes are themselves, the others follow from U+0100 on.
pub(in crate::load) fn letter(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return byte as char;
    }
    let before = (0..byte).filter(|&other| !printable(other)).count() as u32;
    char::from_u32(256 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

fn letters() -> Box<[Option<u8>; 512]> {
    let mut letters = Box::new([None; 512]);
    for byte in 0..=255 {
        letters[letter(byte) as usize] = Some(byte);
    }
    letters
}
