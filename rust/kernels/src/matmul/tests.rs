//! Every level equals the specification bit for bit, whatever the rows and threads, and the specification is accurate.

use std::convert::Infallible;

use proptest::prelude::*;

use super::budget::{Activations, error_budget};
use super::*;
use crate::activation::activate_multiply;
use crate::format::random::Noise;
use crate::format::{Bits, FloatType, Format, Offset, Packing, Precision, RowCodes, SuperBlock, Table};
use crate::isa::Isa;

const OFFSETS: [Offset; 3] = [Offset::Symmetric, Offset::ZeroPoint, Offset::Minimum];
const FLOATS: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];
const PRECISIONS: [Precision; 3] = [Precision::A8, Precision::A16, Precision::F32];

impl Noise {
    /// Uniform in 0..1.
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }

    fn normals(&mut self, length: usize) -> Vec<f32> {
        (0..length).map(|_| self.normal()).collect()
    }
}

fn integer(bits: Bits, group: usize, offset: Offset, scale: FloatType) -> Format {
    Format::Integer { bits, group, offset, scale }
}

fn random(n: usize, k: usize, format: Format, precision: Precision, seed: u64) -> PackedMatrix {
    PackedMatrix::random(n, k, format, precision, seed).unwrap()
}

fn product(isa: Isa, threads: usize, x: &[f32], m: usize, matrix: &PackedMatrix) -> Vec<f32> {
    let pool = Pool::new(threads);
    let mut input = Input::new();
    input.prepare_with(isa, &pool, x, m, matrix.columns(), &[matrix]);
    let mut out = vec![f32::NAN; m * matrix.rows()];
    matmul(&pool, x, m, &input, &mut [Job { matrix, bias: None, add: false, out: &mut out }]);
    out
}

fn levels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

#[track_caller]
fn assert_same(got: &[f32], expected: &[f32], what: &dyn std::fmt::Debug) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
        assert!(same, "{what:?}: output {i}: got {got}, expected {expected}");
    }
}

/// Every level and thread count against the scalar one; every row against the row alone.
fn check(n: usize, k: usize, format: Format, precision: Precision, rows: &[usize], threads: &[usize], seed: u64) {
    let k = inputs(format, k);
    let matrix = random(n, k, format, precision, seed);
    let most = rows.iter().copied().max().unwrap();
    let x = Noise(seed).normals(most * k);
    let expected = product(Isa::Scalar, 1, &x, most, &matrix);
    for isa in levels() {
        for &m in rows {
            for &threads in threads {
                let got = product(isa, threads, &x[..m * k], m, &matrix);
                assert_same(&got, &expected[..m * n], &(isa, threads, m, n, k, format, precision));
            }
        }
    }
    let last = product(Isa::Scalar, 1, &x[(most - 1) * k..], 1, &matrix);
    assert_same(&last, &expected[(most - 1) * n..], &("alone", n, k, format, precision));
}

fn formats() -> impl Iterator<Item = (Format, Precision)> {
    let floats = FLOATS.into_iter().map(|kind| (Format::Float(kind), Precision::F32));
    let mut integers = Vec::new();
    for bits in [Bits::Four, Bits::Eight] {
        for offset in OFFSETS {
            for (group, scale) in
                [(16, FloatType::F32), (32, FloatType::F16), (64, FloatType::F16), (128, FloatType::Bf16)]
            {
                integers.extend(PRECISIONS.map(|precision| (integer(bits, group, offset, scale), precision)));
            }
        }
    }
    let scale = FloatType::F16;
    let ternary = |packing, group| Format::Ternary { packing, group, scale };
    let others = [
        ternary(Packing::TwoBits, Some(32)),
        ternary(Packing::TwoBits, Some(256)),
        ternary(Packing::TwoBits, None),
        ternary(Packing::BaseThree, None),
        Format::Lookup { table: Table::Mxfp4, group: 32, scale: FloatType::Bf16 },
        Format::Lookup { table: Table::Mxfp4, group: 16, scale },
        Format::Lookup { table: Table::Nf4, group: 64, scale: FloatType::F32 },
        Format::Lookup { table: Table::Iq4Nl, group: 32, scale },
        Format::Super(SuperBlock::Q4K),
        Format::Super(SuperBlock::Q6K),
    ];
    let both = [Precision::A8, Precision::A16];
    let others = others.into_iter().flat_map(move |format| both.map(|precision| (format, precision)));
    floats.chain(integers).chain(others)
}

