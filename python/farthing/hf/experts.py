"""What the experts of a transformers model compute, read from their module without copying a weight.

transformers 5 keeps the experts of a layer as parameters of three axes, in a module whose flags say how they lie
(`use_experts_implementation`). The function between their matrices is the module's own method; it is known here only
where its source is one that this file names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UnsupportedError
from ..moe import Expert

__all__ = ["Expert", "Experts", "describe_experts", "is_experts"]

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "ReLUSquaredActivation": "relu_squared",
}
_SIGNATURE = re.compile(r"\s*def \w+\(.*?\)(?: *-> *[^:]*)?:", re.DOTALL)
# Sources of `_apply_gate` without comments, on one line; what they compute, and their attributes for limit and alpha.
_PLAIN = "gate, up = gate_up_out.chunk(2, dim=-1) return self.act_fn(gate) * up"
_CLAMP = "gate = gate.clamp({low}max=self.{limit}) up = up.clamp(min=-self.{limit}, max=self.{limit}) "
_HALVES, _TURNS = "gate, up = gate_up.chunk(2, dim=-1) ", "gate, up = gate_up[..., ::2], gate_up[..., 1::2] "
_OPEN = "min=None, "


class _Gate(NamedTuple):
    """``act``: by the module's `act_fn`; ``silu``; ``swiglu``: ``(up + 1) · gate · sigmoid(alpha · gate)``."""

    kind: str
    limit: str | None = None
    alpha: str | None = None


def _clamp(limit: str, low: str = "") -> str:
    return _CLAMP.format(low=low, limit=limit)


_GATES = {
    _PLAIN: _Gate("act"),
    # gpt-oss, and the privacy filter made from it
    _TURNS
    + _clamp("limit", _OPEN)
    + "glu = gate * torch.sigmoid(gate * self.alpha) gated_output = (up + 1) * glu return gated_output": _Gate(
        "swiglu", "limit", "alpha"
    ),
    _HALVES
    + _clamp("limit", _OPEN)
    + "glu = gate * torch.sigmoid(gate * self.alpha) gated_output = (up + 1) * glu return gated_output": _Gate(
        "swiglu", "limit", "alpha"
    ),
    # MiniMax-M3
    _HALVES
    + _clamp("swiglu_limit")
    + "glu = gate * torch.sigmoid(gate * self.swiglu_alpha) return (up + 1.0) * glu": _Gate(
        "swiglu", "swiglu_limit", "swiglu_alpha"
    ),
    # DeepSeek-V4
    _HALVES + _clamp("limit") + "return self.act_fn(gate) * up": _Gate("act", "limit"),
    # GLM-5-Next, Hy-V4
    _HALVES + _clamp("swiglu_limit", _OPEN) + "return F.silu(gate) * up": _Gate("silu", "swiglu_limit"),
}


@dataclass(frozen=True)
class Experts:
    """The experts of a layer; iterate over them, or take one by its index: views of the module's weights, no copies.

    An expert computes ``down · f(gate · x + gate_bias, up · x + up_bias) + down_bias``, or without a gate
    ``down · f(up · x + up_bias) + down_bias``.

    Attributes:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        dtype: of the weights.
        has_gate: whether there is a gate.
        has_bias: whether there are biases.
        activation: f. With a gate, ``silu`` and ``gelu_tanh`` mean ``activation(gate) · up`` and ``swiglu`` means
            ``(up + 1) · gate · sigmoid(alpha · gate)``; without, ``silu``, ``gelu_tanh`` or ``relu_squared`` of up.
            None where the module computes something else, which `apply_gate` tells.
        limit: the gate is at most this, up is between this and its negative, before f; None for no limit.
        alpha: of ``swiglu``.
        post_norm: module that normalises what an expert gives, before it is weighted; None for most.
        apply_gate: the module's own f, of an array that holds gate and up as its weights hold them, (…, 2I) or (…, I):
            correct for every module, and slow.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    has_gate: bool
    has_bias: bool
    activation: str | None
    limit: float | None
    alpha: float | None
    post_norm: nn.Module | None
    apply_gate: Callable[[torch.Tensor], torch.Tensor] = field(repr=False, compare=False)
    _module: nn.Module = field(repr=False, compare=False)
    _is_transposed: bool = field(repr=False)
    _is_concatenated: bool = field(repr=False)

    def __len__(self) -> int:
        return self.num_experts

    def __iter__(self) -> Iterator[Expert]:
        return (self[index] for index in range(self.num_experts))

    def __getitem__(self, index: int) -> Expert:
        if not 0 <= index < self.num_experts:
            raise IndexError(f"expert: got {index}, expected 0 to {self.num_experts - 1}")
        name = "gate_up_proj" if self.has_gate else "up_proj"
        first, down = self._matrix(name, index), self._matrix("down_proj", index)
        biases = (self._bias(f"{name}_bias", index), self._bias("down_proj_bias", index))
        if not self.has_gate:
            return Expert(None, first, down, None, *biases)
        gate, up = self._halves(first)
        gate_bias, up_bias = (None, None) if biases[0] is None else self._halves(biases[0])
        return Expert(gate, up, down, gate_bias, up_bias, biases[1])

    def _matrix(self, name: str, index: int) -> torch.Tensor:
        """The weights as (outputs, inputs)."""
        weight = _parameter(self._module, name)[index]
        return weight.T if self._is_transposed else weight

    def _bias(self, name: str, index: int) -> torch.Tensor | None:
        return _parameter(self._module, name)[index] if self.has_bias else None

    def _halves(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up of what holds them one behind the other or in turns along its first axis."""
        if self._is_concatenated:
            half = self.intermediate_size
            return both[:half], both[half:]
        return both[::2], both[1::2]


