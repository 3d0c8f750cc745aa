//! The layer against a plain loop over tokens and choices, made of the products of `matmul`, bit for bit.

use super::*;
use crate::activation::{Activation, activate_multiply_with};
use crate::format::{Bits, FloatType, Format, Offset, Packing, Precision, Table, random::Noise};
use crate::math::exp;
use crate::matmul::{Input, Job, matmul};

const SILU: ExpertActivation = ExpertActivation::Gated(Activation::Silu);
const SWIGLU: ExpertActivation = ExpertActivation::ClampedSwiglu { alpha: 1.702, limit: 0.7 };

fn int4(group: usize) -> Format {
    Format::Integer { bits: Bits::Four, group, offset: Offset::Symmetric, scale: FloatType::F16 }
}

fn numbers(seed: u64, length: usize) -> Vec<f32> {
    let mut noise = Noise(seed);
    (0..length).map(|_| (noise.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn expert(
    hidden: usize,
    width: usize,
    format: Format,
    precision: Precision,
    gated: bool,
    bias: bool,
    seed: u64,
) -> Expert {
    let matrix = |n, k, seed| PackedMatrix::random(n, k, format, precision, seed).unwrap();
    Expert {
        gate: gated.then(|| matrix(width, hidden, 3 * seed)),
        up: matrix(width, hidden, 3 * seed + 1),
        down: matrix(hidden, width, 3 * seed + 2),
        biases: bias.then(|| Biases {
            gate: numbers(seed, if gated { width } else { 0 }),
            up: numbers(seed + 1, width),
            down: numbers(seed + 2, hidden),
        }),
    }
}

fn layer(hidden: usize, width: usize, count: usize, format: Format, precision: Precision) -> PackedExperts {
    let mut experts = PackedExperts::new(hidden, SILU);
    for e in 0..count {
        experts.push(expert(hidden, width, format, precision, true, false, e as u64)).unwrap();
    }
    experts
}

fn levels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

#[derive(Clone)]
struct Case {
    x: Vec<f32>,
    ids: Vec<u32>,
    weights: Vec<f32>,
    before: Option<Vec<f32>>,
}

impl Case {
    /// Distinct experts for each token, drawn by `noise`.
    fn uniform(hidden: usize, t: usize, k: usize, count: usize, seed: u64) -> Case {
        let mut noise = Noise(seed);
        let mut ids = Vec::new();
        for _ in 0..t {
            let mut all: Vec<u32> = (0..count as u32).collect();
            for _ in 0..k.min(count) {
                ids.push(all.swap_remove((noise.next() >> 33) as usize % all.len()));
            }
        }
        let weights = numbers(seed + 1, ids.len());
        Case { x: numbers(seed + 2, t * hidden), ids, weights, before: None }
    }

    fn run(&self, experts: &PackedExperts, isa: Isa, threads: usize, scratch: &mut ExpertScratch) -> Vec<f32> {
        let mut out = self.before.clone().unwrap_or_else(|| vec![f32::NAN; self.x.len()]);
        let (pool, add) = (Pool::new(threads), self.before.is_some());
        experts.run_with(isa, &pool, &self.x, &self.ids, &self.weights, scratch, &mut out, add);
        out
    }

    /// Token by token and choice by choice with the scalar products.
    fn expected(&self, experts: &PackedExperts) -> Vec<f32> {
        let (hidden, pool, mut input) = (experts.hidden, Pool::new(1), Input::new());
        let mut product = |matrix: &PackedMatrix, x: &[f32], bias: Option<&[f32]>| {
            let mut y = vec![0.0; matrix.rows()];
            input.prepare_with(Isa::Scalar, &pool, x, 1, matrix.columns(), &[matrix]);
            matmul(&pool, x, 1, &input, &mut [Job { matrix, bias, add: false, out: &mut y }]);
            y
        };
        let mut out = self.before.clone().unwrap_or_else(|| vec![0.0; self.x.len()]);
        let k = self.ids.len() / (self.x.len() / hidden);
        for (token, out) in out.chunks_exact_mut(hidden).enumerate() {
            let x = &self.x[token * hidden..][..hidden];
            let mut choices: Vec<(u32, f32)> =
                (token * k..(token + 1) * k).map(|i| (self.ids[i], self.weights[i])).collect();
            choices.sort_by_key(|choice| choice.0);
            for (id, weight) in choices {
                let Some(expert) = experts.experts.get(id as usize) else { continue };
                let biases = expert.biases.as_ref();
                let gate = expert.gate.as_ref().map(|gate| product(gate, x, biases.map(|biases| &biases.gate[..])));
                let up = product(&expert.up, x, biases.map(|biases| &biases.up[..]));
                let inner = activated(experts.activation, gate, up);
                for (out, y) in out.iter_mut().zip(product(&expert.down, &inner, biases.map(|biases| &biases.down[..])))
                {
                    *out = weight.mul_add(y, *out);
                }
            }
        }
        out
    }
}

/// The formulas of the activations, number by number.
fn activated(activation: ExpertActivation, gate: Option<Vec<f32>>, up: Vec<f32>) -> Vec<f32> {
    let Some(mut gate) = gate else { return up.iter().map(|u| u.max(0.0) * u.max(0.0)).collect() };
    match activation {
        ExpertActivation::Gated(activation) => activate_multiply_with(Isa::Scalar, activation, &mut gate, &up),
        ExpertActivation::ClampedSwiglu { alpha, limit } => {
            for (g, u) in gate.iter_mut().zip(up) {
                let (clamped, u) = (g.min(limit), u.clamp(-limit, limit));
                *g = (u + 1.0) * (clamped / (1.0 + exp(-alpha * clamped)));
            }
        }
        ExpertActivation::ClampedSilu { limit } => {
            for (g, u) in gate.iter_mut().zip(up) {
                let clamped = g.min(limit);
                *g = clamped / (1.0 + exp(-clamped)) * u.clamp(-limit, limit);
            }
        }
        ExpertActivation::ReluSquared => unreachable!("it has no gate"),
    }
    gate
}

#[track_caller]
fn assert_same(got: &[f32], expected: &[f32], what: &dyn std::fmt::Debug) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(got.to_bits() == expected.to_bits(), "{what:?}: output {i}: got {got}, expected {expected}");
    }
}

/// Every level and number of threads.
#[track_caller]
fn check(experts: &PackedExperts, case: &Case, threads: &[usize], what: &dyn std::fmt::Debug) {
    let expected = case.expected(experts);
    assert!(expected.iter().all(|y| y.is_finite()), "{what:?}");
    let mut scratch = ExpertScratch::default();
    for isa in levels() {
        for &threads in threads {
            assert_same(&case.run(experts, isa, threads, &mut scratch), &expected, &(isa, threads, what));
        }
    }
}

#[test]
fn any_number_of_tokens_choices_and_experts() {
    for count in [1, 8, 64] {
        let experts = layer(72, 40, count, int4(32), Precision::A8);
        for t in [1, 2, 3, 8, 33, 257] {
            for k in [1, 2, 4, 8] {
                let case = Case::uniform(72, t, k, count, (t * k) as u64);
                check(&experts, &case, &[1, 2, 3, 4], &(count, t, k));
            }
        }
    }
}

#[test]
fn any_format() {
    let (f16, ternary) = (FloatType::F16, |packing| Format::Ternary { packing, group: None, scale: FloatType::F16 });
    let int8 = Format::Integer { bits: Bits::Eight, group: 32, offset: Offset::ZeroPoint, scale: f16 };
    let minimum = Format::Integer { bits: Bits::Four, group: 32, offset: Offset::Minimum, scale: f16 };
    let formats = [
        (int4(32), Precision::A8),
        (int4(32), Precision::F32),
        (int4(128), Precision::A8),
        (int4(128), Precision::A16),
        (int8, Precision::A8),
        (minimum, Precision::A16),
        (ternary(Packing::TwoBits), Precision::A8),
        (ternary(Packing::BaseThree), Precision::A16),
        (Format::Lookup { table: Table::Mxfp4, group: 32, scale: FloatType::Bf16 }, Precision::A8),
        (Format::Float(FloatType::Bf16), Precision::F32),
    ];
    for (format, precision) in formats {
        let experts = layer(160, 72, 4, format, precision);
        for t in [1, 7, 40] {
            check(&experts, &Case::uniform(160, t, 2, 4, t as u64), &[1, 3], &(format, precision, t));
        }
    }
    let kinds = [crate::format::SuperBlock::Q4K, crate::format::SuperBlock::Q6K];
    for kind in kinds {
        let experts = layer(256, 256, 3, Format::Super(kind), Precision::A16);
        check(&experts, &Case::uniform(256, 9, 2, 3, 1), &[2], &kind);
    }
}

#[test]
fn tails_of_a_real_shape() {
    // Neither number of panels, tiles nor groups is whole.
    let experts = layer(2880, 104, 3, int4(128), Precision::A8);
    check(&experts, &Case::uniform(2880, 5, 2, 3, 1), &[2], &"2880");
    let experts = layer(60, 2880, 3, int4(128), Precision::A8);
    check(&experts, &Case::uniform(60, 5, 2, 3, 1), &[2], &"2880 wide");
}

#[test]
fn one_hot_expert_and_empty_ones() {
    let experts = layer(64, 72, 8, int4(32), Precision::A8);
    let mut case = Case::uniform(64, 600, 2, 8, 3);
    for (i, id) in case.ids.iter_mut().enumerate() {
        *id = if i % 2 == 0 { 5 } else { [1, 5, 6][i % 3] };
    }
    check(&experts, &case, &[1, 2, 4], &"hot");
    let mut scratch = ExpertScratch::default();
    case.run(&experts, Isa::Scalar, 1, &mut scratch);
    let statistics = scratch.statistics();
    assert_eq!(statistics.tokens.iter().sum::<u32>(), 1200);
    assert!(statistics.tokens[5] >= 600 && statistics.tokens[0] == 0);
    // Each of two parts of the step reads each of three experts.
    assert_eq!((statistics.distinct, statistics.weight_bytes), (3, 6 * experts.experts[0].nbytes()));
}

#[test]
fn sentinels_are_skipped_and_duplicates_count_twice() {
    let experts = layer(64, 32, 4, int4(32), Precision::A8);
    let mut case = Case::uniform(64, 11, 4, 4, 5);
    case.ids[..4].fill(u32::MAX);
    (case.ids[5], case.ids[6], case.ids[40]) = (4, case.ids[7], 17);
    for before in [None, Some(numbers(1, 11 * 64))] {
        case.before = before;
        check(&experts, &case, &[1, 2], &"sentinels");
    }
    case.ids.fill(4);
    check(&experts, &case, &[1, 2], &"nothing but sentinels");
    let nothing = Case { x: Vec::new(), ids: Vec::new(), weights: Vec::new(), before: None };
    assert!(nothing.run(&experts, Isa::Scalar, 1, &mut ExpertScratch::default()).is_empty());
    let no_choices = Case { ids: Vec::new(), weights: Vec::new(), ..case };
    assert_eq!(no_choices.before, Some(no_choices.run(&experts, Isa::Scalar, 1, &mut ExpertScratch::default())));
}

#[test]
fn activations_and_biases() {
    let gelu = ExpertActivation::Gated(Activation::GeluTanh);
    let relu = ExpertActivation::ReluSquared;
    for activation in [SILU, gelu, SWIGLU, ExpertActivation::ClampedSilu { limit: 0.5 }, relu] {
        for bias in [false, true] {
            let mut experts = PackedExperts::new(72, activation);
            for seed in 0..3 {
                let gated = activation.gated();
                experts.push(expert(72, 40, int4(32), Precision::A16, gated, bias, seed)).unwrap();
            }
            for t in [1, 20] {
                check(&experts, &Case::uniform(72, t, 2, 3, 7), &[1, 2], &(activation, bias, t));
            }
        }
    }
}

/// A wide shared expert of another format beside narrow routed ones.
#[test]
fn a_shared_expert_is_one_more() {
    let mut experts = layer(96, 40, 5, int4(32), Precision::A8);
    experts.push(expert(96, 168, Format::Float(FloatType::Bf16), Precision::F32, true, false, 9)).unwrap();
    experts.push(expert(96, 104, int4(32), Precision::A16, true, true, 10)).unwrap();
    for t in [1, 4, 30] {
        let mut case = Case::uniform(96, t, 2, 5, t as u64);
        case.ids = case.ids.chunks(2).flat_map(|ids| [ids[0], ids[1], 5, 6]).collect();
        case.weights = case.weights.chunks(2).flat_map(|weights| [weights[0], weights[1], 1.0, 0.25]).collect();
        check(&experts, &case, &[1, 2, 3], &t);
    }
}

#[test]
fn a_bad_token_spoils_itself_only() {
    for (format, precision) in [(int4(32), Precision::A8), (Format::Float(FloatType::Bf16), Precision::F32)] {
        let experts = layer(64, 40, 4, format, precision);
        let good = Case::uniform(64, 9, 2, 4, 2);
        let expected = good.expected(&experts);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut case = good.clone();
            case.x[3 * 64 + 5] = bad;
            for isa in levels() {
                let got = case.run(&experts, isa, 2, &mut ExpertScratch::default());
                for token in (0..9).filter(|&token| token != 3) {
                    let range = token * 64..(token + 1) * 64;
                    assert_same(&got[range.clone()], &expected[range], &(isa, token, bad));
                }
                assert!(got[3 * 64..4 * 64].iter().all(|y| !y.is_finite()), "{isa:?} {bad}");
            }
        }
    }
}

