"""How much thinking a request wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import _core
from ..sampling import integer, number

__all__ = ["REFLECTION_WORDS", "Policy", "Probe"]

#: Words with which models turn back on themselves, for ``Policy(ban=REFLECTION_WORDS)`` (NoWait, arXiv 2506.08343).
#: Off by default: models that were not trained by reinforcement lose accuracy without them.
REFLECTION_WORDS = (
    "wait",
    "alternatively",
    "hmm",
    "but",
    "however",
    "alternative",
    "another",
    "check",
    "double-check",
    "oh",
    "maybe",
    "verify",
    "other",
    "again",
    "now",
    "ah",
    "any",
)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """When and how a look ahead finds out that the answer has settled, so that thinking may end early.

    At the end of a paragraph, or every so many tokens, ``suffix`` is read behind the text, in the pages and the steps
    of the engine, and taken back. The first stage looks at the entropy of what would come next (EAT, arXiv 2509.26522):
    it passes below ``entropy``, or when its moving variance is below ``variance``. Only then the second stage writes a
    short answer greedily (DEER, arXiv 2504.15895): thinking ends when the geometric mean of its tokens' probabilities
    exceeds ``confidence``, or when it says what the look before said. The text waits meanwhile, so that it depends on
    neither batches nor drafts. The ledger counts ``probe_tokens``.

    Args:
        every: look every so many thinking tokens; None looks at the end of each paragraph.
        suffix: text that is read; None is the end of thinking and "The final answer is: ", or for a policy with ``end``
            alone a line break and that end.
        entropy: nats below which the first stage passes; ``inf`` always does.
        variance: variance of the entropy, in nats squared, below which it passes too, from ``4 / alpha`` looks on.
        alpha: weight of the latest entropy in the moving mean and variance, in (0, 1].
        confidence: geometric mean probability above which the short answer settles it; 1 leaves agreement alone.
        answer_tokens: most tokens of the short answer, 1 to 256.
        until: text at which the short answer ends; ``""`` for none. The end of the answer ends it too.
        most: most looks in one answer.

    Raises:
        ValueError: names the argument, what it got and what it expected.

    Example:
        >>> Policy(end="####", probe=Probe(every=24), ramp=None).probe.answer_tokens
        20
    """

    every: int | None = None
    suffix: str | None = None
    entropy: float = 0.5
    variance: float = 1e-3
    alpha: float = 0.2
    confidence: float = 0.95
    answer_tokens: int = 20
    until: str = "\n"
    most: int = 100
    _core: _core.Probe = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("suffix", "until"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "until"):
                raise ValueError(f"{name}: got {value!r}, expected a text")
        core = _core.Probe(
            every=None if self.every is None else integer("every", self.every, 1, 2**31),
            suffix=self.suffix,
            entropy=number("entropy", self.entropy),
            variance=number("variance", self.variance),
            alpha=number("alpha", self.alpha),
            confidence=number("confidence", self.confidence),
            answer_tokens=integer("answer_tokens", self.answer_tokens, 1, 256),
            until=self.until,
            most=integer("most", self.most, 0, 2**31),
        )
        object.__setattr__(self, "_core", core)

    def __reduce__(self) -> Any:
        return _rebuild_probe, ({name: getattr(self, name) for name in self.__dataclass_fields__ if name != "_core"},)


def _rebuild_probe(values: dict[str, Any]) -> Probe:
    return Probe(**values)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How long a model may think, and how its thinking is ended.

    Thinking is what stands between the model's markers (``<think>`` … ``</think>`` and the like); ``start`` and ``end``
    name others. With ``end`` alone the thinking begins with the first generated token, for models that reason in plain
    text: ``Policy(end="####", budget=120)`` bounds what comes before ``####``.

    The budget counts the tokens of all thinking spans, those of a span that the prompt opened included, markers and
    dictated tokens not. When it is spent, the end is dictated: ``message``, then the end marker.

    * A hard cap: ``SamplingParams(thinking_budget=120, thinking=Policy(end="####", ramp=None, loop_guard=False))``.
    * A soft budget: ``SamplingParams(thinking=Policy(end="####", budget=120))``. From 84 tokens on the end marker
      becomes likelier, most of all behind a sentence; beyond 120 the next sentence's end is awaited, 12 tokens at most.
    * Early exit: ``SamplingParams(thinking=Policy(end="####", ramp=None, probe=Probe(every=24)))`` looks every 24
      tokens whether the answer behind ``####`` has settled.

    Args:
        budget: thinking tokens after which the end is near, at least 0; None leaves it to ``thinking_budget``, and to
            what ``max_tokens`` leaves beside the answer's reserve.
        soft_ratio: part of the budget from which the ramp is at work, 0 to 1.
        ramp: how the end marker's logit rises towards the greatest: ``sigmoid``, ``linear`` or None.
        margin: the ramp's end is so far below the greatest logit, at least 0.
        grace: tokens beyond the budget while the end of a sentence is awaited; None is a tenth of the budget.
        min_think: thinking tokens before which thinking may not end.
        answer_reserve: tokens of ``max_tokens`` kept for the answer: thinking ends early enough. None is a quarter of
            ``max_tokens``, at most 256.
        ban: token ids, or words in whatever case with whatever blanks, that may not come while thinking.
        loop_guard: end thinking that goes round in circles: a passage of up to 128 tokens 8 times in a row (24 times
            below 8 tokens).
        probe: a `Probe`: looks ahead that end thinking when the answer has settled.
        reentry: a second thinking span may use what is left of the budget (``rearm``), or may not begin (``ban``).
        start: text that opens a span; needs ``end``.
        end: text that ends it.
        message: text written before the end marker when thinking is ended by force, ``""`` for none; None is one plain
            sentence, or a line break where thinking begins at once.

    Raises:
        ValueError: names the argument, what it got and what it expected.

    Example:
        >>> Policy(budget=256, grace=0, ramp=None).budget
        256
    """

    budget: int | None = None
    soft_ratio: float = 0.7
    ramp: str | None = "sigmoid"
    margin: float = 0.25
    grace: int | None = None
    min_think: int = 0
    answer_reserve: int | None = None
    ban: Sequence[int | str] = ()
    loop_guard: bool = True
    probe: Probe | None = None
    reentry: str = "rearm"
    start: str | None = None
    end: str | None = None
    message: str | None = None
    _core: _core.Policy = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.ban, str) or not isinstance(self.ban, Sequence):
            raise ValueError(f"ban: got {self.ban!r}, expected a list of token ids and words")
        if not isinstance(self.loop_guard, bool):
            raise ValueError(f"loop_guard: got {self.loop_guard!r}, expected True or False")
        if self.probe is not None and not isinstance(self.probe, Probe):
            raise ValueError(f"probe: got {self.probe!r}, expected a farthing.reasoning.Probe")
        for name in ("ramp", "start", "end", "message", "reentry"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "reentry"):
                raise ValueError(f"{name}: got {value!r}, expected a text")
        object.__setattr__(self, "ban", tuple(self.ban))
        core = _core.Policy(
            budget=_count("budget", self.budget),
            cap=None,
            soft_ratio=number("soft_ratio", self.soft_ratio),
            ramp=self.ramp,
            margin=number("margin", self.margin),
            grace=_count("grace", self.grace),
            min_think=integer("min_think", self.min_think, 0, 2**31),
            answer_reserve=_count("answer_reserve", self.answer_reserve),
            ban=[integer("ban", token, 0, 2**32 - 1) for token in self.ban if not isinstance(token, str)],
            ban_words=[word for word in self.ban if isinstance(word, str)],
            loop_guard=self.loop_guard,
            probe=None if self.probe is None else self.probe._core,
            reentry=self.reentry,
            start=self.start,
            end=self.end,
            message=self.message,
        )
        object.__setattr__(self, "_core", core)

    def __reduce__(self) -> Any:
        return _rebuild, ({name: getattr(self, name) for name in self.__dataclass_fields__ if name != "_core"},)


def _rebuild(values: dict[str, Any]) -> Policy:
    return Policy(**values)


def _count(name: str, value: Any) -> int | None:
    return None if value is None else integer(name, value, 0, 2**31)
