//! The exact law of every rule, by enumeration of the production code; and that a planted bug shows.

use farthing_kernels::philox::philox4x32;
use farthing_kernels::sample::{Sampling, TokenCounts, sample};

use super::enumerate::{Branching, Kind, Outcomes, World};
use super::*;

const EXACT: f64 = 1e-12;

type Rule = fn(&Rows<'_>, &Draft<'_>, &mut Branching) -> Result<Verdict, Error>;

/// A verdict that hangs together.
fn checked(verdict: Verdict, shape: &Shape) -> Vec<u32> {
    assert_eq!((verdict.tokens.len(), verdict.rows[0]), (verdict.rows.len(), 0));
    assert!(verdict.accepted() <= shape.len());
    for (step, &row) in verdict.rows.iter().enumerate().skip(1) {
        assert_eq!((shape.parent(row), shape.token(row)), (Some(verdict.rows[step - 1]), verdict.tokens[step - 1]));
    }
    assert_eq!(verdict.node(), verdict.rows.last().unwrap().checked_sub(1));
    verdict.tokens
}

/// Drafts by the drafter's laws and verifies.
fn outcomes(world: &mut World, parents: &[Option<usize>], siblings: Siblings, rule: Rule) -> Outcomes {
    Outcomes::of(|coin| {
        let shape = world.draft(parents, siblings, coin);
        let [p, q] = world.rows(&shape);
        let p = Rows::new("p", &p, world.vocabulary).unwrap();
        let q = Rows::new("q", &q, world.vocabulary).unwrap();
        let draft = Draft { shape: &shape, origin: Origin::Sampled { q: &q, siblings } };
        checked(rule(&p, &draft, coin).unwrap(), &shape)
    })
}

fn chain(length: usize) -> Vec<Option<usize>> {
    (0..length).map(|node: usize| node.checked_sub(1)).collect()
}

fn chains(kinds: &[Kind], vocabulary: usize, length: usize) {
    let rules: [Rule; 4] = [tokens, block, rounds, traversal];
    for &kind in kinds {
        let mut world = World::new(kind, vocabulary);
        let means = rules.map(|rule| {
            let outcomes = outcomes(&mut world, &chain(length), Siblings::Independent, rule);
            let variation = outcomes.variation(&mut world, length + 1);
            assert!(variation <= EXACT, "{kind:?} {vocabulary} {length}: {variation}");
            outcomes.mean()
        });
        assert!(means[1] >= means[0] - EXACT, "{kind:?}: {means:?}");
        assert!((means[2] - means[0]).abs() < EXACT && (means[3] - means[1]).abs() < EXACT, "{kind:?}: {means:?}");
        if kind == Kind::Random && vocabulary > 1 && length > 1 {
            assert!(means[1] > means[0] + 1e-3, "a block gains nothing: {means:?}");
        }
    }
}

#[test]
fn sampled_chains_have_the_targets_law() {
    for vocabulary in 1..=3 {
        for length in 0..=4 {
            chains(&Kind::ALL, vocabulary, length);
        }
    }
    chains(&Kind::ALL, 4, 3);
    chains(&Kind::ALL, 2, 6);
}

#[test]
fn long_sampled_chains_have_the_targets_law() {
    chains(&[Kind::Random, Kind::Mixed], 3, 6);
    chains(&[Kind::Mixed], 4, 6);
}

#[test]
fn sampled_trees_have_the_targets_law() {
    let shapes: [&[i32]; 7] = [
        &[-1, -1],
        &[-1, -1, 0, 0, 1, 1],
        &[-1, -1, -1, 0, 1, 2],
        &[-1, -1, -1, -1, -1, -1],
        &[-1, 0, 0, 1, 1, 2],
        &[-1, 0, -1, 2, 2, 4],
        &[-1, 0, 1, 2, -1, 4],
    ];
    let mut gained = false;
    for (vocabulary, kinds) in [(2, &Kind::ALL[..]), (3, &Kind::ALL), (4, &[Kind::Mixed])] {
        for parents in shapes {
            let parents: Vec<_> = parents.iter().map(|&parent| usize::try_from(parent).ok()).collect();
            for &kind in kinds {
                for siblings in [Siblings::Independent, Siblings::Distinct] {
                    let mut world = World::new(kind, vocabulary);
                    let means = [rounds as Rule, traversal].map(|rule| {
                        let outcomes = outcomes(&mut world, &parents, siblings, rule);
                        let variation = outcomes.variation(&mut world, 5);
                        assert!(variation <= EXACT, "{kind:?} {siblings:?} {parents:?}: {variation}");
                        outcomes.mean()
                    });
                    assert!(means[1] >= means[0] - EXACT, "{kind:?} {siblings:?} {parents:?}: {means:?}");
                    gained |= means[1] > means[0] + 1e-2;
                }
            }
        }
    }
    assert!(gained);
}

