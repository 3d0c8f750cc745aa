"""The suffix cache that vLLM's ``suffix`` method asks for, with the interface of arctic-inference 0.3.0."""

from __future__ import annotations

from collections.abc import Hashable, KeysView
from dataclasses import dataclass, field

from .. import _core
from ..sampling import integer
from .drafters import TokenIds

__all__ = ["SuffixDecodingCache", "SuffixDecodingDraft"]


@dataclass
class SuffixDecodingDraft:
    """What may follow a context.

    Attributes:
        token_ids: the tokens, parents first.
        parents: index of the token before each, -1 where it follows the context.
        probs: how likely each is by the counts, its parents included.
        score: sum of the probabilities.
        match_len: tokens of the context that matched.
    """

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    score: float = 0.0
    match_len: int = 0


class SuffixDecodingCache:
    """Texts of active requests, and the answers of past ones, to look up what follows a context.

    Names, arguments and errors are those of arctic-inference 0.3.0's class. Counts also decide about tokens in the
    middle of a long repeated passage, which that one takes for certain; ``max_spec_tokens=None`` works.

    Args:
        max_tree_depth: most tokens of a context that are compared, and of a proposal (63 at most).
        max_cached_requests: answers that are kept; the oldest go first. -1 keeps all, 0 none.

    Example:
        >>> from farthing.speculative import SuffixDecodingCache
        >>> cache = SuffixDecodingCache(max_tree_depth=24, max_cached_requests=100)
        >>> cache.start_request("a", [1, 2, 3, 4])
        >>> cache.add_active_response("a", [1, 2])
        >>> cache.speculate("a", [4, 1, 2], max_spec_tokens=4).token_ids
        [3, 4]
    """

    def __init__(self, max_tree_depth: int = 64, max_cached_requests: int = -1) -> None:
        if max_cached_requests > 0x7FFFFFFF:
            raise ValueError(f"max_cached_requests: got {max_cached_requests}, expected at most {0x7FFFFFFF}")
        self._max_tree_depth = integer("max_tree_depth", max_tree_depth, 1)
        self._max_cached_requests = max_cached_requests
        self._core = _core.SuffixCache(max_tree_depth, None if max_cached_requests < 0 else max_cached_requests)
        self._active: dict[Hashable, int] = {}
        # Request to answer, the oldest first.
        self._cached: dict[Hashable, int] = {}
        self._started = 0

    @property
    def max_tree_depth(self) -> int:
        """Most tokens of a context that are compared."""
        return self._max_tree_depth

    @property
    def max_cached_requests(self) -> int:
        """Answers that are kept."""
        return self._max_cached_requests

    @property
    def active_requests(self) -> KeysView[Hashable]:
        """Requests that have started and not stopped."""
        return self._active.keys()

    @property
    def cached_requests(self) -> KeysView[Hashable]:
        """Requests whose answers are kept."""
        return self._cached.keys()

    def start_request(self, req_id: Hashable, prompt_token_ids: TokenIds) -> None:
        """A request starts; an answer kept under the same id is evicted.

        Raises:
            ValueError: the request is active.
        """
        if req_id in self._active:
            raise ValueError(f"req_id: request {req_id!r} is already active")
        answer = self._core.start(self._started, prompt_token_ids)
        if req_id in self._cached:
            self.evict_cached_response(req_id)
        self._active[req_id] = self._started
        self._started += 1
        if answer is None:
            return
        self._cached[req_id] = answer
        while 0 < self._max_cached_requests < len(self._cached):
            self._core.retire(self._cached.pop(next(iter(self._cached))))

    def stop_request(self, req_id: Hashable) -> None:
        """A request is over: its own text goes, its answer stays.

        Raises:
            ValueError: the request is not active.
        """
        self._core.stop(self._number(req_id))
        del self._active[req_id]

    def add_active_response(self, req_id: Hashable, token_ids: TokenIds) -> None:
        """Adds tokens to the answer of an active request, for all requests to find.

        Raises:
            ValueError: the request is not active.
        """
        self._core.append(self._number(req_id), token_ids)

    def evict_cached_response(self, req_id: Hashable) -> None:
        """Forgets an answer at once; this reads the other answers again.

        Raises:
            ValueError: no answer is kept under this id.
        """
        if req_id not in self._cached:
            raise ValueError(f"req_id: request {req_id!r} is not cached")
        self._core.forget(self._cached.pop(req_id))

    def speculate(
        self,
        req_id: Hashable,
        context: TokenIds,
        max_spec_tokens: int | None = None,
        max_spec_factor: float = 1.0,
        max_spec_offset: float = 0.0,
        min_token_prob: float = 0.1,
        use_tree_spec: bool = False,
    ) -> SuffixDecodingDraft:
        """What may follow a context, by the request's own text or by the answers, whichever scores more.

        Args:
            req_id: an active request.
            context: the last tokens of its text.
            max_spec_tokens: most tokens; None and 0 take the depth.
            max_spec_factor: most tokens for each token of the context that matches.
            max_spec_offset: tokens beyond that.
            min_token_prob: least probability of a token.
            use_tree_spec: whether to propose a tree.

        Raises:
            ValueError: the request is not active.
        """
        number = self._number(req_id)
        most = max_spec_tokens or self._max_tree_depth
        limits = most, max_spec_factor, max_spec_offset, min_token_prob, use_tree_spec
        return SuffixDecodingDraft(*self._core.speculate(number, context, *limits))

    def _number(self, req_id: Hashable) -> int:
        if req_id not in self._active:
            raise ValueError(f"req_id: request {req_id!r} is not active")
        return self._active[req_id]
