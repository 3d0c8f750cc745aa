//! Tokenizers and chat templates under the bounds, and hostile ones too large or too rare for a fuzzer to find.

use crate::bounded;
use farthing::load::{ChatTemplate, TemplateError, TemplateOptions, Tokenizer, TokenizerError, Vocabulary};
use serde_json::{Value, json};
use std::sync::LazyLock;

const BYTES: usize = 24 << 20;
const SAMPLE: &str = "Hello, World! don't 12345 \u{e9}\u{4e16}\u{1f600}  \n\n\t<|end|> <0x0A> ▁";

fn exercise(loaded: Result<Tokenizer, TokenizerError>) {
    match loaded {
        Ok(tokenizer) => {
            let ids = bounded(SAMPLE.len(), || tokenizer.encode(SAMPLE, true));
            let rows = tokenizer.vocab_size();
            assert!(ids.iter().all(|&id| (id as usize) < rows), "{ids:?} of {rows}");
            bounded(ids.len() * 64, || tokenizer.decode(&ids, false));
        }
        Err(error) => assert!(error.to_string().contains("got"), "{error}"),
    }
}

/// Loads `tokenizer.json` and uses it.
pub fn tokenizer(bytes: &[u8]) {
    exercise(bounded(bytes.len(), || Tokenizer::from_json(bytes, None)));
}

/// Loads the lists of a GGUF file, written one key a line, and uses them.
pub fn vocabulary(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut vocabulary = Vocabulary::default();
    for line in text.lines() {
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        let list = || value.split(',').map(str::to_owned).collect::<Vec<_>>();
        let number = || value.parse().ok();
        match key {
            "model" => vocabulary.model = value.into(),
            "pre" => vocabulary.pre = value.into(),
            "tokens" => vocabulary.tokens = list(),
            "bytes" => vocabulary.tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>"))),
            "scores" => vocabulary.scores = Some(value.split(',').map(|score| score.parse().unwrap_or(0.0)).collect()),
            "types" => vocabulary.types = Some(value.split(',').map(|kind| kind.parse().unwrap_or(1)).collect()),
            "merges" => vocabulary.merges = Some(list()),
            "bos" => vocabulary.bos = number(),
            "eos" => vocabulary.eos = number(),
            "unk" => vocabulary.unk = number(),
            "prefix" => vocabulary.add_space_prefix = Some(value == "1"),
            _ => {}
        }
    }
    let tokens = vocabulary.tokens.len();
    if let Some(scores) = &mut vocabulary.scores {
        scores.resize(tokens, 0.0);
    }
    if let Some(types) = &mut vocabulary.types {
        types.resize(tokens, 1);
    }
    exercise(bounded(bytes.len(), || Tokenizer::from_vocabulary(vocabulary)));
}

