//! Products of packed matrices: SmolLM2-135M's layers (30 of them, so that weights come from memory), 4096² in every
//! format, and single matrices.
//!
//! Elements are weights read for one row, multiply-accumulates for many.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use farthing_kernels::activation::Activation;
use farthing_kernels::format::{Bits, FloatType, Format, Offset, PackedMatrix, Precision};
use farthing_kernels::matmul::{Input, Job, gated, matmul, self_test};
use farthing_kernels::pool::{Pool, default_threads};

mod common;
use common::{FORMATS, activations};

const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const KEYS: usize = 192;
const FEED_FORWARD: usize = 1536;

/// Q4_1: what the default model's layers are stored as.
const INT4: Format = Format::Integer { bits: Bits::Four, group: 32, offset: Offset::Minimum, scale: FloatType::F16 };
/// Q8_0: its head.
const INT8: Format = Format::Integer { bits: Bits::Eight, group: 32, offset: Offset::Symmetric, scale: FloatType::F16 };

fn matrix(n: usize, k: usize, format: Format, precision: Precision) -> PackedMatrix {
    PackedMatrix::random(n, k, format, precision, 1).expect("a format that has kernels")
}

struct Layer {
    qkv: [PackedMatrix; 3],
    out: PackedMatrix,
    gate: PackedMatrix,
    up: PackedMatrix,
    down: PackedMatrix,
}

impl Layer {
    fn new(precision: Precision) -> Layer {
        let matrix = |n, k| matrix(n, k, INT4, precision);
        Layer {
            qkv: [matrix(HIDDEN, HIDDEN), matrix(KEYS, HIDDEN), matrix(KEYS, HIDDEN)],
            out: matrix(HIDDEN, HIDDEN),
            gate: matrix(FEED_FORWARD, HIDDEN),
            up: matrix(FEED_FORWARD, HIDDEN),
            down: matrix(HIDDEN, FEED_FORWARD),
        }
    }

    fn weights(&self) -> usize {
        let all = self.qkv.iter().chain([&self.out, &self.gate, &self.up, &self.down]);
        all.map(|matrix| matrix.rows() * matrix.columns()).sum()
    }

    /// Every product of a block, with the hidden state carried through.
    fn run(&self, pool: &Pool, input: &mut Input, m: usize, x: &mut [f32], buffers: &mut [Vec<f32>; 4]) {
        let [q, k, v, inner] = buffers;
        input.prepare(pool, x, m, HIDDEN, &[&self.qkv[0]]);
        let outs = self.qkv.iter().zip([&mut *q, k, v]);
        let mut jobs: Vec<Job<'_>> = outs
            .map(|(matrix, out)| Job { matrix, bias: None, add: false, out: &mut out[..m * matrix.rows()] })
            .collect();
        matmul(pool, x, m, input, &mut jobs);
        let q = &q[..m * HIDDEN];
        input.prepare(pool, q, m, HIDDEN, &[&self.out]);
        matmul(pool, q, m, input, &mut [Job { matrix: &self.out, bias: None, add: false, out: x }]);
        input.prepare(pool, x, m, HIDDEN, &[&self.gate]);
        let inner = &mut inner[..m * FEED_FORWARD];
        gated(pool, x, m, input, &self.gate, &self.up, Activation::Silu, inner);
        input.prepare(pool, inner, m, FEED_FORWARD, &[&self.down]);
        matmul(pool, inner, m, input, &mut [Job { matrix: &self.down, bias: None, add: false, out: x }]);
    }
}

fn smollm2(criterion: &mut Criterion) {
    self_test(farthing_kernels::isa::Isa::active()).expect("kernels are right before they are timed");
    let pool = Pool::new(default_threads());
    for precision in [Precision::A16, Precision::A8] {
        let layers: Vec<Layer> = (0..LAYERS).map(|_| Layer::new(precision)).collect();
        let mut group = criterion.benchmark_group(format!("SmolLM2-135M layers, {precision:?}"));
        group.sample_size(10);
        for m in [1, 4, 16, 512] {
            let x = activations(m, HIDDEN);
            let mut buffers = [HIDDEN, KEYS, KEYS, FEED_FORWARD].map(|n| vec![0.0; m * n]);
            let mut input = Input::new();
            group.throughput(Throughput::Elements((m * LAYERS * layers[0].weights()) as u64));
            group.bench_function(BenchmarkId::from_parameter(m), |bencher| {
                bencher.iter(|| {
                    let mut x = x.clone();
                    for layer in &layers {
                        layer.run(&pool, &mut input, m, &mut x, &mut buffers);
                    }
                    x
                });
            });
        }
        group.finish();
    }
}

fn single(criterion: &mut Criterion) {
    let pool = Pool::new(default_threads());
    let cases = [
        ("head 49152 × 576 int8 g32 A16", 49152, 576, INT8, Precision::A16),
        ("1024² int4 g32, f32 activations", 1024, 1024, INT4, Precision::F32),
        ("1024² bf16", 1024, 1024, Format::Float(FloatType::Bf16), Precision::F32),
        ("1024² f32", 1024, 1024, Format::Float(FloatType::F32), Precision::F32),
    ];
    for (name, n, k, format, precision) in cases {
        rows(criterion, &pool, name, &[matrix(n, k, format, precision)]);
    }
}

/// 4096² in every format, copies in turn, so that weights come from memory.
fn formats(criterion: &mut Criterion) {
    const SIDE: usize = 4096;
    const RESIDENT: usize = 256 << 20;
    let pool = Pool::new(default_threads());
    for (name, format) in FORMATS {
        for precision in [Precision::A8, Precision::A16] {
            let first = matrix(SIDE, SIDE, format, precision);
            let copies = RESIDENT.div_ceil(first.nbytes());
            let copies: Vec<PackedMatrix> =
                (0..copies).map(|_| first.try_clone().expect("memory for the copies")).collect();
            rows(criterion, &pool, &format!("4096² {name} {}", precision.name()), &copies);
        }
    }
}

/// Whole products with 1, 4, 16 and 128 rows, with the matrices in turn.
fn rows(criterion: &mut Criterion, pool: &Pool, name: &str, matrices: &[PackedMatrix]) {
    let (n, k) = (matrices[0].rows(), matrices[0].columns());
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10);
    for m in [1, 4, 16, 128] {
        let (x, mut out, mut input) = (activations(m, k), vec![0.0; m * n], Input::new());
        let mut turns = matrices.iter().cycle();
        group.throughput(Throughput::Elements((m * n * k) as u64));
        group.bench_function(BenchmarkId::from_parameter(m), |bencher| {
            bencher.iter(|| {
                let matrix = turns.next().expect("a cycle has no end");
                input.prepare(pool, &x, m, k, &[matrix]);
                matmul(pool, &x, m, &input, &mut [Job { matrix, bias: None, add: false, out: &mut out }]);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, smollm2, formats, single);
criterion_main!(benches);
