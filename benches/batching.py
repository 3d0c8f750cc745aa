"""Sixteen prompts at once beside one by one: passes over the weights, and time.

``python -m benches.batching [--model FILE] [--threads 2] [--rounds 5]``
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter

import farthing as ft

from .end_to_end import default_model
from .workers import IDS

LENGTHS = [4, 7, 11, 16, 20, 25, 31, 32, 33, 40, 48, 57, 64, 65, 80, 96]


def main() -> None:
    """Measures both ways by turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    arguments = parser.parse_args()
    model = arguments.model or default_model()
    llm = ft.LLM(model, threads=arguments.threads, context=512)
    params = ft.SamplingParams(max_tokens=arguments.tokens, temperature=0.0, ignore_eos=True)
    prompts = [IDS[:length] for length in LENGTHS]

    def timed(batches: list[list[list[int]]]) -> tuple[float, int, list[list[int]]]:
        passes, start = llm.ledger.passes, perf_counter()
        tokens = [completion.token_ids for batch in batches for completion in llm.generate(batch, params)]
        return perf_counter() - start, llm.ledger.passes - passes, tokens

    together, apart = [], []
    for turn in range(-1, arguments.rounds):
        seconds, passes, tokens = timed([prompts])
        alone_seconds, alone_passes, alone_tokens = timed([[prompt] for prompt in prompts])
        if tokens != alone_tokens:
            raise SystemExit("answers differ: no timing")
        if turn >= 0:
            together.append(seconds)
            apart.append(alone_seconds)
    ratio = median(a / b for a, b in zip(together, apart, strict=True))
    print(f"{model.name}, {len(prompts)} prompts, {arguments.tokens} tokens each, {arguments.threads} threads")
    print(f"{'':<12}{'passes':>8}{'seconds':>10}{'tok/s':>8}")
    for name, count, times in (("one by one", alone_passes, apart), ("together", passes, together)):
        rate = len(prompts) * arguments.tokens / median(times)
        print(f"{name:<12}{count:>8}{median(times):>10.3f}{rate:>8.0f}")
    print(f"{'ratio':<12}{passes / alone_passes:>8.3f}{ratio:>10.3f}")


if __name__ == "__main__":
    main()
