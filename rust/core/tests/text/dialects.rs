//! What templates do with variables, and what efforts make of it; `tests/test_effort.py` compares prompts.

use crate::corpus::seeds;
use farthing::error::Error;
use farthing::load::ChatTemplate;
use farthing::reasoning::{Dialect, Effort, Limits};

fn literals(source: &str) -> Vec<String> {
    let uses = ChatTemplate::new(source).expect("compiles").uses("effort");
    assert!(uses.read, "{source}");
    uses.literals.into_iter().collect()
}

#[test]
fn literals_are_found_wherever_they_stand() {
    for source in [
        "{% if effort == 'a' or 'b' != effort %}{% endif %}",
        "{% if effort in ['a', 'b'] %}{% endif %}",
        "{% if effort not in ('a', 'b') %}{% endif %}",
        "{% set known = ['a', 'b'] %}{% if effort in known %}{% endif %}",
        "{% if effort | default('a') | lower == 'b' %}{% endif %}",
        "{% if effort is not defined %}{% set effort = 'a' %}{% endif %}{{ 'x' if effort is eq('b') }}",
        "{% set level = effort or 'a' %}{% set ns.level = level %}{% if ns.level == 'b' %}{% endif %}",
        "{% set level = effort if effort is defined else 'a' %}{% if level.strip() == 'b' %}{% endif %}",
        "{{ {'a': 1, 'b': 2}[effort] }}",
        "{% set steps = {'a': 1, 'b': 2} %}{{ steps.get(effort, 0) }}",
        "{% macro say(level) %}{% if level == 'a' %}{% elif level == 'b' %}{% endif %}{% endmacro %}{{ say(effort) }}",
        "{{ say(effort) }}{% macro say(level) %}{% if level == 'a' %}{% elif level == 'b' %}{% endif %}{% endmacro %}",
        "{% for m in messages %}{% with level = effort %}{{ level == 'a' }}{{ 'b' == level }}{% endwith %}{% endfor %}",
    ] {
        assert_eq!(literals(source), ["a", "b"], "{source}");
    }
    assert_eq!(literals("{{ effort ~ 'a' }}{{ m.effort == 'b' }}{{ other == 'c' }}"), [""; 0]);
    let message = ChatTemplate::new("{{ m.effort == 'a' }}{% set m.effort = 'b' %}").expect("compiles");
    assert!(!message.uses("effort").read);
}

#[test]
fn any_template_has_a_dialect_and_every_effort_a_plan_or_a_reason() {
    let limits = Limits { tokens: Some(4096), ..Limits::default() };
    for seed in seeds("template_renders_or_errors") {
        let Ok(template) = ChatTemplate::new(&String::from_utf8_lossy(&seed)) else { continue };
        let dialect = Dialect::of(&template, Some("<s>"), None);
        for effort in Effort::ALL {
            match dialect.plan(effort, &limits, true) {
                Ok(plan) => assert!(!plan.summary.is_empty()),
                Err(Error::Unsupported { works, .. }) => assert!(works.contains("thinks=True"), "{works}"),
                Err(other) => panic!("{other}"),
            }
            assert!(dialect.plan(effort, &limits, false).is_ok());
        }
    }
}
