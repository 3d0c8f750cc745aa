//! A coin that takes every side in turn, and tabular models small enough to follow all of them.

use std::collections::HashMap;

use farthing_kernels::math::log;
use farthing_kernels::philox::philox4x32;

use super::{Coin, Shape, Siblings};

/// Replays the decisions made so far, then takes the first side of each new one.
#[derive(Default)]
pub(super) struct Branching {
    /// The side taken of each decision, and all its sides with their probabilities.
    decisions: Vec<(usize, Vec<(usize, f64)>)>,
    at: usize,
    /// Of the sides taken in this run.
    pub(super) probability: f64,
}

impl Branching {
    /// Runs once for every way in which chance can decide.
    pub(super) fn enumerate(mut run: impl FnMut(&mut Branching)) {
        let mut coin = Branching::default();
        loop {
            (coin.at, coin.probability) = (0, 1.0);
            run(&mut coin);
            loop {
                let Some((side, sides)) = coin.decisions.last_mut() else { return };
                *side += 1;
                if *side < sides.len() {
                    break;
                }
                coin.decisions.pop();
            }
        }
    }

    fn decide(&mut self, sides: impl FnOnce() -> Vec<(usize, f64)>) -> usize {
        if self.at == self.decisions.len() {
            self.decisions.push((0, sides()));
        }
        let (side, sides) = &self.decisions[self.at];
        let (value, probability) = sides[*side];
        self.probability *= probability;
        self.at += 1;
        value
    }
}

impl Coin for Branching {
    fn flip(&mut self, part: f64, whole: f64) -> bool {
        if part <= 0.0 || part >= whole {
            return part > 0.0;
        }
        self.decide(|| vec![(1, part / whole), (0, 1.0 - part / whole)]) == 1
    }

    fn draw(&mut self, weights: &[f64]) -> usize {
        self.decide(|| {
            let total: f64 = weights.iter().sum();
            assert!(total > 0.0, "nothing to draw from: {weights:?}");
            let sides = weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0);
            sides.map(|(index, weight)| (index, weight / total)).collect()
        })
    }
}

/// How the laws of target and drafter behind a prefix are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    Random,
    Zeros,
    Equal,
    Disjoint,
    OneHotDrafter,
    OneSurvivor,
    /// Another of these behind each prefix.
    Mixed,
}

impl Kind {
    pub(super) const ALL: [Kind; 7] =
        [Kind::Random, Kind::Zeros, Kind::Equal, Kind::Disjoint, Kind::OneHotDrafter, Kind::OneSurvivor, Kind::Mixed];
}

/// Laws of a target and a drafter behind every prefix.
pub(super) struct World {
    pub(super) vocabulary: usize,
    kind: Kind,
    laws: HashMap<Vec<u32>, [Vec<f32>; 2]>,
    drawn: u32,
}

impl World {
    pub(super) fn new(kind: Kind, vocabulary: usize) -> World {
        World { vocabulary, kind, laws: HashMap::new(), drawn: 0 }
    }

    /// In (0, 1).
    fn uniform(&mut self) -> f32 {
        self.drawn += 1;
        let word = philox4x32([self.drawn, self.vocabulary as u32, 0, 5], [self.kind as u32, 0])[0];
        ((word >> 9) as f32 + 0.5) / 8_388_608.0
    }

    fn random(&mut self) -> Vec<f32> {
        (0..self.vocabulary).map(|_| log(self.uniform()).powi(2) + 1e-3).collect()
    }

    fn one_hot(&mut self) -> Vec<f32> {
        let token = (self.uniform() * self.vocabulary as f32) as usize;
        (0..self.vocabulary).map(|other| f32::from(u8::from(other == token))).collect()
    }

    fn make(&mut self) -> [Vec<f32>; 2] {
        let kind = match self.kind {
            Kind::Mixed => Kind::ALL[(self.uniform() * 6.0) as usize],
            kind => kind,
        };
        let (mut p, mut q) = (self.random(), self.random());
        match kind {
            Kind::Zeros => {
                for row in [&mut p, &mut q] {
                    let kept = (self.uniform() * self.vocabulary as f32) as usize;
                    for (token, weight) in row.iter_mut().enumerate() {
                        if token != kept && self.uniform() < 0.4 {
                            *weight = 0.0;
                        }
                    }
                }
            }
            Kind::Equal => q.clone_from(&p),
            Kind::Disjoint if self.vocabulary > 1 => {
                p.iter_mut().step_by(2).for_each(|p| *p = 0.0);
                q.iter_mut().skip(1).step_by(2).for_each(|q| *q = 0.0);
            }
            Kind::Disjoint | Kind::Random | Kind::Mixed => {}
            Kind::OneHotDrafter => q = self.one_hot(),
            Kind::OneSurvivor => p = self.one_hot(),
        }
        [p, q]
    }

