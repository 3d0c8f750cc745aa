//! One effort for every model family: what the chat template is given, which budget bounds the thinking, what is said
//! in words, and what of the request could not be honoured.

use super::families::Dialect;
use crate::error::Error;
use serde_json::{Map, Value, json};

/// How much a model is to think, from nothing to everything: the names that mistral-common and vLLM use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Effort {
    /// Not at all.
    None,
    /// A line or two.
    Minimal,
    /// The steps that the answer needs.
    Low,
    /// What most families do by default.
    Medium,
    /// Thoroughly.
    High,
    /// More than thoroughly.
    XHigh,
    /// As much as the model can.
    Max,
}

impl Effort {
    /// Every effort, ascending.
    pub const ALL: [Effort; 7] =
        [Effort::None, Effort::Minimal, Effort::Low, Effort::Medium, Effort::High, Effort::XHigh, Effort::Max];

    /// The effort of that name.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] for any other name.
    pub fn parse(name: &str) -> Result<Effort, Error> {
        let expected = || Effort::ALL.map(Effort::name).join(", ");
        Effort::ALL.into_iter().find(|effort| effort.name() == name).ok_or_else(|| Error::Argument {
            name: "effort",
            got: format!("{name:?}"),
            expected: format!("one of {}", expected()),
        })
    }

    /// The effort that a template means by a word of its own: families call "none" differently.
    pub(super) fn of_word(word: &str) -> Option<Effort> {
        match word.to_ascii_lowercase().as_str() {
            "no_think" | "off" | "disabled" | "disable" => Some(Effort::None),
            other => Effort::ALL.into_iter().find(|effort| effort.name() == other),
        }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Effort::None => "none",
            Effort::Minimal => "minimal",
            Effort::Low => "low",
            Effort::Medium => "medium",
            Effort::High => "high",
            Effort::XHigh => "xhigh",
            Effort::Max => "max",
        }
    }

    /// The part of the room for thinking that a family without levels may use, as a quotient.
    const fn share(self) -> (usize, usize) {
        match self {
            Effort::None => (0, 1),
            Effort::Minimal => (1, 16),
            Effort::Low => (1, 8),
            Effort::Medium => (1, 4),
            Effort::High => (1, 2),
            Effort::XHigh => (2, 3),
            Effort::Max => (4, 5),
        }
    }

    /// What the model is told in words.
    pub const fn concise_prompt(self) -> Option<&'static str> {
        match self {
            Effort::Minimal => {
                Some("Think only as much as you must, a line or two at most, and then give the answer at once.")
            }
            Effort::Low => Some(
                "Keep your reasoning short: take only the steps that the answer needs, do not restate the problem, \
                 check nothing twice, and then answer.",
            ),
            Effort::Medium => Some(
                "Reason as far as the problem calls for: be direct where it is easy and careful where it is hard. Leave \
                 out restatements and repeated checks, but never a step that the answer depends on.",
            ),
            Effort::None | Effort::High | Effort::XHigh | Effort::Max => None,
        }
    }
}

/// Where the concise prompt goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Behind the system message, or as one.
    System,
    /// Behind the last user message: a system message would be refused, dropped, or displace the template's own.
    User,
}

/// What bounds the tokens of an answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Most tokens that may be generated, thinking and answer: the smaller of `max_tokens` and what is left of the context.
    pub tokens: Option<usize>,
    /// Tokens kept for the answer; the larger of 256 and a tenth by default.
    pub answer_reserve: Option<usize>,
    /// A budget that the caller chose; it takes the place of the family's share.
    pub budget: Option<usize>,
}

impl Limits {
    fn reserve(&self, tokens: usize) -> usize {
        self.answer_reserve.unwrap_or(256.max(tokens.div_ceil(10)))
    }
}

/// How a request for an effort is honoured.
#[derive(Clone, Debug, PartialEq)]
pub struct EffortPlan {
    /// What was asked for.
    pub effort: Effort,
    /// What the template is told, if it knows levels.
    pub level: Option<Effort>,
    /// Variables for the chat template.
    pub template_kwargs: Map<String, Value>,
    /// What the model is told in words.
    pub suffix: Option<&'static str>,
    /// Most tokens of thinking; whoever decodes must keep to it.
    pub budget: Option<usize>,
    /// What of the request was changed or left undone.
    pub warnings: Vec<String>,
    /// What was done, in words.
    pub summary: String,
}

impl Dialect {
    /// How this family honours `effort`.
    ///
    /// # Errors
    ///
    /// When `strict`, [`Error::Unsupported`] where nothing can honour it: it says what would work. Otherwise what is
    /// left undone stands in [`EffortPlan::warnings`].
    pub fn plan(&self, effort: Effort, limits: &Limits, strict: bool) -> Result<EffortPlan, Error> {
        let mut plan = Planning {
            dialect: self,
            limits,
            strict,
            done: Vec::new(),
            plan: EffortPlan {
                effort,
                level: None,
                template_kwargs: Map::new(),
                suffix: None,
                budget: None,
                warnings: Vec::new(),
                summary: String::new(),
            },
        };
        if !self.thinks() {
            plan.without_thinking()?;
        } else if effort == Effort::None && self.switch.is_some() {
            plan.switch(false);
        } else if self.levels.is_empty() {
            plan.share()?;
        } else {
            plan.level()?;
        }
        let mut planned = plan.plan;
        if planned.budget.is_none() && self.thinks() && limits.budget.is_some() {
            planned.budget = limits.budget;
            plan.done.push(format!("at most {} tokens of thinking, as asked", limits.budget.unwrap_or_default()));
        }
        planned.summary = plan.done.join("; ");
        Ok(planned)
    }
}

