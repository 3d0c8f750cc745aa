//! Chat templates: Jinja as transformers renders it, by minijinja, inside limits.
//!
//! A template that comes with a model is code from a stranger. It sees the messages and nothing else: no files, no
//! other templates, no clock but [`TemplateOptions::now`]. It runs on a stack of its own and within a budget of steps,
//! bytes and containers that grows with the messages, so it ends in bounded time and memory or gives an error.

mod budget;
mod environment;
mod guard;
mod python;
mod uses;

pub use uses::Uses;

use super::tokenizer::shortened;
use environment::Raised;
use minijinja::machinery::{self, CodeGenerator};
use minijinja::{AutoEscape, Error, ErrorKind, Value};
use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};

/// The longest source, ten times the longest real one.
const LONGEST_SOURCE: usize = 256 << 10;
/// The most tokens in one tag: parsers and compilers recurse along an expression.
const LONGEST_TAG: usize = 2000;
/// The most `elif` in a template, along which the parser recurses too.
const MOST_ELIF: usize = 500;
/// The stack that parsing and rendering get: what the limits above can make them use, with room.
const STACK: usize = 64 << 20;

/// What is wrong with a template, with what it was given, or with its rendering.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TemplateError {
    /// The source does not parse.
    #[error("chat template, line {line}: expected Jinja, got {got}")]
    Syntax {
        /// The line, from 1.
        line: usize,
        /// The parser's message.
        got: String,
    },
    /// The source, a tag or the messages are larger than a limit.
    #[error("chat template: expected at most {expected} {what}, got {got}")]
    TooLarge {
        /// The unit.
        what: &'static str,
        /// The amount.
        got: usize,
        /// The limit.
        expected: usize,
    },
    /// Jinja that chat templates may not use.
    #[error("chat template: expected {expected}, got {got}")]
    Unsupported {
        /// What it uses.
        got: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// Rendering needed more than a limit: an endless loop, a huge text, endless recursion.
    #[error("chat template: expected at most {expected} {what}, got more")]
    Limit {
        /// The unit.
        what: &'static str,
        /// The limit.
        expected: u64,
    },
    /// The template refused the messages, by `raise_exception`.
    #[error("the chat template refused the messages: {got}")]
    Raised {
        /// Its message.
        got: String,
    },
    /// The messages are no list of objects.
    #[error("messages: expected a list of objects with role and content, got {got}")]
    Messages {
        /// What they are.
        got: String,
    },
    /// A step of the rendering failed.
    #[error("chat template, line {line}: expected an expression that can be evaluated, got {got}")]
    Render {
        /// The line, from 1; 0 when it is not known.
        line: usize,
        /// The message.
        got: String,
    },
}

impl TemplateError {
    /// Whether the template is well formed but uses something that is not implemented.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, TemplateError::Unsupported { .. })
    }
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
    /// Seconds since 1970 that `strftime_now` shows, with the zone's offset added for local time; by default the clock,
    /// in UTC.
    pub now: Option<i64>,
}

