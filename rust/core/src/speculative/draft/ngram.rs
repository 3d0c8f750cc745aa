//! Drafts copied from the text itself: what followed the last n tokens when they stood there before.

use std::collections::HashMap;
use std::ops::Range;

use super::automaton::{Automaton, ROOT, State};
use super::{Draft, Drafter, Observed, Target, class_of};
use crate::error::Error;

/// Longest n-gram and longest draft that can be asked for.
pub(super) const MOST_TOKENS: usize = 1024;

/// Whose rule it is: they differ in which n-gram and which occurrence they take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NGramMode {
    /// transformers' prompt lookup: from the longest n down, the leftmost occurrence.
    Transformers,
    /// vLLM's `ngram`: the longest n, the leftmost occurrence.
    Vllm,
    /// llama.cpp's `ngram-simple`: one n, the latest occurrence; nothing where fewer than n tokens follow it.
    LlamaCpp,
}

impl NGramMode {
    /// All of them.
    pub const ALL: [NGramMode; 3] = [NGramMode::Transformers, NGramMode::Vllm, NGramMode::LlamaCpp];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            NGramMode::Transformers => "transformers",
            NGramMode::Vllm => "vllm",
            NGramMode::LlamaCpp => "llama.cpp",
        }
    }
}

/// What an [`NGram`] looks up. The first two modes do the same where `min_n` is 1: transformers knows no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NGramOptions {
    /// Whose rule.
    pub mode: NGramMode,
    /// Fewest tokens that must match.
    pub min_n: usize,
    /// Most tokens that are compared.
    pub max_n: usize,
    /// Most tokens to copy.
    pub max_tokens: usize,
}

impl NGramOptions {
    /// The defaults of the original; vLLM has none for `max_tokens`, 5 is its documentation's example.
    pub fn of(mode: NGramMode) -> NGramOptions {
        let (min_n, max_n, max_tokens) = match mode {
            NGramMode::Transformers => (1, 2, 10),
            NGramMode::Vllm => (5, 5, 5),
            NGramMode::LlamaCpp => (12, 12, 48),
        };
        NGramOptions { mode, min_n, max_n, max_tokens }
    }
}

/// Prompt lookup with an index that grows with the text: a draft costs the same at any length.
///
/// ```
/// use farthing::speculative::draft::{Draft, Drafter, NGram, NGramMode, NGramOptions, NoTarget};
/// use farthing::speculative::tree::DraftTree;
/// let mut drafter = NGram::new(NGramOptions::of(NGramMode::Transformers))?;
/// let (tokens, mut tree) = ([1, 2, 3, 4, 1, 2], DraftTree::default());
/// drafter.begin(0, &tokens)?;
/// let sampling = Default::default();
/// let counts = Default::default();
/// drafter.draft(&NoTarget::default(), &mut [Draft { request: 0, tokens: &tokens, budget: 3, least: 0.0, sampling: &sampling, counts: &counts, tree: &mut tree }])?;
/// assert_eq!(tree.nodes().iter().map(|node| node.token).collect::<Vec<_>>(), [3, 4, 1]);
/// # Ok::<(), farthing::error::Error>(())
/// ```
#[derive(Debug)]
pub struct NGram {
    options: NGramOptions,
    requests: HashMap<u64, Index>,
}

impl NGram {
    /// A drafter of that rule.
    pub fn new(options: NGramOptions) -> Result<NGram, Error> {
        let NGramOptions { mode, min_n, max_n, max_tokens } = options;
        let least = match mode {
            NGramMode::Transformers => 1..=1,
            NGramMode::Vllm => 1..=max_n,
            NGramMode::LlamaCpp => max_n..=max_n,
        };
        if !(1..=MOST_TOKENS).contains(&max_n) {
            return Err(Error::argument("max_n", max_n, format!("1 to {MOST_TOKENS}")));
        }
        if !least.contains(&min_n) {
            let expected = match mode {
                NGramMode::Transformers => "1 in this mode".to_owned(),
                NGramMode::Vllm => format!("1 to max_n ({max_n})"),
                NGramMode::LlamaCpp => format!("max_n ({max_n}) in this mode"),
            };
            return Err(Error::argument("min_n", min_n, expected));
        }
        if !(1..=MOST_TOKENS).contains(&max_tokens) {
            return Err(Error::argument("max_tokens", max_tokens, format!("1 to {MOST_TOKENS}")));
        }
        if mode == NGramMode::LlamaCpp && max_tokens < max_n {
            return Err(Error::argument("max_tokens", max_tokens, format!("at least max_n ({max_n}) in this mode")));
        }
        Ok(NGram { options, requests: HashMap::new() })
    }

