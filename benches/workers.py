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
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import farthing
import numpy as np
from farthing import machine
from farthing.bench import _limit

ROOT = Path(__file__).parent.parent
# Ids that every vocabulary has, the 512 tokens of `slices` too; what they say does not matter for speed.
IDS = [32 + 7 * index % 480 for index in range(1536)]
TURN = count()
START = 4  # tokens before a decode run
Tests = dict[str, tuple[str, int]]  # name -> (method, tokens)


def fresh(tokens: int) -> list[int]:
    """Ids that begin unlike those of the calls before: some engines keep what one prompt shares with the last."""
    first = 11 * next(TURN) % 480
    return IDS[first : first + tokens]


class Engine(Protocol):
    """What is measured."""

    def prompt(self, tokens: int) -> float:
        """Seconds for a fresh prompt of that length, up to the logits of its last token."""

    def decode(self, tokens: int) -> float:
        """Seconds for that many single-token passes after a short prompt."""

    def top(self, ids: list[int], text: str, count: int) -> list[int] | str:
        """The likeliest next tokens after a text and its ids: ``count``, or one, or the text of one."""


class Farthing:
    """farthing; ``activations`` is the precision policy."""

    def __init__(self, model: Path, threads: int, activations: str) -> None:
        self._llm = farthing.LLM(model, activations=activations, threads=threads, context=1024, max_sequences=1)

    def prompt(self, tokens: int) -> float:
        params = farthing.SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        ids = fresh(tokens)
        start = perf_counter()
        self._llm.generate(ids, params)
        return perf_counter() - start

    def decode(self, tokens: int) -> float:
        # The first token belongs to the prompt; sampling and the detokenizer are in the time.
        params = farthing.SamplingParams(max_tokens=tokens + 1, temperature=0.0, ignore_eos=True)
        (completion,) = self._llm.generate(fresh(START), params)
        return completion.ledger.decode_seconds

    def top(self, ids: list[int], _text: str, count: int) -> list[int]:
        return np.argsort(-self._llm.logits(ids)[-1])[:count].tolist()

    def limits(self, tests: Tests) -> dict[str, float]:
        """Tokens per second at the machine's limits, probed now."""
        limits = machine.measure(self._llm.threads)
        return {name: _limit(self._llm.explain(), limits, *test) for name, test in tests.items()}

    def encode(self, text: str) -> list[int]:
        return self._llm.tokenizer.encode(text)

    def decode_ids(self, ids: list[int]) -> str:
        return self._llm.tokenizer.decode(ids)


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

    def top(self, ids: list[int], _text: str, count: int) -> list[int]:
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

    def top(self, ids: list[int], _text: str, count: int) -> list[int]:
        return self._step(ids).logits[0, -1].float().argsort(descending=True)[:count].tolist()


class MistralRs:
    """mistral.rs; it takes text alone, so that a prompt is a word repeated."""

    def __init__(self, model: Path, threads: int) -> None:
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        import mistralrs

        self._mistralrs = mistralrs
        which = mistralrs.Which.GGUF(quantized_model_id=str(model.parent), quantized_filename=model.name)
        # No cache of prefixes: every prompt is computed.
        self._runner = mistralrs.Runner(which=which, max_seqs=1, prefix_cache_n=0, token_source="none")

    def _complete(self, text: str, tokens: int) -> Any:
        return self._runner.send_completion_request(
            self._mistralrs.CompletionRequest(
                prompt=text, model="default", max_tokens=tokens, temperature=0.0, ignore_eos=True
            )
        )

    def prompt(self, tokens: int) -> float:
        start = perf_counter()
        usage = self._complete(" the" * tokens, 1).usage
        seconds = perf_counter() - start
        if usage.prompt_tokens != tokens:
            raise RuntimeError(f"the prompt has {usage.prompt_tokens} tokens, expected {tokens}")
        return seconds

    def decode(self, tokens: int) -> float:
        # The first token belongs to the prompt.
        return self._complete(" the" * START, tokens + 1).usage.total_completion_time_sec

    def top(self, _ids: list[int], text: str, _count: int) -> str:
        return self._complete(text, 1).choices[0].text


