"""Packed weights under a transformers model, put in and taken out in place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..ledger import size
from ..matrix import pack
from ..moe import PackedExperts
from ..nn import Experts, Linear
from ..tables import text_table
from .experts import is_experts
from .fused import GatedMLP, RMSNorm, gated_activation, is_rms_norm, share_input, shares_input

__all__ = ["Report", "accelerate", "restore"]

_ORIGINALS = "_farthing_originals"
# What the projection behind attention is called, in a module whose own name speaks of attention.
_ATTENTION_OUTPUTS = {"c_proj", "dense", "o_proj", "out_lin", "out_proj", "proj", "wo"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_IMPLEMENTATION = "farthing"
_PACKED = "packed"
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_BIASES = ("gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
_ADDED = ...


@dataclass
class Report:
    """What `accelerate` did.

    Attributes:
        packed: format and activations of each packed layer by name.
        fused: how many modules of other kinds were put around or beside them, by kind.
        skipped: why a linear layer stayed as it was, by name.
        bytes_before: bytes of the packed layers' weights as the model had them.
        bytes_after: bytes of the same weights packed: what a pass reads. The originals are kept for `restore`.
    """

    packed: dict[str, str] = field(default_factory=dict)
    fused: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        rows = [(f"packed, {kind}", str(count)) for kind, count in Counter(self.packed.values()).items()]
        rows += [(kind, str(count)) for kind, count in self.fused.items()]
        rows += [(f"{name} stays", reason) for name, reason in self.skipped.items()]
        rows += [("bytes before", size(self.bytes_before)), ("bytes after", size(self.bytes_after))]
        return text_table(rows)


def accelerate(
    model: nn.Module,
    weights: str | None = "int4",
    *,
    experts: str | None = "int4",
    group: int = 128,
    symmetric: bool = True,
    activations: str = "auto",
) -> Report:
    """Replaces the linear layers of a model, and its mixtures of experts, by packed ones, in place.

    Weights are fixed from then on; the embedding stays as it is, also where it is tied to a head that is packed, and so
    do routers. Norms and gated networks of known form are computed in one call each. The originals are kept, so memory
    grows by the packed bytes; call `restore` before the model is saved, cast or trained.

    Experts are packed where transformers 5 keeps them as parameters of three axes: these leave their module, and the
    experts implementation ``farthing``, registered with transformers, takes their place. Gradients pass through them to
    the hidden states and to the router.

    Between its operators PyTorch's own threads spin, in the way of ours: where prompts are long, start Python with
    ``OMP_WAIT_POLICY=PASSIVE``, or call ``torch.set_num_threads(1)``.

    Args:
        model: any model on the CPU, of transformers or not.
        weights: ``int4``, ``int8``, ``f32``, ``f16`` or ``bf16`` for linear layers; None leaves them and norms alone.
        experts: the same or ``ternary``, ``mxfp4``, ``nf4``, ``iq4_nl`` for mixtures of experts; None leaves them.
        group: inputs that share a scale, 16, 32, 64 or 128.
        symmetric: a scale for each group; if false, a scale and a minimum.
        activations: precision of what the weights meet: ``a8``, ``a16``, ``f32``, or ``auto``, the engine's rule (8
            bits behind attention and for ternary weights, 15 everywhere else).

    Returns:
        What was packed, and what was left alone and why.

    Raises:
        ValueError: an argument is out of range, or the model is accelerated already.

    Example:
        >>> import torch, farthing as ft
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.SiLU(), torch.nn.Linear(128, 8))
        >>> x = torch.randn(2, 64)
        >>> with torch.no_grad():
        ...     before = model(x)
        ...     report = ft.hf.accelerate(model, "int8", group=32)
        ...     near = bool((model(x) - before).abs().max() < 0.05)
        ...     ft.hf.restore(model)
        ...     same = torch.equal(model(x), before)
        >>> len(report.packed), near, same
        (2, True, True)
    """
    if _ORIGINALS in model.__dict__:
        raise ValueError("model: got one that is accelerated already, expected restore first")
    report = Report()
    changes = model.__dict__[_ORIGINALS] = _Changes()
    options = {"group": group, "symmetric": symmetric, "activations": activations}
    try:
        if weights is not None:
            _pack_linears(model, weights, options, report, changes)
            _fuse(model, report, changes)
        if experts is not None:
            _pack_experts(model, experts, options, report, changes)
    except BaseException:
        restore(model)
        raise
    return report


def restore(model: nn.Module) -> None:
    """Puts back everything that `accelerate` has replaced; the model is then what it was, bit for bit.

    Raises:
        ValueError: the model is not accelerated.
    """
    changes = model.__dict__.pop(_ORIGINALS, None)
    if changes is None:
        raise ValueError("model: got one that is not accelerated, expected accelerate first")
    changes.undo()


class _Changes:
    """What stood where, in the dictionaries of the model's modules and configurations."""

    def __init__(self) -> None:
        self._originals: list[tuple[object, str, str, Any]] = []

    def put(self, owner: object, kind: str, name: str, new: Any) -> None:
        """Sets ``owner.kind[name]``."""
        values = getattr(owner, kind)
        self._originals.append((owner, kind, name, values.get(name, _ADDED)))
        values[name] = new

    def put_module(self, model: nn.Module, name: str, new: nn.Module) -> None:
        """Sets the submodule of that name."""
        path, _, leaf = name.rpartition(".")
        parent = model.get_submodule(path)
        self.put(parent, "_modules", leaf, new.train(parent.training))

    def undo(self) -> None:
        for owner, kind, name, old in reversed(self._originals):
            values = getattr(owner, kind)
            if old is _ADDED:
                del values[name]
            else:
                values[name] = old


