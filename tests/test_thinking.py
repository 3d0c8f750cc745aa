"""Thinking that keeps to its budget: exactly, whatever is computed beside it, and with an answer behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import farthing as ft
import numpy as np
import pytest
import tiny
from farthing.reasoning import Controller, Policy, ThinkSpec

from benches import thinking as bench

TAGS = {"start": "<think>", "end": "</think>"}


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> ft.LLM:
    return ft.LLM(smollm2, speculation=None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": -1}, "budget: got -1"),
        ({"soft_ratio": 1.5}, "soft_ratio: got 1.5"),
        ({"ramp": "cubic"}, 'ramp: got "cubic"'),
        ({"margin": -1.0}, "margin: got -1"),
        ({"reentry": "maybe"}, 'reentry: got "maybe"'),
        ({"start": "<a>"}, "end: got None"),
        ({"end": ""}, "end: got an empty text"),
        ({"ban": "wait"}, "ban: got 'wait'"),
        ({"ban": [-1]}, "ban: got -1"),
        ({"loop_guard": 1}, "loop_guard: got 1"),
        ({"end": 3}, "end: got 3"),
    ],
)
def test_wrong_policies_name_the_argument(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**wrong)


class Spelled:
    """A tokenizer whose tokens are given; longest match first."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            fits = [place for place, token in enumerate(self.tokens) if text.startswith(token)]
            if not fits:
                text = text[1:]
                continue
            longest = max(fits, key=lambda place: len(self.tokens[place]))
            ids.append(longest)
            text = text[len(self.tokens[longest]) :]
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.tokens[token] for token in ids)


WHOLE = Spelled(["<think>", "</think>", "a", "\n", "Time", " is up."])
SPLIT = Spelled(["<", "think", ">", "</", ">\n", "a", "a<", "Time", " is up.", "\n", "x>"])


def test_specs_come_from_any_tokenizer(llm: ft.LLM) -> None:
    spec = ThinkSpec.from_tokenizer(WHOLE, message="Time is up.\n", eos=[2])
    assert spec.forced_close == [4, 5, 3, 1, 3, 3]
    assert spec.eos == [2]
    with pytest.raises(ft.UnsupportedError, match="name the model's own"):
        ThinkSpec.from_tokenizer(SPLIT)
    with pytest.raises(ValueError, match="a text that the tokenizer can write"):
        ThinkSpec.from_tokenizer(SPLIT, start="<q>", end="<q>")
    own = ThinkSpec.from_tokenizer(llm.tokenizer, **TAGS, message="")
    assert llm.tokenizer.decode(own.forced_close) == "</think>\n\n"
    assert own.eos


def test_specs_from_transformers_are_those_of_farthing(tiny_directory: Callable[[str], Path]) -> None:
    transformers = pytest.importorskip("transformers")
    directory = tiny_directory("qwen3")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = ft.LLM(directory).tokenizer
    for tokenizer in (theirs, ours):
        spec = ThinkSpec.from_tokenizer(tokenizer, **TAGS, message="")
        controller = Controller(
            spec, Policy(budget=3, grace=0, ramp=None, answer_reserve=0), ours.encode("<think>"), 99
        )
        seen = []
        for token in ours.encode("one two three four five six"):
            if controller.forced is not None:
                break
            controller.push(token)
            seen.append(token)
        assert len(seen) == controller.thinking_tokens == 3
        assert ours.decode(controller.dictated).startswith("</think>")


def test_tags_are_found_however_they_are_cut() -> None:
    spec = ThinkSpec.from_tokenizer(SPLIT, **TAGS, message="Time is up.")
    controller = Controller(spec, None, SPLIT.encode("a<think>"), max_tokens=100)
    assert controller.is_thinking
    controller.extend([5, 6])  # "a" "a<": the tag is not begun
    assert controller.thinking_tokens == 2
    controller.extend([3, 1, 4])
    assert (controller.state, controller.stop, controller.thinking_tokens) == ("answer", "natural", 2)
    # The model began the tag when the budget was spent: it is completed, nothing else comes between.
    controller = Controller(spec, Policy(budget=2, grace=0, ramp=None), SPLIT.encode("<think>"), max_tokens=400)
    controller.extend([5, 3])
    assert SPLIT.decode(controller.dictated).startswith("think>")
    controller.extend(controller.dictated)
    assert (controller.state, controller.thinking_tokens, controller.answer_tokens) == ("answer", 1, 1)


def test_processed_logits_obey() -> None:
    spec = ThinkSpec(starts=[[1]], ends=[[2]], forced_close=[7, 2], eos=[3])
    controller = Controller(spec, Policy(budget=2, grace=0, ramp=None, ban=[5]), [1], max_tokens=600)
    logits = np.zeros(8, np.float32)
    logits[3] = 4.0
    controller.process(logits)
    assert logits.tolist() == [0, 0, 4, -np.inf, 0, -np.inf, 0, 0]
    copy = controller.copy()
    copy.extend([4, 4])
    assert (controller.state, copy.state, copy.forced) == ("think", "forcing", 7)
    logits = np.zeros(8, np.float32)
    copy.process(logits)
    assert logits.tolist() == [-np.inf] * 7 + [0]
    assert controller.peek([4, 4, 7, 2, 6]) == 5
    assert controller.peek([4, 4, 6]) == 2
    assert controller.peek([5]) == 0
    assert not controller.permits(3)
    with pytest.raises(ValueError, match="contiguous"):
        controller.process(np.zeros(16, np.float32)[::2])
    controller.close()
    assert (controller.stop, controller.dictated) == ("early_exit", [7, 2])


def test_the_bench_compares_equals() -> None:
    ids = bench.tokens(400)
    rescan = bench.Rescan(100)
    expected = next(position for position, token in enumerate(ids) if rescan.push(token))
    policy = Policy(budget=100, grace=0, ramp=None, answer_reserve=0)
    assert bench.follow(Controller(bench.spec(), policy, [bench.START], 10**9), ids) == expected == 99
    assert tiny.VOCABULARY
