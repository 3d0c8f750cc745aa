//! Paged keys and values of all layers: pages of 32 tokens, reference-counted, handed out to sequences.

use crate::error::Error;
use crate::model::config::{BlockSpec, Config};
use farthing_kernels::attention::{KvPages, KvType, PAGE, Span};
use farthing_kernels::pool::Pool;

/// The pages of every layer; page `p` of a sequence is page `p` in each of them.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<KvPages>,
    free: Vec<u32>,
    references: Vec<u32>,
}

/// One sequence's pages, in order.
#[derive(Debug, Default)]
pub struct Table {
    pages: Vec<u32>,
}

impl Cache {
    /// `pages` empty pages for a model; memory is touched only as pages are written.
    pub fn new(config: &Config, pages: usize, kv: KvType) -> Result<Cache, Error> {
        let layers = config.blocks.iter().map(|block| {
            let (heads, width) = block.mixer.keys();
            KvPages::new(pages, heads, width, kv)
        });
        Ok(Cache {
            layers: layers.collect::<Result<_, _>>()?,
            // Low pages first, so that a small load touches little memory.
            free: (0..pages as u32).rev().collect(),
            references: vec![0; pages],
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
        &self.layers[layer]
    }

    /// Stores the keys and values `(t, kv_heads * head_dim)` of the rows in `spans`.
    pub fn write(&mut self, pool: &Pool, layer: usize, spans: &[Span<'_>], keys: &[f32], values: &[f32]) {
        self.layers[layer].write_rows(pool, spans, keys, values);
    }

    /// Gives `table` enough pages for `tokens` tokens; false, and nothing taken, when too few are free.
    pub fn reserve(&mut self, table: &mut Table, tokens: usize) -> bool {
        let missing = tokens.div_ceil(PAGE).saturating_sub(table.pages.len());
        if missing > self.free.len() {
            return false;
        }
        for page in self.free.split_off(self.free.len() - missing).into_iter().rev() {
            self.references[page as usize] = 1;
            table.pages.push(page);
        }
        true
    }

    /// Takes back the pages of `table` beyond `tokens` tokens.
    pub fn truncate(&mut self, table: &mut Table, tokens: usize) {
        let keep = tokens.div_ceil(PAGE).min(table.pages.len());
        for page in table.pages.drain(keep..).rev() {
            let references = &mut self.references[page as usize];
            *references -= 1;
            if *references == 0 {
                self.free.push(page);
            }
        }
    }
}

impl Table {
    /// Page numbers, in order of position.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }
}
