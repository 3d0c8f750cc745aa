"""How the tokens of an answer are drawn."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import _core
from .reasoning.effort import EFFORTS, EffortPlan

if TYPE_CHECKING:
    from .reasoning import Policy

__all__ = ["SamplingParams"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to answer one prompt. Order: penalties, temperature, min-p, top-k, top-p, then the draw.

    Args:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens; None keeps all.
        top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
        min_p: drop tokens less likely than this times the likeliest, in [0, 1).
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or answer, > 0.
        presence_penalty: subtracted from the logits of tokens in the answer.
        frequency_penalty: subtracted from the logits of tokens in the answer, times their count.
        seed: noise key, 0 to 2**64 - 1; the same seed gives the same answer to the same prompt; None draws a fresh one.
        stop: text or texts the answer ends before; inside thinking they mean nothing.
        ignore_eos: go on after the model's end token.
        logprobs: report the log-probability of each drawn token and of this many likeliest ones, 0 to 20.
        effort: how much the model thinks: none, minimal, low, medium, high, xhigh or max, or a plan that
            `farthing.reasoning.resolve_effort` made. For conversations only: it is the chat template that is told.
        thinking_budget: most thinking tokens, at least 0, never exceeded by one: then the end of thinking is dictated,
            after a plain sentence, and the answer follows. Of ``max_tokens``, which counts everything generated, a
            reserve is kept for the answer (a quarter, at most 256 tokens): thinking ends earlier where that needs it.
        thinking: a `farthing.reasoning.Policy`: soft budgets, ramps, reserves, bans, markers of one's own. Beside a
            ``thinking_budget`` it is bounded by that.

    Raises:
        ValueError: names the argument, what it got and what it expected.

    A model without thinking markers raises UnsupportedError for ``thinking_budget`` and for a ``thinking`` that names
    none.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    effort: str | EffortPlan | None = None
    thinking_budget: int | None = None
    thinking: Policy | None = None
    _core: _core.Sampling = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (self.effort is None or isinstance(self.effort, EffortPlan) or self.effort in EFFORTS):
            raise ValueError(f"effort: got {self.effort!r}, expected one of {', '.join(EFFORTS)}, or an EffortPlan")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos: got {self.ignore_eos!r}, expected True or False")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) for text in stop):
            raise ValueError(f"stop: got {self.stop!r}, expected a text or a list of texts")
        core = _core.Sampling(
            max_tokens=integer("max_tokens", self.max_tokens, 1),
            temperature=number("temperature", self.temperature),
            top_k=None if self.top_k is None else integer("top_k", self.top_k, 1),
            top_p=number("top_p", self.top_p),
            min_p=number("min_p", self.min_p),
            repetition_penalty=number("repetition_penalty", self.repetition_penalty),
            presence_penalty=number("presence_penalty", self.presence_penalty),
            frequency_penalty=number("frequency_penalty", self.frequency_penalty),
            seed=None if self.seed is None else integer("seed", self.seed, 0, 2**64 - 1),
            stop=list(stop),
            ignore_eos=self.ignore_eos,
            logprobs=None if self.logprobs is None else integer("logprobs", self.logprobs, 0),
            thinking=_policy(self.thinking, self.thinking_budget),
        )
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "_core", core)

    def __reduce__(self) -> Any:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "_core"}
        return _rebuild, (values,)


def _policy(thinking: Any, budget: Any) -> _core.Policy | None:
    policy = getattr(thinking, "_core", None)
    if thinking is not None and not isinstance(policy, _core.Policy):
        raise ValueError(f"thinking: got {thinking!r}, expected a farthing.reasoning.Policy")
    if budget is None:
        return policy
    most = integer("thinking_budget", budget, 0, 2**31)
    return _core.Policy.hard(most) if policy is None else policy.capped(most)


def _rebuild(values: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**values)


def integer(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """``value`` as an int in ``least..=most``, or a ValueError that names the argument."""
    expected = f"an integer ≥ {least}" if most == 2**63 - 1 else f"an integer from {least} to {most}"
    if isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: got {value!r}, expected {expected}") from None
    if not least <= number <= most:
        raise ValueError(f"{name}: got {number}, expected {expected}")
    return number


def number(name: str, value: Any) -> float:
    """``value`` as a float, or a ValueError that names the argument."""
    if isinstance(value, (bool, str, bytes)):
        raise ValueError(f"{name}: got {value!r}, expected a number")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {value!r}, expected a number") from None
