//! Templates that try to run forever, to fill the memory or to reach outside.

use farthing::load::{ChatTemplate, TemplateError as Wrong, TemplateOptions};
use serde_json::json;

fn render(source: &str) -> Result<String, Wrong> {
    let messages = json!([{"role": "user", "content": "Hello"}]);
    ChatTemplate::new(source)?.render(&messages, &TemplateOptions::default())
}

/// The unit of the limit that the template reaches.
fn limit(source: &str) -> &'static str {
    match render(source) {
        Err(Wrong::Limit { what, .. } | Wrong::TooLarge { what, .. }) => what,
        other => panic!("{}: {other:.300?}", &source[..source.len().min(200)]),
    }
}

const BYTES: &str = "bytes of values";
const WORK: &str = "bytes of values to look at";

#[test]
fn endless_loops() {
    assert_eq!(limit("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"), "steps");
    assert_eq!(limit("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"), "steps");
    assert_eq!(
        limit(
            "{% set ns = namespace(x=0) %}{% for i in range(99999) %}{% for j in range(99) %}{% set ns.x = ns.x + 1 %}{% endfor %}{% endfor %}"
        ),
        "steps"
    );
    let nested = "{% for i in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}";
    assert!(matches!(render(nested), Err(Wrong::Limit { .. } | Wrong::Render { .. })));
}

#[test]
fn huge_ranges_and_texts() {
    assert!(matches!(render("{% for i in range(10**9) %}{% endfor %}"), Err(Wrong::Render { .. })));
    for source in [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ ['a'] * 10**8 }}",
        "{{ (('a' * 10**6)|list)[::2] }}",
        "{{ range(100000)|list|list|list|list|list|list|list|list|list }}",
        "{{ ('a' * 1000).replace('a', 'b' * 1000).replace('b', 'c' * 1000) }}",
        "{{ ('a' * 1000)|replace('a', 'b' * 1000)|replace('b', 'c' * 1000) }}",
        "{{ ('x' * 10000).join(range(10000)) }}",
        "{{ range(10000)|join('x' * 10000) }}",
        "{{ ('a' * 1000000).split('a') }}",
        "{{ ('a ' * 500000).split() }}",
        "{{ ('\\n' * 1000000)|indent(100, true, true) }}",
        "{{ ('\\n' * 1000000).splitlines() }}",
        "{{ [1] * 100000 * 100000 }}",
        "{% set x = [1] * 100000 %}{{ x + x + x + x + x }}",
        "{{ ('é' * 5000000)|tojson(ensure_ascii=true) }}",
        "{{ ('a' * 1000000)|sort }}",
        "{{ namespace(x='a' * 19000000).x }}",
        &format!("{{% set x %}}{{% for i in range(99999) %}}{}{{% endfor %}}{{% endset %}}", "x".repeat(400)),
    ] {
        assert_eq!(limit(source), BYTES, "{source}");
    }
}

#[test]
fn doubling() {
    for step in
        ["x ~ x", "x + x", "x * 2", "[x, x]|join", "x.replace('a', 'aa')", "'{}{}'.format(x, x)", "(x, x)|string"]
    {
        let source = format!("{{% set x = 'a' %}}{}", format!("{{% set x = {step} %}}").repeat(60));
        assert_eq!(limit(&source), BYTES, "{step}");
    }
    let captured = format!("{{% set x = 'a' %}}{}", "{% set x %}{{ x }}{{ x }}{% endset %}".repeat(60));
    assert_eq!(limit(&captured), BYTES);
    let macros = "{% macro m(x, n) %}{% if n %}{{ m(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ m('a', 60) }}";
    assert_eq!(limit(macros), BYTES);
}

