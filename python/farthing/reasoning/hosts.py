"""Following the sequences of a host that hands over whole texts, row by row, and may permute or shorten them."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .controller import Controller
from .policy import Policy

__all__ = ["Rows", "limited"]

# Controllers kept behind a row: assisted generation looks at most so many tokens ahead.
_KEPT = 64

Ids = npt.NDArray[np.int64]


def limited(policy: Policy | None, budget: int | None) -> Policy | None:
    """The policy under a hard budget; either may be None."""
    if budget is None:
        return policy
    if policy is None:
        return Policy(budget=budget, grace=0, ramp=None, loop_guard=False)
    capped = copy.copy(policy)
    object.__setattr__(capped, "_core", policy._core.capped(budget))
    return capped


class _Row:
    """One text and the controllers at its last lengths."""

    def __init__(self, prompt: Ids, controller: Controller) -> None:
        self.ids = prompt
        self.prompt = len(prompt)
        self.controllers = deque([(len(prompt), controller)], maxlen=_KEPT)

    def continues(self, ids: Ids) -> bool:
        """Whether ``ids`` is one token behind what was seen of this text, or of its beginning."""
        known = len(ids) - 1
        if known < self.prompt:
            return len(ids) == self.prompt and np.array_equal(ids, self.ids[: self.prompt])
        return known <= len(self.ids) and np.array_equal(ids[:-1], self.ids[:known])

    def fork(self, ids: Ids, make: Callable[[Ids], Controller]) -> _Row:
        """The row of ``ids``, which continues this one."""
        usable = [(length, kept) for length, kept in self.controllers if length < len(ids)]
        row = _Row.__new__(_Row)
        row.ids, row.prompt = ids, self.prompt
        row.controllers = deque(usable, maxlen=_KEPT)
        if not usable:
            row.controllers.append((self.prompt, make(ids[: self.prompt])))
        length, last = row.controllers[-1]
        if length < len(ids):
            controller = last.copy()
            controller.extend(ids[length:].tolist())
            row.controllers.append((len(ids), controller))
        return row

    @property
    def controller(self) -> Controller:
        return self.controllers[-1][1]


class Rows:
    """The controllers of a batch of texts.

    A row is recognised by what it says, compared as a whole: beams change places, a rejected draft takes tokens back,
    and another call brings other texts. What continues no row is a prompt.

    Args:
        make: the controller behind a prompt.
    """

    def __init__(self, make: Callable[[Ids], Controller]) -> None:
        self._make = make
        self._rows: list[_Row] = []

    def follow(self, texts: Sequence[Ids]) -> list[Controller]:
        """The controller of each text, prompts and answers so far, which all may be one token longer than before."""
        rows = []
        for at, ids in enumerate(texts):
            # Its own place first: nearly always right.
            places = [*self._rows[at : at + 1], *self._rows[:at], *self._rows[at + 1 :]]
            known = next((row for row in places if row.continues(ids)), None)
            rows.append(_Row(ids, self._make(ids)) if known is None else known.fork(ids, self._make))
        self._rows = rows
        return [row.controller for row in rows]

    def prompts(self) -> list[int]:
        """Length of each row's prompt."""
        return [row.prompt for row in self._rows]
