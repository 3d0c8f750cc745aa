//! Text to token ids and back.
//!
//! Built from `tokenizer.json` ([`Tokenizer::from_json`]) or from the vocabulary in GGUF metadata
//! ([`Tokenizer::from_vocabulary`]); both give the same pipeline: added tokens are found, what lies between is
//! normalised, cut into words, and merged by byte pair encoding.

mod added;
mod error;
mod json;
mod lists;
mod merges;
mod normalize;
mod pieces;
mod split;
mod vocabulary;

pub use error::TokenizerError;
pub(super) use error::shortened;
pub use vocabulary::Vocabulary;

use added::Matcher;
use merges::{Merges, Scratch};
use normalize::Normalizer;
use pieces::{Alphabet, Kind, Pieces};
use split::Splitter;

/// Text to token ids and back.
///
/// ```
/// use farthing::load::{Tokenizer, Vocabulary};
///
/// let vocabulary = Vocabulary {
///     model: "gpt2".into(),
///     pre: "gpt-2".into(),
///     tokens: ["a", "b", "ab", "<|end|>"].map(String::from).into(),
///     types: Some(vec![1, 1, 1, 3]),
///     merges: Some(vec!["a b".into()]),
///     eos: Some(3),
///     ..Vocabulary::default()
/// };
/// let tokenizer = Tokenizer::from_vocabulary(vocabulary)?;
/// assert_eq!(tokenizer.encode("aab<|end|>", false), [0, 2, 3]);
/// assert_eq!(tokenizer.decode(&[0, 2, 3], true), "aab");
/// # Ok::<(), farthing::load::TokenizerError>(())
/// ```
pub struct Tokenizer {
    pieces: Pieces,
    alphabet: Alphabet,
    /// Decoded text loses one blank at its start, the one that encoding put there.
    strip_blank: bool,
    /// Added tokens found in raw text, and those found in normalised text.
    raw: Option<Matcher>,
    normalized: Option<Matcher>,
    normalizers: Vec<Normalizer>,
    splitters: Vec<Splitter>,
    merges: Merges,
    /// Ids put before and behind every text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    bos: Option<u32>,
    eos: Vec<u32>,
}

impl Tokenizer {
    /// Token ids of `text`. Special tokens in the text are recognised; `add_special` also adds the ones the model wants
    /// at its beginning and end. Text rendered by a chat template already has them: encode it with `add_special` false.
    pub fn encode(&self, text: &str, add_special: bool) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        let mut scratch = Scratch::default();
        if add_special {
            ids.extend_from_slice(&self.prefix);
        }
        cut(self.raw.as_ref(), text, &mut ids, |start, fragment, ids| {
            let fragment = normalize::normalize(&self.normalizers, fragment);
            cut(self.normalized.as_ref(), &fragment, ids, |inner, fragment, ids| {
                let first = start == 0 && inner == 0;
                split::split(&self.splitters, fragment, first, &mut |word| {
                    self.merges.encode(&self.pieces, word, &mut scratch, ids);
                });
            });
        });
        if add_special {
            ids.extend_from_slice(&self.suffix);
        }
        ids
    }

    /// The text of `ids`, without special tokens if `skip_special`. Bytes that are not UTF-8 become U+FFFD, as in
    /// [`String::from_utf8_lossy`]; ids past the vocabulary are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            self.spell(id, skip_special, &mut bytes);
        }
        let text = String::from_utf8_lossy(&bytes);
        match text.strip_prefix(' ') {
            Some(rest) if self.strip_blank => rest.to_owned(),
            _ => text.into_owned(),
        }
    }

    /// Appends the bytes of one token.
    pub(crate) fn spell(&self, id: u32, skip_special: bool, out: &mut Vec<u8>) {
        if !(skip_special && self.is_special(id)) {
            self.pieces.spell(id, self.alphabet, out);
        }
    }

    /// Whether decoding drops one blank at the start of the text.
    pub(crate) fn strips_blank(&self) -> bool {
        self.strip_blank
    }

    /// One more than the largest id: rows of the embedding that tokens may use.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The id of a token, spelled as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.pieces.find(token)
    }

    /// The token, spelled as in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<&str> {
        (self.pieces.kind(id) != Kind::Absent).then(|| self.pieces.get(id))
    }

    /// Whether every id that both have stands for the same token.
    pub fn same_tokens(&self, other: &Tokenizer) -> bool {
        let both = self.vocab_size().min(other.vocab_size()) as u32;
        (0..both).all(|id| self.id_to_token(id) == other.id_to_token(id))
    }

    /// The token that begins a text, whether or not encoding adds it.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end an answer.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// Replaces the tokens that end an answer, with those of `generation_config.json` for instance.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Id`] for an id outside the vocabulary; nothing changes then.
    pub fn set_eos_ids(&mut self, ids: &[u32]) -> Result<(), TokenizerError> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size()) {
            let (got, expected) = (i64::from(id), self.vocab_size() as u64);
            return Err(TokenizerError::Id { what: "eos_token_id".into(), got, expected });
        }
        ids.clone_into(&mut self.eos);
        Ok(())
    }

    /// Whether `skip_special` leaves the token out: beginnings, ends, roles, padding.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.kind(id) == Kind::Special
    }

    /// The ids that `encode` puts before and behind a text with `add_special`.
    pub fn affixes(&self) -> (&[u32], &[u32]) {
        (&self.prefix, &self.suffix)
    }
}

/// Pushes the ids of added tokens and hands the text between them to `rest(start, text, ids)`.
fn cut(matcher: Option<&Matcher>, text: &str, ids: &mut Vec<u32>, mut rest: impl FnMut(usize, &str, &mut Vec<u32>)) {
    let Some(matcher) = matcher else {
        rest(0, text, ids);
        return;
    };
    matcher.cut(text, |start, end, token| match token {
        Some(id) => ids.push(id),
        None => rest(start, &text[start..end], ids),
    });
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("alphabet", &self.alphabet)
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}
