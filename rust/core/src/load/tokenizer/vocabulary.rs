//! A tokenizer from the lists that GGUF metadata holds (`tokenizer.ggml.*`), with the ids that llama.cpp gives for the
//! same file.
//!
//! Types and keys are those of the GGUF specification. Where transformers differs from llama.cpp, this follows
//! llama.cpp: Qwen's text is not normalised to NFC. One thing is not followed: llama.cpp takes `</s>` for an end of the
//! answer in every vocabulary that has it, as Qwen's has for struck-out HTML.

use super::Tokenizer;
use super::added::{Added, Matcher};
use super::error::{TokenizerError, shortened};
use super::merges::{Atoms, Merges, Order};
use super::normalize::Normalizer;
use super::pieces::{Alphabet, Kind, Pieces, byte_token, check_count};
use super::split::{Behavior, GPT2, Pattern, Splitter};
use std::collections::HashMap;

/// The vocabulary of a GGUF file, key by key: `tokenizer.ggml.` and the name given.
#[derive(Clone, Debug, Default, PartialEq, serde::Deserialize)]
#[serde(default)]
pub struct Vocabulary {
    /// `model`: `gpt2` (byte-level BPE) or `llama` (`SentencePiece`).
    pub model: String,
    /// `pre`: how text is cut into words; for `gpt2` only.
    pub pre: String,
    /// `tokens`: the token of each id.
    pub tokens: Vec<String>,
    /// `scores`: for `llama` only.
    pub scores: Option<Vec<f32>>,
    /// `token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; 0 says nothing.
    pub types: Option<Vec<i32>>,
    /// `merges`: pairs separated by a blank, best first; for `gpt2` only.
    pub merges: Option<Vec<String>>,
    /// `bos_token_id`
    pub bos: Option<u32>,
    /// `eos_token_id`
    pub eos: Option<u32>,
    /// `eot_token_id`: ends a turn.
    pub eot: Option<u32>,
    /// `eom_token_id`: ends a message.
    pub eom: Option<u32>,
    /// `padding_token_id`
    pub pad: Option<u32>,
    /// `unknown_token_id`
    pub unk: Option<u32>,
    /// `add_bos_token`
    pub add_bos: Option<bool>,
    /// `add_eos_token`
    pub add_eos: Option<bool>,
    /// `add_space_prefix`
    pub add_space_prefix: Option<bool>,
}

/// Tokens that end an answer whatever the metadata says.
const ENDS: [&str; 12] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
];

/// How a family of files cuts text.
struct Cutting {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    whole_words: bool,
    add_bos: bool,
}

const LLAMA3: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN35: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}",
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

const CUTTINGS: [Cutting; 8] = [
    Cutting {
        names: &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "mellum",
        ],
        patterns: &[GPT2],
        whole_words: false,
        add_bos: false,
    },
    Cutting {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        patterns: &[r"\p{N}", GPT2],
        whole_words: false,
        add_bos: false,
    },
    Cutting {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"],
        patterns: &[LLAMA3],
        whole_words: true,
        add_bos: true,
    },
    Cutting { names: &["dbrx", "smaug-bpe"], patterns: &[LLAMA3], whole_words: false, add_bos: false },
    Cutting {
        names: &["qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "grok-2"],
        patterns: &[QWEN2],
        whole_words: false,
        add_bos: false,
    },
    Cutting { names: &["qwen35"], patterns: &[QWEN35], whole_words: false, add_bos: false },
    Cutting { names: &["tekken"], patterns: &[TEKKEN], whole_words: true, add_bos: true },
    Cutting {
        names: &["default", ""],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        whole_words: false,
        add_bos: false,
    },
];
const PRE_NAMES: &str = "gpt-2, smollm, llama-bpe, dbrx, qwen2, qwen35, tekken, default and their synonyms";

