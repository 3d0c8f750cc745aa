"""Same request, same bits: whatever is computed beside it, in whatever chunks, threads and pages (and ISA)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import farthing as ft
import numpy as np
import pytest
import tiny

MIXTURES = ("mixtral", "gpt-oss", "deepseek-v3", "qwen3_next-moe", "lfm2-moe")

# Prompt lengths around the edges of pages (32) and of attention's key spans (256).
LENGTHS = [1, 2, 3, 7, 8, 19, 31, 32, 33, 40, 50, 64, 65, 90, 127, 258]
SHORTER = [1, 2, 3, 5, 7, 9, 12, 14, 19, 22, 27, 31, 32, 33, 40, 65]
PAGE = 32


def requests(
    vocabulary: int, tokens: int, lengths: list[int] = LENGTHS
) -> tuple[list[list[int]], list[ft.SamplingParams]]:
    """16 prompts of different lengths; greedy and sampled answers by turns."""
    prompts = [tiny.prompt(length, vocabulary) for length in lengths]
    params = [
        ft.SamplingParams(
            max_tokens=tokens - (index % 3),
            temperature=0.0 if index % 2 else 0.9,
            top_p=0.95,
            repetition_penalty=1.1 if index % 4 == 0 else 1.0,
            seed=index,
            ignore_eos=True,
            logprobs=3,
        )
        for index in range(len(prompts))
    ]
    return prompts, params


def answers(completions: list[ft.Completion]) -> list[tuple[object, ...]]:
    """All that must not change: tokens, log-probabilities to the last bit, text, reason."""
    return [(c.token_ids, c.logprobs, c.text, c.finish_reason) for c in completions]


def one_by_one(llm: ft.LLM, prompts: list[list[int]], params: list[ft.SamplingParams]) -> list[ft.Completion]:
    return [completion for pair in zip(prompts, params, strict=True) for completion in llm.generate(*pair)]


@pytest.mark.parametrize(
    "name", [*("llama-2", "mistral-window", "gemma3", "smollm3", "smollm2", "lfm2", "qwen3_5"), *MIXTURES]
)
def test_tiny_models_are_batch_invariant(name: str, tiny_directory: Callable[[str], Path]) -> None:
    """Tiny checkpoints: windows, sandwich norms, layers without positions; every chunk size with 1 and 2 threads."""
    directory = tiny_directory(name)
    alone = ft.LLM(directory, weights="int8", threads=1, context=320)
    vocabulary = alone.logits([1]).shape[1]
    prompts, params = requests(vocabulary, 20)
    expected = answers(one_by_one(alone, prompts, params))
    ids = tiny.prompt(300, vocabulary)
    logits = alone.logits(ids)
    for threads in (1, 2):
        for chunk in (1, 7, 64, None):
            llm = ft.LLM(directory, weights="int8", threads=threads, chunk=chunk, context=320)
            assert answers(llm.generate(prompts, params)) == expected, (threads, chunk)
            assert np.array_equal(llm.logits(ids), logits), (threads, chunk)


@pytest.mark.parametrize(("threads", "chunk"), [(1, None), (2, None), (2, 64), (1, 7), (2, 1)])
def test_real_model_is_batch_invariant(
    threads: int, chunk: int | None, smollm2: Path, smollm2_alone: tuple[list[tuple[object, ...]], np.ndarray]
) -> None:
    expected, logits = smollm2_alone
    prompts, params = requests(49152, 12, SHORTER)
    llm = ft.LLM(smollm2, threads=threads, chunk=chunk, context=320)
    assert answers(llm.generate(prompts, params)) == expected
    assert np.array_equal(llm.logits(tiny.prompt(100, 49152)), logits)


@pytest.fixture(scope="module")
def smollm2_alone(smollm2: Path) -> tuple[list[tuple[object, ...]], np.ndarray]:
    """Answers one by one on one thread, and the logits of a prompt."""
    prompts, params = requests(49152, 12, SHORTER)
    llm = ft.LLM(smollm2, threads=1, context=320)
    return answers(one_by_one(llm, prompts, params)), llm.logits(tiny.prompt(100, 49152))


@pytest.mark.parametrize(
    ("name", "kv"),
    [
        ("gemma3", "f32"),
        ("gemma3", "f16"),
        ("gemma3", "bf16"),
        ("lfm2", "f16"),
        ("qwen3_5", "f16"),
        *((name, "f16") for name in MIXTURES),
    ],
)
def test_preemption_changes_nothing(name: str, kv: str, tiny_directory: Callable[[str], Path]) -> None:
    """Pages for about two of the sixteen sequences: the others are put off, or lose theirs and are computed again."""
    directory = tiny_directory(name)
    prompts, params = requests(tiny.VOCABULARY, 60)
    expected = answers(ft.LLM(directory, kv=kv, context=352).generate(prompts, params))
    for chunk in (7, None):
        llm = ft.LLM(directory, kv=kv, context=352, chunk=chunk, kv_pages=2 * 352 // PAGE)
        completions = llm.generate(prompts, params)
        assert answers(completions) == expected
        assert llm.ledger.preemptions > 0
        assert sum(completion.ledger.preemptions for completion in completions) == llm.ledger.preemptions


def test_real_model_survives_preemption(
    smollm2: Path, smollm2_alone: tuple[list[tuple[object, ...]], np.ndarray]
) -> None:
    expected, _ = smollm2_alone
    prompts, params = requests(49152, 12, SHORTER)
    llm = ft.LLM(smollm2, context=320, kv_pages=10)
    assert answers(llm.generate(prompts, params)) == expected


def test_sixteen_run_together(tiny_directory: Callable[[str], Path]) -> None:
    """Passes over the weights: sixteen at once take at most a quarter of sixteen one by one, by the ledger."""
    llm = ft.LLM(tiny_directory("llama-2"), max_sequences=16)
    prompts, params = requests(tiny.VOCABULARY, 40)
    before = llm.ledger
    one_by_one(llm, prompts, params)
    between = llm.ledger
    together = llm.generate(prompts, params)
    after = llm.ledger
    apart = between.passes - before.passes
    assert 0 < after.passes - between.passes <= apart / 4
    # Weights are read once a pass, so the bytes shrink alike, in the engine's books and in the requests' own.
    read = after.weight_bytes - between.weight_bytes
    assert 0 < read <= (between.weight_bytes - before.weight_bytes) / 4
    assert sum(completion.ledger.weight_bytes for completion in together) == pytest.approx(read, rel=1e-6)


def test_more_requests_than_sequences(tiny_directory: Callable[[str], Path]) -> None:
    directory = tiny_directory("qwen3")
    prompts, params = requests(tiny.VOCABULARY, 10)
    expected = answers(ft.LLM(directory, context=320).generate(prompts, params))
    assert answers(ft.LLM(directory, context=320, max_sequences=3).generate(prompts, params)) == expected


def test_order_of_requests_does_not_matter(tiny_directory: Callable[[str], Path]) -> None:
    llm = ft.LLM(tiny_directory("qwen2"), context=320)
    prompts, params = requests(tiny.VOCABULARY, 10)
    forward = answers(llm.generate(prompts, params))
    assert answers(llm.generate(prompts[::-1], params[::-1]))[::-1] == forward


ISA_SCRIPT = """
import hashlib, json, sys
import farthing as ft
import tiny
digests = []
for directory, weights in json.loads(sys.argv[1]):
    llm = ft.LLM(directory, weights=weights, context=320)
    vocabulary = llm.logits([1]).shape[1]
    logits = llm.logits(tiny.prompt(120, vocabulary))
    params = ft.SamplingParams(max_tokens=8, temperature=0.8, seed=1, ignore_eos=True, logprobs=2)
    (answer,) = llm.generate(tiny.prompt(9, vocabulary), params)
    digests.append([hashlib.sha256(logits.tobytes()).hexdigest(), answer.token_ids, repr(answer.logprobs)])
print(json.dumps(digests))
"""


def test_every_isa_gives_the_same_bits(tiny_directory: Callable[[str], Path]) -> None:
    """Each level in a process of its own, forced by FARTHING_ISA; the scalar code is the specification."""
    cases = [
        (str(tiny_directory(name)), weights)
        for name in ("llama-2", "gemma3", "smollm2", "lfm2-biases-untied", "qwen3_5-biases-tied", *MIXTURES)
        for weights in ("f32", "bf16", "int8", "int4")
    ]

    def run(isa: str | None) -> subprocess.CompletedProcess[str]:
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        environment.pop("FARTHING_ISA", None)
        if isa is not None:
            environment["FARTHING_ISA"] = isa
        command = [sys.executable, "-c", ISA_SCRIPT, json.dumps(cases)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)

    scalar = run("scalar")
    assert scalar.returncode == 0, scalar.stderr
    for isa in ("avx2", "avx512vnni", None):
        result = run(isa)
        if isa is not None and result.returncode != 0 and "FARTHING_ISA" in result.stderr:
            continue  # this machine has no such level, and says so
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == json.loads(scalar.stdout), isa
