"""Who drafts for an engine, and what came of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import UnsupportedError
from ..names import locate
from ..sampling import integer
from ..tables import html_table, text_table
from .drafters import Suffix, SuffixStore

__all__ = ["DraftModel", "DrafterReport", "Proposer", "SpeculationReport", "drafters"]

# Drafters of the core's own.
CORES = (_core.DraftModel, _core.Drafter, _core.Eagle3, _core.Medusa, _core.MTP)


class Proposer(Protocol):
    """What an object needs to draft for `LLM(speculation=...)`; ``begin``, ``observe`` and ``end`` may be missing too.

    Whatever it proposes, the text stays what it is without it. A drafter that raises or names ids that do not exist is
    asked no more, with a warning; one that is slow or wrong is asked less and less.

    Example:
        >>> class Echo:
        ...     def draft(self, request, tokens, budget):
        ...         return tokens[:budget].tolist()
    """

    def draft(
        self, request: int, tokens: npt.NDArray[np.uint32], budget: int
    ) -> Sequence[int] | tuple[Sequence[int], Sequence[int]]:
        """Tokens that may follow.

        Args:
            request: number of the request.
            tokens: (t,) its prompt and answer so far.
            budget: most tokens of use.

        Returns:
            Token ids one behind the other, or (ids, parents): for each id the index of the one before it, -1 behind
            ``tokens``, parents first.
        """


class DraftModel:
    """A small model, which drafts for a large one.

    It draws its tokens with the large model's noise, so it is right as often as the two agree, at any temperature.

    Its tokenizer may be another one: it reads the text in its own tokens. For greedy answers it writes text, which is
    cut into the large model's tokens (string-level exact match); for drawn ones it drafts the tokens that both have,
    with the same noise (token-level intersection; Timor et al. 2025, https://arxiv.org/abs/2502.05202).

    Args:
        model: path, alias or Hub id, as for `LLM`.
        weights: as for `LLM`.
        activations: as for `LLM`.
        vocabulary: draft only the first so many ids, by a head of their rows in 4 bits: vocabularies of byte pairs
            begin with the most frequent ones, and the head is most of a small model. None keeps the whole head.

    Example:
        ``LLM("target.gguf", speculation=DraftModel("draft.gguf"))``
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        weights: str = "auto",
        activations: str = "a8",
        vocabulary: int | None = 32_768,
    ) -> None:
        self.path: Path = locate(model)
        size = None if vocabulary is None else integer("vocabulary", vocabulary, 1)
        self._core = _core.DraftModel(self.path, weights, activations, size)

    def __repr__(self) -> str:
        return f"DraftModel({os.fspath(self.path)!r})"


@dataclass(frozen=True)
class DrafterReport:
    """What a drafter has done.

    Attributes:
        name: its name.
        drafted: tokens of its that were verified.
        accepted: of which so many were right.
        acceptance: share of its first tokens that were right, lately.
        seconds: time for each drafted token.
        stopped: why it is asked no more, if so.
    """

    name: str
    drafted: int
    accepted: int
    acceptance: float
    seconds: float
    stopped: str | None


@dataclass(frozen=True)
class SpeculationReport:
    """What speculation expects and has done; prints as two tables.

    Attributes:
        pass_costs: rows of a pass and its time, in passes over one row, measured on this machine.
        pass_seconds: time of a pass over one row.
        drafters: every drafter.
    """

    pass_costs: list[tuple[int, float]]
    pass_seconds: float
    drafters: list[DrafterReport]

    @classmethod
    def of(cls, core: _core.SpeculationReport) -> SpeculationReport:
        """From the core's record."""
        return cls(core.pass_costs, core.pass_seconds, [DrafterReport(*entry) for entry in core.drafters])

    def break_even(self, drafter: DrafterReport) -> float:
        """Share of its tokens that must be right for one drafted token to pay."""
        second = dict(self.pass_costs)[2]
        return second - 1 + (drafter.seconds / self.pass_seconds if self.pass_seconds else 0.0)

    def _costs(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        header = ("rows of a pass", *(str(rows) for rows, _ in self.pass_costs))
        return header, [("V, its time over that of one row", *(f"{cost:.2f}" for _, cost in self.pass_costs))]

    def _drafters(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        header = (
            "drafter",
            "drafted",
            "accepted",
            "share",
            "first tokens right",
            "break-even",
            "µs a token",
            "stopped",
        )
        rows: list[tuple[str, ...]] = [
            (
                each.name,
                str(each.drafted),
                str(each.accepted),
                f"{each.accepted / each.drafted:.2f}" if each.drafted else "–",
                f"{each.acceptance:.2f}",
                f"{self.break_even(each):.2f}",
                f"{each.seconds * 1e6:.1f}",
                each.stopped or "",
            )
            for each in self.drafters
        ]
        return header, rows

    def __str__(self) -> str:
        tables = (self._costs(), self._drafters())
        return "\n\n".join(text_table(rows, header) for header, rows in tables)

    def _repr_html_(self) -> str:
        tables = (self._costs(), self._drafters())
        return "".join(html_table(rows, header) for header, rows in tables)


def drafters(speculation: Any) -> list[Any]:
    """The core's drafters of what `LLM(speculation=...)` was given, or an UnsupportedError."""
    many = speculation if isinstance(speculation, (list, tuple)) else [speculation]
    cores = []
    for each in many:
        if each is None:
            continue
        if isinstance(each, str) and each == "auto":
            each = Suffix(SuffixStore())
        core = getattr(each, "_core", each)
        if not isinstance(core, CORES) and not hasattr(core, "draft"):
            works = 'use "auto", None, a drafter (an object with a method draft) or a list of them'
            raise UnsupportedError(f"speculation={each!r} is not supported; {works}")
        cores.append(core)
    return cores
