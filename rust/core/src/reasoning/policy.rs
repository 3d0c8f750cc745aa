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

/// When and how a look ahead finds out that the answer has settled.
///
/// At the end of a paragraph, or every so many tokens, `suffix` is read behind the text. The first stage looks at the
/// entropy of what would come next (EAT, <https://arxiv.org/abs/2509.26522>): it passes below `entropy`, or when its
/// moving variance falls below `variance`. Only then the second stage writes a short answer (DEER,
/// <https://arxiv.org/abs/2504.15895>): thinking ends when the geometric mean of its tokens' probabilities exceeds
/// `confidence`, or when it is the answer of the look before. Nothing of it stays in the text.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Look every so many thinking tokens; `None` looks at the end of each paragraph.
    pub every: Option<u32>,
    /// What is read behind the text; `None` is the end of thinking and a lead up to the answer.
    pub suffix: Option<String>,
    /// Nats below which the first stage passes.
    pub entropy: f32,
    /// Variance of the entropy, in nats², below which it passes too.
    pub variance: f32,
    /// Weight of the latest entropy in the moving mean and variance, in (0, 1]; the variance counts from 4 / `alpha` on.
    pub alpha: f32,
    /// Geometric mean probability above which the short answer settles it.
    pub confidence: f32,
    /// Most tokens of the short answer.
    pub answer_tokens: u32,
    /// Text at which the short answer ends.
    pub until: String,
    /// Most looks; the model thinks on undisturbed after that.
    pub most: u32,
}

impl Default for Probe {
    fn default() -> Self {
        Probe {
            every: None,
            suffix: None,
            entropy: 0.5,
            variance: 1e-3,
            alpha: 0.2,
            confidence: 0.95,
            answer_tokens: 20,
            until: "\n".to_owned(),
            most: 100,
        }
    }
}

impl Probe {
    /// Whether every value is in range; the error names the first that is not.
    pub fn validate(&self) -> Result<(), Error> {
        let positive = |value: f32| value >= 0.0;
        if self.every == Some(0) {
            return Err(Error::argument("every", 0, "None or at least 1"));
        }
        if self.suffix.as_ref().is_some_and(String::is_empty) {
            return Err(Error::argument("suffix", "an empty text", "None or a text of at least one character"));
        }
        for (name, value, good, expected) in [
            ("entropy", self.entropy, positive(self.entropy), "a number ≥ 0"),
            ("variance", self.variance, positive(self.variance), "a number ≥ 0"),
            ("alpha", self.alpha, self.alpha > 0.0 && self.alpha <= 1.0, "a number in (0, 1]"),
            ("confidence", self.confidence, (0.0..=1.0).contains(&self.confidence), "a number from 0 to 1"),
        ] {
            if !good {
                return Err(Error::argument(name, value, expected));
            }
        }
        if self.answer_tokens == 0 || self.answer_tokens > 256 {
            return Err(Error::argument("answer_tokens", self.answer_tokens, "1 to 256"));
        }
        Ok(())
    }
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
    /// Looks ahead that end thinking early.
    pub probe: Option<Probe>,
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
            probe: None,
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
        self.probe.as_ref().map_or(Ok(()), Probe::validate)
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
