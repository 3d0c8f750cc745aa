"""Heads for further tokens that a checkpoint carries."""

from __future__ import annotations

import os
from pathlib import Path

from .. import _core
from ..names import locate
from ..sampling import integer

__all__ = ["MTP"]


class MTP:
    """The heads for further tokens beside the weights of a model (DeepSeek-V3, arXiv 2412.19437; Qwen3-Next, Qwen3.5).

    Several heads draft a token each; a single one goes on with its own states.

    Args:
        model: the checkpoint directory that the model comes from, or its Hub id.
        weights: as for `LLM`.
        activations: as for `LLM`.
        vocabulary: draft only the first so many ids, by a head of their rows in 4 bits; None drafts all, by the model's
            own head.

    Example:
        ``LLM("deepseek", speculation=MTP("deepseek"))``
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        weights: str = "auto",
        activations: str = "auto",
        vocabulary: int | None = None,
    ) -> None:
        self.path: Path = locate(model)
        size = None if vocabulary is None else integer("vocabulary", vocabulary, 1)
        self._core = _core.MTP(self.path, weights, activations, size)

    def __repr__(self) -> str:
        return f"MTP({os.fspath(self.path)!r})"
