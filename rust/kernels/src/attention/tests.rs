//! Attention against f64, and the promise: the same bits however rows, threads, pages and levels are arranged.

use super::*;
use crate::philox::{philox4x32, uniforms};

/// A random sequence: queries, keys and values of `tokens` tokens.
struct Sequence {
    tokens: usize,
    /// (tokens, heads · `head_dim`)
    q: Vec<f32>,
    /// (tokens, `kv_heads` · `head_dim`)
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Sequence {
    fn random(seed: u64, tokens: usize, shape: &AttentionShape<'_>) -> Sequence {
        let row = shape.kv_heads * shape.head_dim;
        let q = uniforms(seed, tokens * shape.heads * shape.head_dim).iter().map(|x| x * 4.0).collect();
        let k = uniforms(seed + 1, tokens * row).iter().map(|x| x * 3.0).collect();
        Sequence { tokens, q, k, v: uniforms(seed + 2, tokens * row) }
    }

    /// Pages of the sequence, each `step` apart from the last.
    fn pages(&self, first: u32, step: u32) -> Vec<u32> {
        (0..self.tokens.div_ceil(PAGE) as u32).map(|i| first + i * step).collect()
    }

    fn write(&self, cache: &mut KvPages, pages: &[u32], tokens: Range<usize>) {
        let row = cache.kv_heads() * cache.head_dim();
        for t in tokens {
            let at = t * row..(t + 1) * row;
            cache.write(pages[t / PAGE], t % PAGE, &self.k[at.clone()], &self.v[at]);
        }
    }
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape<'static> {
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttentionShape { heads, kv_heads, head_dim, scale, window: None, softcap: None, sinks: None }
}

/// The definition in f64, with keys and values as `round` leaves them.
fn reference(s: &Sequence, shape: &AttentionShape<'_>, round: impl Fn(f32) -> f32) -> Vec<f64> {
    let AttentionShape { heads, kv_heads, head_dim, .. } = *shape;
    let rounded = |x: &[f32]| x.iter().map(|&x| f64::from(round(x))).collect::<Vec<_>>();
    let (k, v) = (rounded(&s.k), rounded(&s.v));
    let mut out = Vec::new();
    for t in 0..s.tokens {
        for head in 0..heads {
            let q = &s.q[(t * heads + head) * head_dim..][..head_dim];
            let at = |j: usize| (j * kv_heads + head / (heads / kv_heads)) * head_dim;
            let first = shape.window.map_or(0, |window| (t + 1).saturating_sub(window));
            let scores: Vec<f64> = (first..=t)
                .map(|j| {
                    let dot: f64 = q.iter().zip(&k[at(j)..]).map(|(&q, k)| f64::from(q) * k).sum();
                    let score = dot * f64::from(shape.scale);
                    shape.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                })
                .collect();
            let sink = shape.sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]));
            let greatest = scores.iter().copied().fold(sink, f64::max);
            let p: Vec<f64> = scores.iter().map(|s| (s - greatest).exp()).collect();
            let total: f64 = p.iter().sum::<f64>() + (sink - greatest).exp();
            for d in 0..head_dim {
                out.push((first..=t).zip(&p).map(|(j, p)| p * v[at(j) + d]).sum::<f64>() / total);
            }
        }
    }
    out
}

/// Root of the ratio of squared error to squared reference.
fn relative_error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let error: f64 = got.iter().zip(expected).map(|(&x, y)| (f64::from(x) - y).powi(2)).sum();
    (error / expected.iter().map(|y| y * y).sum::<f64>()).sqrt()
}

/// A cache whose every element is NaN, as if recycled from the worst of sequences.
fn poisoned(pages: usize, shape: &AttentionShape<'_>, kind: KvType) -> KvPages {
    let mut cache = KvPages::new(pages, shape.kv_heads, shape.head_dim, kind).unwrap();
    let row = shape.kv_heads * shape.head_dim;
    for page in 0..pages as u32 {
        for slot in 0..PAGE {
            let bad = if slot % 2 == 0 { f32::NAN } else { f32::INFINITY };
            cache.write(page, slot, &vec![bad; row], &vec![bad; row]);
        }
    }
    cache
}

/// One sequence in one call.
fn whole(isa: Isa, pool: &Pool, s: &Sequence, shape: &AttentionShape<'_>, kind: KvType) -> Vec<f32> {
    last_rows(isa, pool, s, shape, kind, s.tokens)
}

/// The last `rows` tokens of a sequence.
fn last_rows(isa: Isa, pool: &Pool, s: &Sequence, shape: &AttentionShape<'_>, kind: KvType, rows: usize) -> Vec<f32> {
    let pages = s.pages(0, 1);
    let mut cache = poisoned(pages.len(), shape, kind);
    s.write(&mut cache, &pages, 0..s.tokens);
    let mut out = vec![f32::NAN; rows * shape.heads * shape.head_dim];
    let span = Span { first_row: 0, rows, start: s.tokens - rows, pages: &pages, ancestors: &[] };
    attention_with(isa, pool, &s.q[s.q.len() - out.len()..], &[span], &cache, shape, &mut out);
    out
}

