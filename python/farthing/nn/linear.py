"""A linear layer whose weights are packed."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from .._core import PackedMatrix
from ..matrix import pack, restore, state
from .ops import linear
from .packed import Packed

__all__ = ["Linear", "needs_operator"]

Layer = TypeVar("Layer", bound="Linear")


def needs_operator(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product must go through torch's dispatcher: it is traced, or its gradient is wanted."""
    return (
        type(x) is not torch.Tensor
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or torch.compiler.is_compiling()
    )


class Linear(Packed):
    """``y = x · Wᵀ + bias`` with packed weights, where `torch.nn.Linear` stood.

    The weights are fixed; gradients reach the bias and, through the dequantised weights, the input. Inputs are float32,
    bfloat16 or float16 on the CPU, and outputs have their type. A state dict holds the codes row by row, so it does not
    depend on the machine; one of a `torch.nn.Linear` loads too and is quantised on the way.

    Args:
        in_features: K.
        out_features: N.
        bias: whether a bias is added.
        weights: format, see `farthing.quantize`.
        group: inputs that share a scale.
        symmetric: a scale for each group; if false, a scale and a minimum.
        activations: precision of what the weights meet.

    A layer made this way has no weights before `load_state_dict`; `from_linear` takes those of a layer.

    Example:
        >>> import torch, farthing.nn
        >>> layer = torch.nn.Linear(64, 96)
        >>> packed = farthing.nn.Linear.from_linear(layer, weights="int8", group=32)
        >>> x = torch.randn(2, 5, 64)
        >>> bool((packed(x) - layer(x)).abs().max() < 0.02)
        True
    """

    _arrays = ("codes", "scales", "minima", "values")

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weights: str = "int4",
        group: int = 128,
        symmetric: bool = True,
        activations: str = "auto",
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        self._options: tuple[str, int, bool, str] = (weights, group, symmetric, activations)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        weights: str = "int4",
        group: int = 128,
        symmetric: bool = True,
        activations: str = "auto",
    ) -> Linear:
        """A packed copy of a layer; the bias is shared."""
        return cls.from_packed(pack(linear.weight, weights, group, symmetric, activations), linear.bias)

    @classmethod
    def from_packed(cls: type[Layer], matrix: PackedMatrix, bias: nn.Parameter | None = None) -> Layer:
        """A layer around a matrix that is packed already."""
        weights, group, symmetric = matrix.arguments
        outputs, inputs = matrix.shape
        precision = matrix.activations
        layer = cls(
            inputs, outputs, False, weights=weights, group=group or 128, symmetric=symmetric, activations=precision
        )
        layer.bias = bias
        layer._hold(matrix)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x``: (..., K); the result: (..., N), of the same type."""
        bias = self._parameters["bias"]
        if needs_operator(x, bias):
            y: torch.Tensor = linear(x, bias, self._operand(), self.out_features)
        else:
            y = self.matrix.matmul(x, bias)
        return y

    @property
    def matrix(self) -> PackedMatrix:
        """The packed weights.

        Raises:
            RuntimeError: there are none yet.
        """
        matrix: PackedMatrix = self._held()
        return matrix

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weights, float32 (N, K), made anew at each access."""
        return torch.from_numpy(self.matrix.dequantize())

    def extra_repr(self) -> str:
        """Shape, format and precision, for `print`."""
        kind = "no weights yet" if self.packed is None else f"{self.packed.format}, {self.packed.activations}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = state(self.matrix)
        words = {name: value for name, value in parts.items() if name not in self._arrays}
        return words, {name: parts[name] for name in self._arrays if name in parts}

    def _restored(self, words: dict[str, Any], arrays: dict[str, Any]) -> PackedMatrix:
        return self._checked(restore(words | arrays))

    def _converted(self, state_dict: dict[str, Any], prefix: str) -> PackedMatrix | None:
        weight = state_dict.pop(prefix + "weight", None)
        return None if weight is None else self._checked(pack(weight, *self._options))

    def _checked(self, matrix: PackedMatrix) -> PackedMatrix:
        expected = (self.out_features, self.in_features)
        if matrix.shape != expected:
            raise ValueError(f"weights: got shape {matrix.shape}, expected {expected}")
        return matrix
