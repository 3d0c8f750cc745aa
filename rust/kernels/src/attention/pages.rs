//! The paged key-value cache of one layer.
//!
//! A page holds [`PAGE`] tokens of all key-value heads, head after head: K transposed, `[head_dim][32]`, so that the
//! scores of 32 keys are whole vectors; then V, `[32][head_dim]`.

use std::ops::Range;

use bytemuck::Pod;
use half::{bf16, f16};

use super::Span;
use crate::isa::Isa;
use crate::memory::{AlignedBytes, OutOfMemory};
use crate::pool::{Disjoint, Pool, share};
use crate::selftest::float_level;
use crate::vector::{Kernel, LANES, Simd, dispatch};

/// Floats below which a parallel region costs more than it saves.
const PARALLEL: usize = 1 << 14;

/// Tokens of a page.
pub const PAGE: usize = 32;

/// Element type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    Bf16,
}

impl KvType {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 | KvType::Bf16 => 2,
        }
    }
}

/// An element type that vectors load from and store to, rounding to nearest even.
pub(super) trait Element: Pod + Send + Sync {
    fn load<S: Simd>(simd: S, x: &[Self; LANES]) -> S::F;
    fn store<S: Simd>(simd: S, x: S::F, out: &mut [Self; LANES]);
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[f32; LANES]) -> S::F {
        simd.load(x)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, x: S::F, out: &mut [f32; LANES]) {
        simd.store(x, out);
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for f16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[f16; LANES]) -> S::F {
        simd.load_f16(x)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, x: S::F, out: &mut [f16; LANES]) {
        simd.store_f16(x, out);
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[bf16; LANES]) -> S::F {
        simd.load_bf16(x)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, x: S::F, out: &mut [bf16; LANES]) {
        let mut whole = [0.0; LANES];
        simd.store(x, &mut whole);
        for (out, x) in out.iter_mut().zip(whole) {
            *out = bf16::from_f32(x);
        }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

/// Pages of keys and values of one layer; memory is touched where pages are written.
#[derive(Debug)]
pub struct KvPages {
    bytes: AlignedBytes,
    pages: usize,
    kv_heads: usize,
    head_dim: usize,
    kind: KvType,
}

impl KvPages {
    /// `pages` pages of zeros.
    ///
    /// ```
    /// use farthing_kernels::attention::{KvPages, KvType};
    /// let mut cache = KvPages::new(2, 1, 4, KvType::F32)?;
    /// cache.write(1, 31, &[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0]);
    /// let (mut k, mut v) = ([0.0; 4], [0.0; 4]);
    /// cache.read(1, 31, &mut k, &mut v);
    /// assert_eq!((k[3], v[0]), (4.0, 5.0));
    /// # Ok::<(), farthing_kernels::memory::OutOfMemory>(())
    /// ```
    pub fn new(pages: usize, kv_heads: usize, head_dim: usize, kind: KvType) -> Result<KvPages, OutOfMemory> {
        let sizes = [pages, kv_heads, head_dim, 2 * PAGE * kind.bytes()];
        let length = sizes.into_iter().try_fold(1usize, usize::checked_mul).ok_or(OutOfMemory { bytes: usize::MAX })?;
        Ok(KvPages { bytes: AlignedBytes::zeroed(length)?, pages, kv_heads, head_dim, kind })
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Key-value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Elements of a head's key or value.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Element type.
    pub fn kind(&self) -> KvType {
        self.kind
    }

    /// Bytes of a page: keys and values of 32 tokens for all heads.
    pub fn bytes_per_page(&self) -> usize {
        self.kv_heads * self.head_bytes()
    }

    fn head_bytes(&self) -> usize {
        2 * PAGE * self.head_dim * self.kind.bytes()
    }

    /// Stores one token's keys and values, each (`kv_heads`, `head_dim`), rounded to nearest even, at `slot` of `page`.
    ///
    /// # Panics
    /// When the page, the slot or a length is out of range.
    pub fn write(&mut self, page: u32, slot: usize, k: &[f32], v: &[f32]) {
        self.write_with(float_level(), page, slot, k, v);
    }

    /// [`KvPages::write`] on a given level.
    #[doc(hidden)]
    pub fn write_with(&mut self, isa: Isa, page: u32, slot: usize, k: &[f32], v: &[f32]) {
        self.check(slot, k.len(), v.len());
        let (kind, head_dim, row) = (self.kind, self.head_dim, k.len());
        write_page(isa, kind, self.page_mut(page), slot, head_dim, row, k, v);
    }

    /// Stores the keys and values, each (t, `kv_heads` · `head_dim`), of all rows of `spans` at their positions.
    ///
    /// # Panics
    /// When a row or a page is missing, or two spans write to the same page.
    pub fn write_rows(&mut self, pool: &Pool, spans: &[Span<'_>], k: &[f32], v: &[f32]) {
        let (isa, row, head_dim) = (float_level(), self.kv_heads * self.head_dim, self.head_dim);
        // Each run lies in one page: (page, first slot, rows of the step).
        let mut runs: Vec<(u32, usize, Range<usize>)> = Vec::new();
        for span in spans {
            let mut done = 0;
            while done < span.rows {
                let (position, first) = (span.start + done, span.first_row + done);
                let count = (PAGE - position % PAGE).min(span.rows - done);
                runs.push((span.pages[position / PAGE], position % PAGE, first..first + count));
                done += count;
            }
        }
        let mut written: Vec<u32> = runs.iter().map(|(page, ..)| *page).collect();
        written.sort_unstable();
        assert!(written.windows(2).all(|pair| pair[0] != pair[1]), "two spans write to one page");
        assert!(written.last().is_none_or(|&page| (page as usize) < self.pages), "{written:?} of {} pages", self.pages);
        let rows: usize = runs.iter().map(|(.., rows)| rows.len()).sum();
        let (length, kind) = (self.bytes_per_page(), self.kind);
        let bytes = Disjoint::new(&mut self.bytes);
        let write = |(page, slot, rows): &(u32, usize, Range<usize>)| {
            let at = *page as usize * length;
            // SAFETY: the page of this run alone (checked above), and each run is written by one thread.
            let page = unsafe { bytes.slice(at..at + length) };
            let (k, v) = (&k[rows.start * row..rows.end * row], &v[rows.start * row..rows.end * row]);
            write_page(isa, kind, page, *slot, head_dim, row, k, v);
        };
        if row * rows < PARALLEL {
            runs.iter().for_each(write);
        } else {
            pool.run(|index| runs[share(runs.len(), index, pool.threads())].iter().for_each(write));
        }
    }

    /// Reads one token back, as f32.
    ///
    /// # Panics
    /// As [`KvPages::write`].
    pub fn read(&self, page: u32, slot: usize, k: &mut [f32], v: &mut [f32]) {
        self.check(slot, k.len(), v.len());
        match self.kind {
            KvType::F32 => self.read_as::<f32>(page, slot, k, v),
            KvType::F16 => self.read_as::<f16>(page, slot, k, v),
            KvType::Bf16 => self.read_as::<bf16>(page, slot, k, v),
        }
    }

    fn read_as<E: Element>(&self, page: u32, slot: usize, k: &mut [f32], v: &mut [f32]) {
        for head in 0..self.kv_heads {
            let (keys, values) = self.head::<E>(page, head);
            for d in 0..self.head_dim {
                k[head * self.head_dim + d] = keys[d * PAGE + slot].to_f32();
                v[head * self.head_dim + d] = values[slot * self.head_dim + d].to_f32();
            }
        }
    }

    fn check(&self, slot: usize, k: usize, v: usize) {
        let row = self.kv_heads * self.head_dim;
        assert!(slot < PAGE && k == row && v == row, "slot {slot} of {PAGE}, keys {k} and values {v} of {row}");
    }

    /// Copies all of page `from` to page `to` (copy on write).
    ///
    /// # Panics
    /// When either page is out of range.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let (from, to) = (from as usize, to as usize);
        assert!(from < self.pages && to < self.pages, "pages {from} and {to} of {}", self.pages);
        let length = self.bytes_per_page();
        self.bytes.copy_within(from * length..(from + 1) * length, to * length);
    }

    /// Copies one token's keys and values, the bits as they are, from a slot of a page to one of another or the same.
    ///
    /// # Panics
    /// When a page or a slot is out of range.
    pub fn copy_token(&mut self, from: (u32, usize), to: (u32, usize)) {
        let inside = |(page, slot): (u32, usize)| (page as usize) < self.pages && slot < PAGE;
        assert!(inside(from) && inside(to), "tokens {from:?} and {to:?} of {} pages", self.pages);
        match self.kind {
            KvType::F32 => self.copy_token_as::<f32>(from, to),
            KvType::F16 | KvType::Bf16 => self.copy_token_as::<f16>(from, to),
        }
    }

    fn copy_token_as<E: Element>(&mut self, from: (u32, usize), to: (u32, usize)) {
        let (heads, head_dim) = (self.kv_heads, self.head_dim);
        let elements: &mut [E] = bytemuck::cast_slice_mut(&mut self.bytes);
        let head = |page: u32, head: usize| (page as usize * heads + head) * 2 * PAGE * head_dim;
        for index in 0..heads {
            let (source, target) = (head(from.0, index), head(to.0, index));
            for d in 0..head_dim {
                elements[target + d * PAGE + to.1] = elements[source + d * PAGE + from.1];
            }
            let values = source + (PAGE + from.1) * head_dim;
            elements.copy_within(values..values + head_dim, target + (PAGE + to.1) * head_dim);
        }
    }

    fn page_mut(&mut self, page: u32) -> &mut [u8] {
        let (page, length) = (page as usize, self.bytes_per_page());
        assert!(page < self.pages, "page {page} of {}", self.pages);
        &mut self.bytes[page * length..(page + 1) * length]
    }

    /// Keys (`head_dim`, 32) and values (32, `head_dim`) of one head in a page of element type `E`.
    #[inline(always)]
    pub(super) fn head<E: Element>(&self, page: u32, head: usize) -> (&[E], &[E]) {
        let length = self.head_bytes();
        let at = (page as usize * self.kv_heads + head) * length;
        bytemuck::cast_slice(&self.bytes[at..at + length]).split_at(PAGE * self.head_dim)
    }
}

/// Stores tokens, rows of `row` floats in `k` and `v`, in one page from `slot` on.
fn write_page(isa: Isa, kind: KvType, page: &mut [u8], slot: usize, head_dim: usize, row: usize, k: &[f32], v: &[f32]) {
    match kind {
        KvType::F32 => dispatch(isa, Write::<f32> { page: bytemuck::cast_slice_mut(page), slot, head_dim, row, k, v }),
        KvType::F16 => dispatch(isa, Write::<f16> { page: bytemuck::cast_slice_mut(page), slot, head_dim, row, k, v }),
        KvType::Bf16 => {
            dispatch(isa, Write::<bf16> { page: bytemuck::cast_slice_mut(page), slot, head_dim, row, k, v });
        }
    }
}

struct Write<'a, E> {
    /// One page.
    page: &'a mut [E],
    /// Where the first token goes.
    slot: usize,
    head_dim: usize,
    /// Floats of a token's keys or values.
    row: usize,
    /// (tokens, row)
    k: &'a [f32],
    v: &'a [f32],
}

impl<E: Element> Kernel for Write<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Write { page, slot, head_dim, row, k, v } = self;
        let mut rounded = [E::zeroed(); LANES];
        for (slot, (k, v)) in (slot..).zip(k.chunks_exact(row).zip(v.chunks_exact(row))) {
            let heads = page.chunks_exact_mut(2 * PAGE * head_dim);
            for ((head, k), v) in heads.zip(k.chunks_exact(head_dim)).zip(v.chunks_exact(head_dim)) {
                let (keys, values) = head.split_at_mut(PAGE * head_dim);
                for (k, keys) in k.chunks(LANES).zip(keys.chunks_mut(LANES * PAGE)) {
                    E::store(simd, chunk(simd, k), &mut rounded);
                    for (key, place) in rounded.iter().zip(keys.iter_mut().skip(slot).step_by(PAGE)) {
                        *place = *key;
                    }
                }
                let values = &mut values[slot * head_dim..][..head_dim];
                for (v, values) in v.chunks(LANES).zip(values.chunks_mut(LANES)) {
                    E::store(simd, chunk(simd, v), &mut rounded);
                    values.copy_from_slice(&rounded[..values.len()]);
                }
            }
        }
    }
}

