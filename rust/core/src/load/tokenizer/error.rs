//! What can be wrong with a tokenizer: one variant for each way.

/// A `tokenizer.json` or a vocabulary that cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TokenizerError {
    /// The text is not the JSON a tokenizer is.
    #[error("expected the JSON of a tokenizer, got {got}")]
    Json {
        /// The parser's message.
        got: String,
    },
    /// A part of the file is larger than any real one.
    #[error("{what}: expected at most {expected} {unit}, got {got}")]
    TooLarge {
        /// The part.
        what: &'static str,
        /// `bytes`, `tokens`, `merges` …
        unit: &'static str,
        /// Its size, or the first size past the limit.
        got: u64,
        /// The limit.
        expected: u64,
    },
    /// A part that no tokenizer can do without is absent.
    #[error("{field}: expected {expected}, got nothing")]
    Missing {
        /// The part.
        field: &'static str,
        /// What it should hold.
        expected: &'static str,
    },
    /// A component has a setting of the wrong type or value.
    #[error("{field}: expected {expected}, got {got}")]
    Setting {
        /// The component and setting.
        field: String,
        /// The value.
        got: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A component that exists but is not implemented.
    #[error("{field}: expected one of {expected}, got {got}")]
    Unsupported {
        /// The component.
        field: &'static str,
        /// Its type or name.
        got: String,
        /// The types or names that work.
        expected: &'static str,
    },
    /// A splitting pattern that does not compile.
    #[error("split pattern {pattern:?}: expected a regular expression that runs in linear time, got {got}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// The compiler's message.
        got: String,
    },
    /// The vocabulary has no tokens.
    #[error("expected a vocabulary, got one without tokens")]
    Empty,
    /// A token id past the limit, or past the end of the vocabulary.
    #[error("{what}: expected an id below {expected}, got {got}")]
    Id {
        /// The token or the role.
        what: String,
        /// The id.
        got: i64,
        /// The limit.
        expected: u64,
    },
    /// Two tokens share an id.
    #[error("id {id}: expected one token, got {first:?} and {second:?}")]
    DuplicateId {
        /// The id.
        id: u32,
        /// One token.
        first: String,
        /// The other.
        second: String,
    },
    /// Two ids share a token.
    #[error("token {token:?}: expected one id, got {first} and {second}")]
    DuplicateToken {
        /// The token.
        token: String,
        /// The lower id.
        first: u32,
        /// The higher id.
        second: u32,
    },
    /// A token longer than any real one.
    #[error("token {id}: expected at most {expected} bytes, got {got}")]
    TokenLength {
        /// Its id.
        id: u32,
        /// Its bytes.
        got: u64,
        /// The limit.
        expected: u64,
    },
    /// A list that should have one entry per token.
    #[error("{field}: expected {expected} entries, one per token, got {got}")]
    Length {
        /// The list.
        field: &'static str,
        /// Its length.
        got: usize,
        /// The number of tokens.
        expected: usize,
    },
    /// A merge that is not a pair.
    #[error("merge {index}: expected two pieces separated by one blank, got {got:?}")]
    MergeShape {
        /// Its position.
        index: usize,
        /// The merge.
        got: String,
    },
    /// A merge of, or into, a token that does not exist.
    #[error("merge {index}: expected tokens of the vocabulary, got {got:?}, which is none")]
    MergeToken {
        /// Its position.
        index: usize,
        /// The piece.
        got: String,
    },
    /// A score that orders nothing.
    #[error("token {id}: expected a finite score, got {got}")]
    Score {
        /// The token's id.
        id: u32,
        /// The score, in words because NaN equals nothing.
        got: String,
    },
    /// A token type that does not exist.
    #[error("token {id}: expected a type from 0 to 6, got {got}")]
    TokenType {
        /// The token's id.
        id: u32,
        /// The type.
        got: i32,
    },
    /// A byte token that names no byte.
    #[error("token {id}: expected a byte token from <0x00> to <0xFF>, got {got:?}")]
    ByteToken {
        /// The token's id.
        id: u32,
        /// The token.
        got: String,
    },
    /// Text exists that no token can spell.
    #[error("expected the 256 byte tokens or an unknown token to fall back on, got no token for byte {got:#04x}")]
    Fallback {
        /// The first byte without a token.
        got: u8,
    },
}

impl TokenizerError {
    /// Whether the file is well formed but uses something that is not implemented.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, TokenizerError::Unsupported { .. } | TokenizerError::Pattern { .. })
    }
}

/// The start of `text`, short enough for a message.
pub(in crate::load) fn shortened(text: &str) -> String {
    const LONGEST: usize = 200;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
