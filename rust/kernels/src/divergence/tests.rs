use super::*;

/// Reproducible logits: (r, v), a few of them far above the rest.
fn logits(seed: u64, r: usize, v: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..r * v).map(|_| f64::from((next() * 8.0 - 4.0 + if next() < 0.02 { 9.0 } else { 0.0 }) as f32)).collect()
}

fn log_softmax(x: &[f64]) -> Vec<f64> {
    let greatest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log = greatest + x.iter().map(|x| (x - greatest).exp()).sum::<f64>().ln();
    x.iter().map(|x| x - log).collect()
}

/// The definition, on logits.
fn definition(kind: Divergence, x: &[f64], y: &[f64]) -> f64 {
    let (p, q) = (log_softmax(x), log_softmax(y));
    let kl = |p: &[f64], q: &[f64]| -> f64 {
        p.iter().zip(q).filter(|(p, _)| p.exp() > 0.0).map(|(p, q)| p.exp() * (p - q)).sum()
    };
    match kind {
        Divergence::ReverseKl => kl(&p, &q),
        Divergence::ForwardKl => kl(&q, &p),
        Divergence::CrossEntropy => {
            -p.iter().zip(&q).filter(|(_, q)| q.exp() > 0.0).map(|(p, q)| q.exp() * p).sum::<f64>()
        }
        Divergence::JensenShannon(beta) => {
            let m: Vec<f64> = p.iter().zip(&q).map(|(p, q)| (beta * q.exp() + (1.0 - beta) * p.exp()).ln()).collect();
            beta * kl(&q, &m) + (1.0 - beta) * kl(&p, &m)
        }
    }
}

fn transformed(z: &[f64], by: &Transform<'_>) -> Vec<f64> {
    let v = by.bias.map_or(z.len(), <[f64]>::len);
    let bias = |i: usize| by.bias.map_or(0.0, |bias| bias[i % v]);
    let scaled = z.iter().enumerate().map(|(i, z)| by.scale * (z + bias(i)));
    scaled.map(|x| by.cap.map_or(x, |cap| cap * (x / cap).tanh()) / by.temperature).collect()
}

const KINDS: [Divergence; 5] = [
    Divergence::ReverseKl,
    Divergence::ForwardKl,
    Divergence::CrossEntropy,
    Divergence::JensenShannon(0.5),
    Divergence::JensenShannon(0.1),
];

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

#[test]
fn double_precision_is_the_definition_and_its_slope() {
    let (r, v) = (3, 37);
    let bias: Vec<f64> = (0..v).map(|i| (i % 5) as f64 * 0.1).collect();
    let capped = Transform { bias: Some(&bias), scale: 0.7, cap: Some(6.0), temperature: 1.3 };
    let pool = Pool::new(2);
    for kind in KINDS {
        for by in [Transform::NONE, Transform { temperature: 2.0, ..Transform::NONE }, capped] {
            let (z, y) = (logits(1, r, v), logits(2, r, v));
            let weights = [0.5, 1.0, -2.0];
            let mut slopes = z.clone();
            let target = Target::Teacher(Products::F64(&y), by);
            let student = ProductsMut::F64(&mut slopes);
            let found = divergences(&pool, kind, student, by, target, &weights, Gradient::Filtered(0.0));
            let of_row = |z: &[f64], i: usize| {
                let width = i * v..(i + 1) * v;
                definition(kind, &transformed(z, &by), &transformed(&y[width], &by))
            };
            for (i, (row, weight)) in z.chunks(v).zip(weights).enumerate() {
                assert!((found.rows[i].divergence - of_row(row, i)).abs() < 1e-12, "{kind:?}");
                for (j, x) in row.iter().enumerate() {
                    let (mut up, mut down) = (row.to_vec(), row.to_vec());
                    (up[j], down[j]) = (x + 1e-5, x - 1e-5);
                    let slope = weight * (of_row(&up, i) - of_row(&down, i)) / 2e-5;
                    let got = slopes[i * v + j];
                    assert!((got - slope).abs() < 1e-8, "{kind:?} {by:?}: {got} {slope}");
                }
            }
            assert_eq!(found.columns, (0..v).collect::<Vec<_>>());
        }
    }
}

