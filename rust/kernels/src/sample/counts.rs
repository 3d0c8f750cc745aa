//! Which tokens a sequence holds, kept incrementally, and the penalties they bring.

use std::collections::HashMap;

use super::Sampling;

/// Occurrences of each distinct token in a prompt and its output.
#[derive(Clone, Debug, Default)]
pub struct TokenCounts {
    places: HashMap<u32, usize>,
    tokens: Vec<TokenCount>,
}

#[derive(Clone, Copy, Debug)]
struct TokenCount {
    token: u32,
    prompt: u32,
    output: u32,
}

impl TokenCounts {
    /// The counts of a prompt and an output.
    pub fn of(prompt: &[u32], output: &[u32]) -> TokenCounts {
        let mut counts = TokenCounts::default();
        for &token in prompt {
            counts.entry(token).prompt += 1;
        }
        for &token in output {
            counts.entry(token).output += 1;
        }
        counts
    }

    /// Counts a token of the output.
    pub fn push(&mut self, token: u32) {
        self.entry(token).output += 1;
    }

    /// Takes back a token of the output (a rejected draft); one that was never pushed stays at zero.
    pub fn remove(&mut self, token: u32) {
        let entry = self.entry(token);
        entry.output = entry.output.saturating_sub(1);
    }

    fn entry(&mut self, token: u32) -> &mut TokenCount {
        let place = *self.places.entry(token).or_insert(self.tokens.len());
        if place == self.tokens.len() {
            self.tokens.push(TokenCount { token, prompt: 0, output: 0 });
        }
        &mut self.tokens[place]
    }

    /// Applies the three penalties; returns what the changed logits were.
    pub(super) fn penalise(&self, logits: &mut [f32], sampling: &Sampling<'_>) -> Vec<(u32, f32)> {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = *sampling;
        if repetition_penalty == 1.0 && presence_penalty == 0.0 && frequency_penalty == 0.0 {
            return Vec::new();
        }
        let mut raw = Vec::with_capacity(self.tokens.len());
        for &TokenCount { token, prompt, output } in &self.tokens {
            let Some(logit) = logits.get_mut(token as usize).filter(|_| prompt + output > 0) else { continue };
            raw.push((token, *logit));
            *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            if output > 0 {
                *logit -= frequency_penalty * output as f32;
                *logit -= presence_penalty;
            }
        }
        raw
    }
}
