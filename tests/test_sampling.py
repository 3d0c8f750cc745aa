"""How tokens are drawn, checked against numpy: penalties, filters, noise, log-probabilities, stops and limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import farthing as ft
import numpy as np
import numpy.typing as npt
import pytest
import reference
import tiny

Row = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def llm(tiny_directory: Callable[[str], Path]) -> ft.LLM:
    return ft.LLM(tiny_directory("llama-2"))


@pytest.fixture(scope="module")
def talker(smollm2: Path) -> ft.LLM:
    return ft.LLM(smollm2, context=1024)


def philox(seed: int, position: int, tokens: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """First word of Philox4x32-10 for each token: key = seed, counter = (position, token, 0). Salmon et al. 2011."""
    mask = np.uint64(0xFFFFFFFF)
    counter = [np.full_like(tokens, position & 0xFFFFFFFF), np.full_like(tokens, position >> 32), tokens, tokens * 0]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        counter = [
            (second >> shift) ^ counter[1] ^ np.uint64(key[0]),
            second & mask,
            (first >> shift) ^ counter[3] ^ np.uint64(key[1]),
            first & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter[0]


def kept(logits: Row, params: ft.SamplingParams) -> npt.NDArray[np.bool_]:
    """Tokens that min-p, top-k and top-p leave, in this order; logits are divided by the temperature already."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    keep = p >= params.min_p * p.max()
    order = np.lexsort((np.arange(len(p)), -p))  # descending, lower ids first among equals
    if params.top_k is not None:
        keep &= np.isin(np.arange(len(p)), order[: params.top_k])
    if params.top_p < 1.0:
        mass = np.where(keep, p, 0.0)[order]
        before = (np.cumsum(mass) - mass) / mass.sum()
        keep &= np.isin(np.arange(len(p)), order[before < params.top_p])
    return keep


def scores(row: Row, prompt: list[int], output: list[int], params: ft.SamplingParams) -> Row:
    """What the drawn token is the argmax of: processed logits plus noise."""
    row = row.astype(np.float64).copy()
    seen = np.unique(prompt + output)
    if params.repetition_penalty != 1.0:
        row[seen] = np.where(
            row[seen] > 0, row[seen] / params.repetition_penalty, row[seen] * params.repetition_penalty
        )
    counts = np.bincount(np.array(output, dtype=int), minlength=len(row))
    row -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    if params.temperature == 0.0:
        return row
    row /= params.temperature
    words = philox(params.seed or 0, len(prompt) + len(output), np.arange(len(row), dtype=np.uint64))
    noise = -np.log(-np.log1p(-(words.astype(np.float64) + 0.5) / 2.0**32))
    return np.where(kept(row, params), row + noise, -np.inf)


PARAMS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0, "seed": 3},
    "cool": {"temperature": 0.6, "seed": 2**63 + 5},
    "hot": {"temperature": 3.0, "seed": 2**64 - 1},
    "top-k": {"temperature": 1.0, "top_k": 5, "seed": 1},
    "top-p": {"temperature": 1.0, "top_p": 0.5, "seed": 1},
    "min-p": {"temperature": 1.0, "min_p": 0.2, "seed": 1},
    "all filters": {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "seed": 0},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.7},
    "presence": {"temperature": 0.0, "presence_penalty": 2.5},
    "frequency": {"temperature": 0.0, "frequency_penalty": 0.8},
    "negative penalties": {"temperature": 0.0, "presence_penalty": -0.5, "frequency_penalty": -0.3},
    "everything": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "seed": 7,
    },
}


@pytest.mark.parametrize("case", PARAMS)
def test_draws_equal_numpy(case: str, llm: ft.LLM) -> None:
    """Every drawn token is the reference's own choice, up to ties within float32's rounding."""
    params = ft.SamplingParams(max_tokens=40, ignore_eos=True, **PARAMS[case])
    prompt = tiny.prompt(30)
    (completion,) = llm.generate(prompt, params)
    output = completion.token_ids
    rows = llm.logits(prompt + output)[len(prompt) - 1 : -1]
    agreed = 0
    for index, row in enumerate(rows):
        score = scores(row, prompt, output[:index], params)
        assert score[output[index]] >= score.max() - 1e-3
        agreed += int(score.argmax() == output[index])
    assert agreed >= 39