/// The likeliest two tokens of the drafter behind each node, down to a depth.
fn likeliest(world: &mut World, depth: usize) -> Shape {
    let (mut tokens, mut parents): (Vec<u32>, Vec<Option<usize>>) = (Vec::new(), Vec::new());
    let mut open = vec![(None, Vec::new())];
    for _ in 0..depth {
        for (parent, prefix) in std::mem::take(&mut open) {
            let mut law: Vec<_> = world.laws(&prefix)[1].iter().copied().enumerate().collect();
            law.sort_by(|a, b| b.1.total_cmp(&a.1));
            for &(token, _) in law.iter().take(2) {
                open.push((Some(tokens.len()), [&prefix[..], &[token as u32]].concat()));
                tokens.push(token as u32);
                parents.push(parent);
            }
        }
    }
    Shape::tree(&tokens, &parents).unwrap()
}

#[test]
fn one_hot_trees_have_the_targets_law_under_every_rule() {
    let rules: [Rule; 3] = [rounds, traversal, |p, draft, coin| lossy::threshold(p, draft.shape, 1.0, 1.0, coin)];
    for kind in Kind::ALL {
        for (vocabulary, depth) in [(1, 6), (2, 6), (3, 6), (4, 4)] {
            let mut world = World::new(kind, vocabulary);
            let shape = likeliest(&mut world, depth);
            let [p, _] = world.rows(&shape);
            let p = Rows::new("p", &p, vocabulary).unwrap();
            let means = rules.map(|rule| {
                let draft = Draft { shape: &shape, origin: Origin::OneHot };
                let outcomes = Outcomes::of(|coin| checked(rule(&p, &draft, coin).unwrap(), &shape));
                let variation = outcomes.variation(&mut world, depth + 1);
                assert!(variation <= EXACT, "{kind:?} {vocabulary} {depth}: {variation}");
                outcomes.mean()
            });
            assert!(means.iter().all(|mean| (mean - means[0]).abs() < EXACT), "{means:?}");
        }
    }
}

#[test]
fn one_hot_chains_are_followed_by_the_rules_for_chains() {
    let mut world = World::new(Kind::Zeros, 3);
    let shape = Shape::chain(&[2, 0, 1]);
    let [p, _] = world.rows(&shape);
    let p = Rows::new("p", &p, 3).unwrap();
    for rule in [tokens as Rule, block] {
        let draft = Draft { shape: &shape, origin: Origin::OneHot };
        let outcomes = Outcomes::of(|coin| checked(rule(&p, &draft, coin).unwrap(), &shape));
        assert!(outcomes.variation(&mut world, 4) <= EXACT);
    }
}

#[test]
fn an_argmax_that_claims_to_be_drawn_shows() {
    // transformers' case: the most likely token of q, handed over with q.
    let p = [0.3, 0.25, 0.2, 0.15, 0.07, 0.03f64, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0];
    let q = [0.4, 0.3, 0.1, 0.1, 0.05, 0.05f64];
    let (p, q) = (Rows::new("p", &p, 6).unwrap(), Rows::new("q", &q, 6).unwrap());
    let shape = Shape::chain(&[q.law(0).mode()]);
    let claims = |origin: Origin<'_, f64>| {
        let mut first = [0.0; 6];
        Branching::enumerate(|coin| {
            let verdict = tokens(&p, &Draft { shape: &shape, origin }, coin).unwrap();
            first[verdict.tokens[0] as usize] += coin.probability;
        });
        p.law(0).probabilities().zip(first).map(|(p, first)| (p - first).abs()).sum::<f64>() / 2.0
    };
    assert!(claims(Origin::OneHot) <= EXACT);
    let biased = claims(Origin::Sampled { q: &q, siblings: Siblings::Independent });
    // Taken with probability 0.3/0.4 instead of 0.3.
    assert!((biased - 0.45).abs() < EXACT, "{biased}");
}

