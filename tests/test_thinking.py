"""Thinking that keeps to its budget: exactly, whatever is computed beside it, and with an answer behind it."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import farthing as ft
import numpy as np
import pytest
import tiny
from farthing.reasoning import REFLECTION_WORDS, Controller, Policy, Probe, ThinkSpec

from benches import thinking as bench

QUESTIONS = ["What is 17 + 25?", "Name a colour of the sky.", "Is 91 a prime number?", "Who wrote Hamlet?"]
TAGS = {"start": "<think>", "end": "</think>"}


def prompt(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n"


PROMPTS = [prompt(question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> ft.LLM:
    return ft.LLM(smollm2, speculation=None)


def params(index: int = 0, *, max_tokens: int = 96, budget: int | None = None, **policy: Any) -> ft.SamplingParams:
    """Greedy and drawn in turn."""
    return ft.SamplingParams(
        max_tokens=max_tokens,
        temperature=0.8 * (index % 2),
        seed=index,
        thinking_budget=budget,
        thinking=Policy(**(TAGS | policy)),
    )


HARD: dict[str, Any] = {"ramp": None, "loop_guard": False, "answer_reserve": 8}


def record(completion: ft.Completion) -> tuple[Any, ...]:
    ledger = completion.ledger
    counts = ledger.thinking_tokens, ledger.forced_tokens, ledger.answer_tokens
    return completion.token_ids, completion.text, completion.thinking, completion.thinking_stop, counts


def check(completion: ft.Completion, most: int, max_tokens: int, reserve: int) -> None:
    ledger = completion.ledger
    assert ledger.thinking_tokens <= most
    assert len(completion.token_ids) == ledger.output_tokens <= max_tokens
    assert completion.thinking is not None
    assert "</think>" not in completion.text
    assert "</think>" not in completion.thinking
    if completion.finish_reason == "length" and completion.thinking_stop != "natural":
        assert ledger.answer_tokens >= reserve


@pytest.mark.parametrize("budget", [0, 1, 2, 17, 64])
def test_a_hard_budget_is_exact(llm: ft.LLM, budget: int) -> None:
    each = [params(index, max_tokens=128, budget=budget, **HARD) for index in range(4)]
    together = llm.generate(PROMPTS, each)
    for index, completion in enumerate(together):
        check(completion, budget, 128, 8)
        (alone,) = llm.generate(PROMPTS[index], each[index])
        assert record(alone) == record(completion)
        if completion.thinking_stop == "budget":
            # The prompt's "\n" behind the tag is of the span.
            assert completion.ledger.thinking_tokens == max(budget - 1, 0)
            assert completion.ledger.forced_tokens > 0
    assert any(completion.thinking_stop == "budget" for completion in together) or budget == 64


def test_nothing_depends_on_drafts_batches_chunks_or_pages(smollm2: Path, llm: ft.LLM) -> None:
    sixteen = [PROMPTS[index % 4] for index in range(16)]
    each = [
        params(index, budget=[0, 5, 17, 40][index // 4], **(HARD | {"ramp": [None, "linear"][index % 2]}))
        for index in range(16)
    ]
    expected = [record(llm.generate(text, one)[0]) for text, one in zip(sixteen, each, strict=True)]
    assert [record(completion) for completion in llm.generate(sixteen, each)] == expected
    variants: list[dict[str, Any]] = [
        {"speculation": "auto"},
        {"speculation": ft.speculative.NGram(), "draft_tokens": 4},
        {"speculation": ft.speculative.TokenRecycling(), "draft_tokens": 12},
        {"speculation": None, "chunk": 3, "kv_pages": 12, "context": 256},
    ]
    for options in variants:
        other = ft.LLM(smollm2, **options)
        got = [record(completion) for completion in other.generate(sixteen, each)]
        assert got == expected, options
        if "kv_pages" in options:
            assert other.ledger.preemptions > 0
        elif options.get("draft_tokens"):
            assert other.ledger.accepted > 0


def test_what_is_dictated_is_read_in_one_pass(llm: ft.LLM) -> None:
    (completion,) = llm.generate(PROMPTS[0], params(budget=8, max_tokens=60, **HARD))
    ledger = completion.ledger
    assert completion.thinking_stop == "budget"
    assert ledger.forced_tokens > 8
    # The prompt's pass draws the first token; what is dictated goes with the draw behind it.
    assert ledger.passes == ledger.thinking_tokens + ledger.answer_tokens
    # From the first token on it goes with the prompt.
    (at_once,) = llm.generate(PROMPTS[0], params(budget=0, max_tokens=40, **HARD))
    assert at_once.ledger.passes == at_once.ledger.answer_tokens


def test_streams_tell_thinking_from_text(llm: ft.LLM) -> None:
    for index, budget in enumerate([0, 3, 24, None]):
        one = params(index, budget=budget, **HARD)
        (expected,) = llm.generate(PROMPTS[0], one)
        thought: list[str] = []
        stream = llm.stream(PROMPTS[0], one, on_thinking=thought.append)
        assert "".join(stream) == expected.text
        assert "".join(thought).rstrip() == expected.thinking
        assert record(stream.completion) == record(expected)


def test_stop_texts_mean_nothing_in_thinking(llm: ft.LLM) -> None:
    one = params(budget=24, message="Enough.", **HARD)
    (free,) = llm.generate(PROMPTS[0], one)
    assert free.thinking
    assert free.thinking.endswith("Enough.")
    word = free.thinking.split()[0]
    stop = free.text.split()[-1]
    (stopped,) = llm.generate(
        PROMPTS[0],
        ft.SamplingParams(max_tokens=96, thinking_budget=24, thinking=one.thinking, stop=["Enough", stop]),
    )
    assert stopped.thinking == free.thinking
    assert stopped.text == free.text[: free.text.index(stop)]
    assert word in stopped.thinking


def test_the_answer_keeps_its_reserve(llm: ft.LLM) -> None:
    for reserve, most in [(16, 64), (40, 64), (64, 64), (1, 30)]:
        one = params(max_tokens=most, budget=1000, ramp=None, answer_reserve=reserve, min_think=1000, loop_guard=False)
        (completion,) = llm.generate(PROMPTS[2], one)
        ledger = completion.ledger
        assert completion.thinking_stop == "length"
        forced = llm.generate(PROMPTS[2], params(budget=0, **HARD))[0].ledger.forced_tokens
        if reserve + forced <= most:
            assert ledger.thinking_tokens == most - reserve - forced
        if completion.finish_reason == "length":
            assert ledger.answer_tokens >= min(reserve, most - ledger.forced_tokens)
        if reserve + forced > most:
            assert ledger.forced_tokens < forced, "no room for the message"


def test_a_soft_budget_ends_at_a_sentence(llm: ft.LLM) -> None:
    one = Policy(**TAGS, budget=20, grace=30, ramp=None)
    for completion in llm.generate(PROMPTS, ft.SamplingParams(max_tokens=200, thinking=one)):
        assert completion.ledger.thinking_tokens <= 50
        if completion.thinking_stop == "grace" and completion.ledger.thinking_tokens < 49:
            ids = completion.token_ids[: completion.ledger.thinking_tokens]
            text = llm.tokenizer.decode(ids)
            assert "\n" in text[-3:] or text[-1] in ".?!"


def test_the_ramp_ends_thinking_by_the_model(llm: ft.LLM) -> None:
    policy = Policy(**TAGS, budget=60, soft_ratio=0.0, ramp="sigmoid", margin=0.0, grace=0, message="")
    each = [
        ft.SamplingParams(max_tokens=120, temperature=0.7, seed=seed, ignore_eos=True, thinking=policy)
        for seed in range(8)
    ]
    stops = [completion.thinking_stop for completion in llm.generate([PROMPTS[0]] * 8, each)]
    assert "natural" in stops, stops


def test_a_whole_answer_is_thinking_up_to_a_marker(llm: ft.LLM) -> None:
    prompts = [text.removesuffix("<think>\n") for text in PROMPTS]
    policy = Policy(end="####", budget=20, grace=0, ramp=None, answer_reserve=8)
    for completion in llm.generate(prompts, ft.SamplingParams(max_tokens=64, thinking=policy)):
        assert completion.thinking
        assert completion.ledger.thinking_tokens <= 20
        if completion.thinking_stop == "budget":
            assert "\n####" in llm.tokenizer.decode(completion.token_ids)


def test_banned_words_do_not_come_while_thinking(llm: ft.LLM) -> None:
    free = llm.generate(PROMPTS, params(budget=40, **HARD))
    assert free[0].thinking
    word = free[0].thinking.split()[0]
    for completion in llm.generate(PROMPTS, params(budget=40, **HARD, ban=[word])):
        ids = completion.token_ids[: completion.ledger.thinking_tokens]
        assert word.lower() not in [llm.tokenizer.decode([token]).strip().lower() for token in ids]
    assert "wait" in REFLECTION_WORDS


def test_the_end_of_the_answer_becomes_the_end_of_thinking(llm: ft.LLM) -> None:
    # Greedy SmolLM2 ends its turn without ever closing the tag.
    free = llm.generate(PROMPTS, params(max_tokens=256))
    wanted = [one for one in free if one.thinking_stop == "eos_fix"]
    assert wanted
    assert all(one.ledger.answer_tokens > 0 and one.ledger.forced_tokens > 0 for one in wanted)


def test_logprobs_have_an_entry_for_each_token(llm: ft.LLM) -> None:
    one = ft.SamplingParams(max_tokens=48, thinking_budget=6, thinking=Policy(**TAGS, answer_reserve=8), logprobs=2)
    (completion,) = llm.generate(PROMPTS[1], one)
    assert completion.logprobs
    assert [entry.token for entry in completion.logprobs] == completion.token_ids
    dictated = [entry for entry in completion.logprobs if not entry.top]
    assert len(dictated) == completion.ledger.forced_tokens
    assert all(entry.logprob == 0.0 for entry in dictated)


def test_models_without_markers_say_what_would_work(llm: ft.LLM) -> None:
    for one in (ft.SamplingParams(thinking_budget=4), ft.SamplingParams(thinking=Policy(budget=4))):
        with pytest.raises(ft.UnsupportedError, match=r"thinking markers.*Policy\(start="):
            llm.generate("Hello", one)
    (completion,) = llm.generate("<think> hm", ft.SamplingParams(max_tokens=4))
    assert (completion.thinking, completion.thinking_stop) == (None, None)
    assert completion.ledger.thinking_tokens == 0


def test_preempted_and_cancelled_answers_keep_their_books(llm: ft.LLM) -> None:
    stream = llm.stream(PROMPTS[0], params(budget=4, max_tokens=90, **HARD))
    next(stream)
    stream.close()
    ledger = stream.completion.ledger
    assert stream.completion.finish_reason in {"cancelled", "stop", "length"}
    assert ledger.output_tokens == len(stream.completion.token_ids)
    assert ledger.thinking_tokens <= 4


def probed(index: int, **probe: Any) -> ft.SamplingParams:
    look = Probe(**({"every": 8, "answer_tokens": 6, "confidence": 0.6, "entropy": 4.0} | probe))
    return params(index, max_tokens=120, ramp=None, loop_guard=False, answer_reserve=8, probe=look)


def test_early_exit_leaves_no_trace_but_its_end(smollm2: Path, llm: ft.LLM) -> None:
    sixteen = [PROMPTS[index % 4] for index in range(16)]
    every = [
        probed(index, **[{}, {"every": None}, {"confidence": 1.0}, {"entropy": 0.0}][index // 4]) for index in range(16)
    ]
    alone = [llm.generate(text, one)[0] for text, one in zip(sixteen, every, strict=True)]
    stops = [completion.thinking_stop for completion in alone]
    assert "early_exit" in stops, stops
    for completion, one in zip(alone, every, strict=True):
        ledger = completion.ledger
        assert ledger.output_tokens == len(completion.token_ids)
        assert (ledger.probe_tokens > 0) == (completion.thinking_stop == "early_exit" or ledger.probe_tokens > 0)
        if completion.thinking_stop == "early_exit":
            assert ledger.probe_tokens > 0
            assert ledger.answer_tokens > 0
        # Up to the exit the text is that without looks.
        policy = dataclasses.replace(one.thinking, probe=None) if one.thinking else None
        (free,) = llm.generate(sixteen[alone.index(completion)], dataclasses.replace(one, thinking=policy))
        same = completion.ledger.thinking_tokens
        assert completion.token_ids[:same] == free.token_ids[:same]
    expected = [(*record(completion), completion.ledger.probe_tokens) for completion in alone]
    for options in [
        {"speculation": None},
        {"speculation": "auto"},
        {"speculation": ft.speculative.NGram(), "draft_tokens": 4},
        {"speculation": None, "chunk": 3, "kv_pages": 14, "context": 320},
    ]:
        other = ft.LLM(smollm2, **options)
        got = other.generate(sixteen, every)
        assert [(*record(completion), completion.ledger.probe_tokens) for completion in got] == expected, options


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Any:
    """A token for each byte, and three special ones."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<think>", "</think>", "<end>"])
    return tokenizer


