"""Drafters that need no model: they copy what was said before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..sampling import integer
from ..sizes import byte_count

__all__ = ["Composed", "Draft", "Drafter", "NGram", "Suffix", "SuffixStore", "TokenIds", "TokenRecycling"]

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Draft:
    """A tree of drafted tokens, parents before children.

    Attributes:
        token_ids: the tokens, (n,).
        parents: index of the token before each, -1 where it follows the text, (n,).
        classes: the drafter's class of confidence of each, (n,): tokens that match, at most 9, or the rank.
        ratios: how likely each is beside others of its class, (n,), in (0, 1].
    """

    token_ids: list[int]
    parents: list[int]
    classes: list[int]
    ratios: list[float]

    def __len__(self) -> int:
        return len(self.token_ids)


class Drafter:
    """What all drafters do. Drive one by hand, or hand it to ``LLM(speculation=...)``.

    Whatever a drafter proposes, the text stays what it is without it. One object serves any number of threads and
    requests; each engine that is given one makes its own from it, which shares the store or the table.

    Example:
        >>> import farthing as ft
        >>> drafter = ft.speculative.Suffix()
        >>> drafter.begin([1, 2, 3, 4])
        >>> drafter.observe([1, 2])
        >>> drafter.draft(3).token_ids
        [3, 4, 1]
    """

    _core: _core.Drafter

    def begin(self, prompt: TokenIds, *, request: int = 0) -> None:
        """A request begins with the token ids of its prompt, (t,); one of the same number begins anew."""
        self._core.begin(request, prompt)

    def observe(
        self,
        tokens: TokenIds,
        *,
        request: int = 0,
        rows: TokenIds | None = None,
        top: npt.ArrayLike | None = None,
    ) -> None:
        """Takes in what the model said.

        Args:
            tokens: the tokens that were added to the text, (n,).
            request: whose.
            rows: the tokens of all verified rows, rejected ones included, (r,).
            top: the likeliest tokens behind each of them, (r, `wants_top`), the likeliest first.

        Raises:
            ValueError: the request is unknown, an id negative, or the shapes differ.
        """
        self._core.observe(request, tokens, rows, None if top is None else np.asarray(top, np.uint32))

    def draft(self, max_tokens: int, *, request: int = 0) -> Draft:
        """What may follow, at most ``max_tokens`` (and 63) tokens; an empty draft where nothing matches."""
        return Draft(*self._core.draft(request, integer("max_tokens", max_tokens, 0)))

    def end(self, *, request: int = 0) -> None:
        """The request is over."""
        self._core.end(request)

    @property
    def name(self) -> str:
        """Its name in reports."""
        return self._core.name

    @property
    def wants_top(self) -> int:
        """Likeliest tokens of each verified row that it wants to observe."""
        return self._core.wants_top


class NGram(Drafter):
    """Prompt lookup: copies what followed the last n tokens when they stood in the text before.

    The three public rules, token for token; the index grows with the text, so that a draft takes under a microsecond
    in a context of any length.

    Args:
        mode: ``transformers``: from ``max_n`` (2) tokens down to 1, the leftmost occurrence, 10 tokens. ``vllm``: the
            longest of ``min_n`` to ``max_n`` (5 to 5), the leftmost occurrence, 5 tokens. ``llama.cpp`` (its
            ``ngram-simple``): ``max_n`` (12) tokens, the latest occurrence, 48 tokens, nothing where fewer than
            ``max_n`` tokens follow it.
        min_n: fewest tokens that must match.
        max_n: most tokens that are compared, at most 1024.
        max_tokens: most tokens to copy, at most 1024.

    Raises:
        ValueError: an argument is out of range, or not free in this mode.

    Example:
        >>> import farthing as ft
        >>> drafter = ft.speculative.NGram("transformers")
        >>> drafter.begin([5, 6, 7, 8, 5, 6])
        >>> drafter.draft(10).token_ids
        [7, 8, 5, 6]
    """

    def __init__(
        self,
        mode: str = "vllm",
        *,
        min_n: int | None = None,
        max_n: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        def checked(name: str, value: int | None) -> int | None:
            return None if value is None else integer(name, value, 1)

        arguments = checked("min_n", min_n), checked("max_n", max_n), checked("max_tokens", max_tokens)
        self._core, (self.min_n, self.max_n, self.max_tokens) = _core.Drafter.ngram(mode, *arguments)
        self.mode = mode

    def __repr__(self) -> str:
        return f"NGram({self.mode!r}, min_n={self.min_n}, max_n={self.max_n}, max_tokens={self.max_tokens})"


class SuffixStore:
    """What requests said, for requests to come: shared by any number of `Suffix` drafters, engines and threads.

    Holds some 100,000 tokens in its 16 MB. When the newer half is full, the older half is forgotten.

    Args:
        max_bytes: most memory, a number or text such as ``"64MB"``; at least 64 KiB.

    Example:
        >>> import farthing as ft
        >>> store = ft.speculative.SuffixStore("16MB")
        >>> store.add([1, 2, 3, 4])
        >>> drafter = ft.speculative.Suffix(store)
        >>> drafter.begin([7, 1, 2])
        >>> drafter.draft(4).token_ids
        [3, 4]
    """

    def __init__(self, max_bytes: int | str = 16 << 20) -> None:
        self._core = _core.SuffixStore(byte_count("max_bytes", max_bytes))

    def add(self, token_ids: TokenIds) -> None:
        """Adds a text, (t,)."""
        self._core.add(token_ids)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the store to a file, whole or not at all.

        Raises:
            FarthingError: the system refused.
        """
        self._core.save(fspath(path))

    def load(self, path: str | PathLike[str]) -> None:
        """Adds what `save` wrote, as far as there is memory for it.

        Raises:
            FormatError: there is no such file, or it is damaged; nothing was added.
        """
        self._core.load(fspath(path))

    def clear(self) -> None:
        """Forgets everything."""
        self._core.clear()

    @property
    def tokens(self) -> int:
        """Tokens in it."""
        return self._core.tokens

    @property
    def texts(self) -> int:
        """Texts in it."""
        return self._core.texts

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self._core.nbytes

    def __len__(self) -> int:
        return self.tokens

    def __repr__(self) -> str:
        return f"<SuffixStore of {self.tokens} tokens in {self.texts} texts, {self.nbytes} bytes>"


