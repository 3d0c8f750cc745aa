//! What all requests have said, for those to come: shared between engines, bounded in memory, kept on disk.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::automaton::{Automaton, ROOT, State};
use super::propose::Place;
use crate::error::Error;

/// Tokens that are taken in between two looks at the memory.
const CHUNK: usize = 4096;

/// Tokens of a context that are looked up in a generation that the text is not in.
const LOOKED_UP: usize = 24;

/// Who said something.
pub type TextId = u64;

#[derive(Debug)]
struct Text {
    id: TextId,
    tokens: Vec<u32>,
    /// What it has reached.
    last: State,
}

/// Texts of about the same age, which are forgotten together.
#[derive(Debug, Default)]
pub(super) struct Generation {
    pub(super) automaton: Automaton,
    texts: Vec<Text>,
    places: HashMap<TextId, usize>,
    /// Memory of the texts' tokens.
    text_bytes: usize,
}

impl Generation {
    fn bytes(&self) -> usize {
        // An entry of a hash table takes two words and a byte, at a load of 7/8 at most.
        let places = self.places.capacity() * (size_of::<(TextId, usize)>() + 1) * 8 / 7;
        self.automaton.bytes() + self.texts.capacity() * size_of::<Text>() + places + self.text_bytes
    }

    fn open(&mut self, id: TextId) -> usize {
        *self.places.entry(id).or_insert_with(|| {
            self.texts.push(Text { id, tokens: Vec::new(), last: ROOT });
            self.texts.len() - 1
        })
    }

    fn append(&mut self, place: usize, tokens: &[u32]) {
        let text = &mut self.texts[place];
        let before = text.tokens.capacity();
        for &token in tokens {
            text.last = self.automaton.push(text.last, token, 0);
        }
        if text.tokens.capacity() < text.tokens.len() + tokens.len() {
            text.tokens.reserve_exact(tokens.len().max(text.tokens.len() / 4));
        }
        text.tokens.extend_from_slice(tokens);
        self.text_bytes += (text.tokens.capacity() - before) * size_of::<u32>();
    }

    /// The longest suffix of a context, that of text `id`, that stands here.
    pub(super) fn place(&self, id: Option<TextId>, tokens: &[u32]) -> Place<'_> {
        let automaton = &self.automaton;
        if let Some(&place) = id.as_ref().and_then(|id| self.places.get(id)) {
            let text = &self.texts[place];
            if text.tokens.len() >= LOOKED_UP.min(tokens.len()) {
                return Place { automaton, state: text.last, length: automaton.len(text.last), own: true };
            }
        }
        let tail = &tokens[tokens.len().saturating_sub(LOOKED_UP)..];
        let follow = |(state, length), &token: &u32| automaton.follow(state, length, token);
        let (state, length) = tail.iter().fold((ROOT, 0), follow);
        Place { automaton, state, length, own: false }
    }

    /// The same without one text.
    fn without(self, id: TextId) -> Generation {
        let mut rest = Generation::default();
        for text in self.texts.into_iter().filter(|text| text.id != id) {
            let place = rest.open(text.id);
            rest.append(place, &text.tokens);
        }
        rest
    }
}

/// See [`SuffixStore`]; the newer generation first.
#[derive(Debug, Default)]
pub(super) struct Generations {
    pub(super) current: Generation,
    pub(super) previous: Option<Generation>,
}

impl Generations {
    pub(super) fn all(&self) -> impl Iterator<Item = &Generation> {
        std::iter::once(&self.current).chain(&self.previous)
    }
}

/// A generation is full at this part of the memory: its tables may double once more, and there are two.
const FULL: usize = 4;

/// Answers of past and present requests, in two generations: when the newer has filled half of the memory, the older is
/// forgotten. Engines, threads and drafters may share one.
///
/// ```
/// use farthing::speculative::draft::SuffixStore;
/// let store = SuffixStore::new(SuffixStore::DEFAULT_BYTES)?;
/// let text = store.open();
/// store.append(text, &[5, 6, 7]);
/// assert_eq!((store.tokens(), store.texts()), (3, 1));
/// # Ok::<(), farthing::error::Error>(())
/// ```
#[derive(Debug)]
pub struct SuffixStore {
    max_bytes: usize,
    /// Most texts; each generation holds so many.
    max_texts: usize,
    generations: RwLock<Generations>,
    next: AtomicU64,
}

impl SuffixStore {
    /// Memory of a store that is not told how much: about 200,000 tokens.
    pub const DEFAULT_BYTES: usize = 16 << 20;
    /// Least memory of a store.
    pub const LEAST_BYTES: usize = 1 << 16;

    /// An empty store of at most about `max_bytes`.
    pub fn new(max_bytes: usize) -> Result<SuffixStore, Error> {
        if max_bytes < SuffixStore::LEAST_BYTES {
            let expected = format!("at least {}", SuffixStore::LEAST_BYTES);
            return Err(Error::argument("max_bytes", max_bytes, expected));
        }
        Ok(SuffixStore { max_bytes, ..SuffixStore::unbounded(usize::MAX) })
    }

