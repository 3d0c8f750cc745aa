//! Reading `tokenizer.json`: byte pair encoding with the components that language models use.
//!
//! The lists are read without building a tree, and sections that may hold anything are capped before they are parsed,
//! so that memory stays within twice the file and 64 MiB.

use super::Tokenizer;
use super::added::{Added, MOST_ADDED, Matcher};
use super::error::{TokenizerError, shortened};
use super::lists::{AddedList, AddedToken, MergeList, Vocab};
use super::merges::{Atoms, Merges};
use super::normalize::{Normalizer, normalize};
use super::pieces::{Alphabet, Kind, MOST_TOKENS, Pieces, byte_token, check_length};
use super::split::{Behavior, GPT2, Pattern, Prepend, Splitter};
use super::vocabulary::ranks;
use serde::de::DeserializeSeed;
use serde_json::Value;
use serde_json::value::RawValue;

/// The largest file: four times the largest real one.
const MOST_BYTES: usize = 128 << 20;
/// The largest normaliser, pre-tokenizer, post-processor or decoder.
const SECTION_BYTES: usize = 64 << 10;
const MOST_STEPS: usize = 16;
const LONGEST_SETTING: usize = 1024;

#[derive(serde::Deserialize)]
struct File<'f> {
    #[serde(borrow, default)]
    added_tokens: Option<&'f RawValue>,
    #[serde(borrow, default)]
    normalizer: Option<&'f RawValue>,
    #[serde(borrow, default)]
    pre_tokenizer: Option<&'f RawValue>,
    #[serde(borrow, default)]
    post_processor: Option<&'f RawValue>,
    #[serde(borrow, default)]
    decoder: Option<&'f RawValue>,
    #[serde(borrow)]
    model: &'f RawValue,
}

#[derive(serde::Deserialize)]
struct ModelType {
    #[serde(rename = "type")]
    kind: Option<String>,
}

#[derive(serde::Deserialize)]
struct Model {
    vocab: Vocab,
    merges: MergeList,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
    #[serde(default)]
    fuse_unk: Option<bool>,
    #[serde(default)]
    dropout: Option<f64>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
}

impl Tokenizer {
    /// A tokenizer from the bytes of `tokenizer.json`, with `tokenizer_config.json` for the roles of special tokens.
    ///
    /// Supported: model `BPE`; normalisers `NFC`, `NFD`, `NFKC`, `NFKD`, `Lowercase`, `Prepend`, `Replace`;
    /// pre-tokenizers `ByteLevel`, `Digits`, `Metaspace`, `Split`; decoders `ByteLevel`, `Metaspace` and the sequence
    /// of `SentencePiece` models; post-processors `ByteLevel`, `TemplateProcessing`; sequences of each. As in
    /// transformers, `add_bos_token` and `add_eos_token` in the configuration override the post-processor.
    ///
    /// # Errors
    ///
    /// One variant for each way to be wrong; [`TokenizerError::Unsupported`] names the components that work.
    pub fn from_json(bytes: &[u8], config: Option<&Value>) -> Result<Self, TokenizerError> {
        if bytes.len() > MOST_BYTES {
            let (got, expected) = (bytes.len() as u64, MOST_BYTES as u64);
            return Err(TokenizerError::TooLarge { what: "tokenizer.json", unit: "bytes", got, expected });
        }
        let file: File<'_> = serde_json::from_slice(bytes).map_err(|error| json(&error))?;
        let kind: ModelType = serde_json::from_str(file.model.get()).map_err(|error| json(&error))?;
        if let Some(kind) = kind.kind.filter(|kind| kind != "BPE") {
            let got = shortened(&kind);
            return Err(TokenizerError::Unsupported { field: "model.type", got, expected: "BPE" });
        }
        let model: Model = serde_json::from_str(file.model.get()).map_err(|error| json(&error))?;
        check_model(&model)?;
        let added = read_added(file.added_tokens)?;
        let normalizers = flatten(section(file.normalizer, "normalizer")?, "normalizers", "normalizer", normalizer)?;
        let (splitters, byte_level) = pre_tokenizer(section(file.pre_tokenizer, "pre_tokenizer")?)?;
        let (alphabet, strip_blank) = decoder(section(file.decoder, "decoder")?)?;

        let pieces = pieces(&model, &added, alphabet)?;
        let find = |token: &str, role: &str| {
            let error = || TokenizerError::Setting {
                field: role.to_owned(),
                got: shortened(token),
                expected: "a token of the vocabulary",
            };
            pieces.find(token).ok_or_else(error)
        };
        let unknown = model.unk_token.as_deref().map(|token| find(token, "model.unk_token")).transpose()?;
        let order = ranks(&pieces, model.merges.len(), model.merges.pairs())?;
        let atoms = if byte_level {
            Atoms::bytes(&pieces)
        } else {
            let (fallback, fuse) = (model.byte_fallback.unwrap_or(false), model.fuse_unk.unwrap_or(false));
            Atoms::characters(&pieces, fallback, unknown, fuse)
        };
        if let Some(got) = atoms.unspellable() {
            return Err(TokenizerError::Fallback { got });
        }
        let merges = Merges { order, atoms, whole_words: model.ignore_merges.unwrap_or(false) };

        let (mut prefix, mut suffix) = post_processor(section(file.post_processor, "post_processor")?, pieces.len())?;
        let role = |name: &'static str| match config.and_then(|config| config.get(name)).map(token_text) {
            None | Some(None) => Ok(None),
            Some(Some(token)) => find(token, name).map(Some),
        };
        let (bos, eos) = (role("bos_token")?, role("eos_token")?);
        let flag = |name| config.and_then(|config| config.get(name)).and_then(Value::as_bool);
        let (add_bos, add_eos) = (flag("add_bos_token"), flag("add_eos_token"));
        if add_bos.is_some() || add_eos.is_some() {
            prefix = bos.filter(|_| add_bos == Some(true)).into_iter().collect();
            suffix = eos.filter(|_| add_eos == Some(true)).into_iter().collect();
        }
        let (raw, normalized) = matchers(added, &normalizers)?;
        Ok(Tokenizer {
            alphabet,
            strip_blank,
            raw,
            normalized,
            normalizers,
            splitters,
            merges,
            bos: bos.or(prefix.first().copied()),
            prefix,
            suffix,
            eos: eos.into_iter().collect(),
            pieces,
        })
    }
}

