//! How much thinking a request wants.

use crate::error::Error;

/// How the end of thinking becomes likelier before the budget is spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ramp {
    /// In proportion to what is spent.
    Linear,
    /// Slowly, then fast, then slowly.
    Sigmoid,
}

/// What becomes of a second thinking span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reentry {
    /// It may use what is left of the budget.
    Rearm,
    /// It may not begin.
    Ban,
}

/// How much thinking a request wants and how it is ended.
///
/// `budget` counts the tokens of all thinking spans, those of a span that is open in the prompt included, markers not.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Thinking tokens after which the end is near; `None` leaves it to `cap` and to the answer's reserve.
    pub budget: Option<u32>,
    /// Thinking tokens that are never exceeded.
    pub cap: Option<u32>,
    /// Part of the budget at which the ramp begins, in [0, 1].
    pub soft_ratio: f32,
    /// How the end becomes likelier from there on.
    pub ramp: Option<Ramp>,
    /// At the ramp's end the end marker's logit is so far below the greatest.
    pub margin: f32,
    /// Tokens beyond the budget while the end of a sentence is awaited; `None` is a tenth of the budget.
    pub grace: Option<u32>,
    /// Thinking tokens before which thinking may not end.
    pub min_think: u32,
    /// Tokens of `max_tokens` kept for the answer; `None` is a quarter of them, at most 256.
    pub answer_reserve: Option<u32>,
    /// Tokens that may not come while thinking.
    pub ban: Vec<u32>,
    /// Words that may not come while thinking, whatever their case and the blanks around them.
    pub ban_words: Vec<String>,
    /// Whether thinking that goes round in circles is ended.
    pub loop_guard: bool,
    /// What becomes of a second thinking span.
    pub reentry: Reentry,
    /// The text that opens a span; `None` takes the model's own, or with `end` given the first generated token.
    pub start: Option<String>,
    /// The text that ends it; `None` takes the model's own.
    pub end: Option<String>,
    /// What is written before the end marker when thinking is ended by force; `None` takes a plain sentence.
    pub message: Option<String>,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            budget: None,
            cap: None,
            soft_ratio: 0.7,
            ramp: Some(Ramp::Sigmoid),
            margin: 0.25,
            grace: None,
            min_think: 0,
            answer_reserve: None,
            ban: Vec::new(),
            ban_words: Vec::new(),
            loop_guard: true,
            reentry: Reentry::Rearm,
            start: None,
            end: None,
            message: None,
        }
    }
}

impl Policy {
    /// At most `tokens` thinking tokens, and nothing else: no ramp, no grace, no guard.
    pub fn hard(tokens: u32) -> Policy {
        Policy { cap: Some(tokens), ramp: None, grace: Some(0), loop_guard: false, ..Policy::default() }
    }

    /// Whether every value is in range; the error names the first that is not.
    pub fn validate(&self) -> Result<(), Error> {
        if !(0.0..=1.0).contains(&self.soft_ratio) {
            return Err(Error::argument("soft_ratio", self.soft_ratio, "a number from 0 to 1"));
        }
        if !(self.margin.is_finite() && self.margin >= 0.0) {
            return Err(Error::argument("margin", self.margin, "a finite number ≥ 0"));
        }
        for (name, text) in [("start", &self.start), ("end", &self.end)] {
            if text.as_ref().is_some_and(String::is_empty) {
                return Err(Error::argument(name, "an empty text", "a text of at least one character"));
            }
        }
        if self.start.is_some() && self.end.is_none() {
            return Err(Error::argument("end", "None", "a text, as start is given"));
        }
        Ok(())
    }

    /// Budget and grace under the cap.
    pub(super) fn limits(&self) -> (u32, u32) {
        let cap = self.cap.unwrap_or(u32::MAX);
        let budget = self.budget.unwrap_or(cap).min(cap);
        let grace = match (self.grace, self.budget) {
            (Some(grace), _) => grace,
            (None, Some(budget)) => budget.div_ceil(10),
            (None, None) => 0,
        };
        (budget, grace.min(cap - budget))
    }

    /// Tokens of `max_tokens` that are the answer's.
    pub fn reserve(&self, max_tokens: usize) -> usize {
        self.answer_reserve.map_or_else(|| max_tokens.div_ceil(4).min(256), |reserve| reserve as usize)
    }
}
