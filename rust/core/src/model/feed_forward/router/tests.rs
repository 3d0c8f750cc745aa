use super::*;
use farthing_kernels::format::{FloatType, Offset, Precision};
use farthing_kernels::philox::gumbel;
use std::convert::Infallible;

fn numbers(seed: u64, count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| gumbel(seed, 0, i)).collect()
}

/// Ids and weights of `logits`.
fn route(
    spec: &RouterSpec,
    threads: usize,
    logits: &[f32],
    biases: Biases<'_>,
    choice: Choice<'_>,
) -> Result<(Vec<u32>, Vec<f32>), Error> {
    let slots = logits.len() / spec.experts.max(1) * spec.top_k;
    let (mut ids, mut weights) = (vec![u32::MAX; slots], vec![f32::NAN; slots]);
    spec.select(&Pool::new(threads), &mut logits.to_vec(), biases, choice, &mut ids, &mut weights)?;
    Ok((ids, weights))
}

fn deepseek(experts: usize, top_k: usize, count: usize, kept: usize) -> RouterSpec {
    let groups = Groups { count, kept, score: GroupScore::TopTwo, masked_fill: f32::NEG_INFINITY };
    RouterSpec {
        score: Score::Sigmoid,
        groups: Some(groups),
        renormalize: Some(1e-20),
        scale: 2.5,
        ..RouterSpec::softmax(experts, top_k)
    }
}

#[test]
fn only_kept_groups_are_chosen_from_and_the_bias_weighs_nothing() {
    let spec = deepseek(32, 4, 8, 2);
    let (logits, bias) = (numbers(1, 200 * 32), numbers(2, 32));
    let biases = Biases { selection: Some(&bias), ..Biases::default() };
    let (ids, weights) = route(&spec, 1, &logits, biases, Choice::Best).unwrap();
    for ((logits, ids), weights) in logits.chunks(32).zip(ids.chunks(4)).zip(weights.chunks(4)) {
        let score = |id: u32| 1.0 / (1.0 + (-f64::from(logits[id as usize])).exp());
        let choice = |id: u32| score(id) + f64::from(bias[id as usize]);
        let group = |group: u32| {
            let mut four: Vec<f64> = (4 * group..4 * group + 4).map(choice).collect();
            four.sort_by(|a, b| b.total_cmp(a));
            four[0] + four[1]
        };
        let mut groups: Vec<u32> = (0..8).collect();
        groups.sort_by(|a, b| group(*b).total_cmp(&group(*a)));
        let mut expected: Vec<u32> = groups[..2].iter().flat_map(|group| 4 * group..4 * group + 4).collect();
        expected.sort_by(|a, b| choice(*b).total_cmp(&choice(*a)));
        assert_eq!(ids, &expected[..4]);
        let sum: f64 = ids.iter().map(|id| score(*id)).sum();
        for (id, weight) in ids.iter().zip(weights) {
            assert!((score(*id) / sum * 2.5 - f64::from(*weight)).abs() < 1e-6);
        }
    }
}

#[test]
fn threads_and_other_rows_change_no_bit() {
    let spec = deepseek(128, 8, 8, 4);
    let logits = numbers(3, 300 * 128);
    let bias = numbers(4, 128);
    let biases = Biases { selection: Some(&bias), logit: Some(&bias) };
    let all = route(&spec, 1, &logits, biases, Choice::Best).unwrap();
    assert_eq!(route(&spec, 3, &logits, biases, Choice::Best).unwrap(), all);
    for row in [0, 7, 299] {
        let one = route(&spec, 1, &logits[row * 128..(row + 1) * 128], biases, Choice::Best).unwrap();
        assert_eq!(one, (all.0[row * 8..(row + 1) * 8].to_vec(), all.1[row * 8..(row + 1) * 8].to_vec()));
    }
}

