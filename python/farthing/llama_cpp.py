"""Drafters in llama-cpp-python. Importing this module imports nothing of it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from .sampling import integer
from .speculative.drafters import Drafter
from .speculative.engine import Proposer
from .speculative.host import Chain, HostedDrafter, HostedText
from .speculative.pace import Pace, PassTimes, Survival

__all__ = ["DrafterModel"]


class DrafterModel:
    """A drafter as the draft model of ``llama_cpp.Llama``.

    The host draws from its own law and compares, so the law of its text stays as it is. An object serves one ``Llama``.

    Args:
        drafter: one of `farthing.speculative`, or any `farthing.speculative.Proposer`; None makes a `Suffix` with a
            store. Of trees, the chain of first children is taken.
        draft_tokens: tokens of each draft; None weighs measured pass times against how often drafts are right. The time
            of a pass is what lies between two calls, so whoever reads a stream slowly should fix a number.
        vocabulary: ids from here on do not exist; the host fails where a `Proposer` names one.

    Raises:
        UnsupportedError: the drafter can't work there.
        ValueError: an argument is out of range.

    Example:
        ``Llama("model.gguf", draft_model=farthing.llama_cpp.DrafterModel())``, or by hand:

        >>> import numpy as np
        >>> from farthing.llama_cpp import DrafterModel
        >>> from farthing.speculative import NGram
        >>> draft_model = DrafterModel(NGram("transformers"), draft_tokens=3)
        >>> draft_model(np.array([5, 6, 7, 8, 5, 6], np.int32)).tolist()
        [7, 8, 5]
    """

    def __init__(
        self,
        drafter: Drafter | Proposer | None = None,
        *,
        draft_tokens: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self._hosted = HostedDrafter(drafter, "llama-cpp-python", vocabulary=vocabulary)
        self._text = HostedText(self._hosted)
        self._fixed = None if draft_tokens is None else integer("draft_tokens", draft_tokens, 1)
        self._pace = Pace(PassTimes(), Survival())
        self._proposed = Chain()
        #: Tokens that the running pass verifies, and when it began; None before a text's first.
        self._submitted: int | None = None
        self._began = 0.0
        #: Tokens that were verified, and of these so many right.
        self.drafted = self.accepted = 0

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:  # noqa: ARG002
        """Tokens that may follow a text, (t,) -> (n,), int32."""
        now = time.perf_counter()
        said = self._text.follow(input_ids)
        if said is not None and self._submitted is not None:
            self._pace.passed(self._submitted + 1, now - self._began)
            right = self._proposed.right(said)
            self._pace.observe(self._proposed, right, len(said))
            self.drafted += self._submitted
            self.accepted += min(right, self._submitted)
        token_ids = self._next()
        self._submitted = len(token_ids)
        self._began = time.perf_counter()
        return np.array(token_ids, np.intc)

    def _next(self) -> list[int]:
        if self._fixed is not None:
            self._proposed = self._text.draft(self._fixed)
            return self._proposed.token_ids
        self._proposed = Chain()
        if not self._pace.asks():
            return []
        began = time.perf_counter()
        chain = self._proposed = self._text.draft(self._pace.most)
        return chain.token_ids[: self._pace.choose(chain, time.perf_counter() - began)]