/// The kinds of heads of real and tiny models.
fn shapes() -> Vec<AttentionShape<'static>> {
    let mut shapes = vec![
        shape(9, 3, 64),
        shape(7, 1, 64),
        shape(12, 2, 128),
        shape(8, 1, 16),
        shape(2, 2, 5),
        shape(3, 3, 40),
        shape(1, 1, 1),
    ];
    shapes.push(AttentionShape { window: Some(100), softcap: Some(5.0), ..shape(4, 1, 256) });
    shapes.push(AttentionShape { window: Some(1), ..shape(2, 1, 8) });
    shapes.push(AttentionShape { sinks: Some(&[0.5, -2.0, 9.0, 90.0, -90.0, 1.0]), ..shape(6, 2, 16) });
    shapes.push(AttentionShape { window: Some(7), sinks: Some(&[0.0, 3.0]), ..shape(2, 1, 24) });
    shapes.push(AttentionShape { window: Some(257), ..shape(6, 2, 32) });
    shapes
}

fn levels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

#[test]
fn results_match_the_definition() {
    let pool = Pool::new(2);
    for (i, shape) in shapes().iter().enumerate() {
        let s = Sequence::random(i as u64, 300 + 17 * i, shape);
        let exact = reference(&s, shape, |x| x);
        let error = relative_error(&whole(Isa::active(), &pool, &s, shape, KvType::F32), &exact);
        assert!(error < 1e-6, "{shape:?}: {error}");
        let half = whole(Isa::active(), &pool, &s, shape, KvType::F16);
        let error = relative_error(&half, &reference(&s, shape, |x| f16::from_f32(x).to_f32()));
        assert!(error < 1e-6, "{shape:?}: {error}");
        assert!(relative_error(&half, &exact) < 2e-3, "{shape:?}");
        let brain = whole(Isa::active(), &pool, &s, shape, KvType::Bf16);
        let error = relative_error(&brain, &reference(&s, shape, |x| bf16::from_f32(x).to_f32()));
        assert!(error < 1e-6, "{shape:?}: {error}");
    }
}

#[test]
fn levels_and_threads_give_the_same_bits() {
    for kind in [KvType::F32, KvType::F16, KvType::Bf16] {
        for shape in &shapes() {
            // Rows on both sides of the end of a key span.
            let (s, rows) = (Sequence::random(5, 270, shape), 25);
            let expected = last_rows(Isa::Scalar, &Pool::new(1), &s, shape, kind, rows);
            assert!(expected.iter().all(|x| x.is_finite()));
            for isa in levels() {
                for threads in 1..4 {
                    let got = last_rows(isa, &Pool::new(threads), &s, shape, kind, rows);
                    assert_eq!(got, expected, "{} {threads} {shape:?}", isa.name());
                }
            }
        }
    }
}

#[test]
fn chunks_give_the_same_bits() {
    let tokens = 531;
    for (shape, threads) in shapes().iter().zip([1, 2, 3].into_iter().cycle()) {
        let pool = Pool::new(threads);
        let s = Sequence::random(9, tokens, shape);
        let expected = whole(Isa::active(), &pool, &s, shape, KvType::F16);
        let width = shape.heads * shape.head_dim;
        for chunk in [1, 7, 64] {
            // The cache grows with the chunks; pages lie in any order.
            let pages: Vec<u32> = s.pages(0, 1).into_iter().rev().collect();
            let mut cache = poisoned(pages.len(), shape, KvType::F16);
            let mut out = vec![0.0; s.q.len()];
            for start in (0..tokens).step_by(chunk) {
                let rows = chunk.min(tokens - start);
                s.write(&mut cache, &pages, start..start + rows);
                let range = start * width..(start + rows) * width;
                let span =
                    Span { first_row: 0, rows, start, pages: &pages[..(start + rows).div_ceil(PAGE)], ancestors: &[] };
                attention(&pool, &s.q[range.clone()], &[span], &cache, shape, &mut out[range]);
            }
            assert_eq!(out, expected, "chunks of {chunk}: {shape:?}");
        }
    }
}