def _pack_linears(model: nn.Module, weights: str, options: dict[str, Any], report: Report, changes: _Changes) -> None:
    made: dict[int, Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or not _is_linear(module):
            continue
        if reason := _reason_to_skip(name, module):
            report.skipped[name] = reason
            continue
        if id(module) not in made:
            made[id(module)] = _packed(name, module, weights, **options)
            report.bytes_before += module.weight.nbytes
            report.bytes_after += made[id(module)].matrix.nbytes
        layer = made[id(module)]
        report.packed[name] = f"{layer.matrix.format}, {layer.matrix.activations}"
        changes.put_module(model, name, layer)


def _fuse(model: nn.Module, report: Report, changes: _Changes) -> None:
    for name, module in list(model.named_modules()):
        if not name:
            continue
        if is_rms_norm(module):
            changes.put_module(model, name, RMSNorm(module))
            report.fused["norms in one call"] += 1
        elif activation := gated_activation(module):
            gate, up, down = (getattr(module, f"{which}_proj") for which in ("gate", "up", "down"))
            changes.put_module(model, name, GatedMLP(gate, up, down, activation))
            report.fused["gated networks in one call"] += 1
        elif shares_input(module):
            layers = [getattr(module, f"{which}_proj") for which in "qkv"]
            for which, layer in zip("qkv", share_input(layers), strict=True):
                changes.put_module(model, f"{name}.{which}_proj", layer)
            report.fused["queries, keys and values in one call"] += 1


def _pack_experts(model: nn.Module, weights: str, options: dict[str, Any], report: Report, changes: _Changes) -> None:
    for name, module in list(model.named_modules()):
        if not is_experts(module):
            continue
        config = getattr(module, "config", None)
        if config is None or not hasattr(type(module).forward, "__wrapped__"):
            report.skipped[name] = f"{type(module).__name__} does not ask for an experts implementation"
            continue
        try:
            packed = PackedExperts.from_module(module, weights, **options)
        except UnsupportedError as error:
            report.skipped[name] = str(error)
            continue
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        _register()
        report.packed[name] = f"{len(packed)} experts, {packed.format}, {packed.activations}"
        report.bytes_after += packed.nbytes
        for key in (*_WEIGHTS, *_BIASES):
            if (parameter := module._parameters.get(key)) is not None:
                report.bytes_before += parameter.nbytes if key in _WEIGHTS else 0
                # None keeps its place in the order of parameters.
                changes.put(module, "_parameters", key, None)
        changes.put(module, "_modules", _PACKED, Experts(packed).train(module.training))
        if config._experts_implementation != _IMPLEMENTATION:
            changes.put(config, "__dict__", "_experts_implementation_internal", _IMPLEMENTATION)


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if _IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _run_experts)


def _run_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts implementation ``farthing``; modules that are not packed compute what they did."""
    packed = module._modules.get(_PACKED)
    if packed is None:
        eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
        y: torch.Tensor = eager(module, hidden_states, top_k_index, top_k_weights)
    else:
        y = packed(hidden_states, top_k_index, top_k_weights)
    return y


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is the layer of GPT-2, which keeps its weight as (K, N)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _reason_to_skip(name: str, module: nn.Module) -> str | None:
    weight = module.weight
    if type(module) is not nn.Linear and not _is_transposed(module):
        return f"it is a {type(module).__name__}, which may compute something else"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks"
    if type(weight) is not nn.Parameter or weight.device.type != "cpu":
        return f"its weight is a {type(weight).__name__} on {weight.device}, not a parameter on cpu"
    if weight.dtype not in _FLOATS:
        return f"its weight is of {weight.dtype}"
    if not _ROUTERS.isdisjoint(name.split(".")[-2:]):
        return "it chooses experts"
    return None


def _packed(name: str, module: nn.Module, weights: str, group: int, symmetric: bool, activations: str) -> Linear:
    weight = module.weight.detach()  # type: ignore[operator]
    weight = weight.T if _is_transposed(module) else weight
    try:
        matrix = pack(weight, weights, group, symmetric, activations, _role(name))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return Linear.from_packed(matrix, module.bias)  # type: ignore[arg-type]


def _role(name: str) -> str | None:
    """The role that the engine's rule for activations looks at, told from the module's name."""
    path, _, leaf = name.rpartition(".")
    behind = leaf in _ATTENTION_OUTPUTS and "att" in path.rpartition(".")[2].lower()
    return "attention_output" if behind or name.endswith("attention.output.dense") else None
