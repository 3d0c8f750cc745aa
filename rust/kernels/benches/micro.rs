use farthing_kernels::format::*;
use farthing_kernels::matmul::{Input, Job, matmul};
use farthing_kernels::pool::Pool;
use std::convert::Infallible;
use std::time::Instant;
fn main() {
    let pool = Pool::new(1);
    let rate = farthing_kernels::probe::int8_rate(&pool) / 2e9;
    println!("rate {rate:.0} GMAC/s");
    for (k, n) in [(512, 64), (4096, 64), (4096, 256)] {
        for group in [128, 32] {
            for precision in [Precision::A8, Precision::A16] {
                let f = Format::Integer { bits: Bits::Four, group, offset: Offset::Symmetric, scale: FloatType::F16 };
                let w = PackedMatrix::quantize(n, k, f, precision, |n, row: &mut [f32]| {
                    row.iter_mut().enumerate().for_each(|(k, w)| *w = ((n * 31 + k * 17) % 127) as f32 / 64.0 - 1.0);
                    Ok::<(), Infallible>(())
                })
                .unwrap();
                print!("k {k} n {n} g{group} {precision:?}:");
                for m in [1, 2, 3, 4, 5, 6, 12, 96, 480] {
                    let x: Vec<f32> = (0..m * k).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect();
                    let mut out = vec![0.0; m * n];
                    let mut input = Input::new();
                    input.prepare(&pool, &x, m, k, &[&w]);
                    let mut best = f64::MAX;
                    for _ in 0..200 {
                        let t = Instant::now();
                        let reps = 1 + 2_000_000 / (m * n * k);
                        for _ in 0..reps {
                            matmul(
                                &pool,
                                &x,
                                m,
                                &input,
                                &mut [Job { matrix: &w, bias: None, add: false, out: &mut out }],
                            );
                        }
                        best = best.min(t.elapsed().as_secs_f64() / reps as f64);
                    }
                    let planes = if precision == Precision::A16 { 2.0 } else { 1.0 };
                    print!(" {m}:{:.0}%", 100.0 * planes * (m * n * k) as f64 / best / 1e9 / rate);
                }
                println!();
            }
        }
    }
}
