"""One model shared by many Python threads, and by a forked process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import farthing as ft
import numpy as np
import tiny


def test_eight_threads_share_one_model(smollm2: Path) -> None:
    """Answers, streams, logits and tokenizer from 8 threads at once are those of one thread."""
    llm = ft.LLM(smollm2, context=256)

    def work(worker: int) -> tuple[object, ...]:
        ids = tiny.prompt(5 + 9 * worker, 49152)
        params = ft.SamplingParams(max_tokens=16, temperature=0.8, seed=worker, ignore_eos=True, logprobs=1)
        (completion,) = llm.generate(ids, params)
        stream = llm.stream(f"Count from {worker} to", ft.SamplingParams(max_tokens=8))
        text = "".join(stream)
        round_trip = llm.tokenizer.decode(llm.tokenizer.encode(f"thread {worker} 🙂"))
        return completion.token_ids, completion.logprobs, text, round_trip, llm.logits(ids[:20]).tobytes()

    alone = [work(worker) for worker in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            assert list(pool.map(work, range(8))) == alone
    assert alone[3][3] == "thread 3 🙂"


def test_threads_come_and_go(tiny_directory: Callable[[str], Path]) -> None:
    """Requests started, abandoned and cancelled from many threads leave the engine sound."""
    llm = ft.LLM(tiny_directory("llama-2"), max_sequences=4, context=256, kv_pages=16)
    ids = tiny.prompt(40)
    params = ft.SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    (expected,) = llm.generate(ids, params)

    def work(worker: int) -> list[int]:
        for _ in range(10):
            stream = llm.stream(ids, params)
            if worker % 3 == 0:
                stream.close()
                assert stream.completion.finish_reason in ("cancelled", "length")
            elif worker % 3 == 1:
                del stream
            else:
                assert stream.completion.token_ids == expected.token_ids
        return llm.generate(ids, params)[0].token_ids

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [expected.token_ids] * 8


def test_models_come_and_go_in_threads(tiny_directory: Callable[[str], Path]) -> None:
    directory = tiny_directory("gemma3")
    ids = tiny.prompt(20)

    def work(_: int) -> bytes:
        return np.asarray(ft.LLM(directory, threads=2).logits(ids)).tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(work, range(12)))) == 1


FORK_SCRIPT = """
import os, sys, warnings
import farthing as ft
warnings.simplefilter("ignore", DeprecationWarning)  # Python warns that a process with threads forks
llm = ft.LLM(sys.argv[1])
params = ft.SamplingParams(max_tokens=8, ignore_eos=True)
before = llm.generate([1, 5, 9], params)[0].token_ids
child = os.fork()
if child == 0:
    try:
        same = llm.generate([1, 5, 9], params)[0].token_ids == before
        print("same" if same else "different", flush=True)
    except Exception as error:
        print("typed" if isinstance(error, ft.FarthingError) else "untyped", error, flush=True)
    try:
        fresh = ft.LLM(sys.argv[1]).generate([1, 5, 9], params)[0].token_ids
        print("fresh same" if fresh == before else "fresh different", flush=True)
    finally:
        os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert llm.generate([1, 5, 9], params)[0].token_ids == before
print("parent fine")
"""


def test_fork_neither_hangs_nor_lies(tiny_directory: Callable[[str], Path]) -> None:
    """In a forked child a model of the parent works or says what to do; a model loaded there works."""
    command = [sys.executable, "-c", FORK_SCRIPT, str(tiny_directory("llama-2"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    child, fresh, parent = result.stdout.splitlines()
    assert child == "same" or (child.startswith("typed") and "load the model again" in child)
    assert fresh == "fresh same"
    assert parent == "parent fine"