impl Tokenizer {
    /// A tokenizer from GGUF metadata.
    ///
    /// `model` `gpt2` cuts text as `pre` says and merges by rank; `llama` merges whole texts by score, with byte tokens
    /// for what no other token spells. Tokens of type 2, 3 and 4 are found in text first.
    ///
    /// # Errors
    ///
    /// One variant for each way to be wrong; [`TokenizerError::Unsupported`] names the models and `pre` names that
    /// work.
    pub fn from_vocabulary(mut vocabulary: Vocabulary) -> Result<Self, TokenizerError> {
        check_count(vocabulary.tokens.len())?;
        check_roles(&vocabulary)?;
        let types = kinds(&vocabulary)?;
        let tokens = std::mem::take(&mut vocabulary.tokens);
        let pieces = Pieces::new(types, |id| &tokens[id])?;
        drop(tokens);
        let mut tokenizer = match vocabulary.model.as_str() {
            "gpt2" => byte_level(pieces, &vocabulary)?,
            "llama" => sentence_piece(pieces, &vocabulary)?,
            other => {
                let got = shortened(other);
                return Err(TokenizerError::Unsupported {
                    field: "tokenizer.ggml.model",
                    got,
                    expected: "gpt2, llama",
                });
            }
        };
        let added = (0..tokenizer.pieces.len() as u32)
            .filter(|&id| matches!(tokenizer.pieces.kind(id), Kind::Added | Kind::Special))
            .map(|id| Added {
                id,
                text: tokenizer.pieces.get(id).to_owned(),
                single_word: false,
                left: false,
                right: false,
            });
        tokenizer.raw = Matcher::new(added.collect())?;
        tokenizer.eos = ends(&tokenizer.pieces, &vocabulary, tokenizer.eos.first().copied());
        Ok(tokenizer)
    }
}

fn byte_level(pieces: Pieces, vocabulary: &Vocabulary) -> Result<Tokenizer, TokenizerError> {
    let Some(cutting) = CUTTINGS.iter().find(|cutting| cutting.names.contains(&vocabulary.pre.as_str())) else {
        let got = shortened(&vocabulary.pre);
        return Err(TokenizerError::Unsupported { field: "tokenizer.ggml.pre", got, expected: PRE_NAMES });
    };
    let merges = vocabulary
        .merges
        .as_ref()
        .ok_or(TokenizerError::Missing { field: "tokenizer.ggml.merges", expected: "a list of merges" })?;
    // The first piece may itself be a blank in files that do not map bytes to letters.
    let pair = |merge: &str| merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
    let pairs = merges.iter().enumerate().map(|(index, merge)| match pair(merge) {
        Some(at) => Ok((&merge[..at], &merge[at + 1..])),
        None => Err(TokenizerError::MergeShape { index, got: shortened(merge) }),
    });
    let order = ranks(&pieces, merges.len(), pairs)?;
    let mut splitters = Vec::with_capacity(cutting.patterns.len());
    for pattern in cutting.patterns {
        splitters.push(Splitter::Pattern(Box::new(Pattern::new(pattern, Behavior::Isolated, false)?)));
    }
    let merges = Merges { order, atoms: Atoms::bytes(&pieces), whole_words: cutting.whole_words };
    let (prefix, suffix) = affixes(vocabulary, vocabulary.bos, vocabulary.eos, cutting.add_bos)?;
    Ok(Tokenizer {
        alphabet: Alphabet::Bytes,
        strip_blank: false,
        raw: None,
        normalized: None,
        normalizers: Vec::new(),
        splitters,
        merges,
        prefix,
        suffix,
        bos: vocabulary.bos,
        eos: vocabulary.eos.into_iter().collect(),
        pieces,
    })
}

fn sentence_piece(pieces: Pieces, vocabulary: &Vocabulary) -> Result<Tokenizer, TokenizerError> {
    let scores = vocabulary
        .scores
        .as_ref()
        .ok_or(TokenizerError::Missing { field: "tokenizer.ggml.scores", expected: "a score for each token" })?;
    if scores.len() != pieces.len() {
        let (got, expected) = (scores.len(), pieces.len());
        return Err(TokenizerError::Length { field: "tokenizer.ggml.scores", got, expected });
    }
    if let Some(id) = scores.iter().position(|score| !score.is_finite()) {
        return Err(TokenizerError::Score { id: id as u32, got: scores[id].to_string() });
    }
    // The roles that SentencePiece models have unless the file says otherwise.
    let role = |given: Option<u32>, usual: u32| given.or(((usual as usize) < pieces.len()).then_some(usual));
    let (unk, bos, eos) = (role(vocabulary.unk, 0), role(vocabulary.bos, 1), role(vocabulary.eos, 2));
    let atoms = Atoms::characters(&pieces, true, unk, false);
    if let Some(got) = atoms.unspellable() {
        return Err(TokenizerError::Fallback { got });
    }
    let prefix_blank = vocabulary.add_space_prefix.unwrap_or(true);
    let mut normalizers = vec![Normalizer::Replace { from: " ".into(), to: "▁".into() }];
    if prefix_blank {
        normalizers.insert(0, Normalizer::Prepend("▁".into()));
    }
    let (prefix, suffix) = affixes(vocabulary, bos, eos, true)?;
    Ok(Tokenizer {
        alphabet: Alphabet::Blanks,
        strip_blank: prefix_blank,
        raw: None,
        normalized: None,
        normalizers,
        splitters: Vec::new(),
        merges: Merges { order: Order::from_scores(scores), atoms, whole_words: false },
        prefix,
        suffix,
        bos,
        eos: eos.into_iter().collect(),
        pieces,
    })
}

