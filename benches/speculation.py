"""Speculation on and off on real prompts, interleaved in one run.

``python -m benches.speculation [--model FILE] [--draft FILE] [--ways auto draft both] [--prompts 10] [--tokens 128]``

For every prompt of the six Spec-Bench subsets (Xia et al., 2024), of texts to repeat, and of a script of an agent that
edits a file step by step, each way answers in turn, greedily and alone; the texts must be equal token for token. A rate
is tokens after the first over the seconds they took. The agent's script runs twice: the second time every step has been
answered before. The prediction of a speedup is tokens over the cost of the passes they took, by ``V`` of their mean
number of rows; what is measured should come close.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from time import perf_counter
from typing import Any

import farthing as ft
import numpy as np

from .agent_steps import steps

SUBSETS = {"translation", "summarization", "qa", "math_reasoning", "rag"}
PASSAGES = (
    "The farthing was the smallest coin of the realm, worth a quarter of a penny, struck in copper, later in bronze.",
    "def area(width, height):\n    if width < 0:\n        raise ValueError('side')\n    return width * height",
    "Alice bought 3 apples, 5 pears and 12 plums on Monday; on Tuesday she sold 2 pears and 7 plums for 4.50.",
    "name,age,city\nAnna,31,Oslo\nBen,27,Turin\nCleo,45,Lima\nDan,19,Quito\nEve,52,Perth",
    "To make tea, boil fresh water, warm the pot, add one spoon for each cup, pour, and wait four minutes.",
    "The river rises in the hills north of the town, passes under nine bridges, and joins the sea by the harbour.",
    "Error 504 at 10:22:31: gateway timeout after 30000 ms, request 8f3e, host api-7, retry in 5 s.",
    "I must go down to the seas again, to the lonely sea and the sky, and all I ask is a tall ship and a star.",
    "SELECT name, total FROM orders JOIN clients ON clients.id = orders.client WHERE total > 100 ORDER BY total;",
    "Water boils at 100 degrees Celsius at sea level, at 93 on a mountain of two thousand metres.",
)


@dataclass
class Sums:
    """Of one way over the prompts of one kind."""

    tokens: int = 0
    seconds: float = 0.0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    ratios: list[float] = field(default_factory=list)


def questions(data: Path, count: int) -> dict[str, list[str]]:
    """Prompts by kind, as the first turn of a conversation."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for line in (data / "eval" / "spec_bench_question.jsonl").read_text().splitlines():
        question = json.loads(line)
        kind = question["category"] if question["category"] in SUBSETS else "chat"
        kinds[kind].append(question["turns"][0])
    # Spread over a subset, so that each of its parts has a share.
    chosen = {kind: [texts[i * len(texts) // count] for i in range(count)] for kind, texts in sorted(kinds.items())}
    chosen["repeat"] = [f"Repeat this text word for word, and nothing else:\n\n{text}" for text in PASSAGES[:count]]
    return chosen


def answer(llm: ft.LLM, prompt: str, tokens: int, sums: Sums) -> tuple[list[int], float]:
    """Token ids and tokens a second."""
    params = ft.SamplingParams(max_tokens=tokens)
    completion = llm.chat([{"role": "user", "content": prompt}], params)[0]
    ledger = completion.ledger
    count = len(completion.token_ids) - 1
    prompt_passes = -(-ledger.prompt_tokens // 512)
    sums.tokens += count
    sums.seconds += ledger.decode_seconds
    sums.passes += max(ledger.passes - prompt_passes, 0)
    sums.drafted += ledger.drafted
    sums.accepted += ledger.accepted
    return list(completion.token_ids), count / ledger.decode_seconds if count else 0.0


def predicted(sums: Sums, llm: ft.LLM) -> float:
    """The speedup that the measured V and the passes promise."""
    report = llm.speculation
    if report is None or sums.passes == 0:
        return 1.0
    rows = 1 + sums.drafted / sums.passes
    costs = report.pass_costs
    value = float(np.interp(rows, [each for each, _ in costs], [cost for _, cost in costs]))
    return sums.tokens / (sums.passes * value)


def run(engines: dict[str, ft.LLM], kinds: dict[str, list[str]], tokens: int) -> dict[str, dict[str, Sums]]:
    """By kind and way."""
    results: dict[str, dict[str, Sums]] = {kind: {way: Sums() for way in engines} for kind in kinds}
    turn = 0
    for kind, prompts in kinds.items():
        begin = perf_counter()
        for prompt in prompts:
            turn += 1
            ways = list(engines)[turn % len(engines) :] + list(engines)[: turn % len(engines)]
            answers = {way: answer(engines[way], prompt, tokens, results[kind][way]) for way in ways}
            expected, plain = answers["off"]
            for way, (ids, rate) in answers.items():
                if ids != expected:
                    raise SystemExit(f"{way} says something else than off to {prompt[:60]!r}")
                if plain:
                    results[kind][way].ratios.append(rate / plain)
        print(f"{kind}: {perf_counter() - begin:.0f} s", flush=True)
    return results


def show(results: dict[str, dict[str, Sums]], engines: dict[str, ft.LLM]) -> None:
    """One line for each kind and way."""
    print(
        f"\n{'kind':16}{'way':8}{'tok/s':>8}{'speedup':>9}{'predicted':>11}{'tok/pass':>10}{'accepted':>10}{'drafted':>9}"
    )
    means: dict[str, list[float]] = defaultdict(list)
    for kind, ways in results.items():
        plain = ways["off"]
        for way, sums in ways.items():
            rate = sums.tokens / sums.seconds
            speedup = rate / (plain.tokens / plain.seconds)
            means[way].append(speedup)
            share = sums.accepted / sums.drafted if sums.drafted else 0.0
            promise = predicted(sums, engines[way]) if way != "off" else 1.0
            print(
                f"{kind:16}{way:8}{rate:8.1f}{speedup:9.2f}{promise:11.2f}"
                f"{sums.tokens / max(sums.passes, 1):10.2f}{share:10.2f}{sums.drafted:9}"
            )
    for way, speedups in means.items():
        subsets = geometric_mean(speedups[:6])
        print(f"{'mean':16}{way:8}{'':8}{geometric_mean(speedups):9.2f}   of the six subsets {subsets:.2f}")


def main() -> None:
    """Reads the arguments, measures, prints."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--draft", help="a draft model with the same tokenizer, for the ways draft and both")
    parser.add_argument("--draft-weights", default="auto", help="precision of the draft model's weights")
    parser.add_argument("--vocabulary", type=int, default=32_768, help="ids of the draft model's head")
    parser.add_argument("--ways", nargs="+", default=["auto"], choices=["auto", "draft", "both"])
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--activations", default="auto")
    parser.add_argument("--prompts", type=int, default=10, help="of each kind")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--kinds", nargs="+", help="only these")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("FARTHING_DATA", root.parent / "shared" / "data"))
    )
    arguments = parser.parse_args()

    def load(speculation: Any) -> ft.LLM:
        return ft.LLM(
            arguments.model,
            weights=arguments.weights,
            activations=arguments.activations,
            speculation=speculation,
            threads=arguments.threads,
            context=arguments.context,
        )

    def drafter() -> ft.speculative.DraftModel:
        size = arguments.vocabulary or None
        return ft.speculative.DraftModel(arguments.draft, weights=arguments.draft_weights, vocabulary=size)

    makers = {"auto": lambda: "auto", "draft": drafter, "both": lambda: ["auto", drafter()]}
    engines = {"off": load(None)} | {way: load(makers[way]()) for way in arguments.ways}
    for llm in engines.values():
        llm.generate("warm up", ft.SamplingParams(max_tokens=4))
    kinds = questions(arguments.data, arguments.prompts) | {"agent": steps(), "agent again": steps()}
    kinds = {kind: prompts for kind, prompts in kinds.items() if not arguments.kinds or kind in arguments.kinds}
    results = run(engines, kinds, arguments.tokens)
    show(results, engines)
    for way, llm in engines.items():
        if way != "off":
            print(f"\n{way}\n{llm.speculation}")


if __name__ == "__main__":
    main()
