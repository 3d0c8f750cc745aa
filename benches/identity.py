"""The same text with speculation and without: Spec-Bench prompts, greedy and drawn, alone and eight at a time.

``python -m benches.identity [--model FILE] [--prompts 200] [--tokens 32] [--words 120] [--drafters auto ngram ...]``

Every drafter runs under the controller and, with it off, at 4 and at 8 drafted tokens. Each answer must be equal to
that without speculation, token for token; a difference ends the run with its prompt. Prompts are cut to ``--words``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import farthing as ft
from farthing.speculative import NGram, Suffix, SuffixStore, TokenRecycling

DRAFTERS: dict[str, Callable[[], Any]] = {
    "auto": lambda: "auto",
    "ngram": lambda: NGram("vllm", min_n=2, max_n=5),
    "recycling": TokenRecycling,
    "trees": lambda: [Suffix(SuffixStore(), tree=True), TokenRecycling()],
}


def prompts(data: Path, count: int, words: int) -> list[str]:
    """First turns, spread over all subsets."""
    lines = (data / "eval" / "spec_bench_question.jsonl").read_text().splitlines()
    turns = [json.loads(lines[index * len(lines) // count])["turns"][0] for index in range(count)]
    return [" ".join(turn.split(" ")[:words]) for turn in turns]


def answers(llm: ft.LLM, texts: list[str], params: list[ft.SamplingParams], together: int) -> list[list[int]]:
    """Token ids of every answer."""
    conversations = [[{"role": "user", "content": text}] for text in texts]
    found: list[list[int]] = []
    for start in range(0, len(texts), together):
        part = slice(start, start + together)
        found += [list(answer.token_ids) for answer in llm.chat(conversations[part], params[part])]
    return found


def main() -> None:
    """Reads the arguments, compares, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--words", type=int, default=120)
    parser.add_argument("--drafters", nargs="+", default=list(DRAFTERS), choices=DRAFTERS)
    data = os.environ.get("FARTHING_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    arguments = parser.parse_args()
    texts = prompts(arguments.data, arguments.prompts, arguments.words)
    ways = {
        "greedy": [ft.SamplingParams(max_tokens=arguments.tokens) for _ in texts],
        "drawn": [
            ft.SamplingParams(max_tokens=arguments.tokens, temperature=0.7, top_p=0.9, seed=seed)
            for seed in range(len(texts))
        ],
    }
    plain = ft.LLM(arguments.model, speculation=None, context=2048)
    expected = {way: answers(plain, texts, params, 8) for way, params in ways.items()}
    for name in arguments.drafters:
        for fixed in (None, 4, 8):
            begin = perf_counter()
            llm = ft.LLM(arguments.model, speculation=DRAFTERS[name](), draft_tokens=fixed, context=2048)
            for way, params in ways.items():
                for together in (1, 8):
                    got = answers(llm, texts, params, together)
                    for text, ours, theirs in zip(texts, got, expected[way], strict=True):
                        if ours != theirs:
                            raise SystemExit(f"{name}, {fixed} drafted, {way}, {together} at a time: {text[:80]!r}")
            ledger = llm.ledger
            if fixed and not ledger.accepted:
                raise SystemExit(f"{name}, {fixed} drafted: nothing was accepted, so nothing is shown")
            many = "controller" if fixed is None else f"{fixed} drafted"
            share = f"{ledger.accepted} of {ledger.drafted} drafts accepted"
            print(
                f"{name:10} {many:11} {4 * len(texts)} answers equal, {share}, {perf_counter() - begin:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