class Suffix(Drafter):
    """SuffixDecoding (arXiv:2411.04975): copies what most often followed the last tokens, however many match.

    It looks in the request's own text, prompt included, and in a store of what other requests said.

    Args:
        store: where to look, and where to add what is said; None looks in the request's text alone.
        min_match: fewest tokens that must match.
        min_probability: drafts whose counts make them less likely are left out.
        tree: whether drafts are trees; else chains.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import farthing as ft
        >>> drafter = ft.speculative.Suffix()
        >>> drafter.begin([5, 6, 7, 8, 5, 6])
        >>> draft = drafter.draft(2)
        >>> draft.token_ids, draft.classes
        ([7, 8], [3, 4])
    """

    def __init__(
        self,
        store: SuffixStore | None = None,
        *,
        min_match: int = 1,
        min_probability: float = 0.1,
        tree: bool = False,
    ) -> None:
        core = None if store is None else store._core
        self._core = _core.Drafter.suffix(core, integer("min_match", min_match, 1), min_probability, tree)
        self.store = store


class TokenRecycling(Drafter):
    """Token Recycling (arXiv:2408.08696): trees of what the model thought likely behind each token the last time.

    The table is kept across requests. How often each rank is right is learnt, and the likeliest nodes are drafted.

    Example:
        >>> import farthing as ft
        >>> drafter = ft.speculative.TokenRecycling()
        >>> drafter.begin([5])
        >>> drafter.observe([6], rows=[5], top=[[6, 7, 8, 9, 10, 11, 12, 13]])
        >>> drafter.observe([5])
        >>> draft = drafter.draft(2)
        >>> draft.token_ids, draft.parents
        ([6, 7], [-1, -1])
    """

    def __init__(self) -> None:
        self._core = _core.Drafter.recycling()


class Composed(Drafter):
    """Several drafters, one tree: each extends what those before it proposed, within one budget.

    Example:
        >>> import farthing as ft
        >>> sp = ft.speculative
        >>> drafter = sp.Composed(sp.Suffix(min_match=3), sp.TokenRecycling())
        >>> drafter.name
        'suffix + token recycling'
    """

    def __init__(self, *drafters: Drafter) -> None:
        self._core = _core.Drafter.composed([drafter._core for drafter in drafters])
        self.drafters = drafters
