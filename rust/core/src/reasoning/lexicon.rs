//! What the control of thinking has to know of a vocabulary: how tokens are spelled, which end a sentence, which end in
//! the middle of a character.

use crate::load::Tokenizer;

/// A set of token ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BitSet(Vec<u64>);

impl BitSet {
    /// Adds a token.
    pub fn insert(&mut self, token: u32) {
        let word = token as usize / 64;
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (token % 64);
    }

    /// Whether the token is in the set.
    pub fn contains(&self, token: u32) -> bool {
        self.0.get(token as usize / 64).is_some_and(|word| word >> (token % 64) & 1 == 1)
    }
}

impl FromIterator<u32> for BitSet {
    fn from_iter<I: IntoIterator<Item = u32>>(tokens: I) -> Self {
        let mut set = BitSet::default();
        tokens.into_iter().for_each(|token| set.insert(token));
        set
    }
}

/// The spellings of a vocabulary, special tokens as they are written. A token without a spelling matches no text.
///
/// ```
/// use farthing::reasoning::Lexicon;
/// let lexicon = Lexicon::new([&b"So"[..], b".\n", b"\xC3"]);
/// assert_eq!(lexicon.spelling(1), b".\n");
/// assert!(lexicon.ends_sentence(1) && !lexicon.ends_sentence(0));
/// assert_eq!(lexicon.missing_bytes(0, 2), 1);
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lexicon {
    bytes: Vec<u8>,
    ends: Vec<u32>,
    boundary: BitSet,
    /// For vocabularies without spellings: tokens that end inside a character.
    incomplete: BitSet,
}

impl Lexicon {
    /// The vocabulary of these spellings, token 0 first.
    pub fn new<'a>(spellings: impl IntoIterator<Item = &'a [u8]>) -> Lexicon {
        let mut lexicon = Lexicon::default();
        for (token, spelling) in spellings.into_iter().enumerate() {
            lexicon.bytes.extend_from_slice(spelling);
            lexicon.ends.push(lexicon.bytes.len() as u32);
            if ends_sentence(spelling) {
                lexicon.boundary.insert(token as u32);
            }
        }
        lexicon
    }

    /// The vocabulary of a tokenizer.
    pub fn of(tokenizer: &Tokenizer) -> Lexicon {
        let spell = |token| {
            let mut bytes = Vec::new();
            tokenizer.spell(token, false, &mut bytes);
            bytes
        };
        let spellings: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32).map(spell).collect();
        Lexicon::new(spellings.iter().map(Vec::as_slice))
    }

    /// A vocabulary of which only these sets are known: tokens that end a sentence, tokens that end inside a character.
    pub fn unspelled(boundary: BitSet, incomplete: BitSet) -> Lexicon {
        Lexicon { boundary, incomplete, ..Lexicon::default() }
    }

    /// Whether any token has a spelling.
    pub fn is_spelled(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// Number of tokens with a spelling known.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether no spellings are known.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of a token.
    pub fn spelling(&self, token: u32) -> &[u8] {
        let token = token as usize;
        let Some(&end) = self.ends.get(token) else { return &[] };
        let start = token.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..end as usize]
    }

    /// The bytes of several tokens.
    pub fn spell(&self, tokens: &[u32]) -> Vec<u8> {
        tokens.iter().flat_map(|&token| self.spelling(token)).copied().collect()
    }

    /// Whether the token contains a line break or ends in `.`, `?`, `!` or their full-width forms.
    pub fn ends_sentence(&self, token: u32) -> bool {
        self.boundary.contains(token)
    }

    /// Line breaks at the end of the text behind `token`, blanks between them left out, when there were `before`; and
    /// whether a paragraph ends in it, with the second of them.
    pub fn line_breaks(&self, before: u8, token: u32) -> (u8, bool) {
        let mut met = false;
        let breaks = self.spelling(token).iter().fold(before, |breaks, byte| match byte {
            b'\n' => {
                met |= breaks == 1;
                breaks.saturating_add(1)
            }
            b' ' | b'\r' | b'\t' => breaks,
            _ => 0,
        });
        (breaks, met)
    }

    /// Bytes that are missing to a whole character behind `token`, when `missing` were before it.
    pub fn missing_bytes(&self, missing: u8, token: u32) -> u8 {
        if self.ends.is_empty() {
            return u8::from(self.incomplete.contains(token));
        }
        self.spelling(token).iter().fold(missing, |missing, byte| match byte {
            0x80..=0xBF => missing.saturating_sub(1),
            0xC0..=0xDF => 1,
            0xE0..=0xEF => 2,
            0xF0..=0xF7 => 3,
            _ => 0,
        })
    }

    /// Tokens that spell one of `words`, whatever their case and the blanks around them; ascending.
    pub fn variants(&self, words: &[String]) -> Vec<u32> {
        let words: Vec<String> = words.iter().map(|word| word.trim().to_lowercase()).collect();
        let says = |&token: &u32| {
            let Ok(text) = std::str::from_utf8(self.spelling(token)) else { return false };
            let text = text.trim();
            !text.is_empty() && words.iter().any(|word| *word == text.to_lowercase())
        };
        (0..self.ends.len() as u32).filter(says).collect()
    }
}

fn ends_sentence(spelling: &[u8]) -> bool {
    let ends = [".", "?", "!", "。", "？", "！"];
    let text = String::from_utf8_lossy(spelling);
    text.contains('\n') || ends.iter().any(|end| text.trim_end_matches(' ').ends_with(end))
}