#[test]
fn a_wrong_residual_shows() {
    let mut world = World::new(Kind::Random, 3);
    let biased = outcomes(&mut world, &chain(2), Siblings::Independent, |p, draft, coin| {
        let mut verdict = tokens(p, draft, coin)?;
        // Drawn from p where it should be from what p has above q.
        let row = verdict.rows[verdict.rows.len() - 1];
        *verdict.tokens.last_mut().unwrap() = super::follow::draw(p.law(row), coin) as u32;
        Ok(verdict)
    });
    assert!(biased.variation(&mut world, 3) > 0.01);
}

#[test]
fn who_shortens_a_draft_must_not_look_at_the_token() {
    for (by_token, kind) in [(true, Kind::Random), (false, Kind::Random), (false, Kind::Mixed)] {
        let mut world = World::new(kind, 3);
        let outcomes = Outcomes::of(|coin| {
            let drawn = world.draft(&chain(2), Siblings::Independent, coin);
            let [_, q] = world.rows(&drawn);
            let q = Rows::new("q", &q, 3).unwrap();
            let sure = |row: usize| {
                let law = q.law(row);
                law.of(if by_token { drawn.token(row + 1) } else { law.mode() }) >= 0.45
            };
            let length = (0..2).take_while(|&row| sure(row)).count();
            let shape = Shape::chain(&(1..=length).map(|row| drawn.token(row)).collect::<Vec<_>>());
            let [p, q] = world.rows(&shape);
            let (p, q) = (Rows::new("p", &p, 3).unwrap(), Rows::new("q", &q, 3).unwrap());
            let origin = Origin::Sampled { q: &q, siblings: Siblings::Independent };
            checked(tokens(&p, &Draft { shape: &shape, origin }, coin).unwrap(), &shape)
        });
        let variation = outcomes.variation(&mut world, 3);
        assert!(if by_token { variation > 0.01 } else { variation <= EXACT }, "{by_token} {kind:?}: {variation}");
    }
}

/// A drafter with tokens c, a, x, b for a target with a, b, c, d, verified by what `scattered` makes of its law.
fn other_vocabulary(kind: Kind, rule: Rule, scattered: impl Fn(Vec<f32>) -> Vec<f32>) -> f64 {
    let common = Intersection::new(["c", "a", "x", "b"], ["a", "b", "c", "d"]);
    assert_eq!(common.tokens(), [Some(2), Some(0), None, Some(1)]);
    let mut world = World::new(kind, 4);
    let outcomes = Outcomes::of(|coin| {
        let (mut drafted, mut laws): (Vec<u32>, Vec<f32>) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let mut q = world.laws(&drafted)[1].clone();
            if common.restrict(&mut q).is_err() {
                break;
            }
            let token = coin.draw(&q.iter().map(|&q| f64::from(q)).collect::<Vec<_>>());
            laws.extend(scattered(common.scatter(&q).unwrap()));
            drafted.push(common.token(token as u32).unwrap());
        }
        let shape = Shape::chain(&drafted);
        let [p, _] = world.rows(&shape);
        let (p, q) = (Rows::new("p", &p, 4).unwrap(), Rows::new("q", &laws, 4).unwrap());
        let origin = Origin::Sampled { q: &q, siblings: Siblings::Independent };
        checked(rule(&p, &Draft { shape: &shape, origin }, coin).unwrap(), &shape)
    });
    outcomes.variation(&mut world, 4)
}

#[test]
fn a_drafter_of_another_vocabulary_leaves_the_law() {
    for kind in Kind::ALL {
        for rule in [tokens as Rule, block, traversal] {
            let variation = other_vocabulary(kind, rule, |q| q);
            assert!(variation <= EXACT, "{kind:?}: {variation}");
        }
    }
    // transformers' case: columns in another order than tokens.
    let permuted = other_vocabulary(Kind::Random, tokens, |q| vec![q[1], q[2], q[0], q[3]]);
    assert!(permuted > 0.01, "{permuted}");
}