#[test]
fn shared_structures_read_over_and_over() {
    // Each level holds the one below a hundred times: small to store, endless to compare or print.
    let levels = format!("{{% set x = ['abc'] * 100 %}}{}", "{% set x = [x] * 100 %}".repeat(8));
    for use_it in [
        "x == x",
        "x in [x]",
        "[x, x]|unique",
        "x|sort",
        "x is eq(x)",
        "{'k': 1}.get(x)",
        "{x: 1}",
        "x",
        "x ~ ''",
        "x|string",
        "x|tojson",
        "'{}'.format(x)",
    ] {
        let reached = limit(&format!("{levels}{{{{ {use_it} }}}}"));
        assert!([BYTES, WORK].contains(&reached), "{use_it}: {reached}");
    }
    let compare = "{% set a = 'a' * 1000000 %}{% set b = a ~ 'b' %}{% for i in range(90000) %}{% if a == b %}{% endif %}{% endfor %}";
    assert_eq!(limit(compare), WORK);
    let search = "{% set a = 'a' * 1000000 %}{% for i in range(90000) %}{% if 'b' in a %}{% endif %}{% endfor %}";
    assert_eq!(limit(search), WORK);
    let count = "{% set a = 'a' * 1000000 %}{% for i in range(90000) %}{% if a|length %}{% endif %}{% endfor %}";
    assert_eq!(limit(count), WORK);
    let index = "{% set a = 'é' * 1000000 %}{% for i in range(90000) %}{% if a[i] %}{% endif %}{% endfor %}";
    assert_eq!(limit(index), WORK);
    let method = "{% set a = 'a' * 1000000 %}{% for i in range(90000) %}{% if a.count('b') %}{% endif %}{% endfor %}";
    assert_eq!(limit(method), WORK);
}

#[test]
fn deep_recursion() {
    let recursion = |source: &str| match render(source) {
        Err(Wrong::Render { got, .. }) => assert!(got.contains("recursion"), "{got}"),
        Err(Wrong::Limit { .. }) => {}
        other => panic!("{source}: {other:?}"),
    };
    recursion("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}");
    recursion("{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}");
    recursion(
        "{% macro m() %}{{ caller() }}{% endmacro %}{% macro r() %}{% call m() %}{{ r() }}{% endcall %}{% endmacro %}{{ r() }}",
    );
    recursion("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}");
    let containers =
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
    assert_eq!(limit(containers), "containers");
    let printed =
        "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
    assert_eq!(limit(printed), "levels of containers");
    let dropped = "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = {'k': ns.x} %}{% endfor %}ok";
    assert_eq!(render(dropped), Ok("ok".into()));
}

#[test]
fn deep_sources() {
    let parses = |source: &str| match render(source) {
        Err(Wrong::Syntax { .. } | Wrong::Limit { .. } | Wrong::TooLarge { .. } | Wrong::Render { .. }) | Ok(_) => {}
        other => panic!("{other:?}"),
    };
    for n in [100, 1000, 10_000, 60_000] {
        parses(&format!("{{{{ {}1{} }}}}", "(".repeat(n), ")".repeat(n)));
        parses(&format!("{{{{ {}{} }}}}", "[".repeat(n), "]".repeat(n)));
        parses(&format!("{{{{ {}1 }}}}", "not ".repeat(n)));
        parses(&format!("{{{{ {}1 }}}}", "-".repeat(n)));
        parses(&format!("{{{{ 1{} }}}}", "+1".repeat(n)));
        parses(&format!("{{{{ 1{} }}}}", " ~ 1".repeat(n)));
        parses(&format!("{{{{ x{} }}}}", ".x".repeat(n)));
        parses(&format!("{{{{ x{} }}}}", "[0]".repeat(n)));
        parses(&format!("{{{{ x{} }}}}", "|d".repeat(n)));
        parses(&format!("{{{{ x{} }}}}", "()".repeat(n)));
        parses(&format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(n)));
        parses(&format!("{{{{ 1{} }}}}", " == 1".repeat(n)));
        parses(&format!("{{{{ 1{} }}}}", " and 1".repeat(n)));
        parses(&format!("{}{}", "{% if 1 %}".repeat(n), "{% endif %}".repeat(n)));
        parses(&format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 1 %}".repeat(n)));
        parses(&format!("{}{}", "{% for i in [1] %}".repeat(n), "{% endfor %}".repeat(n)));
        parses(&"{{".repeat(n));
        parses(&"{% if".repeat(n));
        parses(&"{#".repeat(n));
        parses(&format!("{{{{ \"{}\" }}}}", "\\u0041".repeat(n)));
    }
}