    /// A store that forgets by the number of texts alone: a generation holds `max_texts`.
    pub(super) fn unbounded(max_texts: usize) -> SuffixStore {
        let generations = RwLock::default();
        SuffixStore { max_bytes: usize::MAX, max_texts, generations, next: AtomicU64::new(0) }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Generations> {
        // A panic in between leaves counts that are a little off; drafts are verified.
        self.generations.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Generations> {
        self.generations.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new text, empty.
    pub fn open(&self) -> TextId {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Adds tokens to a text; a text that was forgotten begins anew.
    pub fn append(&self, id: TextId, tokens: &[u32]) {
        let mut generations = self.write();
        for chunk in tokens.chunks(CHUNK) {
            let full = generations.current.bytes() > self.max_bytes / FULL;
            let many =
                generations.current.texts.len() >= self.max_texts && !generations.current.places.contains_key(&id);
            if full || many {
                let full = std::mem::take(&mut generations.current);
                generations.previous = Some(full);
            }
            let Generations { current, previous } = &mut *generations;
            let generation = match previous {
                // Its own generation, unless that grows beyond its share.
                Some(previous) if previous.places.contains_key(&id) && previous.bytes() <= self.max_bytes / FULL => {
                    previous
                }
                _ => current,
            };
            let place = generation.open(id);
            generation.append(place, chunk);
        }
    }

    /// Forgets a text at once, at the cost of reading the others of its generation again. Whether it was there.
    pub fn forget(&self, id: TextId) -> bool {
        let mut generations = self.write();
        let Generations { current, previous } = &mut *generations;
        let mut found = false;
        for generation in std::iter::once(current).chain(previous) {
            if generation.places.contains_key(&id) {
                *generation = std::mem::take(generation).without(id);
                found = true;
            }
        }
        found
    }

    /// Forgets everything.
    pub fn clear(&self) {
        *self.write() = Generations::default();
    }

    /// Tokens in it.
    pub fn tokens(&self) -> usize {
        self.read().all().map(|generation| generation.automaton.tokens()).sum()
    }

    /// Texts in it.
    pub fn texts(&self) -> usize {
        self.read().all().map(|generation| generation.texts.len()).sum()
    }

    /// Bytes of memory it takes.
    pub fn bytes(&self) -> usize {
        self.read().all().map(Generation::bytes).sum()
    }

    /// Most bytes it may take.
    pub fn max_bytes(&self) -> usize {
        self.max_bytes
    }

    /// Calls `with` for each text, the oldest first.
    pub(super) fn for_each_text(&self, mut with: impl FnMut(&[u32])) {
        let generations = self.read();
        let oldest_first = generations.previous.iter().chain(std::iter::once(&generations.current));
        oldest_first.flat_map(|generation| &generation.texts).for_each(|text| with(&text.tokens));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Ids that repeat themselves about as text does.
    fn text(seed: u64, length: usize) -> Vec<u32> {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        (0..length)
            .map(|_| {
                let (a, b) = (next() % 3000, next() % 3000);
                a.min(b) * a.min(b) / 3000
            })
            .collect()
    }

    #[test]
    fn a_token_takes_at_most_110_bytes_and_the_store_what_it_may() {
        let store = SuffixStore::new(4 << 20).unwrap();
        for seed in 0..20 {
            let id = store.open();
            store.append(id, &text(seed, 1000));
        }
        assert!(store.bytes() <= 110 * store.tokens(), "{} bytes a token", store.bytes() / store.tokens());
        let mut most = 0;
        for seed in 0..200 {
            let id = store.open();
            store.append(id, &text(seed, 1000));
            most = most.max(store.bytes());
        }
        // A generation is looked at between chunks and grows by a quarter.
        assert!(most <= (4 << 20) * 5 / 4, "{most} bytes");
        assert!(store.tokens() >= 20_000, "{} tokens", store.tokens());
    }

    #[test]
    fn what_is_forgotten_is_gone() {
        let store = SuffixStore::new(1 << 20).unwrap();
        let (first, second) = (store.open(), store.open());
        store.append(first, &[1, 2, 3]);
        store.append(second, &[1, 2, 4]);
        assert!(store.forget(first) && !store.forget(first));
        let generations = store.read();
        let Place { automaton, state, length, .. } = generations.current.place(None, &[1, 2]);
        assert_eq!((length, automaton.best(state).map(|next| next.token)), (2, Some(4)));
        assert_eq!(automaton.step(state, 3), None);
    }

    proptest! {
        #[test]
        fn any_ids_in_any_order(appends in prop::collection::vec((0u64..5, prop::collection::vec(any::<u32>(), 0..9)), 0..40)) {
            let store = SuffixStore::unbounded(2);
            for (id, tokens) in &appends {
                store.append(*id, tokens);
            }
            prop_assert!(store.texts() <= 4);
        }
    }
}