#[test]
fn single_precision_is_near_double_and_the_same_on_every_level_thread_and_row() {
    let (r, v) = (5, 2 * CHUNK + 77);
    let (x, y, weights) = (logits(3, r, v), logits(4, r, v), [0.2, 0.3, 0.1, 0.0, 0.4]);
    let filter = Gradient::Filtered(1e-3);
    for kind in KINDS {
        let run = |isa, threads: usize| {
            let (mut x, y) = (narrow(&x), narrow(&y));
            let target = Target::Teacher(Products::F32(&y), Transform::NONE);
            let student = ProductsMut::F32(&mut x);
            let pool = Pool::new(threads);
            let found = divergences_with(isa, &pool, kind, student, Transform::NONE, target, &weights, filter);
            (found, x.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        };
        let expected = run(Isa::Scalar, 1);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            assert!([1, 2, 3].map(|threads| run(isa, threads) == expected).iter().all(|&same| same), "{}", isa.name());
        }
        let mut exact = x.clone();
        let target = Target::Teacher(Products::F64(&y), Transform::NONE);
        let student = ProductsMut::F64(&mut exact);
        let wanted = divergences(&Pool::new(1), kind, student, Transform::NONE, target, &weights, filter);
        for (i, (got, wanted)) in expected.0.rows.iter().zip(&wanted.rows).enumerate() {
            assert!((got.divergence - wanted.divergence).abs() < 1e-5, "{kind:?} row {i}");
            assert!((got.entropy - wanted.entropy).abs() < 1e-5, "{kind:?} row {i}");
            assert!((got.dropped - wanted.dropped).abs() < 1e-5, "{kind:?} row {i}");
            let slopes = &expected.1[i * v..(i + 1) * v];
            let sum: f64 = slopes.iter().map(|&slope| f64::from(f32::from_bits(slope))).sum();
            assert!(sum.abs() < 1e-6, "{kind:?} row {i} sums to {sum}");
            for (slope, exact) in slopes.iter().zip(&exact[i * v..]) {
                assert!((f64::from(f32::from_bits(*slope)) - exact).abs() < 1e-6, "{kind:?} row {i}");
            }
        }
        assert!(expected.0.columns.len() < v / 2 && !expected.0.columns.is_empty());
        // Every column that is left out is small in every row, and what is dropped is at least their sum.
        let mut left = vec![0.0; r];
        let mut columns = expected.0.columns.iter().peekable();
        for j in 0..v {
            if columns.next_if_eq(&&j).is_none() {
                for (i, (left, weight)) in left.iter_mut().zip(weights).enumerate() {
                    let slope = f64::from(f32::from_bits(expected.1[i * v + j])).abs();
                    assert!(slope <= 1e-3 * weight);
                    *left += slope;
                }
            }
        }
        assert!(left.iter().zip(&expected.0.rows).all(|(left, row)| *left <= row.dropped * (1.0 + 1e-6)));
    }
}

#[test]
fn bfloat16_is_single_precision_of_rounded_logits() {
    let (r, v) = (2, 100);
    let round = |x: Vec<f64>| -> Vec<bf16> { x.into_iter().map(bf16::from_f64).collect() };
    let (x, y) = (round(logits(5, r, v)), round(logits(6, r, v)));
    let wide = |x: &[bf16]| -> Vec<f32> { x.iter().map(|x| x.to_f32()).collect() };
    let (mut a, mut b, teacher) = (x.clone(), wide(&x), wide(&y));
    let (pool, weights) = (Pool::new(1), [1.0, 0.5]);
    let run = |student: ProductsMut<'_>, teacher: Products<'_>| {
        let target = Target::Teacher(teacher, Transform::NONE);
        divergences(&pool, Divergence::ReverseKl, student, Transform::NONE, target, &weights, Gradient::Filtered(1e-4))
    };
    let half = run(ProductsMut::Bf16(&mut a), Products::Bf16(&y));
    assert_eq!(half, run(ProductsMut::F32(&mut b), Products::F32(&teacher)));
    assert!(a.iter().zip(&b).all(|(a, &b)| *a == bf16::from_f32(b)));
    let (mut a, mut b) = (x.clone(), wide(&x));
    assert_eq!(
        run(ProductsMut::Bf16(&mut a), Products::F32(&teacher)),
        run(ProductsMut::F32(&mut b), Products::Bf16(&y))
    );
}

