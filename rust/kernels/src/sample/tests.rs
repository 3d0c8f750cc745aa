//! Every processor against a plain f64 reference, the law of the draws, and the same bits on every level.

use super::*;
use crate::philox::{philox4x32, uniforms};

/// The distribution a row defines, by sorting in f64.
fn reference(logits: &[f32], sampling: &Sampling<'_>, prompt: &[u32], output: &[u32]) -> Vec<f64> {
    let mut x: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    for (token, x) in x.iter_mut().enumerate() {
        let count = output.iter().filter(|&&other| other as usize == token).count();
        if count > 0 || prompt.contains(&(token as u32)) {
            let penalty = f64::from(sampling.repetition_penalty);
            *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
        }
        *x -= f64::from(sampling.frequency_penalty) * count as f64;
        *x -= if count > 0 { f64::from(sampling.presence_penalty) } else { 0.0 };
        if sampling.allowed.is_some_and(|allowed| allowed[token / 64] >> (token % 64) & 1 == 0) {
            *x = f64::NEG_INFINITY;
        }
    }
    let greatest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut p: Vec<f64> = x.iter().map(|x| ((x - greatest) / f64::from(sampling.temperature)).exp()).collect();
    p.iter_mut().filter(|p| **p < f64::from(sampling.min_p)).for_each(|p| *p = 0.0);
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
    order[sampling.top_k.unwrap_or(p.len()).min(p.len())..].iter().for_each(|&i| p[i] = 0.0);
    let total: f64 = p.iter().sum();
    let mut reached = 0.0;
    for i in order {
        // The most likely token stays whatever top_p.
        if sampling.top_p < 1.0 && reached > 0.0 && reached >= f64::from(sampling.top_p) * total {
            p[i] = 0.0;
        }
        reached += p[i];
    }
    let total: f64 = p.iter().sum();
    p.iter().map(|p| p / total).collect()
}

/// What `cut` keeps of processed logits.
struct Kept<'a>(&'a mut [f32], &'a Sampling<'a>, &'a TokenCounts);
impl Kernel for Kept<'_> {
    type Output = Vec<bool>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<bool> {
        self.2.penalise(self.0, self.1);
        forbid(simd, self.0, self.1.allowed);
        let greatest = greatest(simd, self.0).unwrap();
        let row = Row { logits: self.0, greatest, inverse: 1.0 / self.1.temperature };
        let cut = truncate::cut(simd, row, self.1);
        let keep = |at| lanes(cut.kept(simd, row.block(simd, at), at)).map(move |lane| at + lane);
        let mut kept = vec![false; row.logits.len()];
        row.blocks().flat_map(keep).for_each(|token| kept[token] = true);
        kept
    }
}

fn kept(isa: Isa, logits: &[f32], sampling: &Sampling<'_>, counts: &TokenCounts) -> Vec<bool> {
    dispatch(isa, Kept(&mut logits.to_vec(), sampling, counts))
}

fn levels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

#[test]
fn truncation_is_what_sorting_gives() {
    let plain = Sampling::default();
    let settings = [
        plain.clone(),
        Sampling { top_k: Some(1), ..plain.clone() },
        Sampling { top_k: Some(7), ..plain.clone() },
        Sampling { top_k: Some(1000), ..plain.clone() },
        Sampling { top_p: 0.0, ..plain.clone() },
        Sampling { top_p: 0.5, ..plain.clone() },
        Sampling { top_p: 0.93, temperature: 1.7, ..plain.clone() },
        Sampling { min_p: 0.05, ..plain.clone() },
        Sampling { min_p: 1.0, ..plain.clone() },
        Sampling { min_p: 0.01, top_k: Some(20), top_p: 0.8, temperature: 0.6, ..plain.clone() },
        Sampling { repetition_penalty: 1.3, top_p: 0.7, ..plain.clone() },
        Sampling { frequency_penalty: 0.4, presence_penalty: -0.3, top_k: Some(9), ..plain.clone() },
    ];
    let (prompt, output) = ([0, 3, 5, 5, 400_000], [1, 3, 3, 3, 8]);
    let counts = TokenCounts::of(&prompt, &output);
    let allowed: Vec<u64> = (0..400).map(|i| !(0x0101_0101_0101_0100 << (i % 7))).collect();
    for vocabulary in [1, 5, 16, 31, 257, 3000, 20_011] {
        for spread in [0.3, 4.0, 30.0] {
            let logits: Vec<f32> = uniforms(vocabulary as u64, vocabulary).iter().map(|x| x * spread).collect();
            for setting in &settings {
                for allowed in [None, Some(&allowed[..])] {
                    let setting = Sampling { allowed, ..setting.clone() };
                    let expected = reference(&logits, &setting, &prompt, &output);
                    for isa in levels() {
                        let kept = kept(isa, &logits, &setting, &counts);
                        let differ = kept.iter().zip(&expected).filter(|(kept, p)| **kept != (**p > 1e-30)).count();
                        assert_eq!(differ, 0, "{} {vocabulary} {spread} {setting:?}", isa.name());
                    }
                }
            }
        }
    }
}

