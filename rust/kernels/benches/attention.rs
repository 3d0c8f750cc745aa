//! Attention of real layer shapes: a prompt of 512 tokens at once, and one token after 512 (or more) keys.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use farthing_kernels::attention::{AttentionShape, KvPages, KvType, PAGE, Span, attention};
use farthing_kernels::pool::{Pool, default_threads};

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919) % 2003) as f32 / 1000.0 - 1.0).collect()
}

fn layers(c: &mut Criterion) {
    let shapes = [
        ("SmolLM2-135M", 9, 3, 64, None),
        ("Qwen2.5-0.5B", 14, 2, 64, None),
        ("Qwen2.5-1.5B", 12, 2, 128, None),
        ("Gemma3-1B", 4, 1, 256, Some(512)),
    ];
    let pool = Pool::new(default_threads());
    for (model, heads, kv_heads, head_dim, window) in shapes {
        let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.1, window, softcap: None, sinks: None };
        for kind in [KvType::F16, KvType::F32] {
            let keys = 2048;
            let pages: Vec<u32> = (0..(keys / PAGE) as u32).collect();
            let mut cache = KvPages::new(pages.len(), kv_heads, head_dim, kind).expect("memory");
            let row = numbers(kv_heads * head_dim);
            for t in 0..keys {
                cache.write((t / PAGE) as u32, t % PAGE, &row, &row);
            }
            let mut group = c.benchmark_group(format!("attention/{model}/{kind:?}"));
            for (name, rows, start) in
                [("prompt 512", 512, 0), ("prompt 16", 16, 0), ("512 keys", 1, 511), ("2048 keys", 1, 2047)]
            {
                let q = numbers(rows * heads * head_dim);
                let mut out = vec![0.0; q.len()];
                let span = [Span { first_row: 0, rows, start, pages: &pages, ancestors: &[] }];
                let pairs: usize = (start + 1..=start + rows).map(|keys| keys.min(window.unwrap_or(keys))).sum();
                group.throughput(Throughput::Elements((4 * pairs * heads * head_dim) as u64));
                group.bench_function(name, |b| {
                    b.iter(|| attention(&pool, black_box(&q), &span, &cache, &shape, &mut out));
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
    targets = layers
}
criterion_main!(benches);