fn json(error: &serde_json::Error) -> TokenizerError {
    TokenizerError::Json { got: shortened_message(&error.to_string()) }
}

/// The place is at the end of a message, behind what the parser copied from the file.
fn shortened_message(message: &str) -> String {
    const TAIL: usize = 100;
    let length = message.chars().count();
    if length <= 3 * TAIL {
        return message.to_owned();
    }
    let tail: String = message.chars().skip(length - TAIL).collect();
    format!("{}{tail}", shortened(message))
}

fn check_model(model: &Model) -> Result<(), TokenizerError> {
    let setting = |field: &str, got: String, expected| {
        Err(TokenizerError::Setting { field: format!("model.{field}"), got: shortened(&got), expected })
    };
    match model {
        Model { dropout: Some(dropout), .. } if *dropout != 0.0 => {
            setting("dropout", dropout.to_string(), "no dropout: encoding is exact")
        }
        Model { continuing_subword_prefix: Some(prefix), .. } if !prefix.is_empty() => {
            setting("continuing_subword_prefix", prefix.clone(), "none")
        }
        Model { end_of_word_suffix: Some(suffix), .. } if !suffix.is_empty() => {
            setting("end_of_word_suffix", suffix.clone(), "none")
        }
        _ => Ok(()),
    }
}

/// The vocabulary and the added tokens, by id.
fn pieces(model: &Model, added: &[AddedToken], alphabet: Alphabet) -> Result<Pieces, TokenizerError> {
    let vocab = &model.vocab;
    let last = vocab.ids.iter().map(|&id| i64::from(id)).chain(added.iter().map(|token| token.id)).max();
    let count = last.map_or(0, |last| last + 1) as usize;
    // The text of id i is `order[i]`: a position in the vocabulary, or behind it one in the added tokens.
    let mut order = vec![u32::MAX; count];
    let text = |at: u32| match (at as usize).checked_sub(vocab.ids.len()) {
        Some(added_at) => added[added_at].content.as_str(),
        None => vocab.text(at as usize),
    };
    let mut kinds = vec![Kind::Absent; count];
    let every = vocab.ids.iter().copied().chain(added.iter().map(|token| token.id as u32));
    for (at, id) in every.enumerate() {
        let (at, slot) = (at as u32, id as usize);
        let again = order[slot] != u32::MAX;
        // Added tokens are listed in the vocabulary too, or follow it.
        if again && (text(order[slot]) != text(at) || (at as usize) < vocab.ids.len()) {
            let (first, second) = (shortened(text(order[slot])), shortened(text(at)));
            return Err(TokenizerError::DuplicateId { id, first, second });
        }
        if !again {
            order[slot] = at;
        }
        kinds[slot] = match (at as usize).checked_sub(vocab.ids.len()).map(|at| &added[at]) {
            None => match byte_token(text(at)) {
                Some(byte) if model.byte_fallback == Some(true) => Kind::Byte(byte),
                _ => Kind::Normal,
            },
            Some(token) if token.special => Kind::Special,
            // `▁` in an added token reads as a blank, as it does everywhere in such a vocabulary.
            Some(_) if alphabet == Alphabet::Blanks => Kind::Normal,
            Some(_) => Kind::Added,
        };
    }
    Pieces::new(kinds, |id| if order[id] == u32::MAX { "" } else { text(order[id]) })
}

