"""The products as torch operators, for what traces or differentiates them: `torch.compile`, autograd, fake tensors.

What is packed is no tensor, so an operator is given its number. A plain call of `PackedMatrix.matmul` is quicker by
some microseconds; modules take the operator only where it is needed.
"""

# ruff: noqa: ARG001 - torch says what these functions are called with
from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch

from .._core import PackedMatrix, share_threads
from ..moe import PackedExperts

__all__ = ["linear", "linear_gradient", "number_of", "packed_of"]

# torch's threads spin behind its operators: products on threads of their own would wait for a core.
share_threads()

_packed: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count(1)


def number_of(packed: PackedMatrix | PackedExperts) -> int:
    """A number by which operators find the matrix, or the experts, while they live."""
    number = next(_numbers)
    _packed[number] = packed
    return number


def packed_of(number: int) -> Any:
    """What has that number."""
    return _packed[number]


@torch.library.custom_op("farthing::linear", mutates_args=())
def linear(x: torch.Tensor, bias: torch.Tensor | None, matrix: int, outputs: int) -> torch.Tensor:
    """``x · Wᵀ + bias``: (..., K) to (..., ``outputs``) with the type of ``x``."""
    y: torch.Tensor = _packed[matrix].matmul(x.detach(), None if bias is None else bias.detach())
    return y


@linear.register_fake
def _(x: torch.Tensor, bias: torch.Tensor | None, matrix: int, outputs: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.custom_op("farthing::linear_gradient", mutates_args=())
def linear_gradient(gradient: torch.Tensor, matrix: int, inputs: int) -> torch.Tensor:
    """``gradient · W`` with the dequantised weights: (..., N) to (..., ``inputs``) with the type of ``gradient``."""
    weights = torch.from_numpy(_packed[matrix].dequantize())
    return (gradient.detach().float() @ weights).to(gradient.dtype)


@linear_gradient.register_fake
def _(gradient: torch.Tensor, matrix: int, inputs: int) -> torch.Tensor:
    return gradient.new_empty((*gradient.shape[:-1], inputs))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bias, ctx.matrix, _ = inputs
    ctx.inputs, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    wants_x, wants_bias = ctx.needs_input_grad[:2]
    of_x = linear_gradient(gradient, ctx.matrix, ctx.inputs) if wants_x else None
    of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype) if wants_bias else None
    return of_x, of_bias, None, None


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gradient, ctx.matrix, _ = inputs
    ctx.outputs = gradient.shape[-1]


def _backward_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return linear(gradient, None, ctx.matrix, ctx.outputs), None, None


linear.register_autograd(_backward, setup_context=_keep)
linear_gradient.register_autograd(_backward_gradient, setup_context=_keep_gradient)