#[test]
fn probabilities_are_the_law_of_the_draws() {
    let plain = Sampling::default();
    let settings = [
        plain.clone(),
        Sampling { temperature: 0.6, top_k: Some(20), top_p: 0.8, min_p: 0.01, ..plain.clone() },
        Sampling {
            frequency_penalty: 0.4,
            presence_penalty: -0.3,
            repetition_penalty: 1.3,
            top_p: 0.9,
            ..plain.clone()
        },
    ];
    let (prompt, output) = ([0, 3, 5, 5, 400_000], [1, 3, 3, 3, 8]);
    let counts = TokenCounts::of(&prompt, &output);
    let allowed: Vec<u64> = (0..50).map(|i| !(0x0101_0101_0101_0100 << (i % 7))).collect();
    for vocabulary in [1, 5, 16, 31, 257, 3000] {
        let logits: Vec<f32> = uniforms(vocabulary as u64, vocabulary).iter().map(|x| x * 4.0).collect();
        for setting in &settings {
            let setting = Sampling { allowed: Some(&allowed), ..setting.clone() };
            let expected = reference(&logits, &setting, &prompt, &output);
            let laws: Vec<Vec<f32>> = levels()
                .map(|isa| {
                    let mut row = logits.clone();
                    probabilities_with(isa, &mut row, &setting, &counts).unwrap();
                    row
                })
                .collect();
            assert!(laws.iter().all(|law| *law == laws[0]));
            for (&p, &exact) in laws[0].iter().zip(&expected) {
                assert_eq!(p > 0.0, exact > 1e-30);
                assert!((f64::from(p) - exact).abs() <= 2e-6 * exact, "{p} {exact}");
            }
        }
        let mut row = logits.clone();
        let greedy = Sampling { temperature: 0.0, ..plain.clone() };
        probabilities(&mut row, &greedy, &counts).unwrap();
        let draw = sample(&mut logits.clone(), &greedy, &counts).unwrap();
        assert!(row.iter().enumerate().all(|(token, &p)| p == f32::from(u8::from(token == draw.token as usize))));
    }
}

#[test]
fn ties_go_to_the_lower_id() {
    // Four tokens of equal mass: half of it is the first two.
    let logits = [1.0, -50.0, 1.0, 1.0, f32::NEG_INFINITY, 1.0];
    for isa in levels() {
        let check = |setting: Sampling<'_>, expected: [u8; 6]| {
            let kept = kept(isa, &logits, &setting, &TokenCounts::default());
            assert_eq!(kept, expected.map(|kept| kept == 1), "{setting:?}");
        };
        let plain = Sampling::default();
        check(plain.clone(), [1, 1, 1, 1, 0, 1]);
        check(Sampling { top_k: Some(3), ..plain.clone() }, [1, 0, 1, 1, 0, 0]);
        check(Sampling { top_p: 0.5, ..plain.clone() }, [1, 0, 1, 0, 0, 0]);
        check(Sampling { top_p: 0.501, ..plain.clone() }, [1, 0, 1, 1, 0, 0]);
        check(Sampling { top_k: Some(2), top_p: 0.5, ..plain.clone() }, [1, 0, 0, 0, 0, 0]);
        check(Sampling { min_p: 1.0, ..plain.clone() }, [1, 0, 1, 1, 0, 1]);
        let greedy = Sampling { temperature: 0.0, ..plain };
        let draw = sample_with(isa, &mut [0.0, 1.0, 1.0, 0.5], &greedy, &TokenCounts::default());
        assert_eq!(draw.unwrap().token, 1);
    }
}

