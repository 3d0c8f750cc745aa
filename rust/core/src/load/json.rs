//! What a JSON text would cost to parse, counted before parsing it.

/// The longest string a header, index or configuration may hold: parsers copy strings into their error messages.
pub(super) const LONGEST_STRING: u64 = 8 << 20;

/// Sizes of a JSON text, without allocation. Malformed texts give some numbers; the parser judges them.
#[derive(Default)]
pub(super) struct Survey {
    /// Commas and opening brackets outside strings: an upper bound, but for one, of the number of values.
    pub(super) values: u64,
    /// Bytes of the longest string, as written.
    pub(super) longest_string: u64,
}

pub(super) fn survey(text: &[u8]) -> Survey {
    let (mut survey, mut string, mut escaped) = (Survey::default(), None, false);
    for &byte in text {
        match &mut string {
            Some(length) if escaped || byte != b'"' => {
                *length += 1;
                escaped = byte == b'\\' && !escaped;
                survey.longest_string = survey.longest_string.max(*length);
            }
            Some(_) => string = None,
            None if byte == b'"' => string = Some(0),
            None => survey.values += u64::from(matches!(byte, b',' | b'[' | b'{')),
        }
    }
    survey
}