#[test]
fn every_law_is_scattered_to_its_own_tokens() {
    let names: Vec<String> = (0..500).map(|i| format!("token {}", i * 7919 % 1000)).collect();
    let mut target = names[100..].to_vec();
    target.reverse();
    target.push(names[100].clone());
    let mut drafter = names.clone();
    drafter.extend([String::new(), names[120].clone()]);
    let common = Intersection::new(drafter.iter(), target.iter());
    assert_eq!((common.len(), common.is_empty(), common.token(1000)), (401, false, None));
    let mut q: Vec<f32> = (0..502).map(|i| (i % 13) as f32 + 0.5).collect();
    common.restrict(&mut q).unwrap();
    let scattered = common.scatter(&q).unwrap();
    for (token, to) in common.tokens().iter().enumerate() {
        let Some(to) = *to else { continue };
        assert_eq!(drafter[token], target[to as usize]);
        let twin = if token == 120 {
            q[501]
        } else if token == 501 {
            q[120]
        } else {
            0.0
        };
        assert_eq!(scattered[to as usize], q[token] + twin);
    }
    assert!((scattered.iter().map(|&q| f64::from(q)).sum::<f64>() - 1.0).abs() < 1e-6);
    assert!(common.restrict(&mut vec![0.0; 502]).is_err() && common.scatter(&[1.0]).is_err());
    assert!(common.scatter(&vec![1.0; 502]).is_err());
}

#[test]
fn greedy_gives_the_greedy_text_for_every_draft() {
    let mut world = World::new(Kind::Random, 3);
    let mut laws = |prefix: &[u32]| -> Vec<f32> {
        // Few values, so that ties occur.
        world.laws(prefix)[0].iter().map(|p| p.min(1.0).round() - 0.5).collect()
    };
    let first = |row: &[f32]| (0..3).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
    for drafted in 0..81 {
        let drafted: Vec<u32> = (0..4).map(|place| drafted / 3u32.pow(place) % 3).collect();
        let scores: Vec<f32> = (0..=4).flat_map(|length| laws(&drafted[..length])).collect();
        let shape = Shape::chain(&drafted);
        let verdict = checked(greedy(&scores, 3, &shape).unwrap(), &shape);
        let mut expected = Vec::new();
        while expected.len() < verdict.len() {
            expected.push(first(&laws(&expected)));
        }
        let same = drafted.iter().zip(&expected).take_while(|(a, b)| a == b).count();
        assert_eq!((verdict.len(), &verdict), (same + 1, &expected));
    }
    assert!(greedy(&[f32::NAN], 1, &Shape::default()).is_err());
}

#[test]
fn coupled_text_is_the_same_for_every_draft() {
    let (vocabulary, seed) = (50, 11);
    let mut world = World::new(Kind::Random, vocabulary);
    // Laws of one token of history, so that texts of any length have a few.
    let mut laws = |token: u32| world.laws(&[token]).clone();
    let mut text = |length: usize, propose: &dyn Fn(u32, u64, &[f32]) -> u32| {
        let (mut tokens, mut passes) = (vec![0u32], 0);
        while tokens.len() < 400 {
            let (mut last, mut drafted, mut rows) = (tokens[tokens.len() - 1], Vec::new(), Vec::new());
            for ahead in 0..length {
                let [p, q] = laws(last);
                rows.extend(p);
                last = propose(last, (tokens.len() + ahead) as u64, &q);
                drafted.push(last);
            }
            rows.extend_from_slice(&laws(last)[0]);
            let p = Rows::new("p", &rows, vocabulary).unwrap();
            let shape = Shape::chain(&drafted);
            tokens.extend(checked(coupled(&p, &shape, seed, tokens.len() as u64).unwrap(), &shape));
            passes += 1;
        }
        tokens.truncate(400);
        (tokens, passes)
    };
    let (plain, passes) = text(0, &|_, _, _| unreachable!());
    assert_eq!(passes, 399);
    let any = |last: u32, position: u64, _: &[f32]| philox4x32([last, position as u32, 0, 0], [3; 2])[0] % 50;
    let by_noise =
        |_: u32, position: u64, q: &[f32]| draw_coupled(Rows::new("q", q, 50).unwrap().law(0), 11, position).unwrap();
    for length in [1, 3, 8] {
        let (random, _) = text(length, &any);
        let (coupled, fewer) = text(length, &by_noise);
        assert!(random == plain && coupled == plain);
        assert!(fewer < 340, "{fewer} passes");
    }
    let exact = plain.clone();
    let next = |_: u32, position: u64, _: &[f32]| exact.get(position as usize).map_or(0, |&token| token);
    let (oracle, fewest) = text(7, &next);
    assert_eq!((oracle, fewest), (plain, 50));
}