/// Compiles a template and renders it.
pub fn template(source: &str) {
    static CONVERSATION: LazyLock<(Value, TemplateOptions)> = LazyLock::new(|| {
        let messages = json!([
            {"role": "system", "content": "Be terse."},
            {"role": "user", "content": "What is the weather?"},
            {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [
                {"type": "function", "id": "a", "function": {"name": "weather", "arguments": {"place": "Zürich", "days": [1, 2.5, null]}}}
            ]},
            {"role": "tool", "content": "{\"sky\": \"grey\"}", "name": "weather", "tool_call_id": "a"},
            {"role": "assistant", "content": "<think>\nso\n</think>\n\nGrey."},
            {"role": "user", "content": [{"type": "text", "text": "Thanks"}]},
        ]);
        let tools = json!([{"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": {
            "type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}}]);
        let options = TemplateOptions {
            add_generation_prompt: true,
            bos_token: Some("<s>".into()),
            eos_token: Some("</s>".into()),
            tools: Some(tools),
            now: Some(1_750_000_000),
            ..TemplateOptions::default()
        };
        (messages, options)
    });
    let (messages, options) = &*CONVERSATION;
    let result = bounded(source.len(), || ChatTemplate::new(source).and_then(|it| it.render(messages, options)));
    if let Err(error) = result {
        assert!(error.to_string().contains("got") || matches!(error, TemplateError::Raised { .. }), "{error}");
    }
}

/// Tokenizers of 24 MiB, each dense in what costs most memory for its bytes.
pub fn large_tokenizers() {
    let many = |entry: &dyn Fn(usize) -> String, count: usize| (0..count).map(entry).collect::<Vec<_>>().join(",");
    let file = |vocab: &str, merges: &str, added: &str| {
        tokenizer(
            format!(
                r#"{{"added_tokens":[{added}],"normalizer":null,"pre_tokenizer":{{"type":"ByteLevel"}},"decoder":{{"type":"ByteLevel"}},
                "model":{{"type":"BPE","vocab":{{{vocab}}},"merges":[{merges}]}}}}"#
            )
            .as_bytes(),
        );
    };
    let small = r#""a":0,"b":1,"ab":2"#;
    file(small, &vec![r#""a b""#; BYTES / 6].join(","), "");
    file(small, &vec![r#"["a","b"]"#; BYTES / 10].join(","), "");
    file(small, &vec![r#""a b""#; 2_000_000].join(","), "");
    file(small, &"1,".repeat(BYTES / 2), "");
    file(&many(&|id| format!(r#""{id:x}":{id}"#), 1 << 20), "", "");
    file(&many(&|id| format!(r#""{id:x}":{id}"#), 1_500_000), "", "");
    file(&vec![r#""a":0"#; BYTES / 6].join(","), "", "");
    file(r#""a":1048575"#, "", "");
    let long = "x".repeat(65_000);
    file(&many(&|id| format!(r#""{long}{id}":{id}"#), BYTES / 65_000), "", "");
    // Every way to split the tokens of a chain is a merge.
    let chain: Vec<String> = (1..1200).map(|length| "a".repeat(length)).collect();
    let vocab = chain.iter().enumerate().map(|(id, token)| format!(r#""{token}":{id}"#)).collect::<Vec<_>>().join(",");
    let merges: Vec<String> = (1..250)
        .flat_map(|left| (1..250).map(move |right| format!(r#""{} {}""#, "a".repeat(left), "a".repeat(right))))
        .collect();
    file(&vocab, &merges.join(","), "");
    file(small, "", &many(&|id| format!(r#"{{"id":{},"content":"<{id:x}>"}}"#, id + 3), 65_536));
    file(small, "", &many(&|id| format!(r#"{{"id":{},"content":"<{id:x}>"}}"#, id + 3), 300_000));
    file(small, "", &many(&|id| format!(r#"{{"id":{},"content":"{}{id}"}}"#, id + 3, "y".repeat(15)), 55_000));
    file(small, "", &many(&|id| format!(r#"{{"id":{},"content":"{id}{}"}}"#, id + 3, "y".repeat(60_000)), 17));
    tokenizer(&b"[".repeat(BYTES));
    tokenizer(&br#"{"model":"#.repeat(BYTES / 9));
    tokenizer(format!(r#"{{"normalizer":{},"model":{{}}}}"#, "[".repeat(BYTES)).as_bytes());
    tokenizer(format!(r#"{{"{}":0}}"#, r"\n".repeat(BYTES / 2)).as_bytes());
    tokenizer(format!(r#"{{"model":{{"type":"{}"}}}}"#, r"\n".repeat(BYTES / 2)).as_bytes());
    let section = "1,".repeat(32_000);
    tokenizer(format!(r#"{{"normalizer":[{section}1],"model":{{"vocab":{{}},"merges":[]}}}}"#).as_bytes());
    let classes = r"\\p{L}\\p{N}".repeat(180);
    for pattern in [
        classes.as_str(),
        &format!("[{classes}]"),
        &format!("(?i){classes}"),
        "(a{100}){100}",
        "(a?){1000}",
        r"(?:\\p{L}{1,3}){1,3}",
    ] {
        let split = format!(r#"{{"type":"Split","pattern":{{"Regex":"{pattern}"}},"behavior":"Isolated"}}"#);
        let splits = vec![split; 8].join(",");
        tokenizer(
            format!(
                r#"{{"pre_tokenizer":{{"type":"Sequence","pretokenizers":[{splits},{{"type":"ByteLevel"}}]}},"decoder":{{"type":"ByteLevel"}},
                "model":{{"type":"BPE","vocab":{{{small}}},"merges":[]}}}}"#
            )
            .as_bytes(),
        );
    }
    let lists = |tokens: usize, types: i32| Vocabulary {
        model: "llama".into(),
        tokens: (0..tokens).map(|id| format!("{id:x}")).collect(),
        scores: Some((0..tokens).map(|id| -(id as f32)).collect()),
        types: Some(vec![types; tokens]),
        ..Vocabulary::default()
    };
    for (tokens, types) in [(1 << 20, 1), (1 << 20, 3), (65_536, 4), (1 << 20, 5), (1 << 20, 6)] {
        let vocabulary = lists(tokens, types);
        exercise(bounded(tokens * 20, || Tokenizer::from_vocabulary(vocabulary)));
    }
}

/// Templates that a fuzzer would have to be lucky to write.
pub fn large_templates() {
    for step in [
        "x ~ x",
        "x + x",
        "x * 2",
        "x|upper ~ x",
        "x.replace('a', 'aa')",
        "[x, x]|join",
        "x|e|e|e",
        "x|tojson",
        "[x]|string",
    ] {
        template(&format!("{{% set x = 'a' %}}{}", format!("{{% set x = {step} %}}").repeat(100)));
    }
    for source in [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}{% endset %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + [i] %}{% endfor %}",
        "{% set ns = namespace(x='') %}{% for i in range(99999) %}{% set ns.x = ns.x ~ i %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x={}) %}{% for i in range(19990) %}{% set ns.x = {'k': ns.x} %}{% endfor %}ok",
        "{% set ns = namespace(x=()) %}{% for i in range(19990) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ ns.x == ns.x }}",
        "{% set ns = namespace(x=messages) %}{% for i in range(19990) %}{% set ns.x = ns.x[0:] %}{% endfor %}{{ ns.x|length }}",
        "{% set ns = namespace(x=namespace()) %}{% for i in range(19990) %}{% set ns.x = namespace(y=ns.x) %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x={}) %}{% for i in range(9990) %}{% set ns.x = {'k': ns.x}.items() %}{% endfor %}{{ ns.x|list }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(9990) %}{% set ns.x = ns.x|reverse %}{% endfor %}{{ ns.x|list }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(9990) %}{% set ns.x = [ns.x]|map('list') %}{% endfor %}{{ ns.x|list }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(x) %}{{ m([x]) }}{% endmacro %}{{ m(1) }}",
        "{% macro m() %}{{ caller() }}{% endmacro %}{% macro r() %}{% call m() %}{{ r() }}{% endcall %}{% endmacro %}{{ r() }}",
        "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% set x = 'a' * 20000000 %}{{ x|upper|lower|title|e|tojson }}",
        "{{ ('\u{130}' * 9000000)|lower }}",
        "{{ ('\u{390}' * 9000000)|upper }}",
        "{{ ('\u{390}' * 9000000).upper() }}",
        "{{ ('\u{390}' * 9000000)|title }}",
        "{{ ('<' * 20000000)|e }}",
        "{{ ('é' * 9000000)|tojson(ensure_ascii=true) }}",
        "{{ ['\\n' * 20000000] }}",
        "{{ ('a' * 20000000)|list }}",
        "{{ ('a' * 20000000)|sort }}",
        "{{ ('a' * 20000000)|map('upper') }}",
        "{{ ('a' * 20000000)|unique }}",
        "{{ ('a' * 20000000)|reverse }}",
        "{{ ('a' * 20000000)[::-1] }}",
        "{{ ('a' * 20000000).split('a') }}",
        "{{ ('a ' * 9000000).split() }}",
        "{{ ('\\n' * 20000000).splitlines() }}",
        "{{ ('\\n' * 20000000)|lines }}",
        "{% for c in 'a' * 20000000 %}{{ c }}{% endfor %}",
        "{{ dict(**{'a': 'b' * 20000000}) }}",
        "{{ '%s%s%s%s'|format('a' * 9000000, 'a' * 9000000, 1, 2) }}",
        "{{ '{0}{0}{0}{0}{0}{0}{0}{0}{0}{0}'.format('a' * 20000000) }}",
        "{{ '{x}{x}{x}{x}{x}{x}{x}{x}{x}{x}'.format(x='a' * 20000000) }}",
        "{{ '%(x)s%(x)s%(x)s%(x)s%(x)s%(x)s%(x)s%(x)s'|format(x='a' * 20000000) }}",
        "{{ messages|groupby('role') }}{{ messages|sort(attribute='role') }}{{ messages|sum }}",
        "{{ 2 ** 2 ** 2 ** 2 ** 2 ** 2 }}{{ 99999999999999999999 * 99999999999999999999 * 99999999999999999999 }}",
        "{{ -9223372036854775808 // -1 }}{{ -170141183460469231731687303715884105728 % -1 }}{{ 1e308 * 1e308 }}{{ range(-9223372036854775807, 9223372036854775807) }}",
        "{{ 'abc'[9223372036854775807:] }}{{ 'abc'[-9223372036854775808:] }}{{ 'abc'[::-9223372036854775808] }}{{ messages[:-9223372036854775807:3] }}",
        "{{ [1,2,3][5:2:-1] }}{{ 'abc'[2:-9:-1] }}{{ [][::-1] }}{{ ''[::-1] }}",
    ] {
        template(source);
    }
    let levels = format!("{{% set x = ['abc'] * 100 %}}{}", "{% set x = [x] * 100 %}".repeat(8));
    for use_it in [
        "x == x",
        "x < x",
        "x in [x]",
        "[x, x]|unique",
        "x|sort",
        "x is eq(x)",
        "{'k': 1}.get(x)",
        "{x: 1}",
        "x",
        "x ~ ''",
        "x|tojson",
        "[x, x]|min",
        "x|sum(start=x)",
        "[x].count(x)",
        "x|select('eq', x)|list",
        "[x]|map('string')|list",
        "[[x, 1]]|dictsort",
        "x is in(x)",
        "dict(a=x) == dict(a=x)",
        "namespace(a=x)",
        "x|string",
        "x|join",
        "'%s'|format(x)",
        "'{}'.format(x)",
        "[x, x]|sort",
        "{'a': x}|dictsort(by='value')",
        "x|first|first",
        "x|last == x|first",
        "{'a': x}.values()|list == {'a': x}.values()|list",
        "{'a': x}.items() == {'a': x}.items()",
        "x|groupby(0)",
        "x|float",
        "x|int",
        "x|abs",
        "x|length",
    ] {
        template(&format!("{levels}{{{{ {use_it} }}}}"));
        template(&format!("{levels}{{% for i in range(9999) %}}{{% if {use_it} %}}{{% endif %}}{{% endfor %}}"));
    }
    for n in [1000, 20_000] {
        for (before, middle, after) in [
            ("(", "1", ")"),
            ("[", "1", "]"),
            ("{1:", "1", "}"),
            ("not ", "1", ""),
            ("-", "1", ""),
            ("", "1", "+1"),
            ("", "1", " ~ 1"),
            ("", "x", ".x"),
            ("", "x", "[0]"),
            ("", "x", "|d"),
            ("", "x", "()"),
            ("", "1", " if 1 else 1"),
            ("", "1", " == 1"),
            ("", "1", " and 1"),
            ("", "1", " is eq 1"),
            ("", "1", " in 1"),
            ("", "1", "**1"),
            ("", "1", ",1"),
            ("", "'a'", " 'a'"),
        ] {
            template(&format!("{{{{ {}{middle}{} }}}}", before.repeat(n), after.repeat(n)));
        }
        for (open, close) in [
            ("{% if 1 %}", "{% endif %}"),
            ("{% for i in [1] %}", "{% endfor %}"),
            ("{% set x %}", "{% endset %}"),
            ("{% filter upper %}", "{% endfilter %}"),
            ("{% macro m() %}", "{% endmacro %}"),
            ("{% call m() %}", "{% endcall %}"),
            ("{% with %}", "{% endwith %}"),
            ("{% generation %}", "{% endgeneration %}"),
            ("{% if 1 %}{% else %}", "{% endif %}"),
            ("{% elif 1 %}", ""),
        ] {
            template(&format!("{}{}", open.repeat(n), close.repeat(n)));
            template(&format!("{{% if 0 %}}{}{{% endif %}}", open.repeat(n)));
        }
    }
    for text in [
        "x",
        "{{ 1 }}",
        "{% if 1 %}{% endif %}",
        "{{ [1, 'a', x.y] }}",
        "{# #}",
        "\u{1f600}",
        "{{ 'é' }}\n",
        "{% set x = 1 %}",
        "{{{",
        "{%%}",
        "{{ a.b.c.d|e|f|g }}",
    ] {
        template(&text.repeat((256 << 10) / text.len()));
    }
}