class OpenVinoGenAi:
    """OpenVINO GenAI, which converts the GGUF file when it loads it."""

    def __init__(self, model: Path, threads: int) -> None:
        import openvino
        import openvino_genai

        self._tensor = openvino.Tensor
        self._pipeline = openvino_genai.LLMPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads, NUM_STREAMS=1)
        self._config = openvino_genai.GenerationConfig()
        self._config.ignore_eos, self._config.do_sample = True, False

    def _generate(self, ids: list[int], tokens: int) -> Any:
        self._config.max_new_tokens = tokens
        return self._pipeline.generate(self._tensor(np.array([ids], np.int64)), self._config)

    def prompt(self, tokens: int) -> float:
        start = perf_counter()
        self._generate(fresh(tokens), 1)
        return perf_counter() - start

    def decode(self, tokens: int) -> float:
        # The first token belongs to the prompt; the mean is over the others.
        return tokens * self._generate(fresh(START), tokens + 1).perf_metrics.get_tpot().mean / 1e3

    def top(self, ids: list[int], _text: str, _count: int) -> list[int]:
        return self._generate(ids, 1).tokens[0]


ENGINES: dict[str, Callable[[Path, int], Engine]] = {
    "farthing": lambda model, threads: Farthing(model, threads, "auto"),
    "farthing a8": lambda model, threads: Farthing(model, threads, "a8"),
    "llama.cpp": LlamaCppWorker,
    "transformers bf16": Transformers,
    "mistral.rs": MistralRs,
    "OpenVINO GenAI": OpenVinoGenAi,
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

    def run(self, tests: Tests) -> dict[str, float]:
        """Seconds for each test, after one like it: engines prepare themselves by length; llama-bench does likewise."""
        seconds = {}
        for name, (method, tokens) in tests.items():
            self.ask(method, tokens if method == "prompt" else 2)
            seconds[name] = self.ask(method, tokens)
        return seconds

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


class BenchBinary:
    """A ``llama-bench`` binary, run once a round; it has no way to show its output."""

    def __init__(self, name: str, binary: str, model: Path, threads: int, *options: str) -> None:
        self.name = name
        self._command = [binary, "-m", str(model), "-t", str(threads), "-r", "1", "-o", "json", *options]

    def run(self, tests: Tests) -> dict[str, float]:
        """Seconds for each test; the file is loaded once for all."""
        lengths = {
            kind: [str(tokens) for method, tokens in tests.values() if method == kind] for kind in ("prompt", "decode")
        }
        options = ["-p", ",".join(lengths["prompt"]) or "0", "-n", ",".join(lengths["decode"]) or "0"]
        output = subprocess.run([*self._command, *options], capture_output=True, text=True, check=True).stdout
        rates = {(run["n_prompt"], run["n_gen"]): run["avg_ts"] for run in json.loads(output[output.index("[") :])}
        return {
            name: tokens / rates[(tokens, 0) if method == "prompt" else (0, tokens)]
            for name, (method, tokens) in tests.items()
        }


def bench_binaries(model: Path, ik_model: Path, threads: int) -> list[BenchBinary]:
    """The llama-bench binaries that LLAMA_BENCH and IK_LLAMA_BENCH name, or that is on the path."""
    found = []
    if binary := os.environ.get("LLAMA_BENCH") or shutil.which("llama-bench"):
        found.append(BenchBinary("llama-bench", binary, model, threads))
    if binary := os.environ.get("IK_LLAMA_BENCH"):
        found.append(BenchBinary("ik_llama.cpp", binary, ik_model, threads))
        found.append(BenchBinary("ik_llama.cpp -rtr", binary, ik_model, threads, "-rtr", "1"))
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
    except (ImportError, RuntimeError, ValueError, farthing.FarthingError) as error:
        return answer(error=str(error))
    answer(value=None)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        answer(value=getattr(engine, method)(*arguments))
    return None


if __name__ == "__main__":
    main()