#[test]
fn wrong_experts_are_errors() {
    let make = |hidden, width, gated, bias| expert(hidden, width, int4(32), Precision::A8, gated, bias, 1);
    let mut experts = PackedExperts::new(64, SILU);
    let message = |error: Result<(), ExpertError>| error.unwrap_err().to_string();
    assert_eq!(
        message(experts.push(make(32, 40, true, false))),
        "gate of expert 0: got shape (40, 32), expected (40, 64)"
    );
    let mut wrong = make(64, 40, true, false);
    wrong.down = make(64, 48, true, false).down;
    assert_eq!(message(experts.push(wrong)), "down of expert 0: got shape (64, 48), expected (64, 40)");
    let mut wrong = make(64, 40, true, true);
    wrong.biases.as_mut().unwrap().up.pop();
    assert_eq!(message(experts.push(wrong)), "bias of up of expert 0: got 39 numbers, expected 40");
    let missing = message(experts.push(make(64, 40, false, false)));
    assert_eq!(missing, "gate of expert 0: got none, expected one for Gated(Silu)");
    let mut ungated = PackedExperts::new(64, ExpertActivation::ReluSquared);
    assert!(matches!(ungated.push(make(64, 40, true, false)), Err(ExpertError::Gate { got: true, .. })));
    experts.push(make(64, 40, true, true)).unwrap();
    assert_eq!(experts.nbytes(), experts.experts()[0].nbytes());
}
