//! How a model marks its thinking, in tokens.

use super::lexicon::Lexicon;
use super::marker::{MOST_MARKERS, Marker, Role};
use super::pairs::{MESSAGE, PAIRS, Pair, TOOLS};
use super::policy::Policy;
use crate::error::Error;
use std::sync::Arc;

/// Longest marker in bytes: the controller remembers the lengths of so many tokens.
const LONGEST: usize = 64;

/// Markers in words, before a vocabulary turns them into tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// What opens a span; `None`: the first generated token does.
    pub start: Option<String>,
    /// What ends it.
    pub end: String,
    /// What is written to end it by force: the end and whatever leads up to the answer's first word.
    pub close: String,
    /// Between the end and the answer, part of neither.
    pub header: Option<String>,
    /// What is written before that.
    pub message: String,
    /// What a look ahead reads behind the text.
    pub probe: String,
}

impl Wishes {
    /// What `policy` asks for, with `pair` as the model's own markers; `None` when neither names any.
    pub fn of(pair: Option<&Pair>, policy: &Policy) -> Option<Wishes> {
        let message = |default: &str| policy.message.clone().unwrap_or_else(|| default.to_owned());
        let probe = |default: String| policy.probe.as_ref().and_then(|probe| probe.suffix.clone()).unwrap_or(default);
        let known = |pair: &Pair| Wishes {
            start: Some(pair.start.to_owned()),
            end: pair.end.to_owned(),
            close: pair.close.to_owned(),
            header: pair.header.map(str::to_owned),
            message: message(MESSAGE),
            probe: probe(format!("\n{}The final answer is: ", pair.close)),
        };
        let Some(end) = &policy.end else { return pair.map(known) };
        if let Some(pair) = PAIRS.iter().find(|pair| pair.end == end && Some(pair.start) == policy.start.as_deref()) {
            return Some(known(pair));
        }
        let default = if policy.start.is_some() { MESSAGE } else { "\n" };
        let (start, message) = (policy.start.clone(), message(default));
        let probe =
            probe(if start.is_some() { format!("\n{end}\n\nThe final answer is: ") } else { format!("\n{end}") });
        Some(Wishes { start, end: end.clone(), close: end.clone(), header: None, message, probe })
    }
}

/// How a model marks its thinking: markers, what is written to end it by force, and the tokens that end an answer.
#[derive(Debug)]
pub struct ThinkSpec {
    lexicon: Arc<Lexicon>,
    markers: Vec<Marker>,
    /// For each marker and each cursor the tokens that complete it and lead up to the answer.
    rests: Vec<Vec<Option<Vec<u32>>>>,
    forced_close: Vec<u32>,
    /// Tokens of `forced_close` that are still thinking.
    message: usize,
    eos: Vec<u32>,
    at_once: bool,
    probe: Vec<u32>,
}

impl ThinkSpec {
    /// Markers in words, as `encode` cuts them; a marker that is one token is known by its id, any other by its text,
    /// however the model's tokens cut it.
    ///
    /// # Errors
    ///
    /// A marker that is empty, longer than 64 bytes, or that `encode` can't write.
    pub fn build(
        lexicon: Arc<Lexicon>,
        wishes: &Wishes,
        eos: &[u32],
        encode: &mut dyn FnMut(&str) -> Result<Vec<u32>, Error>,
    ) -> Result<ThinkSpec, Error> {
        let mut spec = ThinkSpec {
            lexicon,
            markers: Vec::new(),
            rests: Vec::new(),
            forced_close: Vec::new(),
            message: 0,
            eos: eos.to_vec(),
            at_once: wishes.start.is_none(),
            probe: encode(&wishes.probe)?,
        };
        let mut named = vec![(Role::End, wishes.end.as_str())];
        named.extend(wishes.start.as_deref().map(|start| (Role::Start, start)));
        named.extend(wishes.header.as_deref().map(|header| (Role::Header, header)));
        for (role, text) in named {
            let name = if role == Role::End { "end" } else { "start" };
            if text.is_empty() || text.len() > LONGEST {
                return Err(Error::argument(name, format!("{text:?}"), format!("a text of 1 to {LONGEST} bytes")));
            }
            let marker = match encode(text)?[..] {
                [id] if spec.is_whole(id, text, encode)? => Marker::of_ids(role, &[id]),
                _ => Marker::of_text(role, text),
            };
            spec.markers.push(marker);
        }
        for &(open, close) in TOOLS {
            for (role, text) in [(Role::ToolOpen, open), (Role::ToolClose, close)] {
                let ids = encode(text)?;
                if let [id] = ids[..] {
                    spec.markers.push(Marker::of_ids(role, &[id]));
                }
            }
        }
        spec.forced_close = encode(&wishes.message)?;
        spec.message = spec.forced_close.len();
        let close = encode(&wishes.close)?;
        let written = spec.lexicon.spell(&close);
        if !contains(&written, wishes.end.as_bytes()) {
            let got = format!("{:?}, which becomes {:?}", wishes.close, String::from_utf8_lossy(&written));
            return Err(Error::argument("end", got, "a text that the tokenizer can write"));
        }
        spec.forced_close.extend(close);
        let suffix = wishes.close.strip_prefix(wishes.end.as_str()).unwrap_or_default();
        spec.rests = spec.rests(suffix, encode)?;
        Ok(spec)
    }

    /// The markers of `wishes` in `tokenizer`, whose spellings `lexicon` holds.
    pub fn of_tokenizer(
        tokenizer: &crate::load::Tokenizer,
        lexicon: Arc<Lexicon>,
        wishes: &Wishes,
        eos: &[u32],
    ) -> Result<ThinkSpec, Error> {
        ThinkSpec::build(lexicon, wishes, eos, &mut |text| Ok(tokenizer.encode(text, false)))
    }

