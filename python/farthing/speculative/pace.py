"""How many drafted tokens are worth their rows in somebody else's host: by its pass times, as they are measured."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from .host import Chain

__all__ = ["Pace", "PassTimes", "Survival"]

_CLASSES = 10
# A survival estimate starts as if it had seen so many tokens, and forgets by this factor with each.
_PRIOR_WEIGHT = 2.0
_FORGETTING = 0.995
# No token is ever certain, or one class could never lose its drafts again.
_MOST_CERTAIN = 0.99
# A draft must promise this much more than a plain pass, since times are noisy.
_HYSTERESIS = 1.02
# Times older than so many passes were of another context; they are measured again. A single one, which may have
# allocated or compiled something, is sooner.
_OLD = 512
_TENTATIVE = 64
_KEPT = 5
_LONGEST_REST = 64


class PassTimes:
    """Seconds of a host's passes by their rows: the least of the last few, in between straight lines.

    Beyond the most rows measured it hopes for the time of these, up to twice as many: where drafts promise much, longer
    ones are tried step by step.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        # By rows: the pass in which they were measured last, and how often they were.
        self._measured: dict[int, tuple[int, int]] = {}
        self._passes = 0

    def add(self, rows: int, seconds: float) -> None:
        """A pass of so many rows took so long."""
        self._passes += 1
        self._measured[rows] = (self._passes, self._measured.get(rows, (0, 0))[1] + 1)
        self._seconds.setdefault(rows, deque(maxlen=_KEPT)).append(seconds)

    def known(self) -> dict[int, float]:
        """Seconds by rows, as far as they were measured lately."""
        for rows, (last, times) in list(self._measured.items()):
            if self._passes - last > (_OLD if times > 1 else _TENTATIVE):
                self._seconds.pop(rows, None)
        return {rows: min(seconds) for rows, seconds in list(self._seconds.items())}

    def curve(self, most: int) -> list[float] | None:
        """Seconds of passes over 1 to ``most`` rows, or None where a plain pass was not measured twice."""
        points = sorted(self.known().items())
        if len(self._seconds.get(1, ())) < 2:
            return None
        seconds = []
        for rows in range(1, most + 1):
            below = max(point for point in points if point[0] <= rows)
            above = min((point for point in points if point[0] >= rows), default=below)
            share = (rows - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
            hoped = rows <= 2 * points[-1][0]
            seconds.append(below[1] + share * (above[1] - below[1]) if hoped else math.inf)
        return seconds


class Survival:
    """How often drafted tokens are right, by the drafter's class of confidence."""

    def __init__(self) -> None:
        prior = [0.3 + 0.6 * confidence / (_CLASSES - 1) for confidence in range(_CLASSES)]
        self._seen = [_PRIOR_WEIGHT] * _CLASSES
        self._right = [_PRIOR_WEIGHT * mean for mean in prior]

    def of(self, chain: Chain) -> list[float]:
        """Probability of each token that it and all before it are right, (n,)."""
        survival, all_right = [], 1.0
        for confidence, ratio in zip(chain.classes, chain.ratios, strict=True):
            kind = min(confidence, _CLASSES - 1)
            all_right *= min(self._right[kind] / self._seen[kind] * ratio, _MOST_CERTAIN)
            survival.append(all_right)
        return survival

    def observe(self, chain: Chain, right: int, said: int) -> None:
        """Of a chain the first ``right`` tokens were said, and ``said`` tokens in all: only these tell anything."""
        for at in range(min(right + 1, said, len(chain))):
            kind = min(chain.classes[at], _CLASSES - 1)
            self._seen[kind] = _FORGETTING * self._seen[kind] + chain.ratios[at]
            self._right[kind] = _FORGETTING * self._right[kind] + (1.0 if at < right else 0.0)


class Pace:
    """Chooses the length of each draft: the most tokens expected per second, a plain pass always among the choices.

    What was proposed is compared with what was said even where it was not submitted, so that estimates stay fresh. A
    drafter that takes long and proposes nothing of use is asked less and less.
    """

    #: Most tokens of a draft.
    most = 15

    def __init__(self, times: PassTimes, survival: Survival) -> None:
        self._times, self._survival = times, survival
        self._rest = self._resting = 0

    def asks(self) -> bool:
        """Whether to ask the drafter before the next pass."""
        if self._resting:
            self._resting -= 1
            return False
        return True

    def choose(self, chain: Chain, seconds: float) -> int:
        """Tokens of a chain to submit, which took the drafter so long."""
        curve = self._times.curve(len(chain) + 1)
        if curve is None:
            return 0
        length, value = self._best(self._survival.of(chain), curve, seconds)
        # The drafter's time is spent; whether to spend it again is another question.
        if seconds > 0.01 * curve[0] and value * curve[0] < 1:
            self._rest = min(2 * self._rest + 1, _LONGEST_REST)
        else:
            self._rest = 0
        self._resting = self._rest
        return length

    def passed(self, rows: int, seconds: float) -> None:
        """A pass of so many rows took so long."""
        self._times.add(rows, seconds)

    def observe(self, chain: Chain, right: int, said: int) -> None:
        """What became of a chain that was proposed, submitted or not."""
        self._survival.observe(chain, right, said)

    @staticmethod
    def _best(survival: Sequence[float], curve: Sequence[float], seconds: float) -> tuple[int, float]:
        """Tokens to submit, and the tokens expected per second."""
        best, best_value, expected = 0, _HYSTERESIS / (curve[0] + seconds), 1.0
        for length, probability in enumerate(survival, 1):
            expected += probability
            value = expected / (curve[length] + seconds)
            if value > best_value:
                best, best_value = length, value
        return best, best_value
