"""Answers, finished or still being written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from . import _core
from .ledger import Ledger, from_core

if TYPE_CHECKING:
    from typing_extensions import Self

    from .reasoning.effort import EffortPlan

__all__ = ["Completion", "Stream", "TokenLogprobs"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities at one generated token, before temperature and processors.

    Attributes:
        token: the drawn id.
        logprob: its log-probability; 0 for a token that was dictated, not drawn.
        top: the likeliest (id, log-probability) pairs, descending, ties by lower id.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    Attributes:
        text: the answer, without thinking and stop text; blanks behind thinking are left out.
        token_ids: the generated ids, thinking and dictated ones among them, the end token included when one was drawn.
        finish_reason: ``stop`` (end token or stop text), ``length`` (max_tokens or end of context), ``cancelled``.
        ledger: what it cost.
        logprobs: one entry per generated token, if asked for.
        thinking: what the model thought, markers left out, or None when no thinking was opened by it or by the prompt.
            It is told apart for models that mark it in a known way, and where a `farthing.reasoning.Policy` says how.
        thinking_stop: why thinking ended: ``natural`` (the model's end marker), ``budget``, ``grace`` (beyond the
            budget, behind a sentence), ``early_exit``, ``loop``, ``eos_fix`` (the model wanted to end its answer
            there), ``length`` (for the answer's reserve, or nothing more was generated), or None without thinking.
        effort: how ``SamplingParams.effort`` was honoured, if it was given.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    ledger: Ledger
    logprobs: list[TokenLogprobs] | None = None
    thinking: str | None = None
    thinking_stop: str | None = None
    effort: EffortPlan | None = None


class Stream(Iterator[str]):
    """An answer as it is written: iterate over pieces of its text, then read ``completion``.

    Leaving it early cancels the request: ``close()``, the end of a ``with`` block, or garbage collection.
    """

    def __init__(
        self,
        core: _core.Stream,
        progress: Callable[[str, int, int], None] | None = None,
        on_thinking: Callable[[str], None] | None = None,
        effort: EffortPlan | None = None,
    ) -> None:
        self._core = core
        self._progress = progress
        self._on_thinking = on_thinking
        self._effort = effort
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """The whole answer; waits for it if pieces are still to come."""
        while self._completion is None:
            self._event()
        return self._completion

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while self._completion is None:
            if (piece := self._event()) is not None:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Cancels what is left; ``completion`` then has what was written, with finish reason ``cancelled``."""
        self._core.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._core.cancel()

    def _event(self) -> str | None:
        """The next piece of text, or None for an event of another kind."""
        try:
            event = self._core.next()
        except BaseException:  # an interrupt must not leave the engine at work for nobody
            self._core.cancel()
            raise
        if isinstance(event, str):
            return event
        if isinstance(event, _core.Completion):
            self._completion = completion(event, self._effort)
        elif len(event) == 1:
            if self._on_thinking:
                self._on_thinking(event[0])
        elif self._progress:
            self._progress("prompt", *event)
        return None


def completion(core: _core.Completion, effort: EffortPlan | None = None) -> Completion:
    """The completion from the core's record."""
    logprobs = core.logprobs
    return Completion(
        text=core.text,
        token_ids=core.token_ids,
        finish_reason=core.finish_reason,
        ledger=from_core(Ledger, core.ledger),
        logprobs=None if logprobs is None else [TokenLogprobs(*entry) for entry in logprobs],
        thinking=core.thinking,
        thinking_stop=core.thinking_stop,
        effort=effort,
    )
