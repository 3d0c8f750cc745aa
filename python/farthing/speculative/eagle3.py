"""EAGLE-3 drafters, in the layouts in which they are published."""

from __future__ import annotations

import os
from pathlib import Path

from .. import _core
from ..names import locate

__all__ = ["Eagle3"]


class Eagle3:
    """A block that drafts from the states of three of the model's blocks (EAGLE-3, Li et al., arXiv 2503.01840).

    Reads checkpoints of ``speculators`` and those of EAGLE's authors: ``config.json`` and ``model.safetensors`` with
    one block, ``fc``, ``lm_head`` over the drafted tokens and ``d2t``.

    Args:
        path: the directory, or a Hub id.
        weights: as for `LLM`.
        activations: as for `LLM`.

    Example:
        ``LLM("llama-3.1-8b", speculation=Eagle3("llama-3.1-8b-eagle3"))``
    """

    def __init__(self, path: str | os.PathLike[str], *, weights: str = "auto", activations: str = "auto") -> None:
        self.path: Path = locate(path)
        self._core = _core.Eagle3(self.path, weights, activations)

    def __repr__(self) -> str:
        return f"Eagle3({os.fspath(self.path)!r})"
