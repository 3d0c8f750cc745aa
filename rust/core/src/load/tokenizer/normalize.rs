//! What happens to text before it is cut into words.

use std::borrow::Cow;
use unicode_normalization::{
    IsNormalized, UnicodeNormalization, is_nfc_quick, is_nfd_quick, is_nfkc_quick, is_nfkd_quick,
};

/// One step.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::load) enum Normalizer {
    Nfc,
    Nfd,
    Nfkc,
    Nfkd,
    Lowercase,
    /// Puts a text before text that is not empty.
    Prepend(String),
    Replace {
        from: String,
        to: String,
    },
}

pub(in crate::load) fn normalize<'t>(steps: &[Normalizer], text: &'t str) -> Cow<'t, str> {
    let mut text = Cow::Borrowed(text);
    for step in steps {
        let changed = match step {
            Normalizer::Nfc => changed(&is_nfc_quick(text.chars()), || text.nfc().collect()),
            Normalizer::Nfd => changed(&is_nfd_quick(text.chars()), || text.nfd().collect()),
            Normalizer::Nfkc => changed(&is_nfkc_quick(text.chars()), || text.nfkc().collect()),
            Normalizer::Nfkd => changed(&is_nfkd_quick(text.chars()), || text.nfkd().collect()),
            Normalizer::Lowercase => Some(text.to_lowercase()),
            Normalizer::Prepend(prefix) => (!text.is_empty()).then(|| format!("{prefix}{text}")),
            Normalizer::Replace { from, to } => text.contains(from.as_str()).then(|| text.replace(from.as_str(), to)),
        };
        if let Some(changed) = changed {
            text = Cow::Owned(changed);
        }
    }
    text
}

fn changed(quick: &IsNormalized, normalized: impl FnOnce() -> String) -> Option<String> {
    (*quick != IsNormalized::Yes).then(normalized)
}
