//! Rendered text equals what transformers rendered (`fixtures/templates.py`), byte for byte, and fails where it failed.

use crate::shared::{data, fixture};
use farthing::load::{ChatTemplate, TemplateError, TemplateOptions};
use serde_json::{Map, Value, json};

/// The source of a template of the fixture: its own, or a file that is shared.
fn source(template: &Value) -> Option<String> {
    if let Some(source) = template["source"].as_str() {
        return Some(source.to_owned());
    }
    let path = data(&format!("templates/{}", template["name"].as_str()?))?;
    Some(std::fs::read_to_string(path).expect("templates are UTF-8"))
}

fn options(fixture: &Value, conversation: &Value) -> TemplateOptions {
    let mut extra: Map<String, Value> = conversation["variables"].as_object().expect("variables").clone();
    TemplateOptions {
        add_generation_prompt: extra.remove("add_generation_prompt").is_none_or(|flag| flag == true),
        tools: extra.remove("tools"),
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        extra,
        now: fixture["now"].as_i64(),
    }
}

#[test]
fn equal_to_transformers() {
    let fixture = fixture("templates.json");
    let (mut cases, mut templates, mut wrong) = (0, 0, Vec::new());
    for entry in fixture["templates"].as_array().expect("a list") {
        let name = &entry["name"];
        let Some(source) = source(entry) else { continue };
        templates += 1;
        let template = ChatTemplate::new(&source).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (case, expected) in entry["cases"].as_object().expect("cases") {
            cases += 1;
            let conversation = &fixture["conversations"][case];
            let got = template.render(&conversation["messages"], &options(&fixture, conversation));
            let agrees = match (&got, expected["text"].as_str(), expected["raised"].as_str()) {
                (Ok(got), Some(text), _) => got == text,
                (Err(TemplateError::Raised { got }), _, Some(message)) => got == message,
                (Err(TemplateError::Render { .. }), None, None) => true,
                _ => false,
            };
            if !agrees {
                wrong.push(format!("{name}, {case}:\n  expected {expected}\n  got      {got:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {cases} cases:\n{}", wrong.len(), wrong.join("\n"));
    assert!(templates >= 15 && cases >= 100, "only {templates} templates and {cases} cases");
}

#[test]
fn messages_are_a_list_of_objects() {
    let template = ChatTemplate::new("{{ messages }}").expect("compiles");
    let render = |messages| template.render(&messages, &TemplateOptions::default());
    assert_eq!(render(json!("text")), Err(TemplateError::Messages { got: "a string".into() }));
    assert_eq!(render(json!([1])), Err(TemplateError::Messages { got: "a list with a number".into() }));
    assert_eq!(render(json!([])), Ok("[]".into()));
}

#[test]
fn extra_variables_reach_the_template() {
    let template = ChatTemplate::new("{{ effort }} {{ flags.a }} {{ missing is defined }}").expect("compiles");
    let extra = json!({"effort": "high", "flags": {"a": [1]}}).as_object().expect("an object").clone();
    let options = TemplateOptions { extra, ..TemplateOptions::default() };
    assert_eq!(template.render(&json!([]), &options), Ok("high [1] False".into()));
}