#[test]
fn batch_mates_change_nothing() {
    for shape in &shapes() {
        let width = shape.heads * shape.head_dim;
        let lengths = [1, 40, 700, 33, 256, 257, 2];
        let sequences: Vec<Sequence> =
            lengths.iter().enumerate().map(|(i, &tokens)| Sequence::random(i as u64 * 3, tokens, shape)).collect();
        let count = lengths.iter().map(|tokens| tokens.div_ceil(PAGE)).sum::<usize>();
        let mut cache = poisoned(count * lengths.len(), shape, KvType::F16);
        let tables: Vec<Vec<u32>> =
            sequences.iter().enumerate().map(|(i, s)| s.pages(i as u32, lengths.len() as u32)).collect();
        let mut spans = vec![Span { first_row: 0, rows: 0, start: 0, pages: &[], ancestors: &[] }];
        let (mut q, mut expected, mut row) = (vec![0.0; width], vec![7.0; width], 1);
        for (i, (s, pages)) in sequences.iter().zip(&tables).enumerate() {
            s.write(&mut cache, pages, 0..s.tokens);
            // The last one, few or all of its rows are in this step.
            let rows = [1, s.tokens, s.tokens.min(9)][i % 3];
            let start = s.tokens - rows;
            spans.push(Span { first_row: row, rows, start, pages, ancestors: &[] });
            row += rows;
            q.extend(&s.q[start * width..]);
            let alone = whole(Isa::active(), &Pool::new(1), s, shape, KvType::F16);
            expected.extend(&alone[start * width..]);
        }
        // Spans in any order; the first row belongs to none and stays as it is.
        spans.rotate_left(3);
        for threads in 1..4 {
            let mut out = vec![7.0; q.len()];
            attention(&Pool::new(threads), &q, &spans, &cache, shape, &mut out);
            assert_eq!(out, expected, "{threads} {shape:?}");
        }
    }
}

#[test]
fn later_keys_never_reach_back() {
    // An infinite value and a NaN key at a token leave every earlier row alone, bit for bit.
    let shape = shape(6, 2, 32);
    for bad_token in [0, 1, 31, 32, 100, 255, 256, 299] {
        let mut s = Sequence::random(1, 300, &shape);
        let expected = whole(Isa::active(), &Pool::new(2), &s, &shape, KvType::F16);
        let row = shape.kv_heads * shape.head_dim;
        s.k[bad_token * row..(bad_token + 1) * row].fill(f32::NAN);
        s.v[bad_token * row..(bad_token + 1) * row].fill(f32::INFINITY);
        let got = whole(Isa::active(), &Pool::new(2), &s, &shape, KvType::F16);
        let clean = bad_token * shape.heads * shape.head_dim;
        assert_eq!(got[..clean], expected[..clean]);
        assert!(got[clean..].iter().all(|x| x.is_nan()));
    }
}

#[test]
fn pages_behind_the_window_are_never_looked_at() {
    let shape = AttentionShape { window: Some(40), ..shape(2, 1, 16) };
    let s = Sequence::random(8, 600, &shape);
    let expected = whole(Isa::active(), &Pool::new(1), &s, &shape, KvType::F32);
    let mut pages = s.pages(0, 1);
    let mut cache = poisoned(pages.len(), &shape, KvType::F32);
    s.write(&mut cache, &pages, 0..600);
    // Rows 590.. see keys from 551 on: page 17.
    pages[..17].fill(u32::MAX);
    let mut out = vec![0.0; 10 * 32];
    let span = Span { first_row: 0, rows: 10, start: 590, pages: &pages, ancestors: &[] };
    attention(&Pool::new(2), &s.q[590 * 32..], &[span], &cache, &shape, &mut out);
    assert_eq!(out, expected[590 * 32..]);
}

#[test]
fn long_sequences_are_split_and_merged_alike() {
    let shape = shape(3, 1, 64);
    let s = Sequence::random(2, 3000, &shape);
    let pages = s.pages(0, 1);
    let mut cache = poisoned(pages.len(), &shape, KvType::F16);
    s.write(&mut cache, &pages, 0..s.tokens);
    let last = (s.tokens - 1) * 192;
    let expected = whole(Isa::active(), &Pool::new(2), &s, &shape, KvType::F16);
    for isa in levels() {
        for threads in 1..6 {
            let mut out = vec![0.0; 192];
            let span = Span { first_row: 0, rows: 1, start: s.tokens - 1, pages: &pages, ancestors: &[] };
            attention_with(isa, &Pool::new(threads), &s.q[last..], &[span], &cache, &shape, &mut out);
            assert_eq!(out, expected[last..]);
        }
    }
}

