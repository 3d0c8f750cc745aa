//! Chance, as the rules ask for it.

use farthing_kernels::philox::philox4x32;

/// Decides what a rule leaves to chance.
pub trait Coin {
    /// Whether `u · whole < part` for u uniform in [0, 1): never without a part, always where it is all.
    fn flip(&mut self, part: f64, whole: f64) -> bool;

    /// An index, each as likely as its weight says; some weight is above zero.
    fn draw(&mut self, weights: &[f64]) -> usize;
}

/// Philox4x32-10: key = seed, counter = (position, number of the decision), apart from the noise of the sampler.
///
/// ```
/// use farthing::speculative::verify::{Coin, Seeded};
/// let mut coin = Seeded::new(7, 0);
/// assert!(!coin.flip(0.0, 1.0) && coin.flip(1.0, 1.0));
/// assert_eq!(coin.draw(&[0.0, 3.0, 0.0]), 1);
/// ```
#[derive(Clone, Debug)]
pub struct Seeded {
    key: [u32; 2],
    position: [u32; 2],
    decisions: u32,
}

impl Seeded {
    /// The coin of the pass whose first token stands at an absolute position.
    pub fn new(seed: u64, position: u64) -> Seeded {
        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        Seeded { key: halves(seed), position: halves(position), decisions: 0 }
    }

    /// Uniform in [0, 1), of 53 bits.
    fn uniform(&mut self) -> f64 {
        // The sampler's counters end in 0, these in 1.
        let words = philox4x32([self.position[0], self.position[1], self.decisions, 1], self.key);
        self.decisions = self.decisions.wrapping_add(1);
        let bits = u64::from(words[0]) << 21 | u64::from(words[1]) >> 11;
        bits as f64 / (1u64 << 53) as f64
    }
}

impl Coin for Seeded {
    fn flip(&mut self, part: f64, whole: f64) -> bool {
        self.uniform() * whole < part
    }

    fn draw(&mut self, weights: &[f64]) -> usize {
        let target = self.uniform() * weights.iter().sum::<f64>();
        let mut reached = 0.0;
        let found = weights.iter().position(|&weight| {
            reached += weight;
            target < reached
        });
        // Only where rounding kept the sum below the target.
        found.or_else(|| weights.iter().rposition(|&weight| weight > 0.0)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decisions_are_uniform_and_independent_of_the_seed_next_door() {
        let mut sums = [0.0; 3];
        for seed in 0..400 {
            let mut coin = Seeded::new(seed, 1 << 40);
            for _ in 0..100 {
                let (u, flip) = (coin.uniform(), coin.flip(0.25, 1.0));
                assert!((0.0..1.0).contains(&u));
                sums = [sums[0] + u, sums[1] + u * u, sums[2] + f64::from(u8::from(flip))];
            }
        }
        let [mean, square, share] = sums.map(|sum| sum / 40_000.0);
        assert!((mean - 0.5).abs() < 0.006 && (square - 1.0 / 3.0).abs() < 0.006, "{mean} {square}");
        assert!((share - 0.25).abs() < 0.009, "{share}");
    }
}
