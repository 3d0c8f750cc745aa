//! The filters, tests, functions and methods of chat templates: Jinja's and transformers', with Python's text and
//! inside the budget.

use super::budget::{self, Text};
use super::guard;
use super::python::{self, Json, invalid, to_str};
use minijinja::formatting::{FormatStyle, format};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// The message of `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// Levels of macros and loops in one another; a macro costs four.
const RECURSION: usize = 400;
/// The widest field of a format; a real one has a few columns.
const WIDEST: usize = 1000;

pub(super) fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// An environment for one rendering with variables of `input` bytes; `now` is its second since 1970.
pub(super) fn environment(now: i64, input: u64) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_fuel(Some(budget::steps(input)));
    env.set_recursion_limit(RECURSION);
    env.set_formatter(|out, _, value| {
        let text = match value.as_str() {
            Some(text) => {
                budget::make(text.len() as u64)?;
                return out.write_str(text).map_err(Error::from);
            }
            None => to_str(value)?,
        };
        out.write_str(&text).map_err(Error::from)
    });
    env.set_unknown_method_callback(method);
    guards(&mut env);
    filters(&mut env);
    env.add_test("sequence", |value: Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined)
    });
    env.add_test("iterable", |value: Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Iterable)
            || value.is_undefined()
    });
    env.add_test("number", |value: Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
    env.add_test("divisibleby", |value: Value, by: Value| -> Result<bool, Error> {
        match (integer(&value), integer(&by)) {
            (Some(value), Some(by)) if by != 0 => Ok(value.checked_rem(by).is_none_or(|rest| rest == 0)),
            _ => Err(invalid(format!("{} is divisible by no {}", value.kind(), by.kind()))),
        }
    });
    env.add_test("callable", |value: Value| value.kind() == ValueKind::Plain);
    env.remove_global("debug");
    env.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
        let message = to_str(&message)?;
        Err(invalid(message.clone()).with_source(Raised(message)))
    });
    env.add_function("strftime_now", move |format: String| python::strftime(&format, now));
    env
}

fn guards(env: &mut Environment<'_>) {
    env.add_filter(guard::MADE, |value: Value| budget::made(&value).map(|()| value));
    env.add_filter(guard::TEXT, |value: Value| budget::look_at_text(&value).map(|()| value));
    env.add_filter(guard::ALL, |value: Value| budget::look_at_all(&value).map(|()| value));
    env.add_filter(guard::ITEMS, |value: Value| -> Result<Value, Error> {
        budget::look_at_items(&value)?;
        iterable(value)
    });
    env.add_filter(guard::LOOP, |value: Value| -> Result<Value, Error> {
        budget::look_at_text(&value)?;
        iterable(value)
    });
    env.add_filter(guard::CONTAINER, |value: Value| -> Result<Value, Error> {
        match value.kind() {
            ValueKind::Map => budget::look_at_one()?,
            _ => budget::look_at_all(&value)?,
        }
        Ok(value)
    });
    env.add_filter(guard::SLICE, slice);
    env.add_filter(guard::CONCATENATE, |left: Value, right: Value| -> Result<String, Error> {
        let mut text = Text::default();
        python::write_str(&left, &mut text)?;
        python::write_str(&right, &mut text)?;
        Ok(text.finish())
    });
    env.add_filter(guard::ADD, add);
    env.add_filter(guard::MULTIPLY, multiply);
}

/// Python's loops refuse `None`; undefined values are empty.
fn iterable(value: Value) -> Result<Value, Error> {
    if value.is_none() { Err(invalid("'NoneType' object is not iterable".into())) } else { Ok(value) }
}

fn collect(value: &Value) -> Result<Value, Error> {
    budget::make_container(value.len().unwrap_or(0) as u64)?;
    let mut items = Vec::new();
    for item in value.try_iter()? {
        items.push(item);
    }
    Ok(Value::from(items))
}