    /// Markers as token ids. `forced_close` is what is written to end thinking by force; it holds an end marker.
    ///
    /// # Errors
    ///
    /// No end marker, an empty or a 17th one, or a `forced_close` without any.
    pub fn of_ids(
        lexicon: Arc<Lexicon>,
        markers: &[(Role, Vec<u32>)],
        forced_close: Vec<u32>,
        eos: Vec<u32>,
        at_once: bool,
    ) -> Result<ThinkSpec, Error> {
        if markers.len() > MOST_MARKERS {
            return Err(Error::argument("markers", markers.len(), format!("at most {MOST_MARKERS}")));
        }
        let mut ends = markers.iter().filter(|(role, _)| *role == Role::End).map(|(_, ids)| ids).peekable();
        if ends.peek().is_none() {
            return Err(Error::argument("ends", "none", "at least one end marker"));
        }
        if let Some((_, ids)) = markers.iter().find(|(_, ids)| ids.is_empty() || ids.len() > LONGEST) {
            let got = format!("a marker of {} tokens", ids.len());
            return Err(Error::argument("markers", got, format!("1 to {LONGEST} tokens")));
        }
        let place = |end: &Vec<u32>| forced_close.windows(end.len()).position(|window| window == end);
        let Some(message) = ends.filter_map(place).min() else {
            return Err(Error::argument("forced_close", format!("{forced_close:?}"), "tokens that hold an end marker"));
        };
        let markers: Vec<Marker> = markers.iter().map(|(role, ids)| Marker::of_ids(*role, ids)).collect();
        let probe = forced_close.clone();
        let mut spec = ThinkSpec { lexicon, markers, rests: Vec::new(), forced_close, message, eos, at_once, probe };
        spec.rests = spec.rests("", &mut |_| Ok(Vec::new()))?;
        Ok(spec)
    }

    /// The first known pair of which a vocabulary has all tokens, else the first that the chat template writes.
    pub fn detect(has_token: impl Fn(&str) -> bool, template: Option<&str>) -> Option<&'static Pair> {
        let of_vocabulary = PAIRS.iter().find(|pair| pair.tokens.iter().all(|token| has_token(token)));
        let written = |pair: &&Pair| template.is_some_and(|text| text.contains(pair.start) && text.contains(pair.end));
        of_vocabulary.or_else(|| PAIRS.iter().find(written))
    }

    /// Whether `text` is the token `id` wherever it stands, not only alone.
    fn is_whole(
        &self,
        id: u32,
        text: &str,
        encode: &mut dyn FnMut(&str) -> Result<Vec<u32>, Error>,
    ) -> Result<bool, Error> {
        Ok(self.lexicon.spelling(id) == text.as_bytes()
            && encode(&format!(" {text}"))?.contains(&id)
            && encode(&format!("{text}{text}"))? == [id, id])
    }

    fn rests(
        &self,
        suffix: &str,
        encode: &mut dyn FnMut(&str) -> Result<Vec<u32>, Error>,
    ) -> Result<Vec<Vec<Option<Vec<u32>>>>, Error> {
        let mut all = Vec::with_capacity(self.markers.len());
        for marker in &self.markers {
            let mut rests = Vec::new();
            match (marker.role, marker.ids(), marker.text()) {
                (Role::End, Some(ids), _) => {
                    let suffix = if suffix.is_empty() { Vec::new() } else { encode(suffix)? };
                    // Nothing is begun at the first cursor.
                    rests.push(None);
                    rests.extend((1..ids.len()).map(|cursor| Some([&ids[cursor..], &suffix].concat())));
                }
                (Role::End, _, Some(text)) => {
                    for cursor in 0..text.len() {
                        let rest = std::str::from_utf8(&text[cursor..]).ok().filter(|_| cursor >= 2);
                        let ids = rest.map(|rest| encode(&format!("{rest}{suffix}"))).transpose()?;
                        rests.push(ids.filter(|ids| self.lexicon.spell(ids).starts_with(&text[cursor..])));
                    }
                }
                _ => {}
            }
            all.push(rests);
        }
        Ok(all)
    }

    /// The vocabulary.
    pub fn lexicon(&self) -> &Arc<Lexicon> {
        &self.lexicon
    }

    /// The markers.
    pub fn markers(&self) -> &[Marker] {
        &self.markers
    }

    /// What is written to end thinking by force.
    pub fn forced_close(&self) -> &[u32] {
        &self.forced_close
    }

    /// Tokens of [`ThinkSpec::forced_close`] before the end marker: the last of the thinking.
    pub fn message_tokens(&self) -> usize {
        self.message
    }

    /// Tokens that end an answer.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// What a look ahead reads behind the text.
    pub fn probe(&self) -> &[u32] {
        &self.probe
    }

    /// Whether the first generated token is thinking.
    pub fn at_once(&self) -> bool {
        self.at_once
    }

    /// The text of the marker of that role which is known by its text, if there is one.
    pub fn text_of(&self, role: Role) -> Option<&str> {
        let text = self.markers.iter().filter(|marker| marker.role == role).find_map(Marker::text)?;
        std::str::from_utf8(text).ok()
    }

    /// The tokens that complete marker `index` from `cursor` on and lead up to the answer; `None` when it is better
    /// written from the start.
    pub(super) fn rest(&self, index: usize, cursor: u16) -> Option<&[u32]> {
        self.rests[index].get(cursor as usize)?.as_deref()
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}