/// A chat template that compiles.
///
/// ```
/// use farthing::load::{ChatTemplate, TemplateOptions};
/// use serde_json::json;
///
/// let template = ChatTemplate::new("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}")?;
/// let text = template.render(&json!([{"role": "user", "content": " Hello "}]), &TemplateOptions::default())?;
/// assert_eq!(text, "<user>Hello\n");
/// # Ok::<(), farthing::load::TemplateError>(())
/// ```
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    ///
    /// [`TemplateError::Syntax`], [`TemplateError::TooLarge`] and [`TemplateError::Unsupported`].
    pub fn new(source: &str) -> Result<Self, TemplateError> {
        at_most(source.len(), LONGEST_SOURCE, "bytes of source")?;
        let source = without_generation_tags(source).into_owned();
        on_own_stack(|| {
            check_tags(&source)?;
            compile(&source).map(|_| ())
        })?;
        Ok(Self { source })
    }

    /// The template's source, as it is compiled.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// What the template does with a variable of that name.
    ///
    /// ```
    /// use farthing::load::ChatTemplate;
    ///
    /// let template = ChatTemplate::new("{% if (effort | default('low')) in ['low', 'high'] %}{{ effort }}{% endif %}")?;
    /// let uses = template.uses("effort");
    /// assert!(uses.read && uses.literals.iter().eq(["high", "low"]));
    /// # Ok::<(), farthing::load::TemplateError>(())
    /// ```
    pub fn uses(&self, variable: &str) -> Uses {
        let found = on_own_stack(|| {
            let syntax = environment::syntax().map_err(|error| explain(&error, 0))?;
            let parsed = machinery::parse(&self.source, "chat template", syntax).map_err(|error| explain(&error, 0))?;
            Ok(uses::uses(&parsed, variable))
        });
        found.unwrap_or_default() // it compiled before
    }

    /// The prompt for `messages`, a list of objects with `role` and `content`. As in transformers, reasoning is passed
    /// as `reasoning_content` under whichever of `reasoning_content`, `thinking` and `reasoning` it comes.
    ///
    /// # Errors
    ///
    /// [`TemplateError::Raised`] carries the template's own message; [`TemplateError::Limit`] ends hostile templates.
    pub fn render(&self, messages: &serde_json::Value, options: &TemplateOptions) -> Result<String, TemplateError> {
        let mut input = 0;
        let mut convert = |value: &serde_json::Value| convert(value, 0, &mut input);
        let mut variables = vec![
            ("messages", convert(&alias_reasoning(messages)?)?),
            ("tools", options.tools.as_ref().map_or(Ok(Value::from(())), &mut convert)?),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(options.add_generation_prompt)),
        ];
        for (name, token) in [("bos_token", &options.bos_token), ("eos_token", &options.eos_token)] {
            variables.extend(token.as_ref().map(|token| (name, Value::from(token.as_str()))));
        }
        for (name, extra) in &options.extra {
            variables.push((name, convert(extra)?));
        }
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
        let env = environment::environment(options.now.unwrap_or_else(clock), input);
        let root = Value::from_pairs(variables);
        on_own_stack(move || {
            budget::start(input);
            let (instructions, blocks) = compile(&self.source)?;
            let mut text = String::new();
            let mut out = machinery::make_string_output(&mut text);
            let result = machinery::eval(&env, &instructions, root, &blocks, &mut out, AutoEscape::None);
            result.map(|_| ()).map_err(|error| explain(&error, budget::steps(input)))?;
            Ok(text)
        })
    }
}

type Compiled<'s> = (machinery::Instructions<'s>, std::collections::BTreeMap<&'s str, machinery::Instructions<'s>>);

fn compile(source: &str) -> Result<Compiled<'_>, TemplateError> {
    let syntax = environment::syntax().map_err(|error| explain(&error, 0))?;
    let parsed = machinery::parse(source, "chat template", syntax).map_err(|error| explain(&error, 0))?;
    let guarded = guard::guard(&parsed)?;
    let mut generator = CodeGenerator::new("chat template", source);
    generator.compile_stmt(&guarded);
    Ok(generator.finish())
}

/// Runs on a thread whose stack holds the deepest recursion that the limits allow.
fn on_own_stack<T: Send>(work: impl FnOnce() -> Result<T, TemplateError> + Send) -> Result<T, TemplateError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK);
        let failed = |got: String| TemplateError::Render { line: 0, got };
        let running = thread.spawn_scoped(scope, work).map_err(|error| failed(error.to_string()))?;
        running.join().unwrap_or_else(|_| Err(failed("a panic of the template engine".into())))
    })
}

/// Bounds what parsers and compilers recurse along.
fn check_tags(source: &str) -> Result<(), TemplateError> {
    use machinery::Token;
    let syntax = environment::syntax().map_err(|error| explain(&error, 0))?;
    let (mut tag, mut elif) = (0, 0);
    for token in machinery::tokenize(source, false, syntax) {
        let (token, _) = token.map_err(|error| explain(&error, 0))?;
        tag += 1;
        match token {
            Token::TemplateData(_) | Token::BlockStart | Token::VariableStart => tag = 0,
            Token::Ident("elif") => elif += 1,
            _ => {}
        }
        at_most(tag, LONGEST_TAG, "tokens in a tag")?;
        at_most(elif, MOST_ELIF, "branches")?;
    }
    Ok(())
}

fn at_most(got: usize, expected: usize, what: &'static str) -> Result<(), TemplateError> {
    if got > expected {
        return Err(TemplateError::TooLarge { what, got, expected });
    }
    Ok(())
}

