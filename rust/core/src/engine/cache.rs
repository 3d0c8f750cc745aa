//! What sequences remember: pages of keys and values, 32 tokens each, and states of a fixed size.
//!
//! A page is reference-counted and handed out as a sequence grows; a state lies in a slot that a sequence holds from its
//! first row to its last. Both are lost together when a sequence is preempted.

use crate::error::Error;
use crate::model::config::{BlockSpec, Config};
use farthing_kernels::attention::{KvPages, KvType, PAGE, Span};
use farthing_kernels::pool::Pool;
use farthing_kernels::recurrent::States;

/// The pages and states of every layer; page `p` and slot `s` of a sequence are the same in each of them.
#[derive(Debug)]
pub struct Cache {
    /// For each layer; of no bytes where there is no attention.
    pages: Vec<KvPages>,
    /// For each layer; of no bytes where nothing else is remembered.
    states: Vec<States>,
    free: Vec<u32>,
    references: Vec<u32>,
    /// Slots nobody holds; empty from the start when no layer has a state.
    free_slots: Vec<usize>,
    stateful: bool,
}

/// One sequence's pages, in order, and the slot of its states.
#[derive(Debug, Default)]
pub struct Table {
    pages: Vec<u32>,
    slot: Option<usize>,
}

/// What a sequence remembered after its first tokens, to come back to: keys and values stay in their pages, states are
/// copied.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    tokens: usize,
    /// States of all layers, first to last.
    states: Vec<f32>,
}

impl Cache {
    /// `pages` empty pages and states for `sequences` sequences; memory is touched only as they are written.
    pub fn new(config: &Config, pages: usize, kv: KvType, sequences: usize) -> Result<Cache, Error> {
        let of_layer = |block: &BlockSpec| {
            let (heads, width) = block.mixer.keys();
            KvPages::new(pages, heads, width, kv)
        };
        let states = config.blocks.iter().map(|block| States::new(sequences, block.mixer.state_floats()));
        let stateful = Cache::state_bytes(config) > 0;
        Ok(Cache {
            pages: config.blocks.iter().map(of_layer).collect::<Result<_, _>>()?,
            states: states.collect::<Result<_, _>>()?,
            // Low pages and slots first, so that a small load touches little memory.
            free: (0..pages as u32).rev().collect(),
            references: vec![0; pages],
            free_slots: if stateful { (0..sequences).rev().collect() } else { Vec::new() },
            stateful,
        })
    }

    /// Bytes of one page in all layers together.
    pub fn page_bytes(config: &Config, kv: KvType) -> u64 {
        let bytes = |block: &BlockSpec| {
            let (heads, width) = block.mixer.keys();
            (2 * heads * width * PAGE * kv.bytes()) as u64
        };
        config.blocks.iter().map(bytes).sum()
    }

    /// Bytes of one sequence's states in all layers together.
    pub fn state_bytes(config: &Config) -> u64 {
        config.blocks.iter().map(|block| 4 * block.mixer.state_floats() as u64).sum()
    }

    /// Pages in all.
    pub fn total(&self) -> usize {
        self.references.len()
    }

    /// Pages nobody holds.
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// One layer's pages.
    pub fn pages(&self, layer: usize) -> &KvPages {
        &self.pages[layer]
    }

    /// One layer's states.
    pub fn states(&mut self, layer: usize) -> &mut States {
        &mut self.states[layer]
    }

    /// Stores the keys and values `(t, kv_heads * head_dim)` of the rows in `spans`.
    pub fn write(&mut self, pool: &Pool, layer: usize, spans: &[Span<'_>], keys: &[f32], values: &[f32]) {
        self.pages[layer].write_rows(pool, spans, keys, values);
    }

    /// Gives `table` enough pages for `tokens` tokens, and states of zeros if it has none yet; false, and nothing taken,
    /// when too few are free.
    pub fn reserve(&mut self, table: &mut Table, tokens: usize) -> bool {
        let missing = tokens.div_ceil(PAGE).saturating_sub(table.pages.len());
        if missing > self.free.len() {
            return false;
        }
        if self.stateful && table.slot.is_none() {
            let Some(slot) = self.free_slots.pop() else { return false };
            self.states.iter_mut().for_each(|states| states.slot_mut(slot).fill(0.0));
            table.slot = Some(slot);
        }
        for page in self.free.split_off(self.free.len() - missing).into_iter().rev() {
            self.references[page as usize] = 1;
            table.pages.push(page);
        }
        true
    }

    /// Takes back the pages of `table` beyond `tokens` tokens, and its states when none are left.
    ///
    /// States can't be shortened: a sequence that has them goes back to an earlier token by [`Cache::restore`].
    pub fn truncate(&mut self, table: &mut Table, tokens: usize) {
        let keep = tokens.div_ceil(PAGE).min(table.pages.len());
        for page in table.pages.drain(keep..).rev() {
            let references = &mut self.references[page as usize];
            *references -= 1;
            if *references == 0 {
                self.free.push(page);
            }
        }
        if tokens == 0 {
            self.free_slots.extend(table.slot.take());
        }
    }

    /// Whether sequences have states, which can't be shortened.
    pub fn stateful(&self) -> bool {
        self.stateful
    }

    /// Copies what the sequence of `table` remembers of position `from` to position `to`, in all layers.
    pub fn move_token(&mut self, table: &Table, from: usize, to: usize) {
        if from != to {
            let place = |position: usize| (table.pages[position / PAGE], position % PAGE);
            self.pages.iter_mut().for_each(|pages| pages.copy_token(place(from), place(to)));
        }
    }

    /// What the sequence of `table` remembers of its `tokens` tokens, all of them computed.
    pub fn snapshot(&self, table: &Table, tokens: usize) -> Snapshot {
        let of_slot = |slot| self.states.iter().flat_map(move |states: &States| states.slot(slot)).copied().collect();
        Snapshot { tokens, states: table.slot.map_or_else(Vec::new, of_slot) }
    }

    /// Takes the sequence of `table` back to `snapshot`, which was taken of it; false, and nothing changed, when it has
    /// been preempted since and has fewer tokens now.
    pub fn restore(&mut self, table: &mut Table, snapshot: &Snapshot) -> bool {
        if table.pages.len() < snapshot.tokens.div_ceil(PAGE) {
            return false;
        }
        self.truncate(table, snapshot.tokens);
        if let Some(slot) = table.slot {
            let mut rest = &snapshot.states[..];
            for states in &mut self.states {
                let (mine, others) = rest.split_at(states.floats());
                states.slot_mut(slot).copy_from_slice(mine);
                rest = others;
            }
        }
        true
    }
}

impl Table {
    /// Page numbers, in order of position.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Slot of the states; 0 when the model has none.
    pub fn slot(&self) -> usize {
        self.slot.unwrap_or(0)
    }
}

impl Snapshot {
    /// Tokens that the sequence had.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}