fn read_added(section: Option<&RawValue>) -> Result<Vec<AddedToken>, TokenizerError> {
    let Some(section) = section else { return Ok(Vec::new()) };
    let mut deserializer = serde_json::Deserializer::from_str(section.get());
    let tokens = AddedList.deserialize(&mut deserializer).map_err(|error| json(&error))?;
    if tokens.len() > MOST_ADDED {
        let (got, expected) = (tokens.len() as u64, MOST_ADDED as u64);
        return Err(TokenizerError::TooLarge { what: "added tokens", unit: "tokens", got, expected });
    }
    for token in &tokens {
        if !(0..MOST_TOKENS as i64).contains(&token.id) {
            let (got, expected) = (token.id, MOST_TOKENS as u64);
            let what = format!("added token {:?}", shortened(&token.content));
            return Err(TokenizerError::Id { what, got, expected });
        }
        check_length(token.id as u32, token.content.len())?;
    }
    Ok(tokens)
}

type Matchers = (Option<Matcher>, Option<Matcher>);

fn matchers(added: Vec<AddedToken>, normalizers: &[Normalizer]) -> Result<Matchers, TokenizerError> {
    let (mut raw, mut normalized) = (Vec::new(), Vec::new());
    for token in added {
        let mut text = token.content;
        if token.normalized {
            text = normalize(normalizers, &text).into_owned();
        }
        let AddedToken { id, single_word, lstrip: left, rstrip: right, .. } = token;
        let list = if token.normalized { &mut normalized } else { &mut raw };
        list.push(Added { id: id as u32, text, single_word, left, right });
    }
    Ok((Matcher::new(raw)?, Matcher::new(normalized)?))
}

/// The text of a token in `tokenizer_config.json`: a string, or an object with `content`.
fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// A section as a value; absent and null are nothing.
fn section(raw: Option<&RawValue>, what: &'static str) -> Result<Option<Value>, TokenizerError> {
    let Some(raw) = raw else { return Ok(None) };
    if raw.get().len() > SECTION_BYTES {
        let (got, expected) = (raw.get().len() as u64, SECTION_BYTES as u64);
        return Err(TokenizerError::TooLarge { what, unit: "bytes", got, expected });
    }
    let value: Value = serde_json::from_str(raw.get()).map_err(|error| json(&error))?;
    Ok((!value.is_null()).then_some(value))
}

/// The steps of a component: itself, or those of a `Sequence`, whose list is called `list`.
fn steps(value: Option<Value>, list: &'static str, what: &'static str) -> Result<Vec<Value>, TokenizerError> {
    let Some(value) = value else { return Ok(Vec::new()) };
    if kind(&value, what)? != "Sequence" {
        return Ok(vec![value]);
    }
    match value.get(list) {
        Some(Value::Array(steps)) if steps.len() <= MOST_STEPS => Ok(steps.clone()),
        Some(Value::Array(steps)) => {
            let (got, expected) = (steps.len() as u64, MOST_STEPS as u64);
            Err(TokenizerError::TooLarge { what, unit: "steps", got, expected })
        }
        other => Err(wrong(format!("{what}.{list}"), other, "a list of components")),
    }
}

fn flatten<T>(
    value: Option<Value>,
    list: &'static str,
    what: &'static str,
    read: impl Fn(&Value) -> Result<T, TokenizerError>,
) -> Result<Vec<T>, TokenizerError> {
    steps(value, list, what)?.iter().map(read).collect()
}

fn kind<'v>(value: &'v Value, what: &str) -> Result<&'v str, TokenizerError> {
    let kind = value.get("type");
    kind.and_then(Value::as_str).ok_or_else(|| wrong(format!("{what}.type"), kind, "the name of a component"))
}

fn wrong(field: String, got: Option<&Value>, expected: &'static str) -> TokenizerError {
    let got = match got {
        None => "nothing".into(),
        Some(value) => shortened(&value.to_string()),
    };
    TokenizerError::Setting { field, got, expected }
}

