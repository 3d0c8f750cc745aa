//! Values as Python writes them: `str`, `repr`, `json.dumps`, `strftime`.

use super::budget::{self, DEPTH, Text};
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};
use std::borrow::Cow;

/// `str(value)`: what `{{ value }}` and `~` write.
pub(super) fn write_str(value: &Value, out: &mut Text) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.push(text),
        None if value.is_undefined() => Ok(()),
        None => write_repr(value, out, 0),
    }
}

pub(super) fn to_str(value: &Value) -> Result<String, Error> {
    let mut text = Text::default();
    write_str(value, &mut text)?;
    Ok(text.finish())
}

fn write_repr(value: &Value, out: &mut Text, depth: u32) -> Result<(), Error> {
    check_depth(depth)?;
    budget::look_at_one()?;
    match value.kind() {
        ValueKind::Undefined => out.push("Undefined"),
        ValueKind::None => out.push("None"),
        ValueKind::Bool => out.push(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push(&number(value)),
        ValueKind::String => write_quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Map if value.as_object().is_some_and(|object| object.enumerator_len().is_some()) => {
            out.push("{")?;
            for (i, key) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push(", ")?;
                }
                write_repr(&key, out, depth + 1)?;
                out.push(": ")?;
                write_repr(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push("}")
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ("(", ")") } else { ("[", "]") };
            out.push(open)?;
            for (i, item) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push(", ")?;
                }
                write_repr(&item, out, depth + 1)?;
            }
            if value.is_tuple() && value.len() == Some(1) {
                out.push(",")?;
            }
            out.push(close)
        }
        _ => out.push(&value.to_string()),
    }
}

fn write_quoted(text: &str, out: &mut Text) -> Result<(), Error> {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mark = if quote == '"' { "\"" } else { "'" };
    out.push(mark)?;
    escape(text, out, |c| match c {
        '\\' => Some("\\\\".into()),
        '\n' => Some("\\n".into()),
        '\r' => Some("\\r".into()),
        '\t' => Some("\\t".into()),
        c if c == quote => Some(format!("\\{c}").into()),
        c if printable(c) => None,
        c if (c as u32) < 0x100 => Some(format!("\\x{:02x}", c as u32).into()),
        c if (c as u32) < 0x1_0000 => Some(format!("\\u{:04x}", c as u32).into()),
        c => Some(format!("\\U{:08x}", c as u32).into()),
    })?;
    out.push(mark)
}

/// Writes `text` with some characters replaced.
fn escape(text: &str, out: &mut Text, replacement: impl Fn(char) -> Option<Cow<'static, str>>) -> Result<(), Error> {
    let mut done = 0;
    for (at, c) in text.char_indices() {
        if let Some(replacement) = replacement(c) {
            out.push(&text[done..at])?;
            out.push(&replacement)?;
            done = at + c.len_utf8();
        }
    }
    out.push(&text[done..])
}

/// `str.isprintable` for the characters that texts have: no controls, formats, separators but the blank, private or
/// unassigned ones.
fn printable(c: char) -> bool {
    !matches!(c,
        '\u{0}'..='\u{1f}' | '\u{7f}'..='\u{a0}' | '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}'
        | '\u{1680}' | '\u{180e}' | '\u{2000}'..='\u{200f}' | '\u{2028}'..='\u{202f}' | '\u{205f}'..='\u{206f}'
        | '\u{3000}' | '\u{e000}'..='\u{f8ff}' | '\u{feff}' | '\u{fff0}'..='\u{fffb}' | '\u{fffe}'..='\u{ffff}'
        | '\u{e0000}'..='\u{10ffff}')
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
}

/// `repr(float)`: the shortest digits that read back, with an exponent below 1e-4 and from 1e16 on.
fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{x}");
        return if plain.contains('.') { plain } else { format!("{plain}.0") };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// The arguments of `json.dumps` that templates use.
pub(super) struct Json {
    pub(super) ensure_ascii: bool,
    /// What one level is indented by; one line when there is nothing.
    pub(super) indent: Option<String>,
    pub(super) item_separator: String,
    pub(super) key_separator: String,
    pub(super) sort_keys: bool,
}