def test_samples_follow_the_distribution(llm: ft.LLM) -> None:
    """First tokens of 1500 seeds against the softmax: Pearson's chi-square over the likeliest tokens and the rest."""
    prompt, count = tiny.prompt(12), 1500
    params = [ft.SamplingParams(max_tokens=1, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(count)]
    drawn = [completion.token_ids[0] for completion in llm.generate([prompt] * count, params)]
    p = np.exp(reference.log_softmax(llm.logits(prompt)[-1:])[0])
    order = np.argsort(-p)[:30]
    expected = np.append(p[order], 1.0 - p[order].sum()) * count
    found = np.append([drawn.count(token) for token in order], 0)
    found[-1] = count - found.sum()
    statistic = float(((found - expected) ** 2 / expected).sum())
    assert statistic < 30 + 5 * math.sqrt(2 * 30)  # five standard deviations above the mean of 30 degrees


def test_seed_fixes_the_answer(llm: ft.LLM) -> None:
    prompt = tiny.prompt(12)

    def answer(seed: int | None) -> list[int]:
        params = ft.SamplingParams(max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True)
        return llm.generate(prompt, params)[0].token_ids

    assert answer(5) == answer(5)
    assert answer(5) != answer(6)
    assert len({tuple(answer(None)) for _ in range(4)}) == 4


def test_same_seed_same_prompt_in_one_batch(llm: ft.LLM) -> None:
    params = ft.SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True)
    first, second = llm.generate([tiny.prompt(12)] * 2, params)
    assert first.token_ids == second.token_ids


def test_logprobs_are_those_of_the_model(llm: ft.LLM) -> None:
    """Before temperature, penalties and filters; the likeliest first, lower ids first among equals."""
    prompt = tiny.prompt(20)
    params = ft.SamplingParams(
        max_tokens=10, temperature=0.7, top_k=3, repetition_penalty=1.5, seed=1, logprobs=20, ignore_eos=True
    )
    (completion,) = llm.generate(prompt, params)
    rows = reference.log_softmax(llm.logits(prompt + completion.token_ids)[len(prompt) - 1 : -1])
    assert completion.logprobs is not None
    assert [entry.token for entry in completion.logprobs] == completion.token_ids
    for row, entry in zip(rows, completion.logprobs, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-5)
        order = np.argsort(-row)[:20]
        assert [token for token, _ in entry.top] == order.tolist()
        np.testing.assert_allclose([logprob for _, logprob in entry.top], row[order], rtol=0, atol=1e-5)


def test_logprobs_zero_and_none(llm: ft.LLM) -> None:
    (without,) = llm.generate(tiny.prompt(5), ft.SamplingParams(max_tokens=3, ignore_eos=True))
    assert without.logprobs is None
    (bare,) = llm.generate(tiny.prompt(5), ft.SamplingParams(max_tokens=3, ignore_eos=True, logprobs=0))
    assert bare.logprobs is not None
    assert [list(entry.top) for entry in bare.logprobs] == [[], [], []]


def test_params_may_differ_by_prompt(llm: ft.LLM) -> None:
    params = [ft.SamplingParams(max_tokens=count, ignore_eos=True) for count in (1, 5, 9)]
    completions = llm.generate([tiny.prompt(8)] * 3, params)
    assert [len(completion.token_ids) for completion in completions] == [1, 5, 9]
    longest = completions[-1].token_ids
    assert all(completion.token_ids == longest[: len(completion.token_ids)] for completion in completions)


def test_end_token_ends_the_answer(llm: ft.LLM) -> None:
    """The end token that config.json names (2) ends an answer, unless ignored; up to it ids are equal."""
    prompts = [tiny.prompt(length) for length in range(3, 60)]

    def params(ignore: bool) -> list[ft.SamplingParams]:
        return [
            ft.SamplingParams(max_tokens=60, temperature=1.5, seed=seed, ignore_eos=ignore)
            for seed in range(len(prompts))
        ]

    free, ended = llm.generate(prompts, params(True)), llm.generate(prompts, params(False))
    stopped = 0
    for without, completion in zip(free, ended, strict=True):
        if 2 in without.token_ids:
            stopped += 1
            assert completion.token_ids == without.token_ids[: without.token_ids.index(2) + 1]
            assert completion.finish_reason == "stop"
        else:
            assert completion.token_ids == without.token_ids
            assert completion.finish_reason == "length"
    assert stopped > 3


def test_context_end_ends_the_answer(tiny_directory: Callable[[str], Path]) -> None:
    llm = ft.LLM(tiny_directory("llama-2"), context=64)
    (completion,) = llm.generate(tiny.prompt(50), ft.SamplingParams(max_tokens=100, ignore_eos=True))
    assert completion.finish_reason == "length"
    # The last token drawn needs no position of its own.
    assert len(completion.token_ids) in (14, 15)
    (unbounded,) = ft.LLM(tiny_directory("llama-2")).generate(
        tiny.prompt(50), ft.SamplingParams(max_tokens=15, ignore_eos=True)
    )
    assert completion.token_ids == unbounded.token_ids[: len(completion.token_ids)]


