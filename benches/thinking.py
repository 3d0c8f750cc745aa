"""What following a thinking span costs a token: farthing's controller beside searches of the whole text.

``python -m benches.thinking`` follows 30,000 tokens of thinking under a budget. The peer restates what vLLM's V1
budget holder does at every step while a sequence thinks: look through all generated tokens for the end marker, last
first. Both say where the end is forced; the answers are compared before anything is timed. Interleaved, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import farthing as ft
from farthing.reasoning import Controller, Policy, ThinkSpec

START, END = 1, 2
TOKENS = 30_000


class Rescan:
    """Counts thinking tokens by searching what was generated so far at every token."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.output: list[int] = []

    def push(self, token: int) -> bool:
        """Takes in a token; whether the end is forced behind it."""
        self.output.append(token)
        end = next((at for at in range(len(self.output) - 1, -1, -1) if self.output[at] == END), -1)
        return end < 0 and len(self.output) >= self.budget


def spec() -> ThinkSpec:
    return ThinkSpec(starts=[[START]], ends=[[END]], forced_close=[7, END], boundary=range(100, 1100, 10), eos=[3])


def tokens(count: int) -> list[int]:
    """Ids without a loop or a marker."""
    return [100 + (index * index * 7919 + index * 104729) % 32_000 for index in range(count)]


def follow(controller: Controller, ids: list[int]) -> int | None:
    """The position behind which the end is forced."""
    for position, token in enumerate(ids):
        controller.push(token)
        if controller.forced is not None:
            return position
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    ids = tokens(TOKENS)
    budget = 5000
    rescan = Rescan(budget)
    expected = next(position for position, token in enumerate(ids) if rescan.push(token))
    hard = Policy(budget=budget, grace=0, ramp=None, answer_reserve=0)
    found = follow(Controller(spec(), hard, [START], 10**9), ids)
    if found != expected:
        raise SystemExit(f"the end is forced behind token {found}, expected {expected}")

    free = Policy(budget=10**6, answer_reserve=0)
    whole, last, one, scan = [], [], [], []
    for _ in range(rounds):
        controller = Controller(spec(), free, [START], 10**9)
        begin = time.perf_counter()
        controller.extend(ids)
        whole.append((time.perf_counter() - begin) / TOKENS)
        begin = time.perf_counter()
        controller.extend(ids[:1000])
        last.append((time.perf_counter() - begin) / 1000)
        begin = time.perf_counter()
        for token in ids[:1000]:
            controller.push(token)
        one.append((time.perf_counter() - begin) / 1000)
        rescan = Rescan(10**9)
        rescan.output = list(ids)
        begin = time.perf_counter()
        for token in ids[:5]:
            rescan.push(token)
        scan.append((time.perf_counter() - begin) / 5)
    print(f"farthing {ft.__version__}, {TOKENS:,} tokens of thinking, median of {rounds} rounds, seconds a token")
    for name, times in {
        "controller, all tokens together": whole,
        f"controller, at {TOKENS:,} tokens": last,
        f"controller, at {TOKENS:,} tokens, a Python call for each": one,
        f"search of the whole text, at {TOKENS:,} tokens": scan,
    }.items():
        print(f"  {name:<58} {statistics.median(times) * 1e6:10.3f} µs")


if __name__ == "__main__":
    main()