/// A number of inputs near `k` that the format can have.
fn inputs(format: Format, k: usize) -> usize {
    if let Format::Super(_) = format { k.next_multiple_of(SuperBlock::INPUTS) } else { k }
}

#[test]
fn every_level_equals_scalar_for_every_row_count_and_tail() {
    const ROWS: [usize; 10] = [1, 2, 3, 4, 5, 6, 7, 8, 13, 33];
    for (format, precision) in formats() {
        check(65, 96, format, precision, &ROWS, &[1], 1);
        for (n, k) in [(1, 16), (15, 32), (16, 40), (17, 96), (63, 40), (64, 576), (130, 100), (97, 16), (113, 264)] {
            check(n, k, format, precision, &[1, 5, 33], &[1, 2, 3], 2);
        }
    }
}

/// A little of everything, for slow interpreters.
#[test]
fn small_products_agree() {
    let chosen = [
        (integer(Bits::Four, 32, Offset::Minimum, FloatType::F16), Precision::A16),
        (integer(Bits::Eight, 16, Offset::Symmetric, FloatType::F32), Precision::F32),
        (Format::Ternary { packing: Packing::BaseThree, group: None, scale: FloatType::F16 }, Precision::A8),
        (Format::Lookup { table: Table::Nf4, group: 32, scale: FloatType::Bf16 }, Precision::A8),
        (Format::Float(FloatType::Bf16), Precision::F32),
    ];
    for (format, precision) in chosen {
        check(18, 40, format, precision, &[1, 3], &[2], 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_level_equals_scalar_on_any_shape(
        n in 1usize..150,
        k in 1usize..300,
        m in 1usize..70,
        threads in 1usize..4,
        choice in 0usize..95,
        seed in any::<u64>(),
    ) {
        let all: Vec<_> = formats().collect();
        let (format, precision) = all[choice % all.len()];
        check(n, k, format, precision, &[1, m], &[threads], seed);
    }
}

/// Codes, zeros and sub-scales at the ends of their ranges: `(code, zero point, sub-scale)`.
fn extremes(format: Format) -> Vec<(u8, u8, i8)> {
    let most = format.maximum_code();
    let pairs = [(0, 0), (0, most), (most, 0), (most, most)];
    let subs: &[i8] = match format {
        Format::Super(SuperBlock::Q4K) => &[0, 63],
        Format::Super(SuperBlock::Q6K) => &[-128, 0, 127],
        _ => &[0],
    };
    pairs.into_iter().flat_map(|(code, zero)| subs.iter().map(move |&sub| (code, zero, sub))).collect()
}

#[test]
fn extremes_are_exact_and_alike() {
    for (format, precision) in formats().filter(|(format, _)| !matches!(format, Format::Float(_))) {
        let k = inputs(format, 144);
        let fill = |value: f32| vec![value; k];
        let with = |at: usize, value: f32| {
            let mut row = vec![0.0; k];
            row[at] = value;
            row
        };
        let mut signs = fill(8.0);
        signs.iter_mut().step_by(3).for_each(|x| *x = -8.0);
        let mut tiny = fill(f32::MIN_POSITIVE / 8.0);
        tiny[3] = 0.0;
        let rows = [
            fill(0.0),
            fill(1e30),
            fill(-1e30),
            signs,
            with(77, -3.0),
            with(0, 1.0),
            with(k - 1, f32::MAX),
            tiny,
            fill(f32::MAX),
            fill(f32::MIN),
        ];
        let x = rows.concat();
        // One float further on, so that no row is aligned.
        let shifted: Vec<f32> = std::iter::once(f32::NAN).chain(x.iter().copied()).collect();
        for (code, zero, sub) in extremes(format) {
            let matrix = PackedMatrix::pack_codes(70, k, format, precision, |_, row| {
                row.codes.fill(code);
                row.scales.fill(1.0 / 1024.0);
                row.offsets.fill(f32::from(zero));
                row.sub_scales.fill(sub);
                row.sub_minima.fill(if zero == 0 { 0 } else { 63 });
                Ok::<(), Infallible>(())
            });
            let matrix = matrix.unwrap();
            let expected = product(Isa::Scalar, 1, &x, rows.len(), &matrix);
            assert!(expected[..70].iter().all(|&y| y == 0.0), "a row of zeros gives {:?}", &expected[..70]);
            for isa in levels() {
                let what = (isa, format, precision, code, zero, sub);
                let got = product(isa, 1, &shifted[1..], rows.len(), &matrix);
                assert_same(&got, &expected, &what);
                for (row, expected) in expected.chunks_exact(70).enumerate() {
                    assert_same(&product(isa, 1, &x[row * k..][..k], 1, &matrix), expected, &(what, row));
                }
            }
        }
    }
}

/// With all weights alike and all activations at the greatest, a product is a sum that can be written down.
#[test]
fn the_greatest_products_are_exact() {
    let signed = |format: &Format| !matches!(format, Format::Integer { offset: Offset::Minimum, .. });
    for (format, precision) in formats().filter(|(format, precision)| signed(format) && *precision != Precision::F32) {
        let k = 512;
        let (most, x) = (format.maximum_code(), vec![-2.0; k]);
        for (code, sub) in [(most, 63), (0, 63), (most, 127), (0, -128)] {
            if format == Format::Super(SuperBlock::Q4K) && !(0..=63).contains(&sub) {
                continue;
            }
            let matrix = PackedMatrix::pack_codes(17, k, format, precision, |_, row| {
                row.codes.fill(code);
                row.scales.fill(0.5);
                row.sub_scales.fill(sub);
                Ok::<(), Infallible>(())
            });
            let matrix = matrix.unwrap();
            let expected = -2.0 * matrix.dequantize()[0] * k as f32;
            for isa in levels() {
                let (got, what) = (product(isa, 1, &x, 1, &matrix), (isa, format, precision, code, sub));
                let near = |y: &f32| (y - expected).abs() <= 4e-6 * expected.abs();
                assert!(got.iter().all(near), "{what:?}: got {}, expected {expected}", got[0]);
            }
        }
    }
}

#[test]
fn a_bad_activation_spoils_its_own_row_only() {
    for (format, precision) in formats() {
        let (n, k, m) = (33, inputs(format, 72), 5);
        let matrix = random(n, k, format, precision, 9);
        let good = Noise(3).normals(m * k);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = good.clone();
            x[2 * k + 70] = bad;
            for isa in levels() {
                let (got, expected) = (product(isa, 1, &x, m, &matrix), product(isa, 1, &good, m, &matrix));
                for row in 0..m {
                    let range = row * n..(row + 1) * n;
                    if row == 2 {
                        let what = (isa, format, precision, bad);
                        assert!(got[range].iter().all(|y| !y.is_finite()), "{what:?}");
                    } else {
                        assert_same(&got[range.clone()], &expected[range], &(isa, format, precision, bad));
                    }
                }
            }
        }
    }
}

/// Relative L2 error of products with `x: (m, k)` against the f64 products of the dequantised weights.
fn error(x: &[f32], m: usize, matrix: &PackedMatrix) -> f64 {
    let (n, k) = (matrix.rows(), matrix.columns());
    let (weights, got) = (matrix.dequantize(), product(Isa::active(), 1, x, m, matrix));
    let (mut error, mut norm) = (0.0, 0.0);
    for (i, got) in got.iter().enumerate() {
        let (w, x) = (&weights[i % n * k..][..k], &x[i / n * k..][..k]);
        let exact: f64 = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
        error += (f64::from(*got) - exact).powi(2);
        norm += exact * exact;
    }
    (error / norm).sqrt()
}

/// Within the budgets, which are no more than twice what is needed.
#[test]
fn products_are_accurate() {
    let (n, k, m) = (24, 4096, 24);
    let gaussian = Noise(5).normals(m * k);
    let mut outliers = gaussian.clone();
    for row in outliers.chunks_exact_mut(k) {
        row.iter_mut().skip(200).step_by(k / 8).for_each(|x| *x *= 40.0);
    }
    for (format, precision) in formats() {
        let matrix = match format {
            Format::Integer { .. } => PackedMatrix::quantize(n, k, format, precision, |n, row| {
                row.copy_from_slice(&Noise(1000 + n as u64).normals(k));
                Ok::<(), Infallible>(())
            })
            .unwrap(),
            _ => random(n, k, format, precision, 6),
        };
        for (activations, x) in [(Activations::Gaussian, &gaussian), (Activations::Outliers, &outliers)] {
            let (error, budget) = (error(x, m, &matrix), error_budget(format, precision, k, activations));
            let what = format!("{format:?} {precision:?} {activations:?}");
            assert!(error < budget, "{what}: error {error}, budget {budget}");
            let exact = precision == Precision::F32;
            assert!(exact || error > budget / 2.0, "{what}: error {error}, budget {budget} is too large");
        }
    }
}

#[test]
fn jobs_share_a_region_with_bias_and_addition() {
    let (k, m) = (96, 7);
    let x = Noise(1).normals(m * k);
    let format = integer(Bits::Four, 32, Offset::Minimum, FloatType::F16);
    let a = random(70, k, format, Precision::A16, 1);
    let b = random(200, k, integer(Bits::Eight, 64, Offset::Symmetric, FloatType::F16), Precision::A8, 2);
    let c = random(5, k, Format::Float(FloatType::Bf16), Precision::F32, 3);
    let bias = Noise(4).normals(200);
    for m in [1, 7, 40] {
        let x: Vec<f32> = x.iter().copied().cycle().take(m * k).collect();
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            let mut input = Input::new();
            input.prepare(&pool, &x, m, k, &[&a, &b, &c]);
            let (mut ya, mut yb, mut yc) = (vec![1.5; m * 70], vec![2.5; m * 200], vec![f32::NAN; m * 5]);
            let mut jobs = [
                Job { matrix: &a, bias: None, add: true, out: &mut ya },
                Job { matrix: &b, bias: Some(&bias), add: true, out: &mut yb },
                Job { matrix: &c, bias: Some(&bias[..5]), add: false, out: &mut yc },
            ];
            matmul(&pool, &x, m, &input, &mut jobs);
            let expected: Vec<f32> = product(Isa::Scalar, 1, &x, m, &a).iter().map(|y| 1.5 + y).collect();
            assert_same(&ya, &expected, &"add");
            let biased =
                product(Isa::Scalar, 1, &x, m, &b).into_iter().enumerate().map(|(i, y)| 2.5 + (y + bias[i % 200]));
            assert_same(&yb, &biased.collect::<Vec<_>>(), &"bias and add");
            let biased = product(Isa::Scalar, 1, &x, m, &c).into_iter().enumerate().map(|(i, y)| y + bias[i % 5]);
            assert_same(&yc, &biased.collect::<Vec<_>>(), &"bias");
        }
    }
}

