//! One draw from a row of logits: greedy, plain, top-p and top-k, peaked and flat.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use farthing_kernels::philox::gumbel;
use farthing_kernels::sample::{Sampling, TokenCounts, sample};

fn draws(c: &mut Criterion) {
    let settings = [
        ("greedy", Sampling { temperature: 0.0, ..Sampling::default() }),
        ("plain", Sampling::default()),
        ("top-p 0.9", Sampling { top_p: 0.9, ..Sampling::default() }),
        ("top-k 50", Sampling { top_k: Some(50), ..Sampling::default() }),
    ];
    for vocabulary in [49_152, 151_936] {
        for (kind, spread) in [("flat", 0.8), ("peaked", 2.5)] {
            let logits: Vec<f32> = (0..vocabulary).map(|token| spread * gumbel(1, 2, token)).collect();
            let mut group = c.benchmark_group(format!("sample/{vocabulary} {kind}"));
            for (name, sampling) in &settings {
                group.bench_function(*name, |b| {
                    b.iter_batched_ref(
                        || logits.clone(),
                        |logits| black_box(sample(logits, sampling, &TokenCounts::default())),
                        BatchSize::LargeInput,
                    );
                });
            }
            group.finish();
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_millis(500));
    targets = draws
}
criterion_main!(benches);
