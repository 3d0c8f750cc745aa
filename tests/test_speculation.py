"""Speculation in the engine: the text is the same whoever drafts, and bad drafters do no harm."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import farthing as ft
import numpy as np
import numpy.typing as npt
import pytest
import reference
import tiny
from farthing.speculative import DraftModel

Tokens = npt.NDArray[np.uint32]

TEXTS = [
    "The capital of France is",
    "Repeat this text word for word: a farthing was a quarter of a penny, a farthing was a quarter of a penny, a",
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return",
]


def params(index: int, tokens: int = 48) -> ft.SamplingParams:
    """Greedy and drawn by turns."""
    if index % 2:
        return ft.SamplingParams(max_tokens=tokens, temperature=0.7, top_p=0.9, seed=index, logprobs=2)
    return ft.SamplingParams(max_tokens=tokens, logprobs=2)


class Lookup:
    """What followed the last two tokens when they last stood together."""

    def __init__(self) -> None:
        self.observed: dict[int, list[int]] = {}

    def begin(self, request: int, prompt: Tokens) -> None:
        self.observed[request] = prompt.tolist()

    def observe(self, request: int, tokens: Tokens) -> None:
        self.observed[request] += tokens.tolist()

    def end(self, request: int) -> None:
        del self.observed[request]

    def draft(self, request: int, tokens: Tokens, budget: int) -> list[int]:
        text: list[int] = tokens.tolist()
        assert text == self.observed[request]
        for at in range(len(text) - 3, -1, -1):
            if text[at : at + 2] == text[-2:]:
                return text[at + 2 : at + 2 + budget]
        return []


class Dice:
    """Random trees, half of their tokens likely ones."""

    def __init__(self, vocabulary: int) -> None:
        self.random = random.Random(1)
        self.vocabulary = vocabulary

    def draft(self, request: int, tokens: Tokens, budget: int) -> tuple[list[int], list[int]]:
        ids = [self.random.choice([self.random.randrange(self.vocabulary), int(tokens[-1])]) for _ in range(budget)]
        return ids, [self.random.randrange(-1, index) if index else -1 for index in range(budget)]


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> list[ft.Completion]:
    """The answers without drafts."""
    llm = ft.LLM(smollm2, speculation=None)
    answers = [llm.generate(text, params(index))[0] for index, text in enumerate(TEXTS)]
    assert llm.speculation is None or not llm.speculation.drafters
    return answers


def same(got: list[ft.Completion], expected: list[ft.Completion]) -> bool:
    return all(
        (a.token_ids, a.text, a.finish_reason, a.logprobs) == (b.token_ids, b.text, b.finish_reason, b.logprobs)
        for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("fixed", [None, 4, 8])
def test_drafts_change_nothing(smollm2: Path, plain: list[ft.Completion], fixed: int | None) -> None:
    makers: list[Callable[[], Any]] = [Lookup, lambda: Dice(49152), lambda: [Lookup(), Dice(49152)]]
    for make in makers:
        llm = ft.LLM(smollm2, speculation=make(), draft_tokens=fixed)
        together = llm.generate(TEXTS, [params(index) for index in range(len(TEXTS))])
        assert same(together, plain)
        alone = [llm.generate(text, params(index))[0] for index, text in enumerate(TEXTS)]
        assert same(alone, plain)
        ledgers = [completion.ledger for completion in together + alone]
        assert llm.ledger.drafted == sum(ledger.drafted for ledger in ledgers)
        assert llm.ledger.accepted == sum(ledger.accepted for ledger in ledgers)
        if fixed and make is not makers[1]:
            assert llm.ledger.accepted > 10
            assert sum(answer.ledger.passes for answer in alone) < sum(answer.ledger.passes for answer in plain)
        report = llm.speculation
        assert report is not None
        assert sum(each.accepted for each in report.drafters) == llm.ledger.accepted
        assert report.pass_costs[0] == (1, 1.0)
        assert "break-even" in str(report)
        assert "<table" in report._repr_html_()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([1 << 40], "1099511627776"),
        ([-5], "-5"),
        ([60_000], "60000"),
        ("abc", "draft"),
        (([1, 2], [-1]), "a parent for each"),
        (([1, 2], [1, -1]), "parents before"),
        (([1], [-2]), "-2"),
        ([1.5], "draft"),
        (None, "draft"),
        (ZeroDivisionError("no drafts today"), "no drafts today"),
    ],
)
def test_a_drafter_that_talks_nonsense_is_asked_no_more(
    smollm2: Path, plain: list[ft.Completion], answer: Any, reason: str
) -> None:
    class Nonsense:
        asked = 0

        def draft(self, request: int, tokens: Tokens, budget: int) -> Any:
            self.asked += 1
            if isinstance(answer, Exception):
                raise answer
            return answer

    drafter = Nonsense()
    llm = ft.LLM(smollm2, speculation=drafter)
    with pytest.warns(RuntimeWarning, match="Nonsense is no longer asked"):
        got = llm.generate(TEXTS[0], params(0))
    assert same(got, plain[:1])
    assert drafter.asked == 1
    assert llm.speculation is not None
    (report,) = llm.speculation.drafters
    assert report.stopped is not None
    assert reason in report.stopped


def test_a_slow_drafter_is_asked_less(smollm2: Path, plain: list[ft.Completion]) -> None:
    class Slow:
        asked = 0

        def draft(self, request: int, tokens: Tokens, budget: int) -> list[int]:
            self.asked += 1
            time.sleep(0.1)
            return [0]

    drafter = Slow()
    llm = ft.LLM(smollm2, speculation=drafter)
    assert same(llm.generate(TEXTS[0], params(0)), plain[:1])
    assert drafter.asked <= len(plain[0].token_ids) // 4


def test_a_model_drafts_for_itself(smollm2: Path, plain: list[ft.Completion]) -> None:
    for vocabulary in (None, 20_000):
        drafter = DraftModel(smollm2, vocabulary=vocabulary)
        llm = ft.LLM(smollm2, speculation=drafter, draft_tokens=4, context=512)
        together = llm.generate(TEXTS, [params(index) for index in range(len(TEXTS))])
        assert same(together, plain)
        # The same noise at the same positions: drawn tokens agree as greedy ones do.
        ledger = llm.ledger
        assert ledger.accepted / ledger.drafted > (0.8 if vocabulary is None else 0.5), str(llm.speculation)


@pytest.mark.parametrize(("merges", "least"), [(None, 0.75), (20_000, 0.3)])
def test_a_model_with_other_tokens_drafts(
    smollm2: Path, plain: list[ft.Completion], tmp_path: Path, merges: int | None, least: float
) -> None:
    other = reference.gguf_with_other_tokens(smollm2, tmp_path / "other.gguf", merges=merges)
    tokens = [ft.LLM(path, speculation=None).tokenizer.encode(TEXTS[1]) for path in (smollm2, other)]
    assert tokens[0] != tokens[1]
    assert (len(tokens[0]) < len(tokens[1])) == (merges is not None)
    llm = ft.LLM(smollm2, speculation=DraftModel(other, vocabulary=None), draft_tokens=4, context=512)
    together = llm.generate(TEXTS, [params(index) for index in range(len(TEXTS))])
    assert same(together, plain)
    alone = [llm.generate(text, params(index))[0] for index, text in enumerate(TEXTS)]
    assert same(alone, plain)
    for index, answer in enumerate(alone):
        # Greedy answers are written as text, drawn ones in the tokens that both have.
        assert answer.ledger.accepted > least * answer.ledger.drafted, (index, str(llm.speculation))


def test_a_draft_model_needs_a_tokenizer(smollm2: Path, tiny_directory: Callable[[str], Path]) -> None:
    with pytest.raises(ft.UnsupportedError, match="a tokenizer missing"):
        ft.LLM(smollm2, speculation=DraftModel(tiny_directory("llama-2")))
    with pytest.raises(ft.UnsupportedError, match="recurrent"):
        ft.LLM(smollm2, speculation=DraftModel(tiny_directory("lfm2")))


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek-v3", "gemma3", "qwen3_next-moe", "lfm2-moe"])
def test_families_verify_alike(tiny_directory: Callable[[str], Path], family: str) -> None:
    path = tiny_directory(family)
    plain = ft.LLM(path, speculation=None, weights="f32")
    prompts = [tiny.prompt(length, plain.vocabulary) for length in (3, 31, 40)]
    settings = [
        ft.SamplingParams(max_tokens=40, temperature=0.0 if index else 0.8, seed=3, ignore_eos=True, logprobs=2)
        for index in range(3)
    ]
    expected = plain.generate(prompts, settings)
    for drafter in (Lookup(), Dice(plain.vocabulary)):
        llm = ft.LLM(path, weights="f32", speculation=drafter, draft_tokens=7, chunk=16)
        assert same(llm.generate(prompts, settings), expected)
    assert llm.ledger.drafted > 0