@pytest.fixture
def marked(tmp_path: Path, tiny_directory: Callable[[str], Path], bytes_tokenizer: Any) -> Callable[[str], ft.LLM]:
    """A tiny model whose vocabulary has thinking markers."""

    def load(name: str) -> ft.LLM:
        directory = shutil.copytree(tiny_directory(name), tmp_path / name)
        bytes_tokenizer.save(str(directory / "tokenizer.json"))
        return ft.LLM(directory, weights="f32", speculation=None)

    return load


@pytest.mark.parametrize("name", ["qwen3", "lfm2"])
def test_models_that_mark_their_thinking_need_no_policy(name: str, marked: Callable[[str], ft.LLM]) -> None:
    model = marked(name)
    opened = [*tiny.prompt(20, 256), 256]
    followed = ft.SamplingParams(max_tokens=200, temperature=1.5, seed=5, ignore_eos=True)
    (completion,) = model.generate(opened, followed)
    ids = completion.token_ids
    end = ids.index(257) if 257 in ids else len(ids)
    assert completion.ledger.thinking_tokens >= end
    assert completion.thinking is not None
    assert completion.thinking_stop == ("natural" if 257 in ids else "length")
    assert completion.ledger.forced_tokens == 0
    (bounded,) = model.generate(opened, dataclasses.replace(followed, thinking_budget=7))
    assert bounded.token_ids[: min(7, end)] == ids[: min(7, end)]
    assert (bounded.ledger.thinking_tokens, bounded.thinking_stop) in {(7, "budget"), (end, "natural")}
    assert bounded.ledger.forced_tokens > 20 or end < 7
    # Nothing is opened: everything is the answer, as ever.
    (plain,) = model.generate(tiny.prompt(20, 256), dataclasses.replace(followed, max_tokens=3))
    assert (plain.thinking, plain.ledger.answer_tokens) == (None, 3)


