//! Byte pair encoding: neighbours merge, best pair first, leftmost among equals, until no pair merges.
//!
//! Two orders: by the rank of a listed merge (GPT-2 and its descendants), or by the score of the merged token, where
//! every pair whose concatenation is a token may merge (`SentencePiece`). A queue and a linked list make it O(n log n)
//! for n characters.

use super::pieces::{Pieces, letter};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// No token: a character outside the vocabulary, or the end of the list.
const NONE: u32 = u32::MAX;

pub(in crate::load) enum Order {
    /// (left, right) to (rank, merged).
    Ranks(HashMap<(u32, u32), (u32, u32)>),
    /// A key for each token that ascends as its score falls.
    Scores(Vec<u32>),
}

impl Order {
    /// Keys that ascend as scores fall, with -0 equal to 0.
    pub(in crate::load) fn from_scores(scores: &[f32]) -> Self {
        let key = |score: &f32| {
            let bits = (score + 0.0).to_bits();
            let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
            !ascending
        };
        Order::Scores(scores.iter().map(key).collect())
    }
}

/// What a word is cut into before merging.
pub(in crate::load) enum Atoms {
    /// Bytes, each with its token.
    Bytes(Box<[u32; 256]>),
    /// Characters. One without a token becomes its bytes' tokens, else the unknown token.
    Characters { bytes: Box<[u32; 256]>, unknown: Option<u32>, fuse: bool },
}

impl Atoms {
    pub(in crate::load) fn bytes(pieces: &Pieces) -> Self {
        Atoms::Bytes(table(|byte| pieces.find(letter(byte).encode_utf8(&mut [0; 4]))))
    }

    pub(in crate::load) fn characters(pieces: &Pieces, byte_fallback: bool, unknown: Option<u32>, fuse: bool) -> Self {
        let token = |byte| byte_fallback.then(|| pieces.find(&format!("<0x{byte:02X}>"))).flatten();
        Atoms::Characters { bytes: table(token), unknown, fuse }
    }

    /// The first byte that neither has a token nor an unknown token to stand for it.
    pub(in crate::load) fn unspellable(&self) -> Option<u8> {
        match self {
            Atoms::Characters { bytes, unknown: None, .. } => (0..=255).find(|&byte| bytes[byte as usize] == NONE),
            _ => None,
        }
    }
}

fn table(token: impl Fn(u8) -> Option<u32>) -> Box<[u32; 256]> {
    let mut table = Box::new([NONE; 256]);
    for byte in 0..=255 {
        table[byte as usize] = token(byte).unwrap_or(NONE);
    }
    table
}

pub(in crate::load) struct Merges {
    pub(in crate::load) order: Order,
    pub(in crate::load) atoms: Atoms,
    /// A word that is a token is not cut.
    pub(in crate::load) whole_words: bool,
}

/// A run of the word: `start..start + len`, 0 long once it has merged into its left neighbour.
struct Symbol {
    start: u32,
    len: u32,
    id: u32,
    previous: u32,
    next: u32,
}

/// Buffers that words share.
#[derive(Default)]
pub(in crate::load) struct Scratch {
    symbols: Vec<Symbol>,
    /// (key, left symbol, bytes of both, merged token)
    queue: BinaryHeap<Reverse<(u32, u32, u32, u32)>>,
    spelled: String,
}

impl Merges {
    /// Appends the tokens of one word, at most 4 GiB long.
    pub(in crate::load) fn encode(&self, pieces: &Pieces, word: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        if self.whole_words
            && let Some(id) = self.whole(pieces, word, scratch)
        {
            out.push(id);
            return;
        }
        self.cut(pieces, word, &mut scratch.symbols);
        let (symbols, queue) = (&mut scratch.symbols, &mut scratch.queue);
        queue.clear();
        for left in 0..symbols.len().saturating_sub(1) {
            self.offer(pieces, word, symbols, left as u32, queue);
        }
        while let Some(Reverse((_, left, len, id))) = queue.pop() {
            let right = symbols[left as usize].next;
            // Symbols only grow, so equal lengths mean that neither has changed since the offer.
            if symbols[left as usize].len == 0 || right == NONE {
                continue;
            }
            if symbols[left as usize].len + symbols[right as usize].len != len {
                continue;
            }
            let after = symbols[right as usize].next;
            symbols[right as usize].len = 0;
            let merged = &mut symbols[left as usize];
            (merged.len, merged.id, merged.next) = (len, id, after);
            let before = merged.previous;
            if after != NONE {
                symbols[after as usize].previous = left;
                self.offer(pieces, word, symbols, left, queue);
            }
            if before != NONE {
                self.offer(pieces, word, symbols, before, queue);
            }
        }
        let mut unknown_before = false;
        for symbol in symbols.iter().filter(|symbol| symbol.len > 0) {
            if symbol.id != NONE {
                out.push(symbol.id);
                unknown_before = false;
                continue;
            }
            let Atoms::Characters { bytes, unknown, fuse } = &self.atoms else { continue };
            let text = &word.as_bytes()[symbol.start as usize..(symbol.start + symbol.len) as usize];
            if text.iter().all(|&byte| bytes[byte as usize] != NONE) {
                out.extend(text.iter().map(|&byte| bytes[byte as usize]));
                unknown_before = false;
            } else if let Some(unknown) = unknown {
                if !(unknown_before && *fuse) {
                    out.push(*unknown);
                }
                unknown_before = true;
            }
        }
    }

    fn whole(&self, pieces: &Pieces, word: &str, scratch: &mut Scratch) -> Option<u32> {
        if let Atoms::Characters { .. } = self.atoms {
            return pieces.find(word);
        }
        scratch.spelled.clear();
        scratch.spelled.extend(word.bytes().map(letter));
        pieces.find(&scratch.spelled)
    }

    fn cut(&self, pieces: &Pieces, word: &str, symbols: &mut Vec<Symbol>) {
        symbols.clear();
        let mut push = |start: usize, len: usize, id: u32| {
            let at = symbols.len() as u32;
            let previous = at.checked_sub(1).unwrap_or(NONE);
            symbols.push(Symbol { start: start as u32, len: len as u32, id, previous, next: at + 1 });
        };
        match &self.atoms {
            Atoms::Bytes(tokens) => {
                for (start, byte) in word.bytes().enumerate() {
                    push(start, 1, tokens[byte as usize]);
                }
            }
            Atoms::Characters { .. } => {
                for (start, character) in word.char_indices() {
                    let text = &word[start..start + character.len_utf8()];
                    push(start, text.len(), pieces.find(text).unwrap_or(NONE));
                }
            }
        }
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
    }

    /// Queues the pair that starts at `left`, if it merges.
    fn offer(
        &self,
        pieces: &Pieces,
        word: &str,
        symbols: &[Symbol],
        left: u32,
        queue: &mut BinaryHeap<Reverse<(u32, u32, u32, u32)>>,
    ) {
        let first = &symbols[left as usize];
        let second = &symbols[first.next as usize];
        let len = first.len + second.len;
        let merge = match &self.order {
            Order::Ranks(ranks) => ranks.get(&(first.id, second.id)).copied(),
            Order::Scores(keys) => {
                let id = pieces.find(&word[first.start as usize..(first.start + len) as usize]);
                id.map(|id| (keys[id as usize], id))
            }
        };
        if let Some((key, id)) = merge {
            queue.push(Reverse((key, left, len, id)));
        }
    }
}