#[test]
fn draws_follow_the_law() {
    let logits: Vec<f32> = uniforms(4, 40).iter().map(|x| x * 3.0).collect();
    let (prompt, output) = ([2, 3], [7, 7]);
    let counts = TokenCounts::of(&prompt, &output);
    let allowed = [!0b1_0010_0000u64];
    let plain = Sampling::default();
    let settings = [
        plain.clone(),
        Sampling { temperature: 0.5, top_k: Some(12), ..plain.clone() },
        Sampling { temperature: 1.5, top_p: 0.9, allowed: Some(&allowed), ..plain.clone() },
        Sampling { min_p: 0.1, repetition_penalty: 1.5, frequency_penalty: 0.5, presence_penalty: 0.5, ..plain },
    ];
    for setting in settings {
        let law = reference(&logits, &setting, &prompt, &output);
        let (mut observed, draws) = (vec![0.0; law.len()], 40_000);
        for i in 0..draws {
            // Positions of a few seeds: a walk that generation takes.
            let setting = Sampling { seed: i / 5000, position: i % 5000, ..setting.clone() };
            observed[sample(&mut logits.clone(), &setting, &counts).unwrap().token as usize] += 1.0;
        }
        let (mut statistic, mut cells) = (0.0, 0.0);
        for (&p, &observed) in law.iter().zip(&observed) {
            let expected = p * draws as f64;
            if expected == 0.0 {
                assert_eq!(observed, 0.0);
            } else {
                statistic += (observed - expected) * (observed - expected) / expected;
                cells += 1.0;
            }
        }
        // Mean cells - 1, standard deviation √(2(cells - 1)); the seeds are fixed, so this never flickers.
        let freedom: f64 = cells - 1.0;
        assert!((statistic - freedom).abs() < 4.0 * (2.0 * freedom).sqrt(), "{statistic} of {freedom}: {setting:?}");
    }
}

#[test]
fn a_draw_is_the_greatest_sum_of_logit_and_noise() {
    for round in 0..60 {
        let vocabulary = 1 + philox4x32([round, 0, 0, 0], [0; 2])[0] as usize % 3000;
        let logits: Vec<f32> = uniforms(u64::from(round), vocabulary).iter().map(|x| x * 12.0).collect();
        let sampling = Sampling { seed: u64::from(round) << 31, position: 1 << round, ..Sampling::default() };
        let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let score = |token: usize| {
            logits[token] - greatest + crate::philox::gumbel(sampling.seed, sampling.position, token as u32)
        };
        let best = (0..vocabulary).rev().max_by(|&a, &b| score(a).total_cmp(&score(b))).unwrap();
        for isa in levels() {
            let draw = sample_with(isa, &mut logits.clone(), &sampling, &TokenCounts::default()).unwrap();
            assert_eq!(draw.token as usize, best);
        }
    }
}

#[test]
fn logprobs_are_those_of_the_raw_logits() {
    let (prompt, output) = ([0, 1, 2, 3], [4, 5]);
    let counts = TokenCounts::of(&prompt, &output);
    for vocabulary in [6, 100, 49_152] {
        let mut logits: Vec<f32> = uniforms(1, vocabulary).iter().map(|x| x * 9.0).collect();
        logits[1] = logits[3];
        let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let mut ranked: Vec<usize> = (0..vocabulary).collect();
        ranked.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        for temperature in [0.0, 0.7] {
            let sampling = Sampling {
                temperature,
                repetition_penalty: 3.0,
                frequency_penalty: 1.0,
                top_logprobs: 20,
                ..Sampling::default()
            };
            let draws: Vec<Draw> =
                levels().map(|isa| sample_with(isa, &mut logits.clone(), &sampling, &counts).unwrap()).collect();
            assert!(draws.iter().all(|draw| *draw == draws[0]));
            let exact = |token: u32| f64::from(logits[token as usize]) - total.ln();
            assert!((f64::from(draws[0].logprob) - exact(draws[0].token)).abs() < 3e-6);
            assert_eq!(draws[0].top.len(), 20.min(vocabulary));
            for (&(token, logprob), &expected) in draws[0].top.iter().zip(&ranked) {
                assert_eq!(token as usize, expected);
                assert!((f64::from(logprob) - exact(token)).abs() < 3e-6);
            }
        }
    }
}