#[test]
fn coupled_draws_have_the_law_and_agree_as_often_as_the_theorem_says() {
    let mut world = World::new(Kind::Random, 12);
    let [p, q] = world.laws(&[]).clone();
    let (p, q) = (Rows::new("p", &p, 12).unwrap(), Rows::new("q", &q, 12).unwrap());
    let (p, q) = (p.law(0), q.law(0));
    let (mut observed, mut same, draws) = ([0.0; 12], 0.0, 40_000);
    for position in 0..draws {
        let token = draw_coupled(p, 5, position).unwrap();
        observed[token as usize] += 1.0;
        same += f64::from(u8::from(draw_coupled(q, 5, position).unwrap() == token));
        // The engine's own draw from the logits.
        let mut logits: Vec<f32> = p.probabilities().map(|p| farthing_kernels::math::log(p as f32)).collect();
        let sampling = Sampling { seed: 5, position, ..Sampling::default() };
        assert_eq!(sample(&mut logits, &sampling, &TokenCounts::default()).unwrap().token, token);
    }
    let statistic: f64 = observed
        .iter()
        .zip(p.probabilities())
        .map(|(observed, p)| (observed - p * draws as f64).powi(2) / (p * draws as f64))
        .sum();
    assert!((statistic - 11.0).abs() < 4.0 * 22.0f64.sqrt(), "{statistic}");
    let pairs: Vec<(f64, f64)> = p.probabilities().zip(q.probabilities()).collect();
    let exact: f64 = pairs.iter().map(|x| 1.0 / pairs.iter().map(|y| (y.0 / x.0).max(y.1 / x.1)).sum::<f64>()).sum();
    let variation = pairs.iter().map(|(p, q)| (p - q).abs()).sum::<f64>() / 2.0;
    assert!((same / draws as f64 - exact).abs() < 0.01, "{same} {exact}");
    assert!(exact >= (1.0 - variation) / (1.0 + variation));
}

#[test]
fn each_row_is_processed_with_its_own_history() {
    let sampling = Sampling {
        temperature: 0.8,
        top_k: Some(3),
        repetition_penalty: 1.5,
        frequency_penalty: 0.7,
        presence_penalty: 0.3,
        ..Sampling::default()
    };
    let shape = Shape::tree(&[1, 2, 1, 4], &[None, None, Some(1), Some(2)]).unwrap();
    let logits: Vec<f32> =
        (0..25u32).map(|i| (philox4x32([i, 0, 0, 0], [9; 2])[0] % 100) as f32 / 25.0 - 1.0).collect();
    let mut counts = TokenCounts::of(&[0, 1], &[3]);
    let odd = [0b11010u64];
    let mut got = logits.clone();
    laws(&mut got, 5, &shape, &sampling, &mut counts, |row| (row == 2).then_some(&odd[..])).unwrap();
    for (row, path) in [&[][..], &[1], &[2], &[2, 1], &[2, 1, 4]].into_iter().enumerate() {
        let mut expected = logits[row * 5..][..5].to_vec();
        let sampling = Sampling { allowed: (row == 2).then_some(&odd[..]), ..sampling.clone() };
        let output = [&[3], path].concat();
        farthing_kernels::sample::probabilities(&mut expected, &sampling, &TokenCounts::of(&[0, 1], &output)).unwrap();
        assert_eq!(got[row * 5..][..5], expected, "{row}");
    }
    let error = laws(&mut [f32::NAN; 25], 5, &shape, &sampling, &mut counts, |_| None).unwrap_err();
    assert!(matches!(error, Error::NoToken { position: 0, .. }));
}