def is_experts(module: nn.Module) -> bool:
    """Whether `describe_experts` can read the module: it has the flags of the interface, or is that of Llama 4."""
    return all(hasattr(module, flag) for flag in _FLAGS) or type(module).__name__ == "Llama4TextExperts"


def describe_experts(module: nn.Module) -> Experts:
    """What a kernel must know of an experts module of transformers 5.

    Args:
        module: of a class under `use_experts_implementation`, such as ``model.model.layers[0].mlp.experts``, or that of
            Llama 4, which is not under it but lies alike.

    Raises:
        UnsupportedError: another module, or weights that are no floats on the CPU, such as quantised ones.

    Example:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> from farthing.hf import describe_experts
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4}
        >>> experts = describe_experts(MixtralExperts(MixtralConfig(**sizes)))
        >>> experts.activation, len(experts), tuple(experts[0].gate.shape), tuple(experts[3].down.shape)
        ('silu', 4, (96, 64), (64, 96))
    """
    if not is_experts(module):
        raise UnsupportedError(
            f"{type(module).__name__} is no experts module of transformers 5; those have the flags {', '.join(_FLAGS)}"
        )
    # Llama 4 has no flags, for it is called with rows that are sorted already.
    flags = {"has_gate": True, "has_bias": False, "is_transposed": True, "is_concatenated": True}
    flags |= {flag: bool(getattr(module, flag)) for flag in _FLAGS if hasattr(module, flag)}
    first = _parameter(module, "gate_up_proj" if flags["has_gate"] else "up_proj")
    down = _parameter(module, "down_proj")
    experts, rows, columns = down.shape
    hidden, inner = (columns, rows) if flags["is_transposed"] else (rows, columns)
    wide = 2 * inner if flags["has_gate"] else inner
    shape = (experts, hidden, wide) if flags["is_transposed"] else (experts, wide, hidden)
    if first.shape != shape:
        got = f"{tuple(first.shape)} beside a down_proj of {tuple(down.shape)}"
        raise UnsupportedError(f"{type(module).__name__}: got {got}, expected {shape}")
    apply_gate = getattr(module, "_apply_gate", None) if flags["has_gate"] else module.act_fn
    gate = _gate(module) if flags["has_gate"] else _Gate("act")
    activation = None if gate is None else gate.kind
    if activation == "act":
        act_fn: Any = module.act_fn
        activation = "silu" if act_fn is F.silu else _ACTIVATIONS.get(type(act_fn).__name__)
        if flags["has_gate"] and activation == "relu_squared":
            activation = None
    gate = _Gate("none") if gate is None or activation is None else gate
    post_norm: Any = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    return Experts(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=inner,
        dtype=down.dtype,
        has_gate=flags["has_gate"],
        has_bias=flags["has_bias"],
        activation=activation,
        limit=None if gate.limit is None else float(getattr(module, gate.limit)),
        alpha=None if gate.alpha is None else float(getattr(module, gate.alpha)),
        post_norm=post_norm,
        apply_gate=apply_gate if callable(apply_gate) else lambda both: _plain_gate(module, both),
        _module=module,
        _is_transposed=flags["is_transposed"],
        _is_concatenated=flags["is_concatenated"],
    )


def _plain_gate(module: nn.Module, both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return module.act_fn(gate) * up  # type: ignore[operator, no-any-return]


def _gate(module: nn.Module) -> _Gate | None:
    """What the module's `_apply_gate` computes; None if its source is not one that is known."""
    method = getattr(type(module), "_apply_gate", None)
    if method is None:
        return _Gate("act")
    try:
        source = inspect.getsource(method)
    except (OSError, TypeError):
        return None
    signature = _SIGNATURE.match(source)
    if signature is None:
        return None
    body = re.sub(r'""".*?"""|#[^\n]*', "", source[signature.end() :], flags=re.DOTALL)
    return _GATES.get(" ".join(body.split()))


def _parameter(module: nn.Module, name: str) -> torch.Tensor:
    weight: Any = getattr(module, name, None)
    plain = isinstance(weight, torch.Tensor) and type(weight) in (torch.Tensor, nn.Parameter)
    if not plain or weight.device.type != "cpu" or weight.dtype not in _FLOATS:
        got = f"{weight.dtype} on {weight.device}" if plain else type(weight).__name__
        raise UnsupportedError(
            f"{type(module).__name__}.{name}: got {got}, expected float32, bfloat16 or float16 on cpu; "
            "load the model without another quantisation"
        )
    detached: torch.Tensor = weight.detach()
    return detached