#[test]
fn limits_of_the_source() {
    let source = "x".repeat((256 << 10) + 1);
    let expected = Wrong::TooLarge { what: "bytes of source", got: (256 << 10) + 1, expected: 256 << 10 };
    assert_eq!(render(&source), Err(expected));
    assert!(matches!(
        render(&format!("{{{{ [{}] }}}}", "1,".repeat(5000))),
        Err(Wrong::TooLarge { what: "tokens in a tag", .. })
    ));
    assert!(matches!(render("{% if %}"), Err(Wrong::Syntax { line: 1, .. })));
    assert!(matches!(render("{{ a }}\n{{ b"), Err(Wrong::Syntax { line: 2, .. })));
}

#[test]
fn nothing_outside_is_reached() {
    for source in [
        "{% include '/etc/passwd' %}",
        "{% import 'a' as b %}",
        "{% from 'a' import b %}",
        "{% extends 'a' %}",
        "{% block a %}{% endblock %}",
    ] {
        assert!(matches!(ChatTemplate::new(source), Err(Wrong::Unsupported { .. })), "{source}");
    }
    for source in [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ messages.append(1) }}",
        "{{ open('/etc/passwd') }}",
        "{{ lipsum() }}",
        "{{ debug() }}",
        "{{ 'a'|nothing }}",
        "{{ 1 / 0 }}",
        "{{ 1 % 0 }}",
        "{{ 1 is divisibleby 0 }}",
        "{{ 10 ** 1000 }}",
    ] {
        match render(source) {
            Err(Wrong::Render { line: 1, got }) => assert!(!got.is_empty()),
            Ok(text) => assert_eq!(text, "", "{source}"),
            other => panic!("{source}: {other:?}"),
        }
    }
}

#[test]
fn giant_formats() {
    let columns = "columns of a format";
    for source in [
        "{{ '%1000000000d'|format(1) }}",
        "{{ '%.1000000000f'|format(1.0) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1000000000) }}",
        "{{ '%*d'|format(1000000000, 1) }}",
        "{{ '{:99999999999999999999999}'.format(1) }}",
    ] {
        assert_eq!(limit(source), columns, "{source}");
    }
    assert_eq!(render("{{ [1]|tojson(indent=10**9) }}").map(|text| text.len()), Ok(1000 + 5));
    assert!(matches!(render("{{ strftime_now('%Q') }}"), Err(Wrong::Render { .. })));
}

#[test]
fn messages_have_limits_too() {
    let deep = (0..100).fold(json!(1), |inner, _| json!([inner]));
    let template = ChatTemplate::new("{{ messages[0].content }}").expect("compiles");
    let got = template.render(&json!([{"role": "user", "content": deep}]), &TemplateOptions::default());
    assert!(matches!(got, Err(Wrong::TooLarge { what: "levels in messages and variables", .. })), "{got:?}");
}

#[test]
fn long_conversations_render() {
    let content = "A line of text, and another one. ".repeat(100);
    let messages: Vec<_> =
        (0..1000).map(|i| json!({"role": if i % 2 == 0 { "user" } else { "assistant" }, "content": content})).collect();
    let source = "{% set ns = namespace(out='', list=[]) %}{% for m in messages %}{% set ns.list = ns.list + [m.role] %}\
                  {% if m.content is string and '</think>' in m.content %}x{% endif %}\
                  {{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}{{ ns.list|length }}";
    let text = ChatTemplate::new(source).expect("compiles").render(&json!(messages), &TemplateOptions::default());
    assert!(text.expect("renders").len() > 1000 * content.len() - 1000 * 2);
}

#[test]
fn formats_with_fields_that_are_not_ascii() {
    for source in
        ["{{ '%(é\u{0}s  {%- if x'|format(1) }}", "{{ '%(\u{fffd})s'|format(1) }}", "{{ '{é:>5}'.format(1) }}"]
    {
        match render(source) {
            Err(Wrong::Render { got, .. }) => assert!(got.contains("expected ASCII"), "{source}: {got}"),
            other => panic!("{source}: {other:?}"),
        }
    }
}