#[test]
fn tokens_pushed_and_removed_leave_no_trace() {
    let mut counts = TokenCounts::of(&[1, 2], &[2]);
    for token in [3, 3, 2] {
        counts.push(token);
    }
    for token in [3, 2, 3, 9] {
        counts.remove(token);
    }
    let sampling = Sampling { repetition_penalty: 2.0, frequency_penalty: 1.0, ..Sampling::default() };
    let mut logits = vec![4.0; 12];
    counts.penalise(&mut logits, &sampling);
    let mut expected = vec![4.0; 12];
    TokenCounts::of(&[1, 2], &[2]).penalise(&mut expected, &sampling);
    assert_eq!(logits, expected);
    assert_eq!(expected[..4], [4.0, 2.0, 1.0, 4.0]);
}

#[test]
fn rows_without_a_distribution_are_errors() {
    let none = TokenCounts::default();
    for isa in levels() {
        for temperature in [0.0, 1.0] {
            let sampling = Sampling { temperature, ..Sampling::default() };
            for bad in [f32::NAN, f32::INFINITY] {
                for at in [0, 17, 36] {
                    let mut logits = vec![0.0; 37];
                    logits[at] = bad;
                    let error = sample_with(isa, &mut logits, &sampling, &none).unwrap_err();
                    assert!(matches!(error, SampleError::NotFinite { token, .. } if token as usize == at), "{error}");
                }
            }
            let empty = sample_with(isa, &mut [f32::NEG_INFINITY; 20], &sampling, &none);
            assert_eq!(empty.unwrap_err(), SampleError::NothingAllowed { tokens: 20 });
            let nothing = Sampling { allowed: Some(&[0]), ..sampling.clone() };
            let forbidden = sample_with(isa, &mut [1.0; 20], &nothing, &none);
            assert_eq!(forbidden.unwrap_err(), SampleError::NothingAllowed { tokens: 20 });
            let one = Sampling { allowed: Some(&[1 << 19]), ..sampling };
            assert_eq!(sample_with(isa, &mut [1.0; 20], &one, &none).unwrap().token, 19);
        }
    }
}

#[test]
fn a_vanishing_temperature_is_greedy() {
    let sampling = Sampling { temperature: 1e-42, top_p: 0.9, ..Sampling::default() };
    let draw = sample(&mut [0.0, 1.0, 0.999, -3.0], &sampling, &TokenCounts::default());
    assert_eq!(draw.unwrap().token, 1);
}

#[test]
fn a_lift_ends_below_the_greatest_and_reports_the_raw_probability() {
    let lift = |strength, margin| Some(Lift { token: 2, strength, margin });
    let greedy = Sampling { temperature: 0.0, top_logprobs: 0, ..Sampling::default() };
    let mut row = [1.0, 4.0, -2.0];
    let draw = sample(&mut row, &Sampling { lift: lift(0.5, 1.0), ..greedy.clone() }, &TokenCounts::default()).unwrap();
    assert_eq!((draw.token, row), (1, [1.0, 4.0, 0.5]));
    // Beside a ban of the greatest, the whole way makes it win.
    let allowed = [0b101u64];
    let all = Sampling { allowed: Some(&allowed), lift: lift(1.0, 0.0), ..greedy.clone() };
    let mut row = [1.0, 4.0, 2.0];
    let draw = sample(&mut row, &all, &TokenCounts::default()).unwrap();
    let expected = 2.0 - (1.0f32.exp() + 4.0f32.exp() + 2.0f32.exp()).ln();
    assert!(draw.token == 2 && (draw.logprob - expected).abs() < 1e-5, "{draw:?}");
    // A forbidden token stays so.
    let allowed = [0b011u64];
    let mut row = [1.0, 4.0, 2.0];
    sample(&mut row, &Sampling { allowed: Some(&allowed), lift: lift(1.0, 0.0), ..greedy }, &TokenCounts::default())
        .unwrap();
    assert_eq!(row[2], f32::NEG_INFINITY);
}
