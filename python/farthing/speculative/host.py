"""Drafters in other people's hosts, which know whole texts and take chains of tokens."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedError
from .drafters import Drafter, Suffix, SuffixStore
from .engine import Proposer

__all__ = ["Chain", "HostedDrafter", "HostedText"]

_T = TypeVar("_T")
# Far from the numbers of requests that a user drives by hand with the same drafter.
_NUMBERS = itertools.count(1 << 32)
# The class of confidence of tokens whose drafter names none, as in the engine.
_UNNAMED = 5


@dataclass(frozen=True)
class Chain:
    """Drafted tokens, each behind the one before.

    Attributes:
        token_ids: the tokens, (n,).
        classes: the drafter's class of confidence of each, (n,).
        ratios: how likely each is beside others of its class, (n,), in (0, 1].
    """

    token_ids: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)

    def right(self, token_ids: npt.NDArray[Any]) -> int:
        """Tokens before the first one that is not what was said."""
        pairs = zip(self.token_ids, token_ids.tolist(), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class HostedDrafter:
    """A drafter in a host. What it does wrong costs the drafts, with a warning, and never the host.

    Args:
        drafter: one of `farthing.speculative`, or any `Proposer`; None makes a `Suffix` with a store.
        host: its name, for messages.
        vocabulary: ids from here on do not exist; None if the host does not say.
        with_logits: whether the host hands over what the model thought likely.

    Raises:
        UnsupportedError: the drafter can't work there.
    """

    def __init__(
        self,
        drafter: Drafter | Proposer | None,
        host: str,
        *,
        vocabulary: int | None = None,
        with_logits: bool = False,
    ) -> None:
        self.drafter: Any = Suffix(SuffixStore()) if drafter is None else drafter
        if not callable(getattr(self.drafter, "draft", None)):
            works = "use a drafter that needs no model, such as Suffix or NGram, or an object with a method draft"
            raise UnsupportedError(f"drafter={drafter!r} is not supported in {host}; {works}")
        if self.wants_top and not with_logits:
            works = "use Suffix or NGram"
            raise UnsupportedError(f"{self.name} learns from logits, which {host} does not hand over; {works}")
        self.host, self.vocabulary = host, vocabulary
        #: Why it is asked no more, if so.
        self.stopped: str | None = None

    @property
    def name(self) -> str:
        """The drafter's name."""
        return self.drafter.name if isinstance(self.drafter, Drafter) else type(self.drafter).__name__

    @property
    def wants_top(self) -> int:
        """Likeliest tokens of each verified row that it wants to observe."""
        return self.drafter.wants_top if isinstance(self.drafter, Drafter) else 0

    def attempt(self, action: Callable[[], _T], default: _T) -> _T:
        """What the action gives; where the drafter fails it is asked no more, and the answer is ``default``."""
        if self.stopped is None:
            try:
                return action()
            except Exception as error:  # noqa: BLE001
                self.stopped = f"{type(error).__name__}: {error}"
                message = f"the drafter {self.name} is asked no more in {self.host}: {self.stopped}"
                warnings.warn(message, RuntimeWarning, stacklevel=4)
        return default


class HostedText:
    """One text of a host, which its drafter follows."""

    def __init__(self, hosted: HostedDrafter) -> None:
        self._hosted = hosted
        self._number: int | None = None
        #: The text as the drafter knows it, (t,).
        self.token_ids: npt.NDArray[np.uint32] = np.zeros(0, np.uint32)

    def follow(
        self,
        token_ids: npt.NDArray[Any],
        *,
        rows: npt.NDArray[Any] | None = None,
        top: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[np.uint32] | None:
        """Tells the drafter what is new of a text (t,), or that another text begins.

        Args:
            token_ids: the whole text.
            rows: the tokens of the rows that were verified, (r,).
            top: what the model thought likely behind each of them, (r, ``wants_top``).

        Returns:
            The new tokens; None where another text begins.
        """
        known = len(self.token_ids)
        now = np.array(token_ids, np.uint32)
        if self._number is None or known > len(now) or not np.array_equal(now[:known], self.token_ids):
            self.end()
            number = self._number = next(_NUMBERS)
            self.token_ids = now
            self._tell("begin", number, now)
            return None
        self.token_ids = now
        if len(now) > known:
            self._tell("observe", self._number, now[known:], rows, top)
        return now[known:]

    def draft(self, most: int, *, stop_ids: Collection[int] = ()) -> Chain:
        """A chain of at most so many tokens that may follow, cut before the first stop id."""
        if most < 1 or self._number is None or not len(self.token_ids):
            return Chain()
        chain = self._hosted.attempt(lambda: self._draft(most), Chain())
        stop = next((at for at, token in enumerate(chain.token_ids) if token in stop_ids), len(chain))
        return Chain(chain.token_ids[:stop], chain.classes[:stop], chain.ratios[:stop])

    def end(self) -> None:
        """The text is over."""
        if self._number is not None:
            self._tell("end", self._number)
        self._number, self.token_ids = None, np.zeros(0, np.uint32)

    def _tell(self, event: str, number: int, tokens: Any = None, rows: Any = None, top: Any = None) -> None:
        drafter = self._hosted.drafter

        def tell() -> None:
            if isinstance(drafter, Drafter):
                if event == "begin":
                    drafter.begin(tokens, request=number)
                elif event == "observe":
                    drafter.observe(tokens, request=number, rows=rows, top=top)
                else:
                    drafter.end(request=number)
            elif hasattr(drafter, event):
                getattr(drafter, event)(*((number,) if tokens is None else (number, tokens)))

        self._hosted.attempt(tell, None)

    def _draft(self, most: int) -> Chain:
        drafter, vocabulary = self._hosted.drafter, self._hosted.vocabulary
        if isinstance(drafter, Drafter):
            tree = drafter.draft(min(most, 63), request=self._number or 0)
            ids, parents = tree.token_ids, tree.parents
            classes, ratios = tree.classes, tree.ratios
        else:
            drafted = drafter.draft(self._number, self.token_ids, most)
            if isinstance(drafted, tuple):
                ids, parents = ([int(each) for each in part] for part in drafted)
            else:
                ids = [int(token) for token in drafted]
                parents = list(range(-1, len(ids) - 1))
            if len(parents) != len(ids):
                raise ValueError(f"draft: got {len(ids)} tokens and {len(parents)} parents, expected a parent for each")
            classes, ratios = [_UNNAMED] * len(ids), [1.0] * len(ids)
        path = _first_path(parents)[:most]
        for node in path:
            if ids[node] < 0 or (vocabulary is not None and ids[node] >= vocabulary):
                below = "" if vocabulary is None else f" to {vocabulary - 1}"
                raise ValueError(f"draft: got the token {ids[node]}, expected ids from 0{below or ' on'}")
        return Chain([ids[node] for node in path], [classes[node] for node in path], [ratios[node] for node in path])


def _first_path(parents: list[int]) -> list[int]:
    """Nodes of the chain of first children: drafters name the likelier child first."""
    path: list[int] = []
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(f"draft: got the parent {parent} of token {node}, expected -1 or a token before")
        if parent == (path[-1] if path else -1):
            path.append(node)
    return path
