"""The model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core

__all__ = ["Tokenizer"]


class Tokenizer:
    """Text to token ids and back, as ``llm.tokenizer``."""

    def __init__(self, core: _core.Llm) -> None:
        self._core = core

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of ``text``.

        Special tokens written in it are recognised; ``add_special_tokens`` puts the model's own (such as a beginning
        of sequence) around it.
        """
        return self._core.encode(text, add_special_tokens)

    def decode(
        self, token_ids: Sequence[int] | npt.NDArray[np.integer[Any]], *, skip_special_tokens: bool = True
    ) -> str:
        """The text of ``token_ids``; incomplete characters become U+FFFD."""
        return self._core.decode(list(map(int, token_ids)), skip_special_tokens)
