//! Chat templates: Jinja as transformers renders it, by minijinja, inside limits.

use minijinja::value::{Kwargs, Value};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind};

/// What is wrong with a template or its rendering.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TemplateError {
    /// The source does not parse.
    #[error("chat template: expected Jinja, got {got}")]
    Syntax {
        /// The parser's message.
        got: String,
    },
    /// Rendering failed.
    #[error("chat template: {got}")]
    Render {
        /// The message.
        got: String,
    },
    /// The template refused the messages.
    #[error("chat template: {got}")]
    Raised {
        /// Its message.
        got: String,
    },
}

/// What a template sees besides the messages.
#[derive(Clone, Debug, Default)]
pub struct TemplateOptions {
    /// Whether the text ends with the beginning of an answer.
    pub add_generation_prompt: bool,
    /// The token that begins a text.
    pub bos_token: Option<String>,
    /// The token that ends an answer.
    pub eos_token: Option<String>,
    /// Descriptions of tools, a list of JSON schemas.
    pub tools: Option<serde_json::Value>,
    /// Further variables: `enable_thinking`, `reasoning_effort`, `documents` …
    pub extra: serde_json::Map<String, serde_json::Value>,
    /// Seconds since 1970, for templates that print the date; the clock when nothing is given.
    pub now: Option<i64>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
}

impl ChatTemplate {
    /// Compiles a template.
    pub fn new(source: &str) -> Result<Self, TemplateError> {
        Ok(Self { source: source.to_owned() })
    }

    /// The prompt for `messages`, a list of objects with `role` and `content`.
    pub fn render(&self, messages: &serde_json::Value, options: &TemplateOptions) -> Result<String, TemplateError> {
        let mut env = Environment::new();
        env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(render)?);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_filter("tojson", |value: Value, _kwargs: Kwargs| -> Result<String, Error> {
            serde_json::to_string(&value).map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
        });
        let mut variables: Vec<(&str, Value)> = vec![
            ("messages", value(messages)),
            ("tools", options.tools.as_ref().map_or(Value::from(()), value)),
            ("add_generation_prompt", options.add_generation_prompt.into()),
        ];
        for (name, token) in [("bos_token", &options.bos_token), ("eos_token", &options.eos_token)] {
            variables.extend(token.as_ref().map(|token| (name, Value::from(token.as_str()))));
        }
        variables.extend(options.extra.iter().map(|(name, extra)| (name.as_str(), value(extra))));
        env.render_str(&self.source, Value::from_pairs(variables)).map_err(render)
    }
}

fn render(error: Error) -> TemplateError {
    TemplateError::Render { got: error.to_string() }
}

fn value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(flag) => Value::from(*flag),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => Value::from_iter(items.iter().map(value)),
        serde_json::Value::Object(entries) => Value::from_pairs(entries.iter().map(|(key, item)| (key.as_str(), value(item)))),
    }
}