impl Json {
    /// `json.dumps(value)`
    pub(super) fn write(&self, value: &Value, out: &mut Text, depth: u32) -> Result<(), Error> {
        check_depth(depth)?;
        budget::look_at_one()?;
        match value.kind() {
            ValueKind::None => out.push("null"),
            ValueKind::Bool => out.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push(&json_number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq => {
                let items = value.try_iter()?.map(|item| (None, item));
                self.container(['[', ']'], items, out, depth)
            }
            ValueKind::Map => {
                budget::make_container(value.len().unwrap_or(0) as u64 * 2)?;
                let mut entries = Vec::with_capacity(value.len().unwrap_or(0));
                for key in value.try_iter()? {
                    entries.push((json_key(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                let entries = entries.into_iter().map(|(key, item)| (Some(key), item));
                self.container(['{', '}'], entries, out, depth)
            }
            kind => Err(invalid(format!("Object of type {kind} is not JSON serializable"))),
        }
    }

    fn container(
        &self,
        [open, close]: [char; 2],
        items: impl Iterator<Item = (Option<String>, Value)>,
        out: &mut Text,
        depth: u32,
    ) -> Result<(), Error> {
        out.push(open.encode_utf8(&mut [0; 4]))?;
        let mut empty = true;
        for (key, item) in items {
            if !empty {
                out.push(&self.item_separator)?;
            }
            empty = false;
            self.new_line(out, depth + 1)?;
            if let Some(key) = key {
                self.string(&key, out)?;
                out.push(&self.key_separator)?;
            }
            self.write(&item, out, depth + 1)?;
        }
        if !empty {
            self.new_line(out, depth)?;
        }
        out.push(close.encode_utf8(&mut [0; 4]))
    }

    fn new_line(&self, out: &mut Text, depth: u32) -> Result<(), Error> {
        let Some(indent) = &self.indent else { return Ok(()) };
        out.push("\n")?;
        (0..depth).try_for_each(|_| out.push(indent))
    }

    fn string(&self, text: &str, out: &mut Text) -> Result<(), Error> {
        out.push("\"")?;
        escape(text, out, |c| match c {
            '"' => Some("\\\"".into()),
            '\\' => Some("\\\\".into()),
            '\n' => Some("\\n".into()),
            '\r' => Some("\\r".into()),
            '\t' => Some("\\t".into()),
            '\u{8}' => Some("\\b".into()),
            '\u{c}' => Some("\\f".into()),
            c if (c as u32) < 0x20 => Some(format!("\\u{:04x}", c as u32).into()),
            c if self.ensure_ascii && !c.is_ascii() => Some(match *c.encode_utf16(&mut [0; 2]) {
                [high, low] => format!("\\u{high:04x}\\u{low:04x}").into(),
                _ => format!("\\u{:04x}", c as u32).into(),
            }),
            _ => None,
        })?;
        out.push("\"")
    }
}

fn json_number(value: &Value) -> String {
    match number(value).as_str() {
        "nan" => "NaN".into(),
        "inf" => "Infinity".into(),
        "-inf" => "-Infinity".into(),
        number => number.into(),
    }
}

fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => to_str(key),
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number => Ok(json_number(key)),
        kind => Err(invalid(format!("keys must be str, int, float, bool or None, not {kind}"))),
    }
}

/// `datetime.strftime` of a second since 1970, in UTC.
pub(super) fn strftime(format: &str, second: i64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    let (day, of_day) = (second.div_euclid(86_400), second.rem_euclid(86_400));
    let (year, month, date) = civil(day);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    let weekday = (day + 4).rem_euclid(7);
    let day_of_year = day - days_before(year, 1, 1) + 1;
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[weekday as usize]);
    let (hour12, half) = (if hour % 12 == 0 { 12 } else { hour % 12 }, if hour < 12 { "AM" } else { "PM" });
    let mut out = Text::default();
    let mut characters = format.chars();
    while let Some(c) = characters.next() {
        if c != '%' {
            out.push(c.encode_utf8(&mut [0; 4]))?;
            continue;
        }
        let mut directive = characters.next();
        // `%-d` does without the leading zero.
        let bare = directive == Some('-');
        if bare {
            directive = characters.next();
        }
        let padded = |number: i64, width: usize| if bare { number.to_string() } else { format!("{number:0width$}") };
        out.push(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => padded(year.rem_euclid(100), 2),
            Some('m') => padded(month, 2),
            Some('d') => padded(date, 2),
            Some('e') => format!("{date:2}"),
            Some('H') => padded(hour, 2),
            Some('I') => padded(hour12, 2),
            Some('M') => padded(minute, 2),
            Some('S') => padded(second, 2),
            Some('j') => padded(day_of_year, 3),
            Some('w') => weekday.to_string(),
            Some('p') => half.into(),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('A') => day_name.into(),
            Some('a') => day_name[..3].into(),
            Some('F') => format!("{year}-{month:02}-{date:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('D') => format!("{month:02}/{date:02}/{:02}", year.rem_euclid(100)),
            Some('Z' | 'z') => String::new(),
            Some('%') => "%".into(),
            other => {
                let got = other.map_or_else(|| "an end".into(), |c| format!("%{c}"));
                return Err(invalid(format!("strftime_now: expected a date directive, got {got}")));
            }
        })?;
    }
    Ok(out.finish())
}

/// Year, month and day of a day since 1970-01-01 in the Gregorian calendar, counted in eras of 400 years from March on.
fn civil(day: i64) -> (i64, i64, i64) {
    let from_march = day + 719_468;
    let (era, of_era) = (from_march.div_euclid(146_097), from_march.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let date = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, date)
}

fn days_before(year: i64, month: i64, date: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + date - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year - 719_468
}

fn check_depth(depth: u32) -> Result<(), Error> {
    if depth > DEPTH {
        return Err(budget::exceeded("levels of containers", u64::from(DEPTH)));
    }
    Ok(())
}

pub(super) fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