/// Merges by rank, resolved to ids.
pub(super) fn ranks<'m>(
    pieces: &Pieces,
    count: usize,
    pairs: impl Iterator<Item = Result<(&'m str, &'m str), TokenizerError>>,
) -> Result<Order, TokenizerError> {
    const MOST_MERGES: usize = 1 << 21;
    if count > MOST_MERGES {
        let (got, expected) = (count as u64, MOST_MERGES as u64);
        return Err(TokenizerError::TooLarge { what: "merges", unit: "merges", got, expected });
    }
    // Each merge is a way to split a token.
    let mut ranks = HashMap::with_capacity(count.min(pieces.bytes()));
    let mut merged = String::new();
    for (index, pair) in pairs.enumerate() {
        let (left, right) = pair?;
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        let find =
            |piece: &str| pieces.find(piece).ok_or_else(|| TokenizerError::MergeToken { index, got: shortened(piece) });
        // A merge that is listed twice keeps its first rank.
        ranks.entry((find(left)?, find(right)?)).or_insert((index as u32, find(&merged)?));
    }
    Ok(Order::Ranks(ranks))
}

fn check_roles(vocabulary: &Vocabulary) -> Result<(), TokenizerError> {
    let Vocabulary { bos, eos, eot, eom, pad, unk, tokens, .. } = vocabulary;
    let roles = [("bos", bos), ("eos", eos), ("eot", eot), ("eom", eom), ("padding", pad), ("unknown", unk)];
    for (role, id) in roles {
        if let Some(id) = *id
            && id as usize >= tokens.len()
        {
            let what = format!("tokenizer.ggml.{role}_token_id");
            return Err(TokenizerError::Id { what, got: i64::from(id), expected: tokens.len() as u64 });
        }
    }
    Ok(())
}

fn kinds(vocabulary: &Vocabulary) -> Result<Vec<Kind>, TokenizerError> {
    let Vocabulary { tokens, types, .. } = vocabulary;
    if let Some(types) = types
        && types.len() != tokens.len()
    {
        let (got, expected) = (types.len(), tokens.len());
        return Err(TokenizerError::Length { field: "tokenizer.ggml.token_type", got, expected });
    }
    let kind = |(id, token): (usize, &String)| {
        let kind = match types.as_ref().map_or(1, |types| types[id]) {
            0 | 1 => Kind::Normal,
            2 | 3 => Kind::Special,
            4 => Kind::Added,
            5 => Kind::Unused,
            6 => {
                let byte = byte_token(token);
                let error = || TokenizerError::ByteToken { id: id as u32, got: shortened(token) };
                Kind::Byte(byte.ok_or_else(error)?)
            }
            got => return Err(TokenizerError::TokenType { id: id as u32, got }),
        };
        // Files exist whose end of turn is marked as an ordinary token.
        Ok(if ENDS.contains(&token.as_str()) { Kind::Special } else { kind })
    };
    tokens.iter().enumerate().map(kind).collect()
}

fn affixes(
    vocabulary: &Vocabulary,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
) -> Result<(Vec<u32>, Vec<u32>), TokenizerError> {
    let affix = |wanted: bool, id: Option<u32>, field| match (wanted, id) {
        (false, _) => Ok(Vec::new()),
        (true, Some(id)) => Ok(vec![id]),
        (true, None) => Err(TokenizerError::Missing { field, expected: "the id of the token to add" }),
    };
    Ok((
        affix(vocabulary.add_bos.unwrap_or(add_bos), bos, "tokenizer.ggml.bos_token_id")?,
        affix(vocabulary.add_eos.unwrap_or(false), eos, "tokenizer.ggml.eos_token_id")?,
    ))
}

fn ends(pieces: &Pieces, vocabulary: &Vocabulary, eos: Option<u32>) -> Vec<u32> {
    let named = |name: &str| pieces.find(name);
    // In harmony, `<|end|>` ends a message, not the answer.
    let harmony = named("<|return|>").is_some() && named("<|call|>").is_some();
    let mut ends: Vec<u32> = eos.into_iter().chain(vocabulary.eot).chain(vocabulary.eom).collect();
    ends.extend(ENDS.iter().filter(|name| !(harmony && **name == "<|end|>")).filter_map(|name| named(name)));
    let mut seen = Vec::with_capacity(ends.len());
    ends.retain(|id| {
        let new = !seen.contains(id);
        seen.push(*id);
        new
    });
    ends
}
