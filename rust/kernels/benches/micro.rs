//! The kernels alone: one thread, a matrix that stays in the second-level cache, activations already quantised.
//!
//! Prints the share of the int8 rate that each format reaches at several numbers of rows, and for one row the weights and
//! bytes read in a second; then how long 16 activations take to quantise, in blocks of 6 rows.
//! `cargo bench -p farthing-kernels --bench micro -- [format filter]`

#![allow(clippy::print_stdout)]

use std::time::Instant;

use farthing_kernels::format::{PackedMatrix, Precision};
use farthing_kernels::matmul::{Input, Job, matmul};
use farthing_kernels::pool::Pool;
use farthing_kernels::probe;

mod common;
use common::{FORMATS, activations};

const OUTPUTS: usize = 256;
const INPUTS: usize = 4096;
const ROWS: [usize; 10] = [1, 2, 3, 4, 5, 6, 12, 16, 96, 480];
const ROUNDS: usize = 100;
/// Multiply-accumulates of a round, at least: well above the resolution of the clock.
const WORK: usize = 2_000_000;

/// Seconds that a product takes, the best of many rounds.
fn best(pool: &Pool, matrix: &PackedMatrix, m: usize) -> f64 {
    let (x, mut out, mut input) = (activations(m, INPUTS), vec![0.0; m * OUTPUTS], Input::new());
    input.prepare(pool, &x, m, INPUTS, &[matrix]);
    let repetitions = 1 + WORK / (m * OUTPUTS * INPUTS);
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..repetitions {
            matmul(pool, &x, m, &input, &mut [Job { matrix, bias: None, add: false, out: &mut out }]);
        }
        best = best.min(start.elapsed().as_secs_f64() / repetitions as f64);
    }
    best
}

/// Nanoseconds to quantise 16 activations, the best of many rounds.
fn quantizing(pool: &Pool, matrix: &PackedMatrix, m: usize) -> f64 {
    let (x, mut input, mut best) = (activations(m, INPUTS), Input::new(), f64::MAX);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        input.prepare(pool, &x, m, INPUTS, &[matrix]);
        best = best.min(start.elapsed().as_secs_f64());
    }
    best * 16e9 / (m * INPUTS) as f64
}

fn main() {
    let filter = std::env::args().skip(1).find(|argument| argument != "--bench").unwrap_or_default();
    let pool = Pool::new(1);
    let rate = probe::int8_rate(&pool) / 2.0;
    println!("int8: {:.0} GMAC/s", rate / 1e9);
    for (name, format) in FORMATS {
        for precision in [Precision::A8, Precision::A16] {
            let name = format!("{name} {}", precision.name());
            if !name.contains(&filter) {
                continue;
            }
            let matrix = PackedMatrix::random(OUTPUTS, INPUTS, format, precision, 1).expect("a small matrix");
            let weights = (OUTPUTS * INPUTS) as f64;
            let planes = if precision == Precision::A16 { 2.0 } else { 1.0 };
            print!("{name:20} {:5.2} bits", matrix.nbytes() as f64 * 8.0 / weights);
            for m in ROWS {
                let seconds = best(&pool, &matrix, m);
                if m == 1 {
                    print!(" {:4.0} Gw/s {:3.0} GB/s", weights / seconds / 1e9, matrix.nbytes() as f64 / seconds / 1e9);
                }
                print!(" {m}:{:.0}%", 100.0 * planes * m as f64 * weights / seconds / rate);
            }
            println!(" quantising 16 inputs: {:.1} ns", quantizing(&pool, &matrix, 12));
        }
    }
}
