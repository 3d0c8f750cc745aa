"""Medusa heads: a model's own guesses a few tokens ahead."""

from __future__ import annotations

import os
from pathlib import Path

from .. import _core
from ..sampling import integer

__all__ = ["Medusa"]


class Medusa:
    """Heads that each guess one token further ahead from the model's last state (Cai et al., arXiv 2401.10774).

    All guesses come from one small product; a tree of the likeliest ones is verified in the model's next pass. Heads
    come from `train_medusa`, or in the layout of the public ones: ``medusa_lm_head.safetensors`` beside a
    ``config.json`` with ``medusa_num_heads`` and ``medusa_num_layers``.

    Args:
        path: the directory or the file of the heads.
        weights: precision of the heads' matrices, ``auto`` (as stored), ``f32``, ``bf16``, ``int8`` or ``int4``.
        vocabulary: draft only so many tokens, by a head of their rows in 4 bits: the first of those that the file
            lists, or the lowest ids, which are the most frequent ones in vocabularies of byte pairs. None takes all
            that the file lists, or the model's whole head. Heads with output matrices of their own draft all tokens.

    Example:
        ``LLM("smollm2-135m", speculation=Medusa("heads"))``
    """

    def __init__(self, path: str | os.PathLike[str], *, weights: str = "auto", vocabulary: int | None = None) -> None:
        self.path = Path(path)
        size = None if vocabulary is None else integer("vocabulary", vocabulary, 1)
        self._core = _core.Medusa(self.path, weights, size)

    def __repr__(self) -> str:
        return f"Medusa({os.fspath(self.path)!r})"
