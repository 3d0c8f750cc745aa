//! Every way a model file can be wrong.

/// A file is malformed; each variant says what was got and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// A configuration value is missing or out of range.
    #[error("config: {key}: got {got}, expected {expected}")]
    Config {
        /// Name of the value.
        key: String,
        /// What the file says.
        got: String,
        /// What would be right.
        expected: String,
    },
}
