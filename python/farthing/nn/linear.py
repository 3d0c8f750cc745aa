"""A linear layer whose weights are packed."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import torch
from torch import nn

from .._core import PackedMatrix
from ..matrix import pack, restore, state
from .ops import linear, number_of

__all__ = ["Linear", "needs_operator"]

# What a saved layer consists of beside its bias: `state` of its matrix, the words as JSON in bytes.
_ARRAYS = ("codes", "scales", "minima", "values")
_WORDS = "words"
_NO_WEIGHTS = "Linear: got no weights yet, expected load_state_dict first (or from_linear)"


Layer = TypeVar("Layer", bound="Linear")


def needs_operator(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product must go through torch's dispatcher: it is traced, or its gradient is wanted."""
    return (
        type(x) is not torch.Tensor
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or torch.compiler.is_compiling()
    )


class Linear(nn.Module):
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
        self.packed: PackedMatrix | None = None
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        self._options: tuple[str, int, bool, str] = (weights, group, symmetric, activations)
        self._number = 0

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

    def _hold(self, matrix: PackedMatrix) -> None:
        self.packed = matrix
        self._number = number_of(matrix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x``: (..., K); the result: (..., N), of the same type."""
        bias = self._parameters["bias"]
        if needs_operator(x, bias):
            if self._number == 0:
                raise RuntimeError(_NO_WEIGHTS)
            y: torch.Tensor = linear(x, bias, self._number, self.out_features)
        else:
            y = self.matrix.matmul(x, bias)
        return y

    @property
    def matrix(self) -> PackedMatrix:
        """The packed weights.

        Raises:
            RuntimeError: there are none yet.
        """
        if self.packed is None:
            raise RuntimeError(_NO_WEIGHTS)
        return self.packed

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weights, float32 (N, K), made anew at each access."""
        return torch.from_numpy(self.matrix.dequantize())

    def extra_repr(self) -> str:
        """Shape, format and precision, for `print`."""
        kind = "no weights yet" if self.packed is None else f"{self.packed.format}, {self.packed.activations}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is None:
            return
        parts = state(self.packed)
        words = {name: value for name, value in parts.items() if name not in _ARRAYS}
        destination[prefix + _WORDS] = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8)
        for name in _ARRAYS:
            if name in parts:
                destination[prefix + name] = torch.from_numpy(parts[name])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        arrays = {name: state_dict.pop(prefix + name) for name in _ARRAYS if prefix + name in state_dict}
        words, weight = state_dict.pop(prefix + _WORDS, None), state_dict.pop(prefix + "weight", None)
        try:
            if words is not None:
                parts = {name: value.numpy() for name, value in arrays.items()}
                self._load(restore(json.loads(bytes(words.tolist())) | parts))
            elif weight is not None:
                self._load(pack(weight, *self._options))
            else:
                missing_keys.append(prefix + _WORDS)
        except (KeyError, TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'Linear'}: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load(self, matrix: PackedMatrix) -> None:
        expected = (self.out_features, self.in_features)
        if matrix.shape != expected:
            raise ValueError(f"weights: got shape {matrix.shape}, expected {expected}")
        self._hold(matrix)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.packed is not None:
            self._number = number_of(self.packed)