fn text<'v>(value: &'v Value, field: &str, what: &str) -> Result<&'v str, TokenizerError> {
    let found = value.get(field);
    match found.and_then(Value::as_str) {
        Some(text) if text.len() <= LONGEST_SETTING => Ok(text),
        _ => Err(wrong(format!("{what}.{field}"), found, "a text of at most 1024 bytes")),
    }
}

fn flag(value: &Value, field: &str, what: &str, usual: bool) -> Result<bool, TokenizerError> {
    match value.get(field) {
        None => Ok(usual),
        Some(Value::Bool(flag)) => Ok(*flag),
        other => Err(wrong(format!("{what}.{field}"), other, "true or false")),
    }
}

fn normalizer(value: &Value) -> Result<Normalizer, TokenizerError> {
    const WHAT: &str = "normalizer";
    Ok(match kind(value, WHAT)? {
        "NFC" => Normalizer::Nfc,
        "NFD" => Normalizer::Nfd,
        "NFKC" => Normalizer::Nfkc,
        "NFKD" => Normalizer::Nfkd,
        "Lowercase" => Normalizer::Lowercase,
        "Prepend" => Normalizer::Prepend(text(value, "prepend", WHAT)?.to_owned()),
        "Replace" => {
            let pattern = value.get("pattern").unwrap_or(&Value::Null);
            let from = text(pattern, "String", "normalizer.pattern")?.to_owned();
            Normalizer::Replace { from, to: text(value, "content", WHAT)?.to_owned() }
        }
        other => {
            let got = shortened(other);
            let expected = "NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace";
            return Err(TokenizerError::Unsupported { field: WHAT, got, expected });
        }
    })
}

/// The splitters, and whether words are then spelled in bytes.
fn pre_tokenizer(value: Option<Value>) -> Result<(Vec<Splitter>, bool), TokenizerError> {
    const WHAT: &str = "pre_tokenizer";
    let (mut splitters, mut byte_level) = (Vec::new(), false);
    let pattern = |source: &str, behavior, invert| {
        Ok::<_, TokenizerError>(Splitter::Pattern(Box::new(Pattern::new(source, behavior, invert)?)))
    };
    for step in steps(value, "pretokenizers", WHAT)? {
        if byte_level {
            return Err(wrong(format!("{WHAT}.pretokenizers"), Some(&step), "nothing behind ByteLevel"));
        }
        match kind(&step, WHAT)? {
            "ByteLevel" => {
                if flag(&step, "add_prefix_space", WHAT, true)? {
                    splitters.push(Splitter::PrefixSpace);
                }
                if flag(&step, "use_regex", WHAT, true)? {
                    splitters.push(pattern(GPT2, Behavior::Isolated, false)?);
                }
                byte_level = true;
            }
            "Digits" => splitters.push(Splitter::Digits { individual: flag(&step, "individual_digits", WHAT, false)? }),
            "Metaspace" => splitters.push(Splitter::Metaspace {
                replacement: text(&step, "replacement", WHAT)?.to_owned(),
                prepend: prepend(&step, WHAT)?,
                split: flag(&step, "split", WHAT, true)?,
            }),
            "Split" => {
                let behavior = match text(&step, "behavior", WHAT)? {
                    "Isolated" => Behavior::Isolated,
                    "Removed" => Behavior::Removed,
                    "MergedWithPrevious" => Behavior::MergedWithPrevious,
                    "MergedWithNext" => Behavior::MergedWithNext,
                    "Contiguous" => Behavior::Contiguous,
                    other => {
                        let expected = "Isolated, Removed, MergedWithPrevious, MergedWithNext, Contiguous";
                        return Err(TokenizerError::Unsupported {
                            field: "pre_tokenizer.behavior",
                            got: shortened(other),
                            expected,
                        });
                    }
                };
                let invert = flag(&step, "invert", WHAT, false)?;
                let source = step.get("pattern").unwrap_or(&Value::Null);
                splitters.push(if let Some(source) = source.get("Regex").and_then(Value::as_str) {
                    pattern(source, behavior, invert)?
                } else {
                    let text = text(source, "String", "pre_tokenizer.pattern")?.to_owned();
                    Splitter::Literal { text, behavior, invert }
                });
            }
            other => {
                let (got, expected) = (shortened(other), "ByteLevel, Digits, Metaspace, Split");
                return Err(TokenizerError::Unsupported { field: WHAT, got, expected });
            }
        }
    }
    Ok((splitters, byte_level))
}