    /// What it looks up.
    pub fn options(&self) -> NGramOptions {
        self.options
    }
}

impl Drafter for NGram {
    fn name(&self) -> &'static str {
        match self.options.mode {
            NGramMode::Transformers => "n-gram (transformers)",
            NGramMode::Vllm => "n-gram (vllm)",
            NGramMode::LlamaCpp => "n-gram (llama.cpp)",
        }
    }

    fn begin(&mut self, request: u64, _prompt: &[u32]) -> Result<(), Error> {
        let index = match self.options.mode {
            NGramMode::Transformers | NGramMode::Vllm => Index::Leftmost(Leftmost::default()),
            NGramMode::LlamaCpp => Index::Latest(Latest { next: 1, places: HashMap::new() }),
        };
        self.requests.insert(request, index);
        Ok(())
    }

    fn draft(&mut self, _: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        let options = self.options;
        for draft in drafts {
            let index = self.requests.get_mut(&draft.request).ok_or_else(|| super::unknown_request(draft.request))?;
            let found = match index {
                Index::Leftmost(index) => index.look_up(draft.tokens, options),
                Index::Latest(index) => index.look_up(draft.tokens, options),
            };
            if let Some((copied, length)) = found {
                let most = options.max_tokens.min(draft.budget);
                let copied = draft.tokens[copied].iter().take(most).copied();
                draft.tree.push_chain(copied, |index| class_of(length + index + 1));
            }
        }
        Ok(())
    }

    /// Nothing to do: the tokens come with the next draft.
    fn observe(&mut self, observed: &Observed<'_>) -> Result<(), Error> {
        // The index follows the text at the next draft.
        let known = self.requests.contains_key(&observed.request);
        if known { Ok(()) } else { Err(super::unknown_request(observed.request)) }
    }

    fn end(&mut self, request: u64) {
        self.requests.remove(&request);
    }
}

#[derive(Debug)]
enum Index {
    Leftmost(Leftmost),
    Latest(Latest),
}

/// The longest suffix that stood before, up to a length, and where it stood first.
#[derive(Debug, Default)]
struct Leftmost {
    automaton: Automaton,
    /// State of the whole text.
    last: State,
    /// State and length of the longest suffix of at most `max_n` tokens that ended before the last token.
    matched: (State, usize),
}

impl Leftmost {
    /// What may be copied, and how many tokens matched.
    fn look_up(&mut self, tokens: &[u32], options: NGramOptions) -> Option<(Range<usize>, usize)> {
        for (end, &token) in tokens.iter().enumerate().skip(self.automaton.tokens()) {
            let (mut state, mut length) = self.matched;
            if length == options.max_n {
                length -= 1;
                state = self.automaton.settle(state, length);
            }
            // Before the token goes in: the suffix must have ended earlier.
            let (state, length) = self.automaton.follow(state, length, token);
            self.last = self.automaton.push(self.last, token, end);
            self.matched = (self.automaton.settle(state, length), length);
        }
        let (state, length) = self.matched;
        (length >= options.min_n && state != ROOT).then(|| (self.automaton.first_end(state) + 1..tokens.len(), length))
    }
}

/// Where each n-gram stood last.
#[derive(Debug)]
struct Latest {
    /// The first n-gram that is not yet in it; llama.cpp leaves out the one at 0.
    next: usize,
    places: HashMap<u64, usize>,
}

impl Latest {
    fn look_up(&mut self, tokens: &[u32], options: NGramOptions) -> Option<(Range<usize>, usize)> {
        let n = options.max_n;
        // An occurrence that ends one token before the text does is not looked at either.
        while self.next + n + 2 <= tokens.len() {
            self.places.insert(hash(&tokens[self.next..self.next + n]), self.next);
            self.next += 1;
        }
        if tokens.len() <= n + options.max_tokens + 2 {
            return None;
        }
        let suffix = &tokens[tokens.len() - n..];
        let start = *self.places.get(&hash(suffix))?;
        // The last token is not copied.
        let copied = start + n..tokens.len() - 1;
        (tokens[start..start + n] == *suffix && copied.len() >= n).then_some((copied, n))
    }
}

fn hash(tokens: &[u32]) -> u64 {
    tokens.iter().fold(tokens.len() as u64, |sum, &token| {
        (sum ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31)
    })
}