@pytest.mark.parametrize("name", ["qwen3", "lfm2"])
def test_looks_leave_the_text_alone_where_states_go_back(name: str, marked: Callable[[str], ft.LLM]) -> None:
    model = marked(name)
    policy = Policy(
        ramp=None, loop_guard=False, message="", probe=Probe(every=5, entropy=100.0, confidence=1.0, until="")
    )
    looking = ft.SamplingParams(max_tokens=80, ignore_eos=True, thinking=policy, temperature=1.0, seed=3)
    free = dataclasses.replace(looking, thinking=dataclasses.replace(policy, probe=None))
    looked, plain = model.generate([[*tiny.prompt(20, 256), 256]] * 2, [looking, free])
    assert looked.ledger.probe_tokens > 0
    # Up to the first end: later on a second span may begin.
    ids = looked.token_ids
    same = ids.index(257) if 257 in ids else len(ids)
    assert same >= 5
    assert looked.token_ids[:same] == plain.token_ids[:same]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 0}, "every: got 0"),
        ({"suffix": ""}, "suffix: got an empty text"),
        ({"entropy": -1.0}, "entropy: got -1"),
        ({"alpha": 0.0}, "alpha: got 0"),
        ({"confidence": 2.0}, "confidence: got 2"),
        ({"answer_tokens": 0}, "answer_tokens: got 0"),
        ({"until": None}, "until: got None"),
    ],
)
def test_wrong_probes_name_the_argument(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Probe(**wrong)
    assert pickle.loads(pickle.dumps(Policy(probe=Probe(every=3)))).probe == Probe(every=3)


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


def test_policies_are_values() -> None:
    policy = Policy(budget=10, ban=["wait", 7], **TAGS)
    assert pickle.loads(pickle.dumps(policy)) == policy
    one = ft.SamplingParams(thinking_budget=3, thinking=policy)
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(ValueError, match="thinking: got 3"):
        ft.SamplingParams(thinking=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="thinking_budget: got -1"):
        ft.SamplingParams(thinking_budget=-1)


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


def test_specs_come_from_transformers(bytes_tokenizer: Any) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer, eos_token="<end>")
    spec = ThinkSpec.from_tokenizer(tokenizer, message="Stop.")
    assert tokenizer.decode(spec.forced_close) == "Stop.</think>\n\n"
    assert spec.eos == [tokenizer.eos_token_id]
    # Bytes of "é" are tokens: with grace the end waits for the whole character and the end of a sentence.
    policy = Policy(budget=2, grace=5, ramp=None, answer_reserve=0)
    controller = Controller(spec, policy, tokenizer.encode("Well: <think>"), 99)
    for token in tokenizer.encode("aé.b"):
        assert controller.forced is None
        controller.push(token)
        if controller.forced is not None:
            break
    assert (controller.thinking_tokens, controller.stop) == (4, "grace")


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
