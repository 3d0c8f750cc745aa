//! One 4096² product at every number of rows, beside the machine's limits probed in the same rounds.
//!
//! Copies of the matrix are used in turn, so that weights come from memory; activations are quantised inside the time.
//! `cargo bench -p farthing-kernels --bench limits -- [format filter] [--threads N] [--rounds N] [--m ROWS]`

#![allow(clippy::print_stdout)]

use std::time::Instant;

use farthing_kernels::format::{Format, PackedMatrix, Precision};
use farthing_kernels::matmul::{Input, Job, matmul};
use farthing_kernels::pool::{Pool, default_threads};
use farthing_kernels::probe;

mod common;
use common::{FORMATS, activations};

const SIDE: usize = 4096;
const ROWS: [usize; 18] = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 64, 128, 256, 512];
/// Copies fill this many bytes: several times any last-level cache.
const RESIDENT: usize = 256 << 20;

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn measure(pool: &Pool, name: &str, format: Format, precision: Precision, rounds: usize, only: usize) {
    let rows: Vec<usize> = ROWS.into_iter().filter(|&m| only == 0 || m == only).collect();
    let first = PackedMatrix::random(SIDE, SIDE, format, precision, 1).expect("a format of the list");
    let copies = RESIDENT.div_ceil(first.nbytes());
    let copy = |_| first.try_clone().expect("memory for the copies");
    let matrices: Vec<PackedMatrix> = (0..copies).map(copy).collect();
    let most = rows[rows.len() - 1];
    let x = activations(most, SIDE);
    let (mut input, mut out) = (Input::new(), vec![0.0; most * SIDE]);
    let mut times = vec![Vec::new(); rows.len()];
    let (mut bandwidths, mut rates, mut next) = (Vec::new(), Vec::new(), 0);
    for _ in 0..rounds {
        bandwidths.push(probe::read_bandwidth(pool));
        rates.push(probe::int8_rate(pool));
        for (&m, times) in rows.iter().zip(&mut times) {
            for _ in 0..if m <= 16 { 8 } else { 2 } {
                let (matrix, x, out) = (&matrices[next % copies], &x[..m * SIDE], &mut out[..m * SIDE]);
                next += 1;
                let start = Instant::now();
                input.prepare(pool, x, m, SIDE, &[matrix]);
                matmul(pool, x, m, &input, &mut [Job { matrix, bias: None, add: false, out }]);
                times.push(start.elapsed().as_secs_f64());
            }
        }
    }
    let (bandwidth, rate) = (median(&mut bandwidths), median(&mut rates));
    let bytes = matrices[0].nbytes() as f64;
    println!(
        "{name} {}: {:.3} bits a weight, {:.1} GB/s, int8 {:.2} TOP/s, {} threads",
        precision.name(),
        bytes * 8.0 / (SIDE * SIDE) as f64,
        bandwidth / 1e9,
        rate / 1e12,
        pool.threads()
    );
    println!("  rows       µs   V(M)   GOP/s  of int8 rate  of the limit");
    let one = median(&mut times[0]);
    for (&m, times) in rows.iter().zip(&mut times) {
        let time = median(times);
        let operations = 2.0 * (m * SIDE * SIDE) as f64;
        let limit = (bytes / bandwidth).max(operations / rate);
        println!(
            "  {m:4} {:8.1} {:6.2} {:7.0} {:13.1} % {:11.1} %",
            time * 1e6,
            time / one,
            operations / time / 1e9,
            100.0 * operations / time / rate,
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
    let rounds = option("--rounds", 9);
    let filter = arguments.first().filter(|first| !first.starts_with("--"));
    for precision in [Precision::A8, Precision::A16] {
        for (name, format) in FORMATS {
            let name_and_precision = format!("{name} {}", precision.name());
            if filter.is_none_or(|filter| name_and_precision.contains(filter.as_str())) {
                measure(&pool, name, format, precision, rounds, option("--m", 0));
            }
        }
    }
}
