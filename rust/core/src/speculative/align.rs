//! One text in the tokens of two tokenizers, held together by byte offsets (SLEM and TLI, Timor et al., arXiv 2502.05202).
//!
//! A drafter with another vocabulary reads the text in its own tokens ([`Aligned`]), and what it says comes back either
//! token by token, where both have the same ([`common_tokens`]), or as text cut anew ([`continuation`]). Neither has to be
//! exact for the answer's sake: the target draws its own tokens, and a draft cut otherwise is only rejected.

use super::verify::Intersection;
use crate::load::Tokenizer;

/// Bytes behind which a tokenizer no longer changes its mind about what it has cut.
const SETTLED: usize = 32;

/// For each token of `own` the target's token of the same bytes; `None` where the target has none.
pub fn common_tokens(own: &Tokenizer, target: &Tokenizer) -> Intersection {
    let spelled = |tokenizer: &Tokenizer| -> Vec<Vec<u8>> {
        (0..tokenizer.vocab_size() as u32).map(|token| bytes(tokenizer, token)).collect()
    };
    Intersection::new(spelled(own), spelled(target))
}

fn bytes(tokenizer: &Tokenizer, token: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    tokenizer.spell(token, false, &mut bytes);
    bytes
}

/// A growing text of the target's tokens, in a drafter's tokens.
#[derive(Clone, Debug, Default)]
pub struct Aligned {
    text: Vec<u8>,
    /// Tokens of the target's that are in it.
    read: usize,
    /// The drafter's tokens, those that begin each of its texts first.
    ids: Vec<u32>,
    /// Where each of them ends in the text.
    ends: Vec<usize>,
}

impl Aligned {
    /// The drafter's tokens of the target's `tokens`, a text that goes on from the one before; `None` while it ends within
    /// a character. Only what is not settled is cut again.
    pub fn follow(&mut self, own: &Tokenizer, target: &Tokenizer, tokens: &[u32]) -> Option<&[u32]> {
        let before = self.text.len();
        for &token in &tokens[self.read.min(tokens.len())..] {
            target.spell(token, false, &mut self.text);
        }
        self.read = tokens.len();
        if self.ids.is_empty() {
            self.ids = own.affixes().0.to_vec();
            self.ends = vec![0; self.ids.len()];
        }
        let done = self.ends.last().copied().unwrap_or(0);
        if done < self.text.len() {
            // Words begin with a blank in nearly every tokenizer: what is cut before one stays as it is.
            let settled = |&&end: &&usize| end + SETTLED <= before && self.begins_word(end);
            let keep = self.ends.iter().rposition(|end| settled(&end)).map_or(own.affixes().0.len(), |last| last + 1);
            let start = keep.checked_sub(1).map_or(0, |last| self.ends[last]);
            let text = match std::str::from_utf8(&self.text[start..]) {
                Ok(text) => text.to_owned(),
                Err(error) if error.error_len().is_none() => return None,
                Err(_) => String::from_utf8_lossy(&self.text[start..]).into_owned(),
            };
            self.ids.truncate(keep);
            self.ends.truncate(keep);
            let new = own.encode(fragment(own, &text), false);
            // From the end, since tokens of the beginning may spell a blank more than there is.
            let mut ends = Vec::with_capacity(new.len());
            let mut end = self.text.len();
            for &token in new.iter().rev() {
                ends.push(end);
                end = end.saturating_sub(bytes(own, token).len()).max(start);
            }
            self.ids.extend(new);
            self.ends.extend(ends.iter().rev());
        }
        Some(&self.ids)
    }

    fn begins_word(&self, at: usize) -> bool {
        at > 0 && self.text.get(at) == Some(&b' ') && !self.text[at - 1].is_ascii_whitespace()
    }
}

/// A blank at the front comes with the first token of tokenizers that put one before every text.
fn fragment<'t>(tokenizer: &Tokenizer, text: &'t str) -> &'t str {
    if tokenizer.strips_blank() { text.strip_prefix(' ').unwrap_or(text) } else { text }
}

