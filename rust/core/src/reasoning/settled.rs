//! Whether the answer has settled, from looks ahead.

use super::policy::Probe;
use farthing_kernels::math::{exp, log};

/// What the looks ahead of one sequence have shown.
///
/// ```
/// use farthing::reasoning::{Probe, Settled};
/// let probe = Probe { entropy: 0.5, ..Probe::default() };
/// let mut settled = Settled::default();
/// assert!(!settled.entropy(&probe, 2.0));
/// assert!(settled.entropy(&probe, 0.1));
/// assert!(!settled.answer(&probe, "42", 0.8));
/// assert!(settled.answer(&probe, " 42", 0.7), "the same answer twice");
/// ```
#[derive(Clone, Debug, Default)]
pub struct Settled {
    looks: u32,
    mean: f32,
    variance: f32,
    last: Option<String>,
}

impl Settled {
    /// Takes in the entropy of what would follow; whether a short answer is worth its tokens.
    pub fn entropy(&mut self, probe: &Probe, nats: f32) -> bool {
        let alpha = probe.alpha;
        self.looks += 1;
        if self.looks == 1 {
            (self.mean, self.variance) = (nats, 0.0);
        } else {
            self.mean += alpha * (nats - self.mean);
            let away = nats - self.mean;
            self.variance = alpha * away * away + (1.0 - alpha) * self.variance;
        }
        let steady = self.looks as f32 >= 4.0 / alpha && self.variance < probe.variance;
        let passes = nats < probe.entropy || steady;
        if !passes {
            self.last = None;
        }
        passes
    }

    /// Takes in a short answer and the geometric mean of its tokens' probabilities; whether thinking may end.
    pub fn answer(&mut self, probe: &Probe, text: &str, confidence: f32) -> bool {
        let text = text.trim();
        let agrees = self.last.as_deref() == Some(text);
        self.last = Some(text.to_owned());
        !text.is_empty() && (agrees || confidence > probe.confidence)
    }

    /// Looks so far.
    pub fn looks(&self) -> u32 {
        self.looks
    }
}

/// Entropy in nats of the softmax of `logits`, its greatest probability and the token that has it, the lower id among
/// equals. Sums ascend in f64.
pub fn entropy(logits: &[f32]) -> (f32, f32, u32) {
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = token;
        }
    }
    let greatest = logits[best];
    let (mut mass, mut moment) = (0.0f64, 0.0f64);
    for &logit in logits {
        let below = logit - greatest;
        if below > -80.0 {
            let weight = f64::from(exp(below));
            mass += weight;
            moment += weight * f64::from(below);
        }
    }
    let nats = f64::from(log(mass as f32)) - moment / mass;
    (nats as f32, (1.0 / mass) as f32, best as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropies_are_those_of_the_definition() {
        let (nats, greatest, token) = entropy(&[0.0; 8]);
        assert!((nats - 8f32.ln()).abs() < 1e-6 && (greatest - 0.125).abs() < 1e-7 && token == 0);
        let (nats, greatest, token) = entropy(&[f32::NEG_INFINITY, 3.0, 3.0 + 2f32.ln(), -200.0]);
        let expected = -(1.0 / 3.0 * (1.0f32 / 3.0).ln() + 2.0 / 3.0 * (2.0f32 / 3.0).ln());
        assert!((nats - expected).abs() < 1e-6 && (greatest - 2.0 / 3.0).abs() < 1e-6 && token == 2);
    }

    #[test]
    fn the_variance_counts_from_the_twentieth_look_on() {
        let probe = Probe { entropy: 0.0, variance: 0.01, ..Probe::default() };
        let mut settled = Settled::default();
        let passed: Vec<bool> = (0..25).map(|_| settled.entropy(&probe, 1.0)).collect();
        assert_eq!(passed.iter().position(|&passed| passed), Some(19));
        // m = 1.2, v = 0.2 · 0.8² by the published recurrence.
        assert!(!settled.entropy(&probe, 2.0));
        assert!((settled.mean - 1.2).abs() < 1e-6 && (settled.variance - 0.128).abs() < 1e-6);
    }

    #[test]
    fn an_empty_answer_settles_nothing_and_a_doubt_between_two_counts() {
        let probe = Probe::default();
        let mut settled = Settled::default();
        assert!(!settled.answer(&probe, " ", 1.0) && !settled.answer(&probe, "", 1.0));
        assert!(!settled.answer(&probe, "7", 0.5));
        assert!(!settled.entropy(&probe, 3.0));
        assert!(!settled.answer(&probe, "7", 0.5), "the look between them did not pass");
        assert!(settled.answer(&probe, "8", 0.96));
    }
}