struct Planning<'d> {
    dialect: &'d Dialect,
    limits: &'d Limits,
    strict: bool,
    done: Vec<String>,
    plan: EffortPlan,
}

impl Planning<'_> {
    /// What can't be honoured: an error, or a warning that says what is done instead.
    fn refuse(&mut self, got: String, works: String, instead: &str) -> Result<(), Error> {
        if self.strict {
            return Err(Error::Unsupported { got, works });
        }
        self.plan.warnings.push(format!("{got} is not supported: {instead}"));
        Ok(())
    }

    fn wish(&self) -> String {
        format!("effort={:?} with the {} family", self.plan.effort.name(), self.dialect.family)
    }

    fn set(&mut self, variable: &str, value: &Value) {
        self.done.push(format!("{variable}={value}"));
        self.plan.template_kwargs.insert(variable.to_owned(), value.clone());
    }

    fn switch(&mut self, on: bool) {
        let Some(switch) = &self.dialect.switch else { return };
        match if on { switch.on.as_ref() } else { Some(&switch.off) } {
            Some(value) => self.set(&switch.variable, value),
            None => self.done.push(format!("{} left at its default", switch.variable)),
        }
    }

    fn say(&mut self) {
        self.plan.suffix = self.plan.effort.concise_prompt();
        if self.plan.suffix.is_some() {
            let place = match self.dialect.placement {
                Placement::System => "system",
                Placement::User => "last user",
            };
            self.done.push(format!("concise prompt in the {place} message"));
        }
    }

    /// A model that does not think: there is nothing to switch, and words are all there is.
    fn without_thinking(&mut self) -> Result<(), Error> {
        let effort = self.plan.effort;
        if effort == Effort::None {
            self.done.push("nothing to do: the chat template knows no thinking".to_owned());
            return Ok(());
        }
        let got = format!("effort={:?} of a model whose chat template knows no thinking", effort.name());
        let thinks = "if the model thinks all the same, say so (thinks=True)";
        if effort.concise_prompt().is_some() {
            let works = format!("strict=False tells the model in words to be brief; {thinks}");
            self.refuse(got, works, "the model is only told in words to be brief")?;
            self.say();
        } else {
            self.refuse(got, format!("use a reasoning model; {thinks}"), "nothing is changed")?;
            self.done.push("nothing".to_owned());
        }
        Ok(())
    }

    /// A family without levels: thinking is switched on and gets a share of the room.
    fn share(&mut self) -> Result<(), Error> {
        if !self.bound()? {
            return Ok(());
        }
        self.switch(true);
        if let (Some(variable), Some(budget)) = (&self.dialect.budget, self.plan.budget) {
            self.set(variable, &json!(budget));
        }
        self.say();
        Ok(())
    }

    /// A family with levels: the nearest, upwards where two are as near. A higher one than was asked for is bounded by
    /// the share of what was asked for.
    fn level(&mut self) -> Result<(), Error> {
        let effort = self.plan.effort;
        let rank = |level: Effort| ((level as i32 - effort as i32).abs(), level < effort);
        let levels = &self.dialect.levels;
        let Some((level, word)) = levels.values.iter().min_by_key(|(level, _)| rank(*level)).cloned() else {
            return Ok(());
        };
        self.plan.level = Some(level);
        if level != effort {
            let known: Vec<&str> = levels.values.iter().map(|(level, _)| level.name()).collect();
            let (wish, known) = (self.wish(), known.join(", "));
            let nearest = format!("{wish}: it knows {known}; taken as {:?}", level.name());
            self.plan.warnings.push(nearest);
        }
        if level > effort && !self.bound()? {
            return Ok(());
        }
        if level != Effort::None {
            self.switch(true);
        }
        match &word {
            Some(word) => self.set(&levels.variable, &json!(word)),
            None => self.done.push(format!("{} left at its default", levels.variable)),
        }
        Ok(())
    }

    /// Sets the budget of the effort that was asked for; whether anything is left to be planned.
    fn bound(&mut self) -> Result<bool, Error> {
        let effort = self.plan.effort;
        let (share, of) = effort.share();
        if let Some(budget) = self.limits.budget {
            self.plan.budget = Some(budget);
            self.done.push(format!("at most {budget} tokens of thinking, as asked"));
            return Ok(true);
        }
        if effort == Effort::None {
            self.plan.budget = Some(0);
            self.done.push("no tokens of thinking: closed where it begins".to_owned());
            return Ok(true);
        }
        let Some(tokens) = self.limits.tokens else {
            let works = "give max_tokens: this family's effort is a share of it".to_owned();
            self.refuse(self.wish() + " without a limit of tokens", works, "thinking is not bounded")?;
            return Ok(true);
        };
        let reserve = self.limits.reserve(tokens);
        let room = tokens.saturating_sub(reserve);
        let budget = room * share / of;
        if budget > 0 {
            self.plan.budget = Some(budget);
            self.done.push(format!("at most {budget} tokens of thinking, {share}/{of} of {room}"));
            return Ok(true);
        }
        let needed = self.limits.answer_reserve.unwrap_or(256) + of.div_ceil(share);
        let got = format!("{} within {tokens} tokens, {reserve} of them kept for the answer,", self.wish());
        let works = format!("give max_tokens of at least {needed}, or effort=\"none\"");
        self.refuse(got, works, "thinking is switched off")?;
        self.plan.budget = Some(0);
        self.switch(false);
        self.done.push("no tokens of thinking".to_owned());
        Ok(false)
    }
}
