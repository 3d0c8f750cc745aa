"""Varied texts for comparing tokenizers: prose, mathematics, code, chat markup, and edge cases written by hand."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval"

EDGE_CASES = [
    "",
    " ",
    "  ",
    "   \t \n \r\n  ",
    "\n",
    "\n\n\n\n\n\n\n",
    "\t\t\tindented\n\t\tless\n\tleast",
    "a",
    " a",
    "a ",
    "  two leading, two trailing  ",
    "line one\r\nline two\r\n\r\nline four\rold mac",
    "trailing newline\n",
    "spaces before newline   \n   and after",
    "x" * 300,
    " " * 100,
    "\n" * 65,
    "a b" * 50,
    "don't can't won't I'll we've they'd it's I'm you're 'sup 'twas",
    "DON'T CAN'T WON'T I'LL WE'VE THEY'D IT'S I'M YOU'RE",
    "0 1 12 123 1234 12345 123456789 3.14159 1,000,000 1e-9 0xDEADBEEF",
    "١٢٣ ۱۲۳ १२३ １２３ ½ ² Ⅷ ㊿",
    "café naïve façade Zürich Ångström señor",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "\u1e9b\u0323 \u212b \ufb01 \u01c4 \u0390",
    "Привет, мир! Как дела? Ёлка.",
    "Γειά σου Κόσμε, ἀρχῇ ἦν ὁ λόγος",
    "שלום עולם — בְּרֵאשִׁית",
    "مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया। क्या हाल है?",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "你好，世界！这是一个测试。",
    "日本語のテスト：カタカナ、ひらがな、漢字。",
    "안녕하세요 세계! 한국어 시험입니다.",
    "Tiếng Việt có dấu: ăn quả nhớ kẻ trồng cây",
    "👍🏽 👨‍👩‍👧‍👦 🇩🇪🇫🇷 🏳️‍🌈 ❤️ 🤷🏻‍♀️",
    "emoji😀inside🎉words",
    "\u200bzero\u200bwidth\u200d \ufeffbom \u00a0nbsp \u2003em\u3000ideographic",
    "\u2028line separator\u2029paragraph separator\u0085next line",
    "\x00\x01\x02\x1b[31mred\x1b[0m\x7f",
    "𝒻𝒶𝓃𝒸𝓎 𝕥𝕖𝕩𝕥 𓀀𓂀 𐍈 🂡",
    "\U0010ffff \ue000 \ufffd \ufffe",
    "▁already▁escaped ▁ ▁▁",
    "<0x0A> <0xFF> <0x-1> <0xZZ>",
    "Ġbyte Ċlevel ĉ letters",
    "<s>begin <unk> <pad> <bos><eos> [INST] do [/INST] <<SYS>>",
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<|endoftext|>text<|endoftext|>",
    "<|im_start|<|im_end|>|im_end|>",
    "<think>\nreasoning\n</think>\n\nanswer <tool_call>{}</tool_call>",
    "<table><tr><td>1</td></tr></table><h1>t</h1><code>x</code>",
    "<repo_name>a/b<file_sep>c.py<fim_prefix>d<fim_suffix>e<fim_middle>",
    "https://example.com/path?query=1&other=%20#fragment user@example.org",
    "C:\\Users\\name\\file.txt /usr/local/bin ../..",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE x1y2z3",
    "if(a&&b||!c){return~d^e<<2>>>1;}//comment /* block */",
    "!!! ??? ... --- ___ *** ### $$$ %%% &&& @@@ ``` ~~~ +++ === ;;; :::",
    "«guillemets» “curly” ‘single’ „low“ … — – ‑ •",
    "a\u0300\u0301\u0302\u0303\u0304 stacked marks, i\u0307 j\u030c",
    "ﬁﬂ ligatures ĳ Ǆ ß ẞ ſ İ ı K Å",
    "1.  list\n2.  list\n   - nested\n\n> quote\n\n    code",
    '{\'a\': [1, 2.5, None, True], "b": {"c": "d\\n"}}',
    "\\frac{a}{b} \\sum_{i=0}^{\\infty} x^i = \\sqrt{\\pi} \\mathbb{R}",
    "SELECT * FROM t WHERE a >= 10 AND b LIKE '%x%';",
    "aaaaaaaaaaaaaaaaaaaaaaaab bababababababababab abcabcabcabc",
    "The  quick   brown    fox     jumps      over       the        lazy         dog",
    "word\n\n\nword\n \n \nword\t\n\tword",
    "Ünïcödé ÀÉÎÕÜ àéîõü ŁŻŹĆ łżźć ŐŰ őű ĞŞ ğş",
    "١٢٬٣٤٥٫٦٧ ₹1,23,456 €1.234,56 £12 ¥100 ₿0.1",
    "x²+y²=z² H₂O CO₂ 10⁻³ ±5% ≈ ≠ ≤ ≥ ∞ ∑ ∏ ∫ √ ∂ ∇",
    "mixed中文andEnglish混合text123数字",
    "かな交じり文とASCIIとｆｕｌｌｗｉｄｔｈ",
    "\ud7a3\u1100\u1161\u11a8 jamo",
    "tab\tseparated\tvalues\t\t\tend",
]


def varied_texts() -> list[str]:
    """640 texts, always the same: edge cases, then slices of the evaluation data; without it the edge cases."""
    texts = list(EDGE_CASES)
    if not DATA.is_dir():
        return texts
    wikitext = (DATA / "wikitext2_test.txt").read_text("utf-8")
    paragraphs = [p for p in re.split(r"\n \n", wikitext) if len(p) > 80]
    texts += paragraphs[: 120 * 5 : 5]
    texts += [item[key] for item in _lines("gsm8k_test.jsonl")[:60] for key in ("question", "answer")]
    texts += [item["prompt"] + item["canonical_solution"] for item in _lines("HumanEval.jsonl.gz")[:100]]
    texts += [turn for item in _lines("spec_bench_question.jsonl")[:480:4] for turn in item["turns"]][:130]
    texts += [item["solution"] for item in _lines("math500_test.jsonl")]
    return texts[:640]


def _lines(name: str) -> list[dict]:
    path = DATA / name
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