    /// `[p, q]` behind a prefix.
    pub(super) fn laws(&mut self, prefix: &[u32]) -> &[Vec<f32>; 2] {
        if !self.laws.contains_key(prefix) {
            let laws = self.make();
            self.laws.insert(prefix.to_vec(), laws);
        }
        &self.laws[prefix]
    }

    /// The laws at all rows of a draft, `[p, q]`, each (rows, vocabulary).
    pub(super) fn rows(&mut self, shape: &Shape) -> [Vec<f32>; 2] {
        let mut rows = [Vec::new(), Vec::new()];
        for row in 0..=shape.len() {
            let mut prefix: Vec<u32> = shape.path(row).map(|row| shape.token(row)).collect();
            prefix.reverse();
            let laws = self.laws(&prefix);
            rows[0].extend_from_slice(&laws[0]);
            rows[1].extend_from_slice(&laws[1]);
        }
        rows
    }

    /// Draws the tokens of nodes behind `parents`; those with nothing left to draw from are left out.
    pub(super) fn draft(&mut self, parents: &[Option<usize>], siblings: Siblings, coin: &mut impl Coin) -> Shape {
        let mut places: Vec<Option<usize>> = Vec::new();
        let (mut tokens, mut hang): (Vec<u32>, Vec<Option<usize>>) = (Vec::new(), Vec::new());
        let mut prefixes: Vec<Vec<u32>> = Vec::new();
        for parent in parents {
            let place = match parent {
                None => Some(None),
                Some(parent) => places[*parent].map(Some),
            };
            let Some(place) = place else {
                places.push(None);
                continue;
            };
            let mut prefix = place.map_or_else(Vec::new, |place| prefixes[place].clone());
            let mut q: Vec<f64> = self.laws(&prefix)[1].iter().map(|&q| f64::from(q)).collect();
            if siblings == Siblings::Distinct {
                tokens
                    .iter()
                    .zip(&hang)
                    .filter(|(_, other)| **other == place)
                    .for_each(|(&token, _)| q[token as usize] = 0.0);
            }
            if q.iter().sum::<f64>() == 0.0 {
                places.push(None);
                continue;
            }
            let token = coin.draw(&q) as u32;
            places.push(Some(tokens.len()));
            tokens.push(token);
            hang.push(place);
            prefix.push(token);
            prefixes.push(prefix);
        }
        Shape::tree(&tokens, &hang).unwrap()
    }
}

/// What passes brought, each with its probability.
pub(super) struct Outcomes(HashMap<Vec<u32>, f64>);

impl Outcomes {
    /// Of a pass: draft and verification, all that chance decides in them.
    pub(super) fn of(mut pass: impl FnMut(&mut Branching) -> Vec<u32>) -> Outcomes {
        let mut outcomes = HashMap::new();
        Branching::enumerate(|coin| {
            let tokens = pass(coin);
            *outcomes.entry(tokens).or_insert(0.0) += coin.probability;
        });
        let total: f64 = outcomes.values().sum();
        assert!((total - 1.0).abs() < 1e-12, "probabilities add up to {total}");
        Outcomes(outcomes)
    }

    /// Tokens of a pass on average.
    pub(super) fn mean(&self) -> f64 {
        self.0.iter().map(|(tokens, probability)| tokens.len() as f64 * probability).sum()
    }

    /// Total variation from the target's law of the first `length` tokens, when the target goes on behind a pass.
    pub(super) fn variation(&self, world: &mut World, length: usize) -> f64 {
        // (what passes gave, what the target gives) of the prefixes of one length.
        let mut level: Vec<(Vec<u32>, f64, f64)> = vec![(Vec::new(), 0.0, 1.0)];
        for _ in 0..length {
            let mut next = Vec::new();
            for (prefix, given, exact) in level {
                let p: Vec<f64> = world.laws(&prefix)[0].iter().map(|&p| f64::from(p)).collect();
                let total: f64 = p.iter().sum();
                for (token, p) in p.into_iter().enumerate() {
                    let longer = [&prefix[..], &[token as u32]].concat();
                    let ended = self.0.get(&longer).copied().unwrap_or(0.0);
                    next.push((longer, given * p / total + ended, exact * p / total));
                }
            }
            level = next;
        }
        assert!(self.0.keys().all(|tokens| (1..=length).contains(&tokens.len())));
        level.iter().map(|(_, given, exact)| (given - exact).abs()).sum::<f64>() / 2.0
    }
}
