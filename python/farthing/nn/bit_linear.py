"""The linear layer of BitNet b1.58: ternary weights and 8-bit activations, trainable through their rounding."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .._core import PackedMatrix
from ..matrix import pack

__all__ = ["BitLinear"]

_SMALLEST = 1e-5


class BitLinear(nn.Linear):
    """`torch.nn.Linear` with weights rounded to -1, 0 or 1 times their mean magnitude and inputs to 8 bits a token.

    The master weights stay real: gradients pass through both roundings unchanged (straight-through), so any optimiser
    trains it. It is the function of transformers' ``AutoBitLinear`` in online mode. In evaluation without gradients the
    product is one of integers on packed weights, made at the first call and again after the weights change (a token
    whose inputs are all below 1e-5 is then rounded more finely).

    Example:
        >>> import torch, farthing.nn
        >>> layer = farthing.nn.BitLinear(64, 32)
        >>> layer(torch.randn(3, 64)).sum().backward()
        >>> layer.weight.grad.shape
        torch.Size([32, 64])
        >>> with torch.no_grad():
        ...     layer.eval()(torch.randn(3, 64)).shape
        torch.Size([3, 32])
    """

    _packed: tuple[tuple[int, int], PackedMatrix] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x``: (..., K); the result: (..., N), of the same type."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
            weight = _straight_through(self.weight, self._ternary())
            return F.linear(_straight_through(x, _rounded(x)), weight, self.bias)
        y: torch.Tensor = self._matrix().matmul(x, self.bias)
        return y

    def _ternary(self) -> torch.Tensor:
        weight = self.weight.detach().float()
        inverse = 1.0 / weight.abs().mean().clamp_(min=_SMALLEST)
        return ((weight * inverse).round_().clamp_(-1, 1) / inverse).to(self.weight.dtype)

    def _matrix(self) -> PackedMatrix:
        weight = self.weight
        version = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._packed is None or self._packed[0] != version:
            self._packed = (version, pack(self._ternary(), "ternary", 128, True, "a8"))
        return self._packed[1]


def _rounded(x: torch.Tensor) -> torch.Tensor:
    wide = x.detach().float()
    step = 127.0 / wide.abs().amax(dim=-1, keepdim=True).clamp_(min=_SMALLEST)
    return ((wide * step).round_().clamp_(-128, 127) / step).to(x.dtype)


def _straight_through(real: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The value of ``rounded`` with the gradient of ``real``."""
    return _StraightThrough.apply(real, rounded)  # type: ignore[no-any-return]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, real: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return rounded

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ARG004
        return gradient, None
