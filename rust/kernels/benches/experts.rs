//! A mixture-of-experts layer of `OLMoE`'s shape (2048 numbers a token, 64 experts of width 1024, 8 of them for each
//! token) at several numbers of tokens, beside the machine's limits probed in the same rounds.
//!
//! Experts are drawn uniformly for every run, and all of them are far larger than any cache. The limit is the bytes of the
//! experts that were chosen over the read bandwidth, or the operations over the int8 rate, whichever is longer.
//! `cargo bench -p farthing-kernels --bench experts -- [format filter] [--threads N] [--rounds N] [--t TOKENS]`

#![allow(clippy::print_stdout)]

use std::time::Instant;

use farthing_kernels::activation::Activation;
use farthing_kernels::experts::{Expert, ExpertActivation, ExpertScratch, PackedExperts};
use farthing_kernels::format::{Format, PackedMatrix, Precision};
use farthing_kernels::pool::{Pool, default_threads};
use farthing_kernels::probe;

mod common;
use common::{FORMATS, activations};

const HIDDEN: usize = 2048;
const WIDTH: usize = 1024;
const EXPERTS: usize = 64;
const CHOICES: usize = 8;
const TOKENS: [usize; 6] = [1, 2, 8, 64, 256, 512];

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Pseudo-random numbers below `below`.
struct Draw(u64);

impl Draw {
    fn below(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below
    }

    /// Different experts for each of `t` tokens.
    fn experts(&mut self, t: usize) -> Vec<u32> {
        let mut ids = Vec::new();
        for _ in 0..t {
            let mut all: Vec<u32> = (0..EXPERTS as u32).collect();
            ids.extend((0..CHOICES).map(|_| all.swap_remove(self.below(all.len()))));
        }
        ids
    }
}

fn layer(format: Format, precision: Precision) -> PackedExperts {
    let matrix = |n, k| PackedMatrix::random(n, k, format, precision, 1).expect("a format of the list");
    let mut experts = PackedExperts::new(HIDDEN, ExpertActivation::Gated(Activation::Silu));
    for _ in 0..EXPERTS {
        let (gate, up, down) = (matrix(WIDTH, HIDDEN), matrix(WIDTH, HIDDEN), matrix(HIDDEN, WIDTH));
        experts.push(Expert { gate: Some(gate), up, down, biases: None }).expect("shapes that fit");
    }
    experts
}

fn measure(pool: &Pool, name: &str, experts: &PackedExperts, rounds: usize, only: usize) {
    let steps: Vec<usize> = TOKENS.into_iter().filter(|&t| only == 0 || t == only).collect();
    let most = steps[steps.len() - 1];
    let (x, weights, mut out) = (activations(most, HIDDEN), vec![0.125; most * CHOICES], vec![0.0; most * HIDDEN]);
    let (mut scratch, mut draw) = (ExpertScratch::default(), Draw(1));
    let (mut times, mut bytes) = (vec![Vec::new(); steps.len()], vec![Vec::new(); steps.len()]);
    let (mut bandwidths, mut rates) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        bandwidths.push(probe::read_bandwidth(pool));
        rates.push(probe::int8_rate(pool));
        for ((&t, times), bytes) in steps.iter().zip(&mut times).zip(&mut bytes) {
            for _ in 0..if t <= 8 { 8 } else { 2 } {
                let ids = draw.experts(t);
                let (x, weights, out) = (&x[..t * HIDDEN], &weights[..ids.len()], &mut out[..t * HIDDEN]);
                let start = Instant::now();
                experts.run(pool, x, &ids, weights, &mut scratch, out, false);
                times.push(start.elapsed().as_secs_f64());
                bytes.push(scratch.statistics().weight_bytes as f64);
            }
        }
    }
    let (bandwidth, rate) = (median(&mut bandwidths), median(&mut rates));
    println!(
        "{name}: {:.1} MB, {:.1} GB/s, int8 {:.2} TOP/s, {} threads",
        experts.nbytes() as f64 / 1e6,
        bandwidth / 1e9,
        rate / 1e12,
        pool.threads()
    );
    println!("  tokens       ms  GB/s  GOP/s  of the limit");
    for ((&t, times), bytes) in steps.iter().zip(&mut times).zip(&mut bytes) {
        let (time, bytes) = (median(times), median(bytes));
        let operations = 2.0 * (3 * t * CHOICES * HIDDEN * WIDTH) as f64;
        let limit = (bytes / bandwidth).max(operations / rate);
        println!(
            "  {t:6} {:8.3} {:5.1} {:6.0} {:11.1} %",
            time * 1e3,
            bytes / time / 1e9,
            operations / time / 1e9,
            100.0 * limit / time
        );
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let option = |name: &str, default: usize| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)?.parse().ok()).unwrap_or(default)
    };
    let pool = Pool::new(option("--threads", default_threads()));
    let filter = arguments.first().filter(|first| !first.starts_with("--"));
    for precision in [Precision::A8, Precision::A16] {
        for (name, format) in FORMATS {
            let name = format!("{name} {}", precision.name());
            if filter.is_none_or(|filter| name.contains(filter.as_str())) {
                let experts = layer(format, precision);
                measure(&pool, &name, &experts, option("--rounds", 5), option("--t", 0));
            }
        }
    }
}