/// Python's slice of a string or a list.
fn slice(value: &Value, start: &Value, stop: &Value, step: &Value) -> Result<Value, Error> {
    let bound = |bound: &Value| match integer(bound) {
        None if bound.is_none() => Ok(None),
        None => Err(invalid(format!("a slice bound of type {}", bound.kind()))),
        Some(bound) => Ok(Some(bound)),
    };
    let (start, stop, step) = (bound(start)?, bound(stop)?, bound(step)?.unwrap_or(1));
    if step == 0 {
        return Err(invalid("slice step cannot be zero".into()));
    }
    // (first, how many, distance) of the items that the slice takes
    let range = |len: usize| {
        let len = len as i128;
        let (lowest, highest) = if step > 0 { (0, len) } else { (-1, len - 1) };
        let clamp = |bound: i128| if bound < 0 { (bound + len).max(lowest) } else { bound.min(highest) };
        let first = start.map_or(if step > 0 { lowest } else { highest }, clamp);
        let end = stop.map_or(if step > 0 { highest } else { lowest }, clamp);
        let count = if step > 0 { (end - first + step - 1) / step } else { (end - first + step + 1) / step };
        (first, count.max(0))
    };
    if let Some(text) = value.as_str() {
        budget::look_at_text(value)?;
        let length = text.chars().count();
        let (first, count) = range(length);
        budget::make(text.len() as u64)?;
        if step == 1 {
            return Ok(Value::from(text.chars().skip(first as usize).take(count as usize).collect::<String>()));
        }
        budget::make(text.len() as u64 * 4)?;
        let characters: Vec<char> = text.chars().collect();
        return Ok(Value::from((0..count).map(|i| characters[(first + i * step) as usize]).collect::<String>()));
    }
    if !is_list(value) {
        return Err(invalid(format!("a value of type {} cannot be sliced", value.kind())));
    }
    let items: Vec<Value> = value.try_iter()?.collect();
    let (first, count) = range(items.len());
    budget::make_container((items.len() as i128 + count) as u64)?;
    let taken: Vec<Value> = (0..count).map(|i| items[(first + i * step) as usize].clone()).collect();
    Ok(if value.is_tuple() { Value::from(Tuple::from(taken)) } else { Value::from(taken) })
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn integer(value: &Value) -> Option<i128> {
    match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    }
}

fn from_integer(number: i128) -> Value {
    i64::try_from(number).map_or_else(|_| Value::from(number), Value::from)
}

fn float(value: &Value) -> Option<f64> {
    let number = value.kind() == ValueKind::Number;
    integer(value).map(|number| number as f64).or_else(|| number.then(|| f64::try_from(value.clone()).ok()).flatten())
}

fn mismatch(operator: &str, left: &Value, right: &Value) -> Error {
    invalid(format!("unsupported operands for {operator}: {} and {}", left.kind(), right.kind()))
}

fn add(left: &Value, right: &Value) -> Result<Value, Error> {
    if let (Some(left), Some(right)) = (left.as_str(), right.as_str()) {
        let mut text = Text::default();
        text.push(left)?;
        text.push(right)?;
        return Ok(Value::from(text.finish()));
    }
    if is_list(left) && is_list(right) {
        budget::make_container((left.len().unwrap_or(0) + right.len().unwrap_or(0)) as u64)?;
        let mut items: Vec<Value> = Vec::new();
        items.extend(left.try_iter()?);
        items.extend(right.try_iter()?);
        return Ok(if left.is_tuple() { Value::from(Tuple::from(items)) } else { Value::from(items) });
    }
    if let (Some(a), Some(b)) = (integer(left), integer(right)) {
        return a.checked_add(b).map(from_integer).ok_or_else(|| mismatch("+", left, right));
    }
    match (float(left), float(right)) {
        (Some(a), Some(b)) => Ok(Value::from(a + b)),
        _ => Err(mismatch("+", left, right)),
    }
}