/// Up to 16 floats.
#[inline(always)]
fn chunk<S: Simd>(simd: S, x: &[f32]) -> S::F {
    match x.first_chunk() {
        Some(whole) => simd.load(whole),
        None => simd.load_part(x),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::uniforms;

    #[test]
    fn what_is_written_is_read_back_rounded_to_nearest_even() {
        for kind in [KvType::F32, KvType::F16, KvType::Bf16] {
            for (kv_heads, head_dim) in [(1, 1), (3, 5), (2, 64), (1, 100)] {
                let row = kv_heads * head_dim;
                for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                    let mut cache = KvPages::new(3, kv_heads, head_dim, kind).unwrap();
                    assert_eq!(cache.bytes_per_page(), 2 * PAGE * row * kind.bytes());
                    let tokens: Vec<_> =
                        (0..2 * PAGE as u64).map(|t| (uniforms(t, row), uniforms(t + 99, row))).collect();
                    for (t, (k, v)) in tokens.iter().enumerate() {
                        cache.write_with(isa, (t / PAGE) as u32, t % PAGE, k, v);
                    }
                    cache.copy_page(1, 2);
                    cache.write_with(isa, 1, 3, &vec![0.0; row], &vec![f32::NAN; row]);
                    let rounded = |x: &f32| match kind {
                        KvType::F32 => *x,
                        KvType::F16 => f16::from_f32(*x).to_f32(),
                        KvType::Bf16 => bf16::from_f32(*x).to_f32(),
                    };
                    for (t, (k, v)) in tokens.iter().enumerate() {
                        let (mut k_read, mut v_read) = (vec![0.0; row], vec![0.0; row]);
                        cache.read([0, 2][t / PAGE], t % PAGE, &mut k_read, &mut v_read);
                        assert_eq!(k_read, k.iter().map(rounded).collect::<Vec<_>>());
                        assert_eq!(v_read, v.iter().map(rounded).collect::<Vec<_>>());
                    }
                }
            }
        }
    }

    #[test]
    fn rows_of_a_step_go_where_single_tokens_do() {
        for kind in [KvType::F32, KvType::F16, KvType::Bf16] {
            let (kv_heads, head_dim, rows) = (3, 40, 200);
            let (row, mut caches) = (kv_heads * head_dim, Vec::new());
            let (k, v) = (uniforms(1, rows * row), uniforms(2, rows * row));
            let spans = [
                Span { first_row: 5, rows: 3, start: 61, pages: &[9, 3, 2], ancestors: &[] },
                Span { first_row: 8, rows: 0, start: 7, pages: &[], ancestors: &[] },
                Span { first_row: 10, rows: 190, start: 0, pages: &[0, 1, 4, 5, 6, 7], ancestors: &[] },
            ];
            let mut expected = KvPages::new(10, kv_heads, head_dim, kind).unwrap();
            for span in &spans {
                for i in 0..span.rows {
                    let (position, at) = (span.start + i, (span.first_row + i) * row);
                    let page = span.pages[position / PAGE];
                    expected.write(page, position % PAGE, &k[at..at + row], &v[at..at + row]);
                }
            }
            for threads in 1..4 {
                let mut cache = KvPages::new(10, kv_heads, head_dim, kind).unwrap();
                cache.write_rows(&Pool::new(threads), &spans, &k, &v);
                caches.push(cache);
            }
            assert!(caches.iter().all(|cache| cache.bytes[..] == expected.bytes[..]));
        }
    }

    #[test]
    fn a_moved_token_keeps_its_bits() {
        for kind in [KvType::F32, KvType::F16, KvType::Bf16] {
            let (kv_heads, head_dim) = (3, 5);
            let row = kv_heads * head_dim;
            let mut cache = KvPages::new(2, kv_heads, head_dim, kind).unwrap();
            let (k, v) = (uniforms(1, row), uniforms(2, row));
            cache.write(1, 30, &k, &v);
            cache.copy_token((1, 30), (0, 7));
            cache.copy_token((0, 7), (0, 9));
            let read = |page, slot| {
                let (mut k, mut v) = (vec![0.0; row], vec![0.0; row]);
                cache.read(page, slot, &mut k, &mut v);
                (k, v)
            };
            assert_eq!(read(0, 9), read(1, 30));
            assert!(read(0, 8).0.iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    #[should_panic(expected = "two spans")]
    fn spans_that_share_a_page_panic() {
        let mut cache = KvPages::new(2, 1, 4, KvType::F16).unwrap();
        let span = Span { first_row: 0, rows: 1, start: 0, pages: &[1], ancestors: &[] };
        cache.write_rows(&Pool::new(1), &[span, Span { first_row: 1, start: 1, ..span }], &[0.0; 8], &[0.0; 8]);
    }

    #[test]
    fn impossible_caches_are_errors() {
        assert!(KvPages::new(usize::MAX, 8, 128, KvType::F16).is_err());
        assert!(KvPages::new(1 << 50, 1, 64, KvType::F32).is_err());
    }
}