#[test]
fn gated_equals_its_parts() {
    let (n, k) = (104, 64);
    let format = integer(Bits::Four, 32, Offset::Minimum, FloatType::F16);
    let gate = random(n, k, format, Precision::A16, 1);
    let up = random(n, k, integer(Bits::Eight, 16, Offset::Symmetric, FloatType::F32), Precision::A8, 2);
    for m in [1, 3, 50] {
        let x = Noise(8).normals(m * k);
        let (mut expected, multiplier) = (product(Isa::Scalar, 1, &x, m, &gate), product(Isa::Scalar, 1, &x, m, &up));
        activate_multiply(Activation::Silu, &mut expected, &multiplier);
        for isa in levels() {
            for threads in [1, 2, 3] {
                let pool = Pool::new(threads);
                let (mut input, mut out) = (Input::new(), vec![f32::NAN; m * n]);
                input.prepare_with(isa, &pool, &x, m, k, &[&gate, &up]);
                gated(&pool, &x, m, &input, &gate, &up, Activation::Silu, &mut out);
                assert_same(&out, &expected, &(isa, threads, m));
            }
        }
    }
}

#[test]
#[should_panic(expected = "not prepared for this matrix")]
fn a_product_without_its_input_panics() {
    let a = random(16, 32, integer(Bits::Four, 32, Offset::Symmetric, FloatType::F16), Precision::A16, 1);
    let b = random(16, 32, integer(Bits::Four, 32, Offset::Symmetric, FloatType::F16), Precision::A8, 1);
    let (pool, mut input, mut out) = (Pool::new(1), Input::new(), vec![0.0; 16]);
    let x = vec![1.0; 32];
    input.prepare(&pool, &x, 1, 32, &[&a]);
    matmul(&pool, &x, 1, &input, &mut [Job { matrix: &b, bias: None, add: false, out: &mut out }]);
}