/// The target's tokens of `text`, which goes on from another, each with the byte of `text` behind its end; nothing from
/// the first byte on that is not whole text.
pub fn continuation(target: &Tokenizer, text: &[u8]) -> Vec<(u32, usize)> {
    let text = match std::str::from_utf8(text) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&text[..error.valid_up_to()]).unwrap_or_default(),
    };
    // A blank would be put before the rest of a word: it is put before a line's end instead, which is taken away again.
    let inside = target.strips_blank() && !text.starts_with([' ', '\n']);
    let mut ids = if inside {
        let ids = target.encode(&format!("\n{text}"), false);
        let line = ids.iter().position(|&id| bytes(target, id).ends_with(b"\n"));
        ids[line.map_or(ids.len(), |line| line + 1)..].to_vec()
    } else {
        target.encode(fragment(target, text), false)
    };
    let mut end = 0;
    let ends: Vec<usize> = ids.iter().map(|&id| (end += bytes(target, id).len(), end).1).collect();
    // What spells otherwise than the text is not the text.
    let same = |(&id, &end): (&u32, &usize)| {
        let bytes = bytes(target, id);
        end <= text.len() && text.as_bytes()[end - bytes.len()..end] == bytes[..]
    };
    let whole = ids.iter().zip(&ends).take_while(|&pair| same(pair)).count();
    ids.truncate(whole);
    ids.into_iter().zip(ends).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Vocabulary;
    use proptest::prelude::*;

    /// Tokens of single bytes and `merges`, which are pairs.
    fn tokenizer(model: &str, letters: &str, merges: &[&str]) -> Tokenizer {
        let mut tokens: Vec<String> = letters.chars().map(String::from).collect();
        tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
        let count = tokens.len();
        let vocabulary = Vocabulary {
            model: model.into(),
            pre: "gpt-2".into(),
            scores: (model == "llama").then(|| (0..count).map(|id| -(id as f32)).collect()),
            types: Some(vec![1; count]),
            add_bos: Some(false),
            tokens,
            merges: (model == "gpt2").then(|| merges.iter().map(|&merge| merge.to_owned()).collect()),
            ..Vocabulary::default()
        };
        Tokenizer::from_vocabulary(vocabulary).unwrap()
    }

    /// Ġ is a blank in bytes, Ċ a line's end; é is two bytes.
    fn pairs() -> [Tokenizer; 3] {
        [
            tokenizer("gpt2", "abcĠĊÃ©", &["a b", "Ġ a", "Ġa b", "Ã ©"]),
            tokenizer("gpt2", "cĠabĊÃ©", &["b a", "b c", "Ġ b", "c c"]),
            tokenizer("llama", "▁abc\né", &["▁ a", "a b", "▁ b", "b c"]),
        ]
    }

    fn spelled(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|&id| bytes(tokenizer, id)).collect()
    }

    #[test]
    fn common_tokens_spell_alike() {
        for own in pairs() {
            for target in pairs() {
                let common = common_tokens(&own, &target);
                assert!(!common.is_empty());
                for (token, to) in common.tokens().iter().enumerate() {
                    let Some(to) = to else { continue };
                    assert_eq!(bytes(&own, token as u32), bytes(&target, *to));
                }
            }
        }
    }

    #[test]
    fn half_a_character_waits() {
        let [target, own, _] = pairs();
        let mut aligned = Aligned::default();
        assert_eq!(aligned.follow(&own, &target, &[0, 5]), None);
        let ids = aligned.follow(&own, &target, &[0, 5, 6]).unwrap();
        assert_eq!(spelled(&own, ids), "aé".as_bytes());
        assert_eq!(continuation(&target, "bé".as_bytes()), [(1, 1), (10, 3)]);
        assert_eq!(continuation(&target, &"bé".as_bytes()[..2]), [(1, 1)]);
    }

    proptest! {
        #[test]
        fn a_growing_text_is_the_text_in_other_tokens(
            words in prop::collection::vec("[abc]{1,3}", 1..40),
            steps in prop::collection::vec(1usize..7, 60),
            which in (0usize..2, 0usize..3),
        ) {
            let (target, own) = (&pairs()[which.0], &pairs()[which.1]);
            let text = words.join(" ");
            let tokens = target.encode(&text, false);
            let mut aligned = Aligned::default();
            let mut read = 0;
            for step in steps {
                read = (read + step).min(tokens.len());
                let so_far = spelled(target, &tokens[..read]);
                let ids = aligned.follow(own, target, &tokens[..read]).unwrap().to_vec();
                let back = spelled(own, &ids);
                prop_assert!(back == so_far || back.strip_prefix(b" ") == Some(&so_far[..]), "{back:?} {so_far:?}");
                // As if the whole had been cut at once, but for a text that was cut within a word.
                prop_assert_eq!(&ids, &own.encode(std::str::from_utf8(&so_far).unwrap(), false));
                prop_assert_eq!(aligned.ends.last(), Some(&so_far.len()));
            }
        }

        #[test]
        fn a_continuation_spells_the_text(text in "[abc ]{0,12}", which in 0usize..3) {
            let target = &pairs()[which];
            let tokens = continuation(target, text.as_bytes());
            let end = tokens.last().map_or(0, |&(_, end)| end);
            let ids: Vec<u32> = tokens.iter().map(|&(id, _)| id).collect();
            prop_assert_eq!(&spelled(target, &ids)[..], &text.as_bytes()[..end]);
            if which < 2 {
                prop_assert_eq!(end, text.len());
            }
        }
    }
}