#[test]
fn random_steps_agree_between_levels() {
    let pools = [Pool::new(1), Pool::new(3)];
    for round in 0..60u32 {
        let random = |i: u32, below: u32| (philox4x32([round, i, 0, 9], [0; 2])[0] % below) as usize;
        let kv_heads = 1 + random(0, 3);
        let mut shape = shape(kv_heads * (1 + random(1, 9)), kv_heads, 1 + random(2, 80));
        shape.window = [None, Some(1 + random(3, 300))][random(4, 2)];
        shape.softcap = [None, Some(2.0)][random(5, 2)];
        let s = Sequence::random(u64::from(round), 1 + random(6, 400), &shape);
        let kind = [KvType::F32, KvType::F16, KvType::Bf16][random(7, 3)];
        let rows = s.tokens.min(1 + random(8, 20));
        let expected = last_rows(Isa::Scalar, &pools[0], &s, &shape, kind, rows);
        for isa in levels() {
            for pool in &pools {
                assert_eq!(last_rows(isa, pool, &s, &shape, kind, rows), expected, "{} {shape:?}", isa.name());
            }
        }
    }
}

#[test]
fn no_rows_are_fine() {
    let shape = shape(2, 1, 8);
    let cache = KvPages::new(0, 1, 8, KvType::F16).unwrap();
    attention(&Pool::new(2), &[], &[], &cache, &shape, &mut []);
    let span = Span { first_row: 0, rows: 0, start: 5, pages: &[], ancestors: &[] };
    attention(&Pool::new(2), &[], &[span], &cache, &shape, &mut []);
}

#[test]
#[should_panic(expected = "spans")]
fn rows_in_two_spans_panic() {
    let shape = shape(1, 1, 8);
    let cache = KvPages::new(1, 1, 8, KvType::F16).unwrap();
    let span = Span { first_row: 0, rows: 2, start: 0, pages: &[0], ancestors: &[] };
    let spans = [span, Span { first_row: 1, ..span }];
    attention(&Pool::new(1), &[0.0; 24], &spans, &cache, &shape, &mut [0.0; 24]);
}

#[test]
#[should_panic(expected = "pages")]
fn missing_pages_panic() {
    let shape = shape(1, 1, 8);
    let cache = KvPages::new(1, 1, 8, KvType::F16).unwrap();
    let span = Span { first_row: 0, rows: 1, start: 32, pages: &[0], ancestors: &[] };
    attention(&Pool::new(1), &[0.0; 8], &[span], &cache, &shape, &mut [0.0; 8]);
}

/// Rows of a random tree: row 0 is the root, every other has an earlier row before it.
fn random_tree(seed: u64, rows: usize) -> Vec<u64> {
    let mut ancestors = vec![1u64];
    for (row, random) in (1..rows).zip(uniforms(seed, rows)) {
        // Often the row before, so that there are long branches.
        let parent = if random < 0.0 { row - 1 } else { (random * row as f32) as usize };
        ancestors.push(ancestors[parent] | 1 << row);
    }
    ancestors
}

#[test]
fn a_branch_of_a_tree_has_the_bits_of_its_tokens_alone() {
    for (i, shape) in shapes().iter().enumerate() {
        let (width, row) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        for (start, rows) in [(0, 9), (5, 16), (30, 64), (250, 12), (255, 40), (511, 7), (600, 1)] {
            let ancestors = random_tree(start as u64 + i as u64, rows);
            let s = Sequence::random(start as u64, start + rows, shape);
            let pages: Vec<u32> = s.pages(0, 1).into_iter().rev().collect();
            let mut cache = poisoned(pages.len(), shape, KvType::F16);
            s.write(&mut cache, &pages, 0..s.tokens);
            let span = Span { first_row: 0, rows, start, pages: &pages, ancestors: &ancestors };
            let mut expected = vec![0.0; rows * width];
            for (r, mask) in ancestors.iter().enumerate() {
                let path: Vec<usize> =
                    (0..start).chain((0..64).filter(|bit| mask >> bit & 1 == 1).map(|bit| start + bit)).collect();
                let of = |x: &[f32], width: usize| {
                    path.iter().flat_map(|t| x[t * width..][..width].to_vec()).collect::<Vec<f32>>()
                };
                let alone = Sequence { tokens: path.len(), q: of(&s.q, width), k: of(&s.k, row), v: of(&s.v, row) };
                let out = last_rows(Isa::active(), &Pool::new(1), &alone, shape, KvType::F16, 1);
                expected[r * width..][..width].copy_from_slice(&out);
            }
            for isa in levels() {
                for threads in 1..3 {
                    let mut out = vec![f32::NAN; rows * width];
                    let pool = Pool::new(threads);
                    attention_with(isa, &pool, &s.q[start * width..], &[span], &cache, shape, &mut out);
                    assert_eq!(out, expected, "{} {threads} {start} {rows} {shape:?}", isa.name());
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "ancestors")]
fn a_row_that_does_not_see_itself_panics() {
    let (shape, mut out) = (shape(1, 1, 1), [0.0; 2]);
    let cache = KvPages::new(1, 1, 1, KvType::F32).unwrap();
    let span = Span { first_row: 0, rows: 2, start: 0, pages: &[0], ancestors: &[1, 1] };
    attention(&Pool::new(1), &[0.0; 2], &[span], &cache, &shape, &mut out);
}
