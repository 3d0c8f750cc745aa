//! What drafting costs in the core: `cargo bench -p farthing --bench drafters`. Medians over single calls, one thread,
//! a clock's own time (about 20 ns) included; `python -m benches.drafters` has the peers and the Python face.
#![allow(clippy::print_stdout, reason = "a bench prints")]
#![allow(missing_docs, reason = "nothing is public")]

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use farthing::error::Error;
use farthing::speculative::draft::{
    Draft, Drafter, NGram, NGramMode, NGramOptions, NoTarget, Observed, Suffix, SuffixOptions, SuffixStore,
    TokenRecycling,
};
use farthing::speculative::tree::DraftTree;
use farthing_kernels::sample::{Sampling, TokenCounts};

const STEPS: usize = 2000;

/// Ids as uneven as those of text, and passages that come again.
fn text(seed: u64, length: usize) -> Vec<u32> {
    let mut state = seed * 2 + 1;
    let mut next = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut tokens: Vec<u32> = Vec::with_capacity(length + 64);
    while tokens.len() < length {
        if tokens.len() > 64 && next(40) == 0 {
            let start = next(tokens.len() - 40);
            tokens.extend_from_within(start..start + 5 + next(35));
        } else {
            let rarest = 1 + next(20_000);
            tokens.push(next(rarest) as u32);
        }
    }
    tokens.truncate(length);
    tokens
}

/// Median and 99th percentile, in microseconds.
fn quantiles(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2] * 1e6, times[times.len() * 99 / 100] * 1e6)
}

/// Drafts and observes token by token behind `context` tokens; seconds of each.
fn run(
    drafter: &mut dyn Drafter,
    tokens: &[u32],
    context: usize,
    budget: usize,
) -> Result<(Vec<f64>, Vec<f64>), Error> {
    let (sampling, counts) = (Sampling::default(), TokenCounts::default());
    let (mut drafted, mut observed, mut nodes) = (Vec::new(), Vec::new(), 0);
    let target = NoTarget::default();
    drafter.begin(0, &tokens[..context])?;
    for end in context..tokens.len() {
        let mut tree = DraftTree::default();
        let tokens_so_far = &tokens[..end];
        let start = Instant::now();
        drafter.draft(
            &target,
            &mut [Draft {
                request: 0,
                tokens: tokens_so_far,
                budget,
                least: 0.0,
                sampling: &sampling,
                counts: &counts,
                tree: &mut tree,
            }],
        )?;
        drafted.push(start.elapsed().as_secs_f64());
        nodes += tree.len();
        let token = &tokens[end..=end];
        let top: [u32; 8] = std::array::from_fn(|rank| token[0] + rank as u32);
        let top = if drafter.wants().top > 0 { &top[..] } else { &[] };
        let start = Instant::now();
        drafter.observe(&Observed {
            request: 0,
            tokens: token,
            rows: &tokens[end - 1..end],
            top,
            ..Observed::default()
        })?;
        observed.push(start.elapsed().as_secs_f64());
    }
    drafter.end(0);
    assert!(nodes > 0, "nothing was drafted");
    // The first draft indexes the prompt.
    Ok((drafted.split_off(1), observed))
}

fn main() -> Result<(), Error> {
    println!("draft and index of one token, median (99th percentile) in µs, at contexts of");
    println!("{:<36}{:>16}{:>16}{:>16}{:>16}", "", "512", "2048", "8192", "32768");
    for mode in NGramMode::ALL {
        let mut line = format!("n-gram ({})", mode.name());
        line += &" ".repeat(36 - line.len());
        for context in [512, 2048, 8192, 32768] {
            let mut options = NGramOptions::of(mode);
            if mode == NGramMode::Vllm {
                options.min_n = 2;
            }
            let (drafted, observed) = run(&mut NGram::new(options)?, &text(1, context + STEPS), context, 63)?;
            let both = drafted.iter().zip(&observed[1..]).map(|(a, b)| a + b).collect();
            let (median, high) = quantiles(both);
            let _ = write!(line, "{:>16}", format!("{median:.2} ({high:.2})"));
        }
        println!("{line}");
    }
    println!(
        "\nbehind 4096 tokens, at most 15 drafted: median (99th percentile) in µs of a draft, of one token taken in"
    );
    let store = Arc::new(SuffixStore::new(SuffixStore::DEFAULT_BYTES)?);
    for seed in 0..50 {
        store.append(store.open(), &text(seed, 2000));
    }
    let tree = SuffixOptions { tree: true, ..SuffixOptions::default() };
    let drafters: [(&str, Box<dyn Drafter>); 5] = [
        ("suffix", Box::new(Suffix::new(None, SuffixOptions::default())?)),
        ("suffix, trees", Box::new(Suffix::new(None, tree)?)),
        ("suffix, store of 100,000 tokens", Box::new(Suffix::new(Some(Arc::clone(&store)), SuffixOptions::default())?)),
        ("suffix, same store, trees", Box::new(Suffix::new(Some(Arc::clone(&store)), tree)?)),
        ("token recycling", Box::new(TokenRecycling::default())),
    ];
    for (name, mut drafter) in drafters {
        let (drafted, observed) = run(&mut *drafter, &text(3, 4096 + STEPS), 4096, 15)?;
        let ((draft, slow), (take, late)) = (quantiles(drafted), quantiles(observed));
        println!("{name:<36}{:>16}{:>16}", format!("{draft:.2} ({slow:.2})"), format!("{take:.2} ({late:.2})"));
    }
    let start = Instant::now();
    let mut drafter = Suffix::new(None, SuffixOptions::default())?;
    drafter.begin(0, &text(5, 32_000))?;
    println!("a prompt of 32,000 tokens: {:.2} µs a token", start.elapsed().as_secs_f64() * 1e6 / 32_000.0);
    println!("store: {} tokens, {:.1} bytes a token", store.tokens(), store.bytes() as f64 / store.tokens() as f64);
    Ok(())
}
