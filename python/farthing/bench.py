"""How fast a model runs here, and how far that is from what the machine allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from .explanation import Explanation
from .llm import LLM
from .machine import Limits, measure
from .sampling import SamplingParams
from .tables import html_table, text_table

__all__ = ["Speed", "bench"]

DECODE_PROMPT = 16


@dataclass(frozen=True)
class Speed:
    """One kind of work.

    Attributes:
        work: ``prompt-16``, ``prompt-512`` or ``decode-128``: tokens of a prompt, or tokens drawn one by one.
        rate: tokens per second, the median of the rounds.
        limit: tokens per second at the limits measured in the same rounds: the slower of memory and arithmetic.
    """

    work: str
    rate: float
    limit: float

    @property
    def share(self) -> float:
        """Part of the limit that was reached."""
        return self.rate / self.limit


class Bench(list[Speed]):
    """The speeds; prints as a table."""

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (speed.work, f"{speed.rate:.1f} tok/s", f"{speed.limit:.1f} tok/s", f"{speed.share:.0%}") for speed in self
        ]

    def __str__(self) -> str:
        return text_table(self._rows(), ("work", "speed", "limit", "reached"))

    def _repr_html_(self) -> str:
        return html_table(self._rows(), ("work", "speed", "limit", "reached"))


def bench(
    llm: LLM,
    prompts: tuple[int, ...] = (16, 512),
    decode: int = 128,
    rounds: int = 5,
    watch: Callable[[int, int], None] | None = None,
) -> Bench:
    """Measures ``llm`` alone on its machine, work and limits interleaved round by round.

    Args:
        llm: a loaded model.
        prompts: prompt lengths in tokens.
        decode: tokens to draw one by one after a short prompt.
        rounds: how often everything is measured.
        watch: called as ``watch(done, rounds)``.
    """
    matrices, random = llm.explain(), np.random.default_rng(0)
    kinds = [*(("prompt", length) for length in prompts), ("decode", decode)]
    rates: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    tops: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        limits = measure(llm.threads)
        for kind in kinds:
            rate = _run(llm, random, *kind)
            if number:  # the first round warms up
                rates[kind].append(rate)
                tops[kind].append(_limit(matrices, limits, *kind))
        if watch:
            watch(number, rounds)
    return Bench(Speed("-".join(map(str, kind)), median(rates[kind]), median(tops[kind])) for kind in kinds)


def _run(llm: LLM, random: np.random.Generator, work: str, count: int) -> float:
    """Tokens per second of one run on random ids."""
    length, drawn = (count, 1) if work == "prompt" else (DECODE_PROMPT, count + 1)
    ids = random.integers(0, llm.vocabulary, length)
    (completion,) = llm.generate(ids, SamplingParams(max_tokens=drawn, ignore_eos=True))
    ledger = completion.ledger
    return count / (ledger.prefill_seconds if work == "prompt" else ledger.decode_seconds)


def _limit(matrices: Explanation, limits: Limits, work: str, count: int) -> float:
    """Tokens per second when one pass takes as long as its bytes or its operations need, whichever is more.

    Tokens are taken to choose their experts evenly.
    """
    tokens = count if work == "prompt" else 1
    head = next(matrix for matrix in reversed(matrices) if matrix.layer is None)
    blocks = [matrix for matrix in matrices if matrix.layer is not None]
    read = [matrix.nbytes * (1 - (1 - matrix.used / matrix.count) ** tokens) for matrix in [*blocks, head]]
    reading = sum(read) / limits.bandwidth
    planes = {"a8": 1, "a16": 2}
    operations = sum(
        2 * matrix.used * matrix.rows * matrix.columns * planes.get(matrix.activations, 0) for matrix in blocks
    )
    return tokens / max(reading, tokens * operations / limits.int8_rate)
