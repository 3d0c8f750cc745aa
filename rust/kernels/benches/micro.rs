//! scratch
use farthing_kernels::format::*;
use farthing_kernels::matmul::{Input, Job, matmul};
use farthing_kernels::pool::Pool;
use std::convert::Infallible;
use std::time::Instant;
fn main() {
    let pool = Pool::new(1);
    let rate = farthing_kernels::probe::int8_rate(&pool) / 2e9;
    println!("rate {rate:.0} GMAC/s");
    let filter = std::env::args().skip(1).find(|a| a != "--bench").unwrap_or_default();
    let i4 = |group, offset| Format::Integer { bits: Bits::Four, group, offset, scale: FloatType::F16 };
    let scale = FloatType::F16;
    let fs = [
        i4(128, Offset::Symmetric),
        i4(32, Offset::Symmetric),
        i4(32, Offset::Minimum),
        Format::Integer { bits: Bits::Eight, group: 32, offset: Offset::Symmetric, scale },
        Format::Super(SuperBlock::Q4K),
        Format::Super(SuperBlock::Q6K),
        Format::Ternary { packing: Packing::TwoBits, group: None, scale },
        Format::Ternary { packing: Packing::TwoBits, group: Some(256), scale },
        Format::Ternary { packing: Packing::BaseThree, group: None, scale },
        Format::Lookup { table: Table::Mxfp4, group: 32, scale },
    ];
    for f in fs {
        if !f.to_string().contains(&filter) {
            continue;
        }
        for precision in [Precision::A8, Precision::A16] {
            let (n, k) = (256, 4096);
            let top = match f {
                Format::Ternary { .. } => 3,
                Format::Super(SuperBlock::Q6K) => 64,
                Format::Integer { bits: Bits::Eight, .. } => 256,
                _ => 16,
            };
            let w = PackedMatrix::pack_codes(n, k, f, precision, |n, row: &mut RowCodes| {
                row.codes.iter_mut().enumerate().for_each(|(k, w)| *w = ((n * 31 + k * 17) % top) as u8);
                row.scales.fill(0.5);
                row.sub_scales.fill(7);
                row.sub_minima.fill(3);
                Ok::<(), Infallible>(())
            })
            .unwrap();
            print!("{f} {precision:?} {:.2} bpw:", w.nbytes() as f64 * 8.0 / (n * k) as f64);
            for m in [1, 2, 3, 4, 5, 6, 12, 16, 96, 480] {
                let x: Vec<f32> = (0..m * k).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect();
                let mut out = vec![0.0; m * n];
                let mut input = Input::new();
                input.prepare(&pool, &x, m, k, &[&w]);
                let mut best = f64::MAX;
                for _ in 0..100 {
                    let t = Instant::now();
                    let reps = 1 + 2_000_000 / (m * n * k);
                    for _ in 0..reps {
                        matmul(&pool, &x, m, &input, &mut [Job { matrix: &w, bias: None, add: false, out: &mut out }]);
                    }
                    best = best.min(t.elapsed().as_secs_f64() / reps as f64);
                }
                let planes = if precision == Precision::A16 { 2.0 } else { 1.0 };
                if m == 1 {
                    print!(" {:.0} Gw/s {:.0} GB/s", (n * k) as f64 / best / 1e9, w.nbytes() as f64 / best / 1e9);
                }
                print!(" {m}:{:.0}%", 100.0 * planes * (m * n * k) as f64 / best / 1e9 / rate);
            }
            println!();
        }
    }
}
