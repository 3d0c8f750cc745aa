//! Known-answer tests at run time: each level against the scalar one, on this very CPU.

use std::sync::OnceLock;

use crate::activation::{Activation, activate_multiply_with};
use crate::attention::{AttentionShape, KvPages, KvType, PAGE, Span, attention_with};
use crate::divergence::{Divergence, Gradient, Products, ProductsMut, Target, Transform, divergences_with};
use crate::isa::Isa;
use crate::norm::{add_with, rms_norm_with};
use crate::philox::philox4x32;
use crate::pool::Pool;
use crate::recurrent::{
    Columns, Convolution, DeltaInput, GatedDelta, Segment, States, delta_gates_with, l2_norm_with, multiply_with,
    sigmoid_multiply_with,
};
use crate::rope::{RopeTable, rotate_with};
use crate::sample::{Sampling, TokenCounts, sample_with};
use crate::score::{Score, renormalize_with, score_with};
use crate::topk::top_k_with;

pub use crate::matmul::SelfTest;

/// The level in force, or the best below it all of whose float kernels pass; tested once, at first use.
pub(crate) fn float_level() -> Isa {
    static LEVEL: OnceLock<Isa> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let passes = |isa: &Isa| float_self_tests(*isa).iter().all(|test| test.passed);
        let mut levels = Isa::ALL.into_iter().rev().filter(|isa| *isa <= Isa::active() && isa.available());
        levels.find(passes).unwrap_or(Isa::Scalar)
    })
}

/// Everything that a kernel computes from fixed inputs.
type Outputs = fn(Isa) -> Vec<f32>;

/// Tests every float kernel on `isa`, in about a millisecond.
///
/// ```
/// use farthing_kernels::{isa::Isa, selftest::float_self_tests};
/// assert!(float_self_tests(Isa::active()).iter().all(|test| test.passed));
/// ```
///
/// # Panics
/// When this CPU lacks `isa`.
pub fn float_self_tests(isa: Isa) -> Vec<SelfTest> {
    let kernels: [(&'static str, Outputs); 15] = [
        ("rms_norm", rms_norm),
        ("add", add),
        ("rotate", rotate),
        ("activate_multiply", activate_multiply),
        ("attention", attention),
        ("sample", sample),
        ("score", score),
        ("top_k", top_k),
        ("multiply", multiply),
        ("convolution", convolution),
        ("l2_norm", l2_norm),
        ("delta_gates", delta_gates),
        ("sigmoid_multiply", sigmoid_multiply),
        ("gated_delta", gated_delta),
        ("divergence", divergence),
    ];
    let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let test = |(name, kernel): (&str, Outputs)| SelfTest {
        name: name.to_owned(),
        isa,
        passed: bits(kernel(isa)) == bits(kernel(Isa::Scalar)),
    };
    kernels.into_iter().map(test).collect()
}

/// Reproducible numbers in [-4, 4).
fn numbers(seed: u32, count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| (philox4x32([i, 0, 0, 2], [seed, 0])[0] >> 8) as f32 / 2_097_152.0 - 4.0).collect()
}

fn rms_norm(isa: Isa) -> Vec<f32> {
    let mut out = vec![0.0; 3 * 77];
    rms_norm_with(isa, &numbers(1, out.len()), &numbers(2, 77), 1e-5, &mut out);
    out
}

fn add(isa: Isa) -> Vec<f32> {
    let mut out = numbers(3, 77);
    add_with(isa, &mut out, &numbers(4, 77));
    out
}

fn rotate(isa: Isa) -> Vec<f32> {
    let mut table = RopeTable::new(numbers(5, 20), 1.0);
    table.ensure(100);
    let mut out = numbers(6, 2 * 3 * 48);
    rotate_with(isa, &table, &mut out, 3 * 48, 3, 48, &[1, 99]);
    out
}

fn activate_multiply(isa: Isa) -> Vec<f32> {
    let mut out = numbers(7, 77);
    for activation in [Activation::Silu, Activation::GeluTanh] {
        activate_multiply_with(isa, activation, &mut out, &numbers(8, 77));
    }
    out
}

fn attention(isa: Isa) -> Vec<f32> {
    let pool = Pool::new(1);
    let mut all = Vec::new();
    for kind in [KvType::F32, KvType::F16, KvType::Bf16] {
        let (heads, kv_heads, head_dim, tokens) = (6, 2, 36, 40);
        let Ok(mut cache) = KvPages::new(2, kv_heads, head_dim, kind) else { continue };
        for t in 0..tokens {
            let row = |seed| numbers(seed + t as u32, kv_heads * head_dim);
            cache.write_with(isa, (t / PAGE) as u32, t % PAGE, &row(100), &row(200));
        }
        for (window, softcap) in [(None, None), (Some(9), Some(3.0))] {
            let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.2, window, softcap, sinks: None };
            let mut out = vec![0.0; 5 * heads * head_dim];
            let span = Span { first_row: 0, rows: 5, start: tokens - 5, pages: &[0, 1], ancestors: &[] };
            attention_with(isa, &pool, &numbers(9, out.len()), &[span], &cache, &shape, &mut out);
            all.extend(out);
        }
    }
    all
}

