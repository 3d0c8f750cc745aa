//! How model families are told how much to think, found in their chat templates: which variables are read, which values
//! are known, and, by rendering, which of them change anything.

use super::effort::{Effort, Placement};
use super::pairs::PAIRS;
use crate::load::{ChatTemplate, TemplateOptions};
use serde_json::{Map, Value, json};
use std::borrow::Cow;

/// Variables that take the name of a level.
const LEVELS: [&str; 3] = ["reasoning_effort", "reasoning_strength", "thinking_effort"];
/// Variables that switch thinking on or off.
const SWITCHES: [&str; 2] = ["enable_thinking", "thinking"];
/// The variable that takes a number of tokens.
const BUDGET: &str = "thinking_budget";
/// A value that no template knows.
const UNKNOWN: &str = "farthing-unknown";

/// A family by what its templates alone contain: all of `marks`. Earlier ones go first.
struct Family {
    name: &'static str,
    marks: &'static [&'static str],
    /// Levels of families whose templates print whatever they are given.
    levels: &'static [Effort],
}

const FAMILIES: [Family; 13] = [
    Family { name: "gpt-oss", marks: &["<|channel|>analysis"], levels: &[Effort::Low, Effort::Medium, Effort::High] },
    Family { name: "Mistral", marks: &["[INST]"], levels: &[] },
    Family { name: "SmolLM3", marks: &["Reasoning Mode:"], levels: &[] },
    Family { name: "LFM2", marks: &["<|tool_list_start|>"], levels: &[] },
    Family { name: "DeepSeek", marks: &["<｜Assistant｜>"], levels: &[] },
    Family { name: "GLM", marks: &["[gMASK]"], levels: &[] },
    Family { name: "Hunyuan", marks: &["<｜hy_"], levels: &[] },
    Family { name: "Seed", marks: &["<seed:"], levels: &[] },
    Family { name: "Kimi", marks: &["<|im_middle|>"], levels: &[] },
    Family { name: "Gemma", marks: &["<start_of_turn>"], levels: &[] },
    Family {
        name: "Muse",
        marks: &["reasoning_strength"],
        levels: &[Effort::Low, Effort::Medium, Effort::High, Effort::XHigh],
    },
    Family { name: "Qwen3", marks: &["<|im_start|>", "enable_thinking", "<tool_call>"], levels: &[] },
    Family { name: "<think>", marks: &["<think>"], levels: &[] },
];
/// What a template that prints any level is trusted to mean.
const USUAL: [Effort; 3] = [Effort::Low, Effort::Medium, Effort::High];

/// The variable that takes a level, and the words that it knows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Levels {
    /// Its name.
    pub variable: String,
    /// Levels, ascending, each with the word to give, or without when the variable is to be left out.
    pub values: Vec<(Effort, Option<String>)>,
}

impl Levels {
    /// Whether the template knows none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

/// A variable that switches thinking.
#[derive(Clone, Debug, PartialEq)]
pub struct Switch {
    /// Its name.
    pub variable: String,
    /// The value that switches thinking off.
    pub off: Value,
    /// The value that switches it on; `None` leaves the variable out.
    pub on: Option<Value>,
}

/// How a model is told how much to think.
///
/// ```
/// use farthing::load::ChatTemplate;
/// use farthing::reasoning::{Dialect, Effort, Limits};
///
/// let template = ChatTemplate::new(
///     "{{ messages[-1].content }}{% if enable_thinking is false %}<think></think>{% else %}<think>{% endif %}",
/// )?;
/// let dialect = Dialect::of(&template, None, None);
/// let limits = Limits { tokens: Some(4096), ..Limits::default() };
/// let plan = dialect.plan(Effort::None, &limits, true)?;
/// assert_eq!(plan.template_kwargs["enable_thinking"], false);
/// let plan = dialect.plan(Effort::High, &limits, true)?;
/// assert_eq!((&plan.template_kwargs["enable_thinking"], plan.budget), (&true.into(), Some(1843)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Dialect {
    /// The family's name.
    pub family: Cow<'static, str>,
    /// The levels that the template knows.
    pub levels: Levels,
    /// The switch that it has.
    pub switch: Option<Switch>,
    /// The variable that takes a budget.
    pub budget: Option<String>,
    /// What begins and ends the thinking, as text.
    pub markers: Option<(&'static str, &'static str)>,
    /// Whether the model thinks, whatever its template shows.
    pub assumed: Option<bool>,
    /// Where words for the model go.
    pub placement: Placement,
}