fn multiply(left: &Value, right: &Value) -> Result<Value, Error> {
    let times = |count: i128| u64::try_from(count.max(0)).unwrap_or(u64::MAX);
    for (value, count) in [(left, right), (right, left)] {
        let Some(count) = integer(count).map(times) else { continue };
        if let Some(text) = value.as_str() {
            budget::make(count.saturating_mul(text.len() as u64))?;
            return Ok(Value::from(text.repeat(if text.is_empty() { 0 } else { count as usize })));
        }
        if is_list(value) {
            let items: Vec<Value> = value.try_iter()?.collect();
            budget::make_container(count.saturating_mul(items.len() as u64))?;
            let len = count as usize * items.len();
            return Ok(Value::from(items.iter().cycle().take(len).cloned().collect::<Vec<_>>()));
        }
    }
    if let (Some(a), Some(b)) = (integer(left), integer(right)) {
        return a.checked_mul(b).map(from_integer).ok_or_else(|| mismatch("*", left, right));
    }
    match (float(left), float(right)) {
        (Some(a), Some(b)) => Ok(Value::from(a * b)),
        _ => Err(mismatch("*", left, right)),
    }
}

type Case = fn(&mut State<'_, '_>, String) -> Result<Value, Error>;

/// Filters and methods that change the case of letters.
const CASES: [(&str, Case); 4] = [
    ("lower", |_, text| Ok(Value::from(text.to_lowercase()))),
    ("upper", |_, text| Ok(Value::from(text.to_uppercase()))),
    ("title", |_, text| Ok(Value::from(minijinja::filters::title(text.into())))),
    ("capitalize", |state, text| unknown_method_callback(state, &Value::from(text), "capitalize", &[])),
];

fn filters(env: &mut Environment<'_>) {
    // These make more than they are given, and no chat template needs them.
    for name in ["batch", "slice", "chain", "zip", "pprint"] {
        env.remove_filter(name);
    }
    for name in ["length", "count"] {
        env.add_filter(name, |value: Value| -> Result<usize, Error> {
            let no_length = || invalid(format!("{} has no length", value.kind()));
            if value.is_undefined() { Ok(0) } else { value.len().ok_or_else(no_length) }
        });
    }
    // Letters may grow to three times their bytes, and to six when they are escaped.
    for (name, change) in CASES {
        env.add_filter(name, move |state: &mut State<'_, '_>, value: Value| -> Result<Value, Error> {
            let text = to_str(&value)?;
            budget::make(text.len() as u64 * 3)?;
            change(state, text)
        });
    }
    for name in ["escape", "e"] {
        env.add_filter(name, |state: &mut State<'_, '_>, value: Value| -> Result<Value, Error> {
            let text = to_str(&value)?;
            budget::make(text.len() as u64 * 6)?;
            minijinja::filters::escape(state, &Value::from(text))
        });
    }
    env.add_filter("string", |value: Value| to_str(&value));
    env.add_filter("tojson", tojson);
    env.add_filter("replace", |value: Value, from: Value, to: Value, count: Option<i64>| -> Result<Value, Error> {
        replace(&to_str(&value)?, &to_str(&from)?, &to_str(&to)?, count)
    });
    env.add_filter("join", |values: Value, separator: Option<Value>, options: Kwargs| -> Result<String, Error> {
        let named: Option<Value> = options.get("d")?;
        let attribute: Option<String> = options.get("attribute")?;
        options.assert_all_used()?;
        let separator = separator.or(named).map_or_else(|| Ok(String::new()), |separator| to_str(&separator))?;
        join(&separator, &values, attribute.as_deref())
    });
    env.add_filter("indent", indent);
    env.add_filter("format", |template: String, values: Rest<Value>| -> Result<String, Error> {
        check_widths(&template, &values)?;
        format(FormatStyle::Printf, &template, &values)
    });
    env.add_filter("split", |value: String, separator: Option<String>, most: Option<i64>| {
        split(&value, separator.as_deref(), most)
    });
    env.add_filter("lines", |value: String| lines(&value, false));
    env.add_filter("list", |value: Value| collect(&value));
    env.add_filter("trim", |value: Value, characters: Option<String>| -> Result<String, Error> {
        let text = to_str(&value)?;
        Ok(match characters {
            Some(characters) => text.trim_matches(|c| characters.contains(c)).to_owned(),
            None => text.trim().to_owned(),
        })
    });
}