fn prepend(value: &Value, what: &str) -> Result<Prepend, TokenizerError> {
    match value.get("prepend_scheme").and_then(Value::as_str) {
        Some("always") => Ok(Prepend::Always),
        Some("first") => Ok(Prepend::First),
        Some("never") => Ok(Prepend::Never),
        Some(other) => {
            let (got, expected) = (shortened(other), "always, first, never");
            Err(TokenizerError::Unsupported { field: "prepend_scheme", got, expected })
        }
        None => Ok(if flag(value, "add_prefix_space", what, true)? { Prepend::Always } else { Prepend::Never }),
    }
}

/// The alphabet, and whether decoding drops the first blank.
fn decoder(value: Option<Value>) -> Result<(Alphabet, bool), TokenizerError> {
    const WHAT: &str = "decoder";
    const NAMES: &str = "ByteLevel, Metaspace, or a Sequence of Replace, ByteFallback, Fuse, Strip";
    let unsupported = |got: &str| TokenizerError::Unsupported { field: WHAT, got: shortened(got), expected: NAMES };
    let (mut alphabet, mut strip) = (None, false);
    for step in steps(value, "decoders", WHAT)? {
        let known = match kind(&step, WHAT)? {
            "ByteLevel" => alphabet.replace(Alphabet::Bytes).is_none(),
            "Metaspace" => {
                strip = prepend(&step, WHAT)? != Prepend::Never;
                alphabet.replace(Alphabet::Blanks).is_none() && step.get("replacement") == Some(&Value::from("▁"))
            }
            "Replace" => {
                let from = step.get("pattern").and_then(|pattern| pattern.get("String"));
                let blanks = from == Some(&Value::from("▁")) && step.get("content") == Some(&Value::from(" "));
                alphabet.replace(Alphabet::Blanks).is_none() && blanks
            }
            "Strip" => {
                let is = |field, value: Value| step.get(field) == Some(&value);
                strip = true;
                is("content", " ".into()) && is("start", 1.into()) && is("stop", 0.into())
            }
            "ByteFallback" | "Fuse" => true,
            _ => false,
        };
        if !known {
            return Err(unsupported(&step.to_string()));
        }
    }
    Ok((alphabet.ok_or_else(|| unsupported("nothing that spells tokens"))?, strip))
}

/// Ids before and behind a text.
fn post_processor(value: Option<Value>, vocab_size: usize) -> Result<(Vec<u32>, Vec<u32>), TokenizerError> {
    const WHAT: &str = "post_processor";
    let mut affixes = None;
    for step in steps(value, "processors", WHAT)? {
        match kind(&step, WHAT)? {
            "ByteLevel" => {}
            "TemplateProcessing" if affixes.is_none() => affixes = Some(template(&step, vocab_size)?),
            other => {
                let (got, expected) = (shortened(other), "ByteLevel, one TemplateProcessing");
                return Err(TokenizerError::Unsupported { field: WHAT, got, expected });
            }
        }
    }
    Ok(affixes.unwrap_or_default())
}

fn template(value: &Value, vocab_size: usize) -> Result<(Vec<u32>, Vec<u32>), TokenizerError> {
    let single = value.get("single");
    let wrong_single = || wrong("post_processor.single".into(), single, "special tokens around one sequence");
    let (mut before, mut behind, mut sequences) = (Vec::new(), Vec::new(), 0);
    for part in single.and_then(Value::as_array).ok_or_else(wrong_single)? {
        if part.get("Sequence").is_some() {
            sequences += 1;
            continue;
        }
        let name = part.get("SpecialToken").and_then(|token| token.get("id")).and_then(Value::as_str);
        let name = name.ok_or_else(wrong_single)?;
        let token = value.get("special_tokens").and_then(|tokens| tokens.get(name));
        let ids = token.and_then(|token| token.get("ids"));
        let field = || format!("post_processor.special_tokens.{}.ids", shortened(name));
        for id in ids.and_then(Value::as_array).ok_or_else(|| wrong(field(), ids, "a list of ids"))? {
            let id = id.as_i64().ok_or_else(|| wrong(field(), Some(id), "an id"))?;
            if !(0..vocab_size as i64).contains(&id) {
                return Err(TokenizerError::Id { what: field(), got: id, expected: vocab_size as u64 });
            }
            if sequences == 0 { before.push(id as u32) } else { behind.push(id as u32) }
        }
    }
    if sequences == 1 { Ok((before, behind)) } else { Err(wrong_single()) }
}