impl Dialect {
    /// Reads a template. `bos` and `eos` are the tokens it may print.
    pub fn of(template: &ChatTemplate, bos: Option<&str>, eos: Option<&str>) -> Dialect {
        let probe = Probe { template, bos, eos };
        let source = template.source();
        let family = FAMILIES.iter().find(|family| family.marks.iter().all(|mark| source.contains(mark)));
        let mut dialect = Dialect {
            family: family.map_or("plain", |family| family.name).into(),
            levels: Levels::default(),
            switch: None,
            budget: None,
            markers: PAIRS.iter().find(|pair| source.contains(pair.start)).map(|pair| (pair.start, pair.end)),
            assumed: None,
            placement: probe.placement(),
        };
        dialect.switch = SWITCHES.iter().find_map(|variable| probe.switch(variable));
        let on = dialect.switch.as_ref().and_then(|switch| Some((switch.variable.clone(), switch.on.clone()?)));
        let on: Map<String, Value> = on.into_iter().collect();
        let trusted = family.map_or(&[][..], |family| family.levels);
        for variable in LEVELS {
            match probe.levels(variable, &on, trusted) {
                Found::Levels(levels) => dialect.levels = levels,
                Found::Switch(switch) if dialect.switch.is_none() => dialect.switch = Some(switch),
                Found::Switch(_) | Found::Nothing => continue,
            }
            break;
        }
        if template.uses(BUDGET).read && probe.differs(&on, (BUDGET, &json!(512)), (BUDGET, &json!(4096))) {
            dialect.budget = Some(BUDGET.to_owned());
        }
        dialect
    }

    /// A family whose levels are known from elsewhere: mistral-common's tokenizers carry a list, which may be empty.
    pub fn of_levels(family: &str, variable: &str, levels: &[Effort]) -> Dialect {
        let mut values: Vec<_> = levels.iter().map(|level| (*level, Some(level.name().to_owned()))).collect();
        values.sort();
        let levels = Levels { variable: variable.to_owned(), values };
        Dialect {
            family: family.to_owned().into(),
            levels,
            switch: None,
            budget: None,
            markers: None,
            assumed: None,
            placement: Placement::System,
        }
    }

    /// Whether the model thinks, as far as is known.
    pub fn thinks(&self) -> bool {
        let variables = self.switch.is_some() || self.budget.is_some() || !self.levels.is_empty();
        self.assumed.unwrap_or(variables || self.markers.is_some())
    }
}

type Words = Vec<(Effort, Option<String>)>;

fn add(words: &mut Words, effort: Effort, word: &str) {
    if !words.iter().any(|(known, _)| *known == effort) {
        words.push((effort, Some(word.to_owned())));
    }
}

enum Found {
    Levels(Levels),
    Switch(Switch),
    Nothing,
}

/// Renders a small conversation.
struct Probe<'t> {
    template: &'t ChatTemplate,
    bos: Option<&'t str>,
    eos: Option<&'t str>,
}

