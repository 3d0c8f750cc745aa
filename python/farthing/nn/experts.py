"""The experts of a layer as a torch module whose weights are packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..matrix import restore, state
from ..moe import Expert, PackedExperts
from .expert_ops import experts
from .packed import Packed

__all__ = ["Experts"]

_MATRICES = ("gate", "up", "down")
_BIASES = ("gate_bias", "up_bias", "down_bias")
_ARRAYS = ("codes", "scales", "minima", "values")


class Experts(Packed):
    """``Σ weight · f_id(hidden)`` over each token's choices, with packed weights.

    The weights are fixed; gradients reach the hidden states and the routing weights through the dequantised weights
    (straight-through). A state dict holds the codes of all experts stacked, row by row.

    Args:
        packed: the experts; without, the module has none before `load_state_dict`.

    Example:
        >>> import torch, farthing as ft, farthing.nn
        >>> packed = ft.moe.PackedExperts.from_arrays(torch.randn(4, 96, 64), torch.randn(4, 64, 48), group=16)
        >>> layer = farthing.nn.Experts(packed)
        >>> ids, weights = torch.tensor([[0, 3], [1, 2]]), torch.ones(2, 2, requires_grad=True)
        >>> y = layer(torch.randn(2, 64), ids, weights)
        >>> y.sum().backward()
        >>> y.shape, weights.grad.shape
        (torch.Size([2, 64]), torch.Size([2, 2]))
    """

    _arrays = (*(f"{matrix}.{array}" for matrix in _MATRICES for array in _ARRAYS), *_BIASES)

    def __init__(self, packed: PackedExperts | None = None) -> None:
        super().__init__()
        if packed is not None:
            self._hold(packed)

    @property
    def experts(self) -> PackedExperts:
        """The packed experts.

        Raises:
            RuntimeError: there are none yet.
        """
        packed: PackedExperts = self._held()
        return packed

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``hidden``: (T, H), ``ids`` and ``weights``: (T, K); the result: (T, H), of the type of ``hidden``."""
        traced = type(hidden) is not torch.Tensor or torch.compiler.is_compiling()
        if traced or (torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad)):
            y: torch.Tensor = experts(hidden, ids, weights, self._operand())
        else:
            y = self.experts(hidden, ids, weights)
        return y

    def extra_repr(self) -> str:
        """What the experts are, for `print`."""
        return "no weights yet" if self.packed is None else repr(self.packed)

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        activation, alpha, limit = self.experts.activation
        words: dict[str, Any] = {"activation": activation, "alpha": alpha, "limit": limit}
        stacked: dict[str, list[Any]] = {}
        for expert in self.experts:
            for name, matrix in zip(_MATRICES, expert[:3], strict=True):
                parts = {} if matrix is None else state(matrix)
                words[name] = {key: value for key, value in parts.items() if key not in _ARRAYS}
                for key in parts.keys() & set(_ARRAYS):
                    stacked.setdefault(f"{name}.{key}", []).append(parts[key])
            for name, bias in zip(_BIASES, expert[3:], strict=True):
                if bias is not None:
                    stacked.setdefault(name, []).append(bias)
        for name, arrays in stacked.items():
            if len({array.shape for array in arrays}) > 1 or len(arrays) != len(self.experts):
                raise ValueError(f"{name}: got experts of different shapes, expected equal ones in a state dict")
        return words, {name: np.stack(arrays) for name, arrays in sorted(stacked.items())}

    def _restored(self, words: dict[str, Any], arrays: dict[str, Any]) -> PackedExperts:
        def matrix(name: str, index: int) -> Any:
            keys = [key for key in _ARRAYS if f"{name}.{key}" in arrays]
            return restore(words[name] | {key: arrays[f"{name}.{key}"][index] for key in keys}) if keys else None

        def expert(index: int) -> Expert:
            biases = (arrays[name][index] if name in arrays else None for name in _BIASES)
            return Expert(*(matrix(name, index) for name in _MATRICES), *biases)

        counts = {len(array) for array in arrays.values()}
        if len(counts) != 1:
            raise ValueError(f"experts: got arrays of {sorted(counts)}, expected as many in each")
        options = {name: words[name] for name in ("activation", "alpha", "limit")}
        packed = PackedExperts((expert(index) for index in range(counts.pop())), **options)
        if self.packed is not None:
            got, expected = ((len(of), of.intermediate_size, of.hidden_size) for of in (packed, self.packed))
            if got != expected:
                raise ValueError(f"experts: got (E, I, H) = {got}, expected {expected}")
        return packed
