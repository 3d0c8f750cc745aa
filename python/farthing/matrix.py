"""Packed matrices of low-bit weights, made from numpy arrays or torch tensors and multiplied with either."""

from __future__ import annotations

from typing import Any

from . import _core
from ._core import PackedMatrix
from .sampling import integer

__all__ = ["PackedMatrix", "check_words", "pack", "quantize", "restore", "state"]

_FLOATS = ("f32", "f16", "bf16")


def quantize(
    w: Any, weights: str = "int4", *, group: int = 128, symmetric: bool = True, activations: str = "auto"
) -> PackedMatrix:
    """Packs a weight matrix for products ``x · Wᵀ`` on the CPU.

    Four-bit codes are chosen with a search for the scale of each group that rounds its weights best.

    Args:
        w: (N, K) outputs and inputs, float32, float16 or (torch only) bfloat16; numpy array or CPU tensor.
        weights: ``int4``, ``int8``; ``ternary`` (-1, 0 and 1, BitNet b1.58); ``mxfp4`` (OCP microscaling),
            ``nf4`` (QLoRA) or ``iq4_nl`` (GGUF), four bits that choose from a table; ``f32``, ``f16`` or ``bf16``.
        group: inputs that share a scale, 16, 32, 64 or 128; ternary weights have a scale for each row, floats none.
        symmetric: a scale for each group; if false, a scale and a minimum, for ``int4`` and ``int8`` alone.
        activations: what the weights are multiplied with: ``a8``, ``a16`` (8 or 15 bits, a scale per group), ``f32``,
            or ``auto``, which is ``a16``, and ``f32`` for float weights.

    Returns:
        A matrix that has ``matmul(x)``, ``dequantize()``, ``nbytes``, ``shape``, ``format`` and ``activations``.

    Raises:
        TypeError: ``w`` is no array of these types.
        ValueError: an argument is out of range, or a weight is not finite.
        UnsupportedError: a tensor of a subclass, which may have no data.

    Example:
        >>> import numpy as np
        >>> import farthing as ft
        >>> w = np.linspace(-1, 1, 96 * 64, dtype=np.float32).reshape(96, 64)
        >>> m = ft.quantize(w, "int4", group=32)
        >>> m.matmul(np.ones((2, 5, 64), np.float32)).shape
        (2, 5, 96)
        >>> bool(abs(m.dequantize() - w).max() < 0.07)
        True
    """
    return pack(w, weights, group, symmetric, activations)


def pack(w: Any, weights: str, group: int, symmetric: bool, activations: str, role: str | None = None) -> PackedMatrix:
    """`quantize` for a matrix of a known role, such as ``attention_output``, which ``auto`` looks at."""
    check_words({"weights": weights, "activations": activations}, symmetric)
    group = integer("group", group, 1)
    return _core.quantize(w, weights, group=group, symmetric=symmetric, activations=activations, role=role)


def check_words(words: dict[str, Any], symmetric: Any) -> None:
    """Raises ValueError for what is no word, or no bool."""
    for name, word in words.items():
        if not isinstance(word, str):
            raise ValueError(f"{name}: got {word!r}, expected a word such as 'int4' or 'a16'")
    if not isinstance(symmetric, bool):
        raise ValueError(f"symmetric: got {symmetric!r}, expected True or False")


def state(matrix: PackedMatrix) -> dict[str, Any]:
    """Everything a matrix is made of, as arrays and words: what `restore` takes and pickles hold.

    ``codes`` are uint8, row by row, as many to a byte as it holds and the first in its lowest bits; ``scales`` and
    ``minima`` (N, groups) float16 or float32; float formats give ``values`` (N, K) float32 instead.
    """
    weights, group, symmetric = matrix.arguments
    words = {"weights": weights, "activations": matrix.activations}
    if weights in _FLOATS:
        return words | {"values": matrix.dequantize()}
    codes, scales, minima = matrix.parts()
    arrays = {"codes": codes, "scales": scales, "minima": minima}
    return words | {"group": group, "symmetric": symmetric, "columns": matrix.shape[1]} | arrays


def restore(state: dict[str, Any]) -> PackedMatrix:
    """The matrix of which `state` told, bit for bit.

    Raises:
        ValueError: the parts do not fit together.
    """
    if "values" in state:
        return pack(state["values"], state["weights"], 32, True, state["activations"])
    return _core.from_parts(
        state["codes"],
        state["scales"],
        state["minima"],
        weights=state["weights"],
        group=state["group"],
        symmetric=state["symmetric"],
        activations=state["activations"],
        columns=state["columns"],
    )
