//! The long lists of `tokenizer.json`, read into a few flat buffers: a tree of values would take ten times the file.

use super::added::MOST_ADDED;
use super::error::{TokenizerError, shortened};
use super::pieces::MOST_TOKENS;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// An added token as the file has it.
#[derive(serde::Deserialize)]
#[allow(clippy::struct_excessive_bools)] // the file's own layout
pub(super) struct AddedToken {
    pub(super) id: i64,
    pub(super) content: String,
    #[serde(default)]
    pub(super) single_word: bool,
    #[serde(default)]
    pub(super) lstrip: bool,
    #[serde(default)]
    pub(super) rstrip: bool,
    #[serde(default)]
    pub(super) normalized: bool,
    #[serde(default)]
    pub(super) special: bool,
}

/// `{token: id}`, without a tree.
#[derive(Default)]
pub(super) struct Vocab {
    text: String,
    ends: Vec<u32>,
    pub(super) ids: Vec<u32>,
}

impl Vocab {
    pub(super) fn text(&self, at: usize) -> &str {
        &self.text[at.checked_sub(1).map_or(0, |before| self.ends[before] as usize)..self.ends[at] as usize]
    }
}

impl<'de> serde::Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Vocab;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary {token: id}")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab, A::Error> {
                let mut vocab = Vocab::default();
                while map.next_key_seed(Text(&mut vocab.text))?.is_some() {
                    let id: i64 = map.next_value()?;
                    if !(0..MOST_TOKENS as i64).contains(&id) {
                        return Err(A::Error::custom(format_args!("token id {id}, expected one below {MOST_TOKENS}")));
                    }
                    if vocab.ids.len() == MOST_TOKENS {
                        return Err(A::Error::custom(format_args!("more than {MOST_TOKENS} tokens")));
                    }
                    vocab.ends.push(vocab.text.len() as u32);
                    vocab.ids.push(id as u32);
                }
                Ok(vocab)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// `["a b", …]` or `[["a", "b"], …]`, without a tree.
#[derive(Default)]
pub(super) struct MergeList {
    text: String,
    /// Ends of the pieces, two for each merge; a merge that is not a pair has both at its end.
    ends: Vec<u32>,
}

impl MergeList {
    pub(super) fn len(&self) -> usize {
        self.ends.len() / 2
    }

    pub(super) fn pairs(&self) -> impl Iterator<Item = Result<(&str, &str), TokenizerError>> {
        let mut start = 0;
        self.ends.chunks_exact(2).enumerate().map(move |(index, ends)| {
            let (left, right) = (&self.text[start..ends[0] as usize], &self.text[ends[0] as usize..ends[1] as usize]);
            start = ends[1] as usize;
            // Written as one text: cut at its only blank.
            match (right.is_empty(), left.split_once(' ')) {
                (true, Some((left, right))) if !right.contains(' ') => Ok((left, right)),
                (true, _) => Err(TokenizerError::MergeShape { index, got: shortened(left) }),
                (false, _) => Ok((left, right)),
            }
        })
    }
}

impl<'de> serde::Deserialize<'de> for MergeList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = MergeList;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of merges")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<MergeList, A::Error> {
                let mut merges = MergeList::default();
                while list.next_element_seed(Merge(&mut merges))?.is_some() {}
                Ok(merges)
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// Appends one merge to the list.
struct Merge<'l>(&'l mut MergeList);

impl<'de> DeserializeSeed<'de> for Merge<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Merge<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a merge, \"a b\" or [\"a\", \"b\"]")
    }

    fn visit_str<E: Error>(self, merge: &str) -> Result<(), E> {
        self.0.text.push_str(merge);
        let end = self.0.text.len() as u32;
        self.0.ends.extend([end, end]);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<(), A::Error> {
        for i in 0..2 {
            let piece = pair.next_element_seed(Text(&mut self.0.text))?;
            piece.ok_or_else(|| A::Error::invalid_length(i, &"two pieces"))?;
            self.0.ends.push(self.0.text.len() as u32);
        }
        match pair.next_element::<serde::de::IgnoredAny>()? {
            None => Ok(()),
            Some(_) => Err(A::Error::invalid_length(3, &"two pieces")),
        }
    }
}

/// Appends a string to another.
struct Text<'t>(&'t mut String);

impl<'de> DeserializeSeed<'de> for Text<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Text<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.0.push_str(text);
        Ok(())
    }
}

/// Added tokens, up to one more than the limit.
pub(super) struct AddedList;

impl<'de> DeserializeSeed<'de> for AddedList {
    type Value = Vec<AddedToken>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for AddedList {
    type Value = Vec<AddedToken>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of added tokens")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut tokens = Vec::new();
        while tokens.len() <= MOST_ADDED
            && let Some(token) = list.next_element::<AddedToken>()?
        {
            tokens.push(token);
        }
        while list.next_element::<serde::de::IgnoredAny>()?.is_some() {}
        Ok(tokens)
    }
}