#[allow(clippy::needless_pass_by_value)] // keyword arguments come by value
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = options.get("indent")?;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match (indent.as_str(), integer(&indent)) {
            (Some(text), _) => text.to_owned(),
            (None, Some(width)) => " ".repeat(usize::try_from(width.max(0)).unwrap_or(usize::MAX).min(WIDEST)),
            (None, None) => return Err(invalid(format!("tojson: expected an indent, got {}", indent.kind()))),
        }),
    };
    let separators: Option<Value> = options.get("separators")?;
    let (mut item_separator, mut key_separator) =
        (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    if let Some(separators) = separators.filter(|separators| !separators.is_none()) {
        item_separator = to_str(&separators.get_item(&Value::from(0))?)?;
        key_separator = to_str(&separators.get_item(&Value::from(1))?)?;
    }
    let json = Json {
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent,
        item_separator,
        key_separator,
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut text = Text::default();
    json.write(value, &mut text, 0)?;
    Ok(text.finish())
}

fn replace(text: &str, from: &str, to: &str, count: Option<i64>) -> Result<Value, Error> {
    let most = usize::try_from(count.unwrap_or(-1)).unwrap_or(usize::MAX);
    let found = text.matches(from).take(most).count();
    budget::make(text.len() as u64 + (found as u64).saturating_mul(to.len() as u64))?;
    Ok(Value::from(text.replacen(from, to, most)))
}

fn join(separator: &str, values: &Value, attribute: Option<&str>) -> Result<String, Error> {
    let mut text = Text::default();
    for (i, value) in values.try_iter()?.enumerate() {
        if i > 0 {
            text.push(separator)?;
        }
        match attribute {
            Some(attribute) => python::write_str(&value.get_attr(attribute)?, &mut text)?,
            None => python::write_str(&value, &mut text)?,
        }
    }
    Ok(text.finish())
}

/// Jinja's `indent(width=4, first=False, blank=False)`.
#[allow(clippy::needless_pass_by_value)] // keyword arguments come by value
fn indent(
    text: &str,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<String, Error> {
    let width = width.or(options.get("width")?);
    let first = first.or(options.get("first")?).unwrap_or(false);
    let blank = blank.or(options.get("blank")?).unwrap_or(false);
    options.assert_all_used()?;
    let prefix = match &width {
        None => "    ".to_owned(),
        Some(width) => match (width.as_str(), integer(width)) {
            (Some(prefix), _) => prefix.to_owned(),
            (None, count) => " ".repeat(usize::try_from(count.unwrap_or(4).max(0)).unwrap_or(usize::MAX).min(WIDEST)),
        },
    };
    let mut out = Text::default();
    for (i, line) in text.split('\n').enumerate() {
        if i > 0 {
            out.push("\n")?;
        }
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push(&prefix)?;
        }
        out.push(line)?;
    }
    Ok(out.finish())
}

/// Refuses keys and fields of a format that are not ASCII: minijinja's parser steps through them byte by byte.
fn check_fields(template: &str) -> Result<(), Error> {
    for (open, close) in [("%(", ')'), ("{", '}')] {
        for field in template.split(open).skip(1) {
            let field = field.split(close).next().unwrap_or(field);
            if !field.is_ascii() {
                return Err(invalid(format!("expected ASCII in a format's field, got {field:?}")));
            }
        }
    }
    Ok(())
}

/// Refuses widths and precisions that no text has, and counts what a format may print.
fn check_widths(template: &str, values: &[Value]) -> Result<(), Error> {
    check_fields(template)?;
    let (mut width, mut widest) = (0_usize, 0);
    for byte in template.bytes() {
        width =
            if byte.is_ascii_digit() { width.saturating_mul(10).saturating_add(usize::from(byte - b'0')) } else { 0 };
        widest = widest.max(width);
    }
    // A width may also come from a value.
    if template.contains('*') || template.contains("{}}") || template.contains(":{") {
        let given = values.iter().filter_map(integer).max().unwrap_or(0);
        widest = widest.max(usize::try_from(given).unwrap_or(if given > 0 { usize::MAX } else { 0 }));
    }
    if widest > WIDEST {
        return Err(budget::exceeded("columns of a format", WIDEST as u64));
    }
    // Each field may print all that is given.
    let fields = template.bytes().filter(|byte| matches!(byte, b'%' | b'{')).count() as u64;
    let mut size = widest as u64;
    for value in values {
        size += to_str(value)?.len() as u64;
    }
    budget::make(fields.saturating_mul(size) + template.len() as u64)
}

/// Python's `str.split`.
fn split(text: &str, separator: Option<&str>, most: Option<i64>) -> Result<Value, Error> {
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    match separator {
        Some("") => Err(invalid("empty separator".into())),
        Some(separator) => {
            let parts = text.matches(separator).take(most).count() as u64 + 1;
            budget::make_container(parts)?;
            Ok(text.splitn(most.saturating_add(1), separator).map(Value::from).collect())
        }
        None => {
            budget::make_container(text.split_whitespace().count() as u64)?;
            let mut parts = Vec::new();
            let mut rest = text.trim_start();
            while !rest.is_empty() {
                let end = if parts.len() == most { None } else { rest.find(char::is_whitespace) };
                let (part, behind) = rest.split_at(end.unwrap_or(rest.len()));
                parts.push(Value::from(part));
                rest = behind.trim_start();
            }
            Ok(Value::from(parts))
        }
    }
}

/// Python's `str.splitlines`.
fn lines(text: &str, keep_ends: bool) -> Result<Value, Error> {
    let breaks = |c: char| {
        matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    budget::make_container(text.matches(breaks).count() as u64 + 1)?;
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(end) = rest.find(breaks) else {
            parts.push(Value::from(rest));
            break;
        };
        let width =
            if rest[end..].starts_with("\r\n") { 2 } else { rest[end..].chars().next().map_or(0, char::len_utf8) };
        parts.push(Value::from(&rest[..if keep_ends { end + width } else { end }]));
        rest = &rest[end + width..];
    }
    Ok(Value::from(parts))
}

/// Python's methods: those that make more than they are given here, the others by minijinja.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    for arg in args {
        budget::look_at_all(arg)?;
    }
    let Some(text) = value.as_str() else {
        if name == "count" {
            budget::look_at_all(value)?;
        }
        return unknown_method_callback(state, value, name, args);
    };
    budget::look_at_text(value)?;
    match name {
        "replace" => {
            let (from, to, count): (&str, &str, Option<i64>) = from_args(args)?;
            replace(text, from, to, count)
        }
        "join" => {
            let (values,): (&Value,) = from_args(args)?;
            join(text, values, None).map(Value::from)
        }
        "split" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            split(text, separator, most)
        }
        "rsplit" => {
            let (separator, most): (&str, Option<i64>) = from_args(args)?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            if separator.is_empty() {
                return Err(invalid("empty separator".into()));
            }
            budget::make_container(text.matches(separator).count() as u64 + 1)?;
            let mut parts: Vec<&str> = text.rsplitn(most.saturating_add(1), separator).collect();
            parts.reverse();
            Ok(parts.into_iter().map(Value::from).collect())
        }
        "splitlines" => {
            let (keep_ends,): (Option<bool>,) = from_args(args)?;
            lines(text, keep_ends.unwrap_or(false))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "format" => {
            check_widths(text, args)?;
            format(FormatStyle::StrFormat, text, args).map(Value::from)
        }
        name if CASES.iter().any(|(case, _)| *case == name) => {
            budget::make(text.len() as u64 * 3)?;
            unknown_method_callback(state, value, name, args)
        }
        _ => match unknown_method_callback(state, value, name, args) {
            Err(error) if error.kind() == ErrorKind::UnknownMethod => {
                Err(Error::new(ErrorKind::UnknownMethod, format!("strings have no method {name}")))
            }
            other => other,
        },
    }
}