#[test]
fn edges_have_the_values_that_are_documented() {
    let (pool, hidden) = (Pool::new(1), f32::NEG_INFINITY);
    let run = |kind, x: &mut [f32], y: &[f32], weights: &[f64]| {
        let target = Target::Teacher(Products::F32(y), Transform::NONE);
        divergences(&pool, kind, ProductsMut::F32(x), Transform::NONE, target, weights, Gradient::Filtered(0.0))
    };
    // No rows.
    assert_eq!(run(Divergence::ReverseKl, &mut [], &[], &[]), Divergences::default());
    for kind in KINDS {
        // Equal sides, far apart logits, a column that neither has.
        let y = [1e4, -1e4, hidden, 9999.0];
        let mut x = y;
        let found = run(kind, &mut x, &y, &[1.0]);
        assert!(x.iter().all(|x| x.abs() < 1e-6), "{kind:?} {x:?}");
        let entropy = found.rows[0].entropy;
        let wanted = if kind == Divergence::CrossEntropy { entropy } else { 0.0 };
        assert!((found.rows[0].divergence - wanted).abs() < 1e-6 && found.rows[0].clamped == 0, "{kind:?}");
        // A row without weight.
        let mut x = [f32::NAN, 1.0];
        assert_eq!(run(kind, &mut x, &[0.0, 0.0], &[0.0]).rows, [Row::default()]);
        assert_eq!(x, [0.0, 0.0]);
        // NaN is passed on.
        let mut x = [f32::NAN, 1.0];
        assert!(run(kind, &mut x, &[0.0, 0.0], &[1.0]).rows[0].divergence.is_nan());
    }
    // What one side alone lacks.
    let (mut x, y) = ([0.0, 0.0], [0.0, hidden]);
    let found = run(Divergence::ReverseKl, &mut x, &y, &[1.0]).rows[0];
    assert!(found.clamped == 1 && (found.divergence - 4999.3).abs() < 0.1, "{found:?}");
    let (mut x, y) = ([0.0, hidden], [0.0, 0.0]);
    let found = run(Divergence::ForwardKl, &mut x, &y, &[1.0]).rows[0];
    assert!(found.clamped == 1 && found.divergence > 4999.0 && x == [0.5, -0.5], "{found:?} {x:?}");
    let (mut x, y) = ([0.0, hidden], [0.0, 0.0]);
    assert_eq!(run(Divergence::ReverseKl, &mut x, &y, &[1.0]).rows[0].clamped, 0);
    assert!(x.iter().all(|x| *x == 0.0));
}

#[test]
fn labels_are_a_teacher_that_is_sure() {
    let (mut x, weights) = (narrow(&logits(7, 2, 40)), [1.0, 0.5]);
    let z = x.clone();
    let labels = [3, 39];
    let student = ProductsMut::F32(&mut x);
    let (kind, target) = (Divergence::CrossEntropy, Target::Labels(&labels));
    let found = divergences(&Pool::new(1), kind, student, Transform::NONE, target, &weights, Gradient::Filtered(0.0));
    for (i, &label) in labels.iter().enumerate() {
        let row: Vec<f64> = z[i * 40..(i + 1) * 40].iter().map(|&z| f64::from(z)).collect();
        let logs = log_softmax(&row);
        assert!((found.rows[i].divergence + logs[label]).abs() < 1e-5);
        for (j, log) in logs.iter().enumerate() {
            let slope = weights[i] * (log.exp() - f64::from(j == label));
            assert!((f64::from(x[i * 40 + j]) - slope).abs() < 1e-6);
        }
    }
}