STORY = "Tell me a story about a fox and a well, please."


def test_stop_strings_across_tokens(talker: ft.LLM) -> None:
    """A stop text that begins and ends inside tokens; the answer ends before its first occurrence."""
    plain = ft.SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True)
    (whole,) = talker.generate(STORY, plain)
    pieces = [talker.tokenizer.decode([token]) for token in whole.token_ids]
    checked = 0
    for index in range(5, 60, 5):
        left, right = pieces[index], pieces[index + 1]
        if len(left) < 3 or len(right) < 3 or not (left + right).isascii():
            continue
        stop = left[-2:] + right[:2]
        expected = whole.text[: whole.text.index(stop)]
        params = ft.SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True, stop=[stop, "never \x00 written"])
        (completion,) = talker.generate(STORY, params)
        assert completion.text == expected
        assert completion.finish_reason == "stop"
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
        assert "".join(talker.stream(STORY, params)) == expected
        checked += 1
    assert checked >= 3


def test_earliest_of_several_stops(talker: ft.LLM) -> None:
    (whole,) = talker.generate(STORY, ft.SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
    words = whole.text.split()
    stops = [words[20], words[6], words[12]]
    first = min(whole.text.index(stop) for stop in stops)
    (completion,) = talker.generate(
        STORY, ft.SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, stop=stops)
    )
    assert completion.text == whole.text[:first]


def test_stream_adds_up(talker: ft.LLM) -> None:
    """Pieces are whole characters and add up to the text, accents, emoji and scripts included."""
    prompt = "Ünïcödé: 🙂🎉 日本語 русский — repeat: 🙂🎉 日本語 русский — repeat: 🙂🎉 日本"
    for temperature in (0.0, 1.2):
        params = ft.SamplingParams(max_tokens=64, temperature=temperature, seed=4, ignore_eos=True)
        stream = talker.stream(prompt, params)
        pieces = list(stream)
        assert "".join(pieces) == stream.completion.text
        assert len(pieces) > 10
        (whole,) = talker.generate(prompt, params)
        assert stream.completion.token_ids == whole.token_ids
        assert stream.completion.text == whole.text


def test_cancelled_stream_keeps_what_was_written(talker: ft.LLM) -> None:
    params = ft.SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
    stream = talker.stream(STORY, params)
    pieces = [next(stream) for _ in range(3)]
    stream.close()
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.text.startswith("".join(pieces))
    assert len(stream.completion.token_ids) < 900
    # The engine is free again and unharmed.
    (after,) = talker.generate("The capital of France is", ft.SamplingParams(max_tokens=4))
    assert "Paris" in after.text


def test_chat_equals_its_rendered_prompt(talker: ft.LLM) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    params = ft.SamplingParams(max_tokens=12)
    (chat,) = talker.chat(messages, params)
    ids = talker.tokenizer.encode(talker.chat_prompt(messages))
    (completion,) = talker.generate(ids, params)
    assert chat.token_ids == completion.token_ids
    assert list(talker.stream(messages, params)) == list(talker.stream(ids, params))


def test_ledger_counts(talker: ft.LLM) -> None:
    ids = talker.tokenizer.encode("One two three four five six seven")
    before = talker.ledger
    (completion,) = talker.generate(ids, ft.SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True))
    after, ledger = talker.ledger, completion.ledger
    assert ledger.prompt_tokens == len(ids)
    assert ledger.answer_tokens == 10
    assert ledger.cached_tokens == ledger.thinking_tokens == 0
    assert ledger.accepted <= ledger.drafted
    assert ledger.passes + ledger.accepted == 10  # the prompt's pass draws the first token
    assert after.passes - before.passes == ledger.passes
    assert ledger.weight_bytes == after.weight_bytes - before.weight_bytes > ledger.passes * 80e6
    assert ledger.kv_bytes > 0
    assert ledger.prefill_seconds > 0
    assert ledger.decode_seconds > 0
    prices = {"input_per_million": 2.0, "output_per_million": 8.0}
    assert ledger.cost(prices) == pytest.approx((2.0 * len(ids) + 8.0 * 10) / 1e6)
    assert ledger.cost({"cpu_hour": 3600.0}) == pytest.approx(ledger.cpu_seconds)
    assert "10 tokens" in str(ledger)
