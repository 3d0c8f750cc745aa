"""Engines under measurement, each in a process of its own so that none's threads or caches help or hinder another's.

A worker reads one JSON request per line and answers with one: ``python -m benches.workers ENGINE MODEL THREADS``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

ROOT = Path(__file__).parent.parent
# Ids that every vocabulary has; what they say does not matter for speed.
IDS = [1000 + 7 * index for index in range(1024)]
START = 4  # tokens before a decode run


class Engine(Protocol):
    """What is measured."""

    def prompt(self, tokens: int) -> float:
        """Seconds for a fresh prompt of that length, up to the logits of its last token."""

    def decode(self, tokens: int) -> float:
        """Seconds for that many single-token passes after a short prompt."""

    def top(self, ids: list[int], count: int) -> list[int]:
        """The likeliest next tokens."""


class Farthing:
    """farthing; ``activations`` is the precision policy."""

    def __init__(self, model: Path, threads: int, activations: str) -> None:
        import farthing as ft

        self._ft = ft
        self._llm = ft.LLM(model, activations=activations, threads=threads, context=1024, max_sequences=1)

    def prompt(self, tokens: int) -> float:
        params = self._ft.SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        start = perf_counter()
        self._llm.generate(IDS[:tokens], params)
        return perf_counter() - start

    def decode(self, tokens: int) -> float:
        # The first token belongs to the prompt; sampling and the detokenizer are in the time.
        params = self._ft.SamplingParams(max_tokens=tokens + 1, temperature=0.0, ignore_eos=True)
        (completion,) = self._llm.generate(IDS[:START], params)
        return completion.ledger.decode_seconds

    def top(self, ids: list[int], count: int) -> list[int]:
        return np.argsort(-self._llm.logits(ids)[-1])[:count].tolist()


class LlamaCppWorker:
    """llama.cpp as installed (see ``llama_cpp_library``); what llama-bench calls pp and tg."""

    def __init__(self, model: Path, threads: int) -> None:
        from .llama_cpp_library import LlamaCpp

        self._llama = LlamaCpp(model, threads=threads, context=1024)
        sys.stderr.write(f"llama.cpp is {self._llama.description}\n")

    def prompt(self, tokens: int) -> float:
        self._llama.clear()
        start = perf_counter()
        self._llama.decode(IDS[:tokens])
        return perf_counter() - start

    def decode(self, tokens: int) -> float:
        self._llama.clear()
        self._llama.decode(IDS[:START])
        start = perf_counter()
        for token in IDS[:tokens]:
            self._llama.decode([token])
        return perf_counter() - start

    def top(self, ids: list[int], count: int) -> list[int]:
        self._llama.clear()
        return np.argsort(-self._llama.decode(ids))[:count].tolist()


class Transformers:
    """transformers on the dequantised weights in bfloat16."""

    def __init__(self, model: Path, threads: int) -> None:
        import torch

        sys.path.insert(0, str(ROOT / "tests"))
        import reference

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = reference.gguf_model(model).to(torch.bfloat16)
        self._model.set_attn_implementation("sdpa")

    def _step(self, ids: list[int], cache: Any = None) -> Any:
        with self._torch.inference_mode():
            return self._model(self._torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)

    def prompt(self, tokens: int) -> float:
        start = perf_counter()
        self._step(IDS[:tokens])
        return perf_counter() - start

    def decode(self, tokens: int) -> float:
        cache = self._step(IDS[:START]).past_key_values
        start = perf_counter()
        for token in IDS[:tokens]:
            cache = self._step([token], cache).past_key_values
        return perf_counter() - start

    def top(self, ids: list[int], count: int) -> list[int]:
        return self._step(ids).logits[0, -1].float().argsort(descending=True)[:count].tolist()


ENGINES: dict[str, Callable[[Path, int], Engine]] = {
    "farthing": lambda model, threads: Farthing(model, threads, "auto"),
    "farthing a8": lambda model, threads: Farthing(model, threads, "a8"),
    "llama.cpp": LlamaCppWorker,
    "transformers bf16": Transformers,
}


class Worker:
    """An engine in a process of its own."""

    def __init__(self, engine: str, model: Path, threads: int) -> None:
        command = [sys.executable, "-m", "benches.workers", engine, str(model), str(threads)]
        self.name = engine
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_environment(threads)
        )
        self.error = self._answer().get("error")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": f"ended with exit code {self._process.wait()}"}

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the engine."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


class BenchBinary:
    """A ``llama-bench`` binary, run once for each measurement; it has no way to show its output."""

    error = None

    def __init__(self, name: str, binary: str, model: Path, threads: int, *options: str) -> None:
        self.name = name
        self._command = [binary, "-m", str(model), "-t", str(threads), "-r", "1", "-o", "json", *options]

    def ask(self, method: str, tokens: int) -> float:
        """Seconds for a ``prompt`` or a ``decode`` of that many tokens."""
        which = ["-p", str(tokens), "-n", "0"] if method == "prompt" else ["-p", "0", "-n", str(tokens)]
        output = subprocess.run([*self._command, *which], capture_output=True, text=True, check=True).stdout
        return tokens / json.loads(output[output.index("[") :])[0]["avg_ts"]

    def close(self) -> None:
        """Nothing is kept running."""


def bench_binaries(model: Path, threads: int) -> list[BenchBinary]:
    """The llama-bench binaries that LLAMA_BENCH and IK_LLAMA_BENCH name, or that is on the path."""
    found = []
    if binary := os.environ.get("LLAMA_BENCH") or shutil.which("llama-bench"):
        found.append(BenchBinary("llama-bench", binary, model, threads))
    if binary := os.environ.get("IK_LLAMA_BENCH"):
        found.append(BenchBinary("ik_llama.cpp", binary, model, threads))
        found.append(BenchBinary("ik_llama.cpp -rtr", binary, model, threads, "-rtr", "1"))
    return found


def _environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def main() -> None:
    """Serves one engine."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    name, model, threads = sys.argv[1:]
    try:
        engine = ENGINES[name](Path(model), int(threads))
    except (ImportError, RuntimeError) as error:
        return answer(error=str(error))
    answer(value=None)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        answer(value=getattr(engine, method)(*arguments))
    return None


if __name__ == "__main__":
    main()