fn sample(isa: Isa) -> Vec<f32> {
    let mut all = Vec::new();
    for position in 0..8 {
        let sampling = Sampling { top_p: 0.9, top_k: Some(50), min_p: 0.01, position, ..Sampling::default() };
        match sample_with(isa, &mut numbers(10, 300), &sampling, &TokenCounts::default()) {
            Ok(draw) => all.extend([draw.token as f32, draw.logprob]),
            Err(_) => all.push(f32::NAN),
        }
    }
    all
}

fn divergence(isa: Isa) -> Vec<f32> {
    let (teacher, capped) = (numbers(21, 2 * 77), Transform { cap: Some(3.0), ..Transform::NONE });
    let mut all = Vec::new();
    let kinds =
        [Divergence::ReverseKl, Divergence::ForwardKl, Divergence::JensenShannon(0.3), Divergence::CrossEntropy];
    for kind in kinds {
        let mut student = numbers(22, 2 * 77);
        let target = Target::Teacher(Products::F32(&teacher), Transform::NONE);
        let (rows, weights, gradient) = (ProductsMut::F32(&mut student), [0.5, 1.0], Gradient::Filtered(1e-3));
        let found = divergences_with(isa, &Pool::new(1), kind, rows, capped, target, &weights, gradient);
        all.extend(student);
        all.extend(found.rows.iter().flat_map(|row| [row.divergence as f32, row.entropy as f32, row.dropped as f32]));
    }
    all
}

fn score(isa: Isa) -> Vec<f32> {
    let mut all = Vec::new();
    for kind in Score::ALL {
        let mut scores = numbers(11, 2 * 77);
        score_with(isa, kind, &mut scores, 77);
        all.extend_from_slice(&scores);
        renormalize_with(isa, &mut scores, 77, 1e-6);
        all.extend(scores);
    }
    all
}

fn multiply(isa: Isa) -> Vec<f32> {
    let (x, mut out) = (numbers(11, 3 * 100), vec![0.0; 3 * 37]);
    let columns = |offset| Columns { x: &x, stride: 100, offset };
    multiply_with(isa, &Pool::new(1), columns(3), columns(60), &mut out, 37);
    out
}

fn convolution(isa: Isa) -> Vec<f32> {
    let mut all = Vec::new();
    for silu in [false, true] {
        let convolution = Convolution::new(&numbers(12, 37 * 4), Some(&numbers(13, 37)), 37, silu);
        let Ok(mut states) = States::new(1, convolution.state_floats()) else { continue };
        for rows in [5, 1] {
            let mut out = vec![0.0; rows * 37];
            let segment = Segment { first_row: 0, rows, slot: 0 };
            convolution.run_with(isa, &Pool::new(1), &numbers(14, rows * 37), &[segment], &mut states, &mut out);
            all.extend(out);
        }
        all.extend_from_slice(states.slot(0));
    }
    all
}

fn l2_norm(isa: Isa) -> Vec<f32> {
    let mut out = numbers(15, 2 * 100);
    l2_norm_with(isa, &Pool::new(1), &mut out, 100, 10..84, 37, 1e-6, 0.5);
    out
}

fn delta_gates(isa: Isa) -> Vec<f32> {
    let (mut decay, mut rate) = (numbers(16, 3 * 21), numbers(17, 3 * 21));
    delta_gates_with(isa, &mut decay, &mut rate, &numbers(18, 21), &numbers(19, 21));
    decay.extend(rate);
    decay
}

fn sigmoid_multiply(isa: Isa) -> Vec<f32> {
    let mut out = numbers(20, 77);
    sigmoid_multiply_with(isa, &mut out, &numbers(21, 77));
    out
}

fn gated_delta(isa: Isa) -> Vec<f32> {
    let mut all = Vec::new();
    for value_dim in [3, 24, 40, 70] {
        let heads = GatedDelta { key_heads: 1, value_heads: 2, key_dim: 5, value_dim, tiled: false };
        let Ok(mut states) = States::new(1, heads.state_floats()) else { continue };
        let small = |seed, count: usize| numbers(seed, count).iter().map(|x| x / 8.0).collect::<Vec<_>>();
        let (qkv, decay, rate) = (small(22, 4 * heads.width()), small(23, 4 * 2), small(24, 4 * 2));
        let input = DeltaInput { qkv: &qkv, decay: &decay, rate: &rate };
        let mut out = vec![0.0; 4 * 2 * value_dim];
        let segment = Segment { first_row: 0, rows: 4, slot: 0 };
        heads.run_with(isa, &Pool::new(1), &input, &[segment], &mut states, 0, &mut out);
        all.extend(out);
        all.extend_from_slice(states.slot(0));
    }
    all
}

fn top_k(isa: Isa) -> Vec<f32> {
    let mut ids = [0; 2 * 8];
    top_k_with(isa, &numbers(12, 2 * 77), 77, 8, &mut ids);
    ids.map(|id| id as f32).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_passes() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            let tests = float_self_tests(isa);
            assert_eq!(tests.len(), 15);
            assert!(tests.iter().all(|test| test.passed && test.isa == isa), "{tests:?}");
        }
    }
}
