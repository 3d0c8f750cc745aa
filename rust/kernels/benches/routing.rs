//! The choice of experts for a row of logits: softmax, and the greatest 8.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use farthing_kernels::philox::gumbel;
use farthing_kernels::score::{Score, score};
use farthing_kernels::topk::top_k;

fn routing(c: &mut Criterion) {
    for experts in [64, 128, 256, 512] {
        for rows in [1, 64, 512] {
            let logits: Vec<f32> = (0..rows * experts).map(|i| gumbel(1, 2, i as u32)).collect();
            let mut ids = vec![0; rows * 8];
            let mut group = c.benchmark_group(format!("{experts} experts/{rows} rows"));
            group.throughput(Throughput::Elements(rows as u64));
            group.bench_function("softmax", |b| {
                b.iter_batched_ref(
                    || logits.clone(),
                    |logits| score(Score::Softmax, black_box(logits), experts),
                    BatchSize::LargeInput,
                );
            });
            group.bench_function("top 8", |b| b.iter(|| top_k(black_box(&logits), experts, 8, &mut ids)));
            group.finish();
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(std::time::Duration::from_millis(100))
        .measurement_time(std::time::Duration::from_millis(300));
    targets = routing
}
criterion_main!(benches);