impl Probe<'_> {
    fn messages(&self, messages: &Value, variables: Map<String, Value>) -> Option<String> {
        let options = TemplateOptions {
            add_generation_prompt: true,
            bos_token: self.bos.map(str::to_owned),
            eos_token: self.eos.map(str::to_owned),
            extra: variables,
            now: Some(0),
            ..TemplateOptions::default()
        };
        self.template.render(messages, &options).ok()
    }

    fn render(&self, others: &Map<String, Value>, variable: &str, value: Option<&Value>) -> Option<String> {
        let mut variables = others.clone();
        if let Some(value) = value {
            variables.insert(variable.to_owned(), value.clone());
        }
        self.messages(&json!([{"role": "user", "content": "Hello"}]), variables)
    }

    fn differs(&self, others: &Map<String, Value>, one: (&str, &Value), other: (&str, &Value)) -> bool {
        let one = self.render(others, one.0, Some(one.1));
        let other = self.render(others, other.0, Some(other.1));
        one.is_some() && other.is_some() && one != other
    }

    fn switch(&self, variable: &str) -> Option<Switch> {
        let (on, off) = (json!(true), json!(false));
        let found = self.template.uses(variable).read && self.differs(&Map::new(), (variable, &on), (variable, &off));
        found.then(|| Switch { variable: variable.to_owned(), off, on: Some(on) })
    }

    /// What the template makes of each word, with thinking on.
    fn levels(&self, variable: &str, on: &Map<String, Value>, trusted: &[Effort]) -> Found {
        let uses = self.template.uses(variable);
        if !uses.read {
            return Found::Nothing;
        }
        let rendered = |word: &str| self.render(on, variable, Some(&json!(word)));
        let (unset, unknown) = (self.render(on, variable, None), rendered(UNKNOWN));
        let written: Vec<&str> = uses.literals.iter().map(String::as_str).collect();
        let mut words = Words::new();
        let prints = unknown.as_ref().is_some_and(|text| text.contains(UNKNOWN));
        for word in &written {
            if let Some(effort) = Effort::of_word(word)
                && rendered(word).is_some()
            {
                add(&mut words, effort, word);
            }
        }
        if unknown.is_none() {
            // The template refuses what it does not know: what it accepts, it knows.
            for effort in Effort::ALL {
                if rendered(effort.name()).is_some() {
                    add(&mut words, effort, effort.name());
                }
            }
        } else if prints && words.len() < 2 {
            let levels = if trusted.is_empty() { &USUAL[..] } else { trusted };
            for level in levels {
                add(&mut words, *level, level.name());
            }
        }
        let texts: Vec<Option<String>> = words.iter().map(|(_, word)| word.as_deref().and_then(&rendered)).collect();
        if !texts.contains(&unset) && unset.is_some() {
            // Leaving the variable out is a level of its own, between those that the template names.
            match words.as_slice() {
                [(Effort::None, Some(off))] => {
                    return Found::Switch(Switch { variable: variable.to_owned(), off: json!(off), on: None });
                }
                _ if !words.iter().any(|(effort, _)| *effort == Effort::Medium) => words.push((Effort::Medium, None)),
                _ => {}
            }
        } else if texts.iter().all(|text| *text == texts[0]) {
            return Found::Nothing;
        }
        words.sort();
        if words.len() < 2 {
            Found::Nothing
        } else {
            Found::Levels(Levels { variable: variable.to_owned(), values: words })
        }
    }

    /// A system message is shown and takes nothing away, or words go to the user's.
    fn placement(&self) -> Placement {
        const WORDS: &str = "Be kind.";
        let user = json!({"role": "user", "content": "Hello"});
        let without = self.messages(&json!([user]), Map::new());
        let with = self.messages(&json!([{"role": "system", "content": WORDS}, user]), Map::new());
        let (Some(without), Some(with)) = (without, with) else { return Placement::User };
        if !with.contains(WORDS) {
            return Placement::User;
        }
        let head = without.bytes().zip(with.bytes()).take_while(|(a, b)| a == b).count();
        let rest = without.len().min(with.len()) - head;
        let tail = without.bytes().rev().zip(with.bytes().rev()).take(rest).take_while(|(a, b)| a == b).count();
        let lost = without.as_bytes().get(head..without.len() - tail).unwrap_or_default();
        // Line ends and headers of roles are no message.
        if lost.iter().filter(|byte| byte.is_ascii_alphabetic()).count() > WORDS.len() {
            Placement::User
        } else {
            Placement::System
        }
    }
}