/// `{% generation %}` marks an answer for training; for rendering it is a block like `{% with %}`.
fn without_generation_tags(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        let marker = tag.len() - tag.trim_start_matches(['-', '+']).len();
        let inner = tag[marker..].trim_start();
        let name = inner.split(|c: char| !c.is_ascii_alphabetic()).next().unwrap_or_default();
        let behind = inner[name.len()..].trim_start().trim_start_matches(['-', '+']);
        let replacement = match name {
            "generation" if behind.starts_with("%}") => Some("with"),
            "endgeneration" if behind.starts_with("%}") => Some("endwith"),
            _ => None,
        };
        rest = tag;
        if let Some(replacement) = replacement {
            let name_start = tag.len() - inner.len();
            out.push_str(&tag[..name_start]);
            out.push_str(replacement);
            rest = &tag[name_start + name.len()..];
        }
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Messages whose reasoning has the name that templates read.
fn alias_reasoning(messages: &serde_json::Value) -> Result<serde_json::Value, TemplateError> {
    let serde_json::Value::Array(messages) = messages else {
        return Err(TemplateError::Messages { got: kind_name(messages).into() });
    };
    let alias = |message: &serde_json::Value| {
        let serde_json::Value::Object(entries) = message else {
            return Err(TemplateError::Messages { got: format!("a list with {}", kind_name(message)) });
        };
        let names = ["reasoning_content", "thinking", "reasoning"];
        let reasoning = names.iter().find_map(|name| entries.get(*name).filter(|value| !value.is_null()));
        let Some(reasoning) = reasoning else { return Ok(message.clone()) };
        let mut aliased = serde_json::Map::new();
        aliased.insert("thinking".into(), reasoning.clone());
        aliased.extend(entries.iter().map(|(name, value)| (name.clone(), value.clone())));
        aliased.insert("reasoning_content".into(), reasoning.clone());
        Ok(serde_json::Value::Object(aliased))
    };
    messages.iter().map(alias).collect::<Result<Vec<_>, _>>().map(serde_json::Value::Array)
}

fn kind_name(value: &serde_json::Value) -> &'static str {
    match value {
        serde_json::Value::Null => "null",
        serde_json::Value::Bool(_) => "a boolean",
        serde_json::Value::Number(_) => "a number",
        serde_json::Value::String(_) => "a string",
        serde_json::Value::Array(_) => "a list",
        serde_json::Value::Object(_) => "an object",
    }
}

/// A value for the template; `input` counts its bytes.
fn convert(value: &serde_json::Value, depth: usize, input: &mut u64) -> Result<Value, TemplateError> {
    const DEEPEST: usize = budget::DEPTH as usize / 2;
    at_most(depth, DEEPEST, "levels in messages and variables")?;
    *input += 8;
    Ok(match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(flag) => Value::from(*flag),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => {
            *input += text.len() as u64;
            Value::from(text.as_str())
        }
        serde_json::Value::Array(items) => {
            let items = items.iter().map(|item| convert(item, depth + 1, input));
            Value::from(items.collect::<Result<Vec<_>, _>>()?)
        }
        serde_json::Value::Object(entries) => {
            let mut pairs = Vec::with_capacity(entries.len());
            for (key, item) in entries {
                *input += key.len() as u64;
                pairs.push((key.as_str(), convert(item, depth + 1, input)?));
            }
            Value::from_pairs(pairs)
        }
    })
}

/// An error of the engine in our words.
fn explain(error: &Error, steps: u64) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            return TemplateError::Raised { got: shortened(message) };
        }
        if let Some(budget::Exceeded { what, limit }) = current.downcast_ref() {
            return TemplateError::Limit { what, expected: *limit };
        }
        if let Some(error) = current.downcast_ref::<Error>()
            && error.kind() == ErrorKind::OutOfFuel
        {
            return TemplateError::Limit { what: "steps", expected: steps };
        }
        cause = current.source();
    }
    let (line, detail) = (error.line().unwrap_or(0), error.detail());
    let got = shortened(&detail.map_or_else(|| error.kind().to_string(), ToString::to_string));
    match error.kind() {
        ErrorKind::SyntaxError => TemplateError::Syntax { line, got },
        _ => TemplateError::Render { line, got },
    }
}