#[test]
fn self_tests_pass_on_every_level() {
    let tests = self_tests();
    assert_eq!(tests.len(), 37 * levels().count());
    for test in tests {
        assert!(test.passed, "{test:?}");
    }
    for isa in levels() {
        self_test(isa).unwrap();
    }
}

/// What is packed comes back as the formulas of the formats say.
#[test]
fn rows_come_back_as_they_were_packed() {
    for (format, precision) in formats() {
        let Format::Integer { bits, group, offset, scale } = format else { continue };
        let (n, k) = (67, 100_usize);
        let mut noise = Noise(4);
        let (top, groups) = (u64::from(bits.maximum()) + 1, k.div_ceil(group));
        let rows: Vec<RowCodes> = std::iter::repeat_with(|| RowCodes {
            codes: (0..k).map(|_| (noise.next() % top) as u8).collect(),
            scales: (0..groups).map(|_| scale.round(noise.normal() * 0.01)).collect(),
            offsets: match offset {
                Offset::Symmetric => Vec::new(),
                Offset::ZeroPoint => (0..groups).map(|_| (noise.next() % top) as f32).collect(),
                Offset::Minimum => (0..groups).map(|_| scale.round(noise.normal())).collect(),
            },
            ..RowCodes::default()
        })
        .take(n)
        .collect();
        let packed = PackedMatrix::pack_codes(n, k, format, precision, |n, row| {
            row.clone_from(&rows[n]);
            Ok::<(), Infallible>(())
        });
        let got = packed.unwrap().dequantize();
        for (n, row) in rows.iter().enumerate() {
            for k in 0..k {
                let (code, scale) = (f32::from(row.codes[k]), row.scales[k / group]);
                let stored = row.offsets.get(k / group).copied().unwrap_or(0.0);
                let expected = match offset {
                    Offset::Symmetric => scale * (code - f32::from(bits.bias())),
                    Offset::ZeroPoint => scale * (code - stored),
                    Offset::Minimum => scale.mul_add(code, stored),
                };
                assert_eq!(got[n * 100 + k].to_bits(), expected.to_bits(), "{format:?} ({n}, {k})");
            }
        }
    }
}
