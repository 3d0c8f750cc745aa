"""What `accelerate` puts where single products would cost more in Python than in arithmetic.

A call from Python into a product costs about as much as the product of a small model. These modules do in one call what
their originals do in several, and only where the source of the original says that it computes exactly this.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F

from .._core import matmul_gated, matmul_together, rms_norm
from ..nn.linear import Linear, needs_operator

__all__ = ["GatedMLP", "RMSNorm", "SharedLinear", "gated_activation", "is_rms_norm", "share_input", "shares_input"]

_GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
_GATED_BODIES = (f"down_proj = {_GATED} return down_proj", f"return {_GATED}")
_NORM_BODY = (
    "input_dtype = hidden_states.dtype hidden_states = hidden_states.to(torch.float32) "
    "variance = hidden_states.pow(2).mean(-1, keepdim=True) "
    "hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon) "
    "return self.weight * hidden_states.to(input_dtype)"
)
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _body(module: nn.Module) -> str:
    """The source of the module's forward function behind its signature, on one line; empty if it has none."""
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return ""
    signature = re.match(r"\s*def forward\(.*?\)(?: *-> *[^:]*)?:", source, re.DOTALL)
    return " ".join(source[signature.end() :].split()) if signature else ""


def _has_hooks(module: nn.Module) -> bool:
    return any(chain(module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))


def is_rms_norm(module: nn.Module) -> bool:
    """Whether the module is the norm of Llama, under whatever name."""
    return _body(module) == _NORM_BODY and not _has_hooks(module)


def gated_activation(module: nn.Module) -> str | None:
    """The activation of a gated network whose three layers are packed and have no bias; None if it is no such thing."""
    if _body(module) not in _GATED_BODIES or _has_hooks(module):
        return None
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = all(isinstance(layer, Linear) and layer.bias is None for layer in layers)
    return _ACTIVATIONS.get(type(module.act_fn).__name__) if plain else None


def shares_input(module: nn.Module) -> bool:
    """Whether the module is an attention that projects one unchanged input three times in a row."""
    calls = re.findall(r"self\.([qkv])_proj\((\w+)\)", _body(module))
    layers = [getattr(module, f"{name}_proj", None) for name in "qkv"]
    return calls == [(name, "hidden_states") for name in "qkv"] and all(type(layer) is Linear for layer in layers)


class RMSNorm(nn.Module):
    """The norm of Llama, rounded to the type of its input once, at the end."""

    weight: nn.Parameter

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.register_parameter("weight", original._parameters["weight"])
        self.variance_epsilon = float(original.__dict__["variance_epsilon"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x``: (..., K); the result has the same shape and type."""
        weight = self._parameters["weight"]
        if needs_operator(x, weight):
            wide = F.rms_norm(x.float(), x.shape[-1:], None, self.variance_epsilon)
            return (wide * self.weight.float()).to(x.dtype)
        y: torch.Tensor = rms_norm(x, weight, self.variance_epsilon)
        return y


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))`` of packed layers, rounded to the type of its input once, at the end."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def __init__(self, gate: Linear, up: Linear, down: Linear, activation: str) -> None:
        super().__init__()
        self.gate_proj = gate
        self.up_proj = up
        self.down_proj = down
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x``: (..., K); the result has the same shape and type."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if needs_operator(x, None):
            y: torch.Tensor = down(_FUNCTIONS[self.activation](gate(x)) * up(x))
        else:
            y = matmul_gated(x, gate.matrix, up.matrix, down.matrix, self.activation)
        return y

    def extra_repr(self) -> str:
        """The activation, for `print`."""
        return self.activation


class SharedLinear(Linear):
    """A packed layer that is called in turn with others on the same input: the first call computes all of them.

    What a later layer finds ready is used only if its input is the very tensor of the first call, unchanged; anything
    else is computed alone, so sharing never changes a result.
    """

    group: SharedInput

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x``: (..., K); the result: (..., N), of the same type."""
        if needs_operator(x, self._parameters["bias"]):
            return super().forward(x)
        return self.group.product(self, x)


class SharedInput:
    """The products of some layers with one input."""

    def __init__(self, layers: list[SharedLinear]) -> None:
        self._layers = layers
        self._ready: tuple[torch.Tensor, int, list[torch.Tensor]] | None = None

    def product(self, layer: SharedLinear, x: torch.Tensor) -> torch.Tensor:
        """The output of ``layer`` for ``x``."""
        version = -1 if x.is_inference() else x._version
        layers = self._layers
        if layer is layers[0]:
            matrices = [layer.matrix for layer in layers]
            made = matmul_together(x, matrices, [layer._parameters["bias"] for layer in layers])
            self._ready = (x, version, made)
            return made[0]  # type: ignore[no-any-return]
        ready = self._ready
        if ready is None or ready[0] is not x or ready[1] != version:
            y: torch.Tensor = layer.matrix.matmul(x, layer._parameters["bias"])
            return y
        if layer is layers[-1]:
            self._ready = None
        return ready[2][layers.index(layer)]


def share_input(layers: list[Linear]) -> list[SharedLinear]:
    """The same layers, computed together when the first is called."""
    shared = [SharedLinear.from_packed(layer.matrix, layer.bias) for layer in layers]
    group = SharedInput(shared)
    for layer in shared:
        layer.group = group
    return shared