#[test]
fn zero_in_place_of_masked_scores_can_win() {
    let groups = Groups { count: 2, kept: 1, score: GroupScore::Maximum, masked_fill: 0.0 };
    let spec = RouterSpec { score: Score::Identity, groups: Some(groups), ..RouterSpec::softmax(4, 2) };
    let (ids, weights) = route(&spec, 1, &[5.0, -1.0, 2.0, 3.0], Biases::default(), Choice::Best).unwrap();
    assert_eq!((ids, weights), (vec![0, 2], vec![5.0, 2.0]));
}

#[test]
fn chosen_experts_keep_their_places() {
    let spec = RouterSpec { score: Score::SqrtSoftplus, renormalize: Some(1e-20), ..RouterSpec::softmax(4, 2) };
    let (ids, weights) = route(&spec, 1, &[0.0, 3.0, 0.0, -1.0], Biases::default(), Choice::Given(&[2, 0])).unwrap();
    assert_eq!((ids, weights), (vec![2, 0], vec![0.5, 0.5]));
    let error = route(&spec, 1, &[0.0; 4], Biases::default(), Choice::Given(&[2, 4])).unwrap_err();
    assert_eq!(error.to_string(), "chosen: got expert 4, expected 0 to 3");
}

#[test]
fn odd_rows_have_distinct_experts() {
    for spec in [RouterSpec::softmax(8, 8), deepseek(8, 3, 2, 1)] {
        for value in [0.0, f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -1e30] {
            let (mut ids, _) = route(&spec, 1, &[value; 8], Biases::default(), Choice::Best).unwrap();
            ids.sort_unstable();
            ids.dedup();
            assert_eq!(ids.len(), spec.top_k, "{value}");
        }
    }
    let logits = [9.0, 9.0, f32::NAN, f32::NAN, 0.0, 1.0, 2.0, 3.0];
    let (ids, weights) = route(&deepseek(8, 4, 2, 1), 1, &logits, Biases::default(), Choice::Best).unwrap();
    assert_eq!(ids, [0, 1, 2, 3]);
    assert!(weights[2].is_nan());
    let (ids, weights) =
        route(&RouterSpec::softmax(3, 2), 1, &[1.0, f32::NAN, 0.0], Biases::default(), Choice::Best).unwrap();
    assert_eq!(ids, [0, 1]);
    assert!(weights.iter().all(|weight| weight.is_nan()));
    assert_eq!(route(&deepseek(8, 3, 2, 1), 1, &[], Biases::default(), Choice::Best).unwrap(), (vec![], vec![]));
}

#[test]
fn impossible_wishes_are_errors() {
    let grouped = |count, kept, score| Groups { count, kept, score, masked_fill: f32::NEG_INFINITY };
    let softmax = RouterSpec::softmax(8, 2);
    let with = |groups| RouterSpec { groups: Some(groups), ..softmax };
    let top = GroupScore::TopTwo;
    for (spec, message) in [
        (RouterSpec::softmax(0, 0), "num_experts: got 0, expected 1 to 4294967295"),
        (RouterSpec::softmax(8, 0), "top_k: got 0, expected 1 to 8 experts"),
        (RouterSpec::softmax(8, 9), "top_k: got 9, expected 1 to 8 experts"),
        (with(grouped(3, 1, top)), "n_group: got 3, expected a divisor of 8 experts"),
        (with(grouped(0, 1, top)), "n_group: got 0, expected 1 to 8 experts"),
        (with(grouped(4, 5, top)), "topk_group: got 5, expected 1 to 4 groups"),
        (
            with(grouped(8, 2, top)),
            "n_group: got 8, expected groups of at least 2 experts where the best two are summed",
        ),
        (with(grouped(8, 1, GroupScore::Maximum)), "top_k: got 2, expected 1 to 1 experts in the kept groups"),
        (with(Groups { masked_fill: 1.0, ..grouped(4, 1, top) }), "masked_fill: got 1, expected minus infinity or 0"),
        (RouterSpec { renormalize: Some(-1.0), ..softmax }, "norm_eps: got -1, expected a finite number, 0 or above"),
        (RouterSpec { scale: f32::NAN, ..softmax }, "routed_scaling_factor: got NaN, expected a finite number"),
    ] {
        assert_eq!(spec.check().unwrap_err().to_string(), message);
        assert!(
            route(&spec, 1, &[0.0; 8], Biases::default(), Choice::Best)
                .is_err_and(|error| error.to_string() == message)
        );
    }
    let biases = Biases { selection: Some(&[0.0; 7]), ..Biases::default() };
    let error = route(&softmax, 1, &[0.0; 8], biases, Choice::Best).unwrap_err();
    assert_eq!(error.to_string(), "selection_bias: got 7 numbers, expected 8");
    let error = route(&softmax, 1, &[0.0; 9], Biases::default(), Choice::Best).unwrap_err();
    assert_eq!(error.to_string(), "logits: got 9 numbers, expected rows of 8 experts");
}

