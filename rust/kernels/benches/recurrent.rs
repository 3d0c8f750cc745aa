//! Short convolutions and gated delta rules of real layer shapes: rows a second of a prompt, and of one token.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use farthing_kernels::pool::{Pool, default_threads};
use farthing_kernels::recurrent::{Convolution, DeltaInput, GatedDelta, Segment, States};

const ROWS: [(&str, usize); 3] = [("prompt 512", 512), ("prompt 16", 16), ("one token", 1)];

fn numbers(count: usize, low: f32, high: f32) -> Vec<f32> {
    (0..count).map(|i| low + (high - low) * ((i * 7919) % 2003) as f32 / 2002.0).collect()
}

fn convolutions(c: &mut Criterion) {
    let pool = Pool::new(default_threads());
    for (model, channels, taps, silu) in [("LFM2-1.2B", 2048, 3, false), ("Qwen3.5-9B", 8192, 4, true)] {
        let convolution = Convolution::new(&numbers(channels * taps, -1.0, 1.0), None, channels, silu);
        let mut states = States::new(1, convolution.state_floats()).expect("memory");
        let mut group = c.benchmark_group(format!("convolution/{model}"));
        for (name, rows) in ROWS {
            let x = numbers(rows * channels, -1.0, 1.0);
            let mut out = vec![0.0; x.len()];
            let segment = [Segment { first_row: 0, rows, slot: 0 }];
            group.throughput(Throughput::Elements(rows as u64));
            group.bench_function(name, |b| {
                b.iter(|| convolution.run(&pool, black_box(&x), &segment, &mut states, &mut out));
            });
        }
        group.finish();
    }
}

fn delta_rules(c: &mut Criterion) {
    let pool = Pool::new(default_threads());
    for (model, key_heads, value_heads) in [("Qwen3.5-0.8B", 16, 16), ("Qwen3.5-9B", 16, 32)] {
        let heads = GatedDelta { key_heads, value_heads, key_dim: 128, value_dim: 128, tiled: false };
        // As many states as a model has layers, so that one token finds its own in memory, not in the nearest cache.
        let mut layers: Vec<States> = (0..18).map(|_| States::new(1, heads.state_floats()).expect("memory")).collect();
        let mut group = c.benchmark_group(format!("delta rule/{model}"));
        for (name, rows) in ROWS {
            let qkv = numbers(rows * heads.width(), -0.08, 0.08);
            let (decay, rate) = (numbers(rows * value_heads, 0.9, 1.0), numbers(rows * value_heads, 0.1, 0.9));
            let input = DeltaInput { qkv: &qkv, decay: &decay, rate: &rate };
            let mut out = vec![0.0; rows * value_heads * 128];
            let segment = [Segment { first_row: 0, rows, slot: 0 }];
            let mut layer = 0;
            group.throughput(Throughput::Elements(rows as u64));
            group.bench_function(name, |b| {
                b.iter(|| {
                    layer = (layer + 1) % layers.len();
                    heads.run(&pool, black_box(&input), &segment, &mut layers[layer], 0, &mut out);
                });
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_millis(500));
    targets = convolutions, delta_rules
}
criterion_main!(benches);
