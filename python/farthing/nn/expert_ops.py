"""Packed experts as torch operators, for what traces or differentiates them."""

# ruff: noqa: ARG001 - torch says what these functions are called with
from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .ops import packed_of

__all__ = ["experts", "experts_gradient"]


@torch.library.custom_op("farthing::experts", mutates_args=())
def experts(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int) -> torch.Tensor:
    """``Σ weight · f_id(hidden)``: (T, H) with the type of ``hidden``, for ids and weights (T, K)."""
    y: torch.Tensor = packed_of(number)(hidden.detach(), ids, weights.detach())
    return y


@experts.register_fake
def _(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("farthing::experts_gradient", mutates_args=())
def experts_gradient(
    gradient: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``hidden`` (T, H) and ``weights`` (T, K): weights dequantised, activations not rounded."""
    packed = packed_of(number)
    of_hidden = torch.zeros(hidden.shape, dtype=torch.float32)
    of_weights = torch.zeros(weights.shape, dtype=torch.float32)
    gradient, x, weights_of = gradient.detach().float(), hidden.detach().float(), weights.detach().float()
    for number_of_expert in torch.unique(ids).tolist():
        if not 0 <= number_of_expert < len(packed):
            continue
        tokens, slots = torch.where(ids == number_of_expert)
        gate, up, down, gate_bias, up_bias, down_bias = _floats(packed[number_of_expert])
        rows, above = x[tokens], gradient[tokens]
        gated = None if gate is None else F.linear(rows, gate, gate_bias)
        inner, slope_of_gate, slope_of_up = _slopes(packed.activation, gated, F.linear(rows, up, up_bias))
        of_weights[tokens, slots] = (above * F.linear(inner, down, down_bias)).sum(-1)
        of_inner = (above * weights_of[tokens, slots, None]) @ down
        of_rows = (of_inner * slope_of_up) @ up
        if gate is not None:
            of_rows += (of_inner * slope_of_gate) @ gate
        of_hidden.index_add_(0, tokens, of_rows)
    return of_hidden.to(hidden.dtype), of_weights.to(weights.dtype)


@experts_gradient.register_fake
def _(
    gradient: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden.new_empty(hidden.shape), weights.new_empty(weights.shape)


def _floats(expert: Any) -> list[Any]:
    matrices = (None if matrix is None else torch.from_numpy(matrix.dequantize()) for matrix in expert[:3])
    return [*matrices, *(None if bias is None else torch.from_numpy(bias) for bias in expert[3:])]


def _slopes(
    activation: tuple[str, float | None, float | None], gate: torch.Tensor | None, up: torch.Tensor
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """The function of gate and up, and its derivatives by each."""
    word, alpha, limit = activation
    if gate is None:
        positive = up.relu()
        return positive.square(), None, 2 * positive
    low, high = (None, None) if limit is None else (gate <= limit, up.abs() <= limit)
    gate, up = (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))
    if word == "gelu_tanh":
        activated = F.gelu(gate, approximate="tanh")
        slope = torch.ops.aten.gelu_backward(torch.ones_like(gate), gate, approximate="tanh")
    else:
        alpha = 1.0 if alpha is None else alpha
        sigmoid = torch.sigmoid(alpha * gate)
        activated, slope = gate * sigmoid, sigmoid * (1 + alpha * gate * (1 - sigmoid))
    factor = up + 1 if word == "swiglu" else up
    of_gate, of_up = slope * factor, activated
    return activated * factor, of_gate if low is None else of_gate * low, of_up if high is None else of_up * high


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    hidden, ids, weights, ctx.number = inputs
    ctx.save_for_backward(hidden, ids, weights)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    hidden, ids, weights = ctx.saved_tensors
    of_hidden, of_weights = experts_gradient(gradient, hidden, ids, weights, ctx.number)
    wants_hidden, _, wants_weights, _ = ctx.needs_input_grad
    return of_hidden if wants_hidden else None, None, of_weights if wants_weights else None, None


experts.register_autograd(_backward, setup_context=_keep)
