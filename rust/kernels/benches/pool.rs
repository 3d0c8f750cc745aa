//! Parallel regions as decoding makes them: empty, short, and products of a small model's layers whose weights come from
//! memory. Medians and tails, since a neighbour on the machine shows in the tail first.
//!
//! `cargo bench -p farthing-kernels --bench pool -- [--threads N] [--seconds N]`; `FARTHING_PIN` chooses pinning.

#![allow(clippy::print_stdout)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use farthing_kernels::format::{Bits, FloatType, Format, Offset, PackedMatrix, Precision};
use farthing_kernels::matmul::{Input, Job, matmul};
use farthing_kernels::pool::{Pool, default_threads, pinning};

const LAYERS: usize = 30;
/// (outputs, inputs) of the four products of a SmolLM2-135M layer.
const SHAPES: [(usize, usize); 4] = [(960, 576), (576, 576), (3072, 576), (576, 1536)];
const INT4: Format = Format::Integer { bits: Bits::Four, group: 32, offset: Offset::Minimum, scale: FloatType::F16 };

/// Runs `body` for that long; prints the median, the 90th and the 99th percentile of its times.
fn report(name: &str, patience: Duration, mut body: impl FnMut()) {
    let (start, mut times) = (Instant::now(), Vec::new());
    while start.elapsed() < patience {
        let begin = Instant::now();
        body();
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[(times.len() as f64 * share) as usize];
    println!("{name:32} {:9.2} {:9.2} {:9.2} µs", at(0.5), at(0.9), at(0.99));
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let option = |name: &str, default: usize| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)?.parse().ok()).unwrap_or(default)
    };
    let pool = Pool::new(option("--threads", default_threads()));
    let patience = Duration::from_secs(option("--seconds", 2) as u64);
    println!("{} threads, pinning {}: median, 90 %, 99 %", pool.threads(), if pinning() { "on" } else { "off" });
    report("empty region", patience, || pool.run(|_| {}));
    report("region after 1 ms of rest", patience, || {
        std::thread::sleep(Duration::from_millis(1));
        pool.run(|_| {});
    });
    let work = || (0..4000u64).fold(0, |sum, i| black_box(sum + i));
    report("150 regions of a few µs", patience, || {
        for _ in 0..150 {
            pool.run(|_| {
                black_box(work());
            });
        }
    });
    let matrix = |n, k| PackedMatrix::random(n, k, INT4, Precision::A8, 1).expect("a small matrix");
    let layers: Vec<[PackedMatrix; 4]> = (0..LAYERS).map(|_| SHAPES.map(|(n, k)| matrix(n, k))).collect();
    let (x, mut out, mut input) = (vec![0.5; 1536], vec![0.0; 3072], Input::new());
    report("30 layers of SmolLM2-135M, 1 row", patience, || {
        for matrix in layers.iter().flatten() {
            let (n, k) = (matrix.rows(), matrix.columns());
            input.prepare(&pool, &x[..k], 1, k, &[matrix]);
            let out = &mut out[..n];
            matmul(&pool, &x[..k], 1, &input, &mut [Job { matrix, bias: None, add: false, out }]);
        }
    });
}