fn identity(experts: usize) -> PackedMatrix {
    PackedMatrix::pack_float(experts, experts, FloatType::Bf16, |n, row| {
        row[n] = 1.0;
        Ok::<(), Infallible>(())
    })
    .unwrap()
}

#[test]
fn a_router_multiplies_adds_and_looks_up() {
    let pool = Pool::new(1);
    let (mut scratch, mut ids, mut weights) = (RouterScratch::default(), [0; 4], [0.0; 4]);
    let spec = RouterSpec { score: Score::Identity, post: Score::Softmax, ..RouterSpec::softmax(3, 2) };
    let router = Router::new(spec, identity(3), Some(vec![0.0, 0.0, 9.0]), None, None).unwrap();
    let x = [1.0, 1.0, -7.0, 0.0, 4.0, -8.0];
    router.route(&pool, &x, &[], &mut scratch, &mut ids, &mut weights).unwrap();
    assert_eq!(ids, [2, 0, 1, 2]);
    assert!((weights[0] - 0.731_058_6).abs() < 1e-6 && (weights[2] - 0.952_574_1).abs() < 1e-6);
    assert_eq!(scratch.scores(), [1.0, 1.0, 2.0, 0.0, 4.0, 1.0]);
    let mass: Vec<f32> = spec.selected_mass(scratch.scores(), &ids).collect();
    assert!((mass[0] - 0.788_058_4).abs() < 1e-6 && mass[1] > mass[0] && mass[1] < 1.0);

    let spec = RouterSpec { score: Score::Sigmoid, ..spec };
    let table = Some(vec![0, 1, 2, 1, 0, 2]);
    let router = Router::new(spec, identity(3), None, None, table).unwrap();
    router.route(&pool, &x, &[2, 1], &mut scratch, &mut ids, &mut weights).unwrap();
    assert_eq!(ids, [0, 2, 2, 1]);
    for (tokens, message) in [
        (&[2, 3][..], "token_ids: got 3, expected 0 to 2, the rows of the table"),
        (&[2], "token_ids: got 1 numbers, expected 2"),
    ] {
        let error = router.route(&pool, &x, tokens, &mut scratch, &mut ids, &mut weights).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn routers_refuse_parts_that_do_not_fit() {
    let spec = RouterSpec::softmax(3, 2);
    let new = |weight, bias, table| Router::new(spec, weight, None, bias, table).unwrap_err().to_string();
    assert_eq!(new(identity(4), None, None), "weight: got 4 rows, expected 3 rows, one for each expert");
    assert_eq!(new(identity(3), Some(vec![0.0; 4]), None), "selection_bias: got 4 numbers, expected 3");
    assert_eq!(new(identity(3), None, Some(vec![0, 1, 2])), "table: got 3 numbers, expected rows of 2 experts");
    let error = new(identity(3), None, Some(vec![0, 1, 2, 3]));
    assert_eq!(error, "table: got expert 3 for token 1, expected 0 to 2");
    let format = Format::Integer {
        bits: farthing_kernels::format::Bits::Eight,
        group: 32,
        offset: Offset::Symmetric,
        scale: FloatType::F16,
    };
    let int8 = PackedMatrix::quantize(3, 32, format, Precision::A8, |_, row| {
        row.fill(1.0);
        Ok::<(), Infallible>(())
    });
    assert!(new(int8.unwrap(), None, None).ends_with("expected f32, f16 or bf16: routers are not quantised"));
}