#[test]
fn lossy_rules_do_what_their_names_say() {
    let shape = Shape::tree(&[1, 2, 3, 0], &[None, None, Some(0), Some(1)]).unwrap();
    let rows = [
        [0.1, 0.3, 0.6, 0.0f64],
        [0.0, 0.1, 0.1, 0.8],
        [0.85, 0.05, 0.05, 0.05],
        [0.4, 0.3, 0.2, 0.1],
        [0.0, 0.0, 1.0, 0.0],
    ]
    .concat();
    let p = Rows::new("p", &rows, 4).unwrap();
    // Both paths stay; the second is likelier: 0.6 · 0.85.
    let verdict = lossy::typical(&p, &shape, 0.09, 0.3).unwrap();
    assert_eq!((verdict.tokens, verdict.rows), (vec![2, 0, 2], vec![0, 2, 4]));
    // 0.3 is no more than exp(-0.9), 0.6 is.
    let strict = lossy::typical(&p, &shape, 0.7, 1.0).unwrap();
    assert_eq!((strict.tokens, strict.rows), (vec![2, 0, 2], vec![0, 2, 4]));
    assert_eq!(lossy::relaxed(&p, &shape, 2, 0.25).unwrap().tokens, [2, 0, 2]);
    assert_eq!(lossy::relaxed(&p, &shape, 2, 0.31).unwrap().tokens, [1, 3, 0]);
    assert_eq!(lossy::relaxed(&p, &shape, 1, 1.0).unwrap().tokens, [2, 0, 2]);
    let mut coin = Seeded::new(0, 0);
    assert_eq!(lossy::threshold(&p, &shape, 0.3, 1.0, &mut coin).unwrap().tokens[..2], [1, 3]);
    // Certain from 0.3/0.3 on.
    assert_eq!(lossy::threshold(&p, &shape, 1.0, 0.3, &mut coin).unwrap().tokens[..2], [1, 3]);

    let mut world = World::new(Kind::Random, 3);
    let mut weighed = |weight: f64| {
        let outcomes = Outcomes::of(|coin| {
            let shape = world.draft(&chain(2), Siblings::Independent, coin);
            let [p, q] = world.rows(&shape);
            let (p, q) = (Rows::new("p", &p, 3).unwrap(), Rows::new("q", &q, 3).unwrap());
            let origin = Origin::Sampled { q: &q, siblings: Siblings::Independent };
            checked(lossy::ensemble(&p, &Draft { shape: &shape, origin }, weight, coin).unwrap(), &shape)
        });
        (outcomes.variation(&mut world, 3), outcomes.mean())
    };
    let [exact, half, all] = [1.0, 0.5, 0.0].map(&mut weighed);
    assert!(exact.0 <= EXACT && half.0 > 0.01 && half.0 < all.0, "{exact:?} {half:?} {all:?}");
    assert!(exact.1 < half.1 && half.1 < all.1 && (all.1 - 3.0).abs() < EXACT);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let fails = |result: Result<Verdict, Error>, message: &str| {
        assert_eq!(result.unwrap_err().to_string(), message);
    };
    let weights = [0.5f32; 8];
    let p = |rows: usize| Rows::new("p", &weights[..rows * 2], 2).unwrap();
    let coin = &mut Seeded::new(0, 0);
    let tree = Shape::tree(&[0, 1], &[None, None]).unwrap();
    let q = p(1);
    let origin = Origin::Sampled { q: &q, siblings: Siblings::Independent };
    let message =
        "a sampled tree under block verification is not supported; multi-round and traversal verification take trees";
    fails(block(&p(3), &Draft { shape: &tree, origin }, coin), message);
    let two = Shape::chain(&[0, 1]);
    let message = "p: got 2 rows, expected 3, one more than drafted tokens";
    fails(tokens(&p(2), &Draft { shape: &two, origin }, coin), message);
    let message = "q: got no law at row 1, expected one wherever tokens were drafted";
    fails(tokens(&p(3), &Draft { shape: &two, origin }, coin), message);
    fails(sampled(&p(2), &Shape::chain(&[2]), coin), "tokens: got 2, expected ids below 2, the length of a row");
    // What stands where nothing was drawn is nobody's business.
    let rubbish = [0.5, 0.5, f32::NAN, -1.0];
    let q = Rows::of_draft(&rubbish, 2, &tree).unwrap();
    let origin = Origin::Sampled { q: &q, siblings: Siblings::Independent };
    assert!(rounds(&p(3), &Draft { shape: &tree, origin }, coin).is_ok());
    for (weights, got) in [
        ([0.5, -0.1], "-0.10000000149011612 for token 1 in row 0"),
        ([f32::NAN, 1.0], "NaN for token 0 in row 0"),
        ([1.0, f32::INFINITY], "inf for token 1 in row 0"),
    ] {
        let error = Rows::new("p", &weights, 2).unwrap_err().to_string();
        assert_eq!(error, format!("p: got {got}, expected probabilities, 0 or above"));
    }
    let error = Rows::new("p", &[0.0f32; 2], 2).unwrap_err().to_string();
    assert_eq!(error, "p: got row 0 with sum 0, expected probabilities of sum 1");
    assert!(Rows::new("p", &[1.0f32; 3], 2).is_err() && Rows::<f32>::new("p", &[], 0).is_err());
    let error = Shape::tree(&[0, 0], &[None, Some(1)]).unwrap_err().to_string();
    assert_eq!(error, "parents: got 1 for node 1, expected an earlier node, or -1 for the last committed token");
    assert!(Shape::tree(&[0], &[]).is_err());
}

#[test]
fn the_tree_of_the_engine_is_followed_too() {
    let mut tree = crate::speculative::tree::DraftTree::default();
    let first = tree.push(None, 7, 0, 1.0);
    tree.push(None, 8, 0, 1.0);
    tree.push(first, 9, 0, 1.0);
    let shape = Shape::from(&tree);
    assert_eq!(shape, Shape::tree(&[7, 8, 9], &[None, None, Some(0)]).unwrap());
    let target = [7, 9, 0, 4];
    let verdict = follow(&shape, |row, _| Ok::<u32, Error>(target[row])).unwrap();
    assert_eq!((verdict.tokens, verdict.rows, tree.is_chain()), (vec![7, 9, 4], vec![0, 1, 3], false));
}

#[test]
fn a_chain_longer_than_the_stack_is_deep() {
    let shape = Shape::chain(&vec![0; 200_000]);
    let (p, q) = (vec![1.0f32; 200_001], vec![1.0f32; 200_000]);
    let (p, q) = (Rows::new("p", &p, 1).unwrap(), Rows::new("q", &q, 1).unwrap());
    let draft = Draft { shape: &shape, origin: Origin::Sampled { q: &q, siblings: Siblings::Distinct } };
    for rule in [traversal, block, rounds, tokens] {
        assert_eq!(rule(&p, &draft, &mut Seeded::new(0, 0)).unwrap().accepted(), 200_000);
    }
}

#[test]
fn text_of_a_drafter_with_other_tokens_leaves_the_law() {
    use crate::load::{Tokenizer, Vocabulary};
    use crate::speculative::align::continuation;

    let tokens_of = |list: [&str; 4]| list.map(String::from).to_vec();
    let target = Tokenizer::from_vocabulary(Vocabulary {
        model: "gpt2".into(),
        pre: "gpt-2".into(),
        tokens: tokens_of(["a", "b", "ab", "ba"]),
        types: Some(vec![1; 4]),
        merges: Some(vec!["a b".into(), "b a".into()]),
        ..Vocabulary::default()
    })
    .unwrap();
    for kind in Kind::ALL {
        let mut world = World::new(kind, 4);
        // What a drafter of single letters may say, cut into the target's tokens.
        for text in ["", "a", "ab", "abb", "bab", "abab", "aabba"] {
            let drafted: Vec<u32> =
                continuation(&target, text.as_bytes()).into_iter().map(|(token, _)| token).collect();
            assert!(drafted.len() <= text.len() && drafted.is_empty() == text.is_empty());
            let shape = Shape::chain(&drafted);
            let [p, _] = world.rows(&shape);
            let p = Rows::new("p", &p, 4).unwrap();
            for rule in [tokens as Rule, block, traversal] {
                let draft = Draft { shape: &shape, origin: Origin::OneHot };
                let outcomes = Outcomes::of(|coin| checked(rule(&p, &draft, coin).unwrap(), &shape));
                let variation = outcomes.variation(&mut world, drafted.len() + 1);
                assert!(variation <= EXACT, "{kind:?} {text}: {variation}");
            }
        }
    }
}
