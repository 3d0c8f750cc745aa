"""Packed weights under a transformers model, put in and taken out in place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from ..ledger import size
from ..matrix import pack
from ..nn import Linear
from ..tables import text_table
from .fused import GatedMLP, RMSNorm, gated_activation, is_rms_norm, share_input, shares_input

__all__ = ["Report", "accelerate", "restore"]

_ORIGINALS = "_farthing_originals"
# What the projection behind attention is called, in a module whose own name speaks of attention.
_ATTENTION_OUTPUTS = {"c_proj", "dense", "o_proj", "out_lin", "out_proj", "proj", "wo"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
    model: nn.Module, weights: str = "int4", *, group: int = 128, symmetric: bool = True, activations: str = "auto"
) -> Report:
    """Replaces the linear layers of a model by packed ones, in place.

    Weights are fixed from then on; the embedding stays as it is, also where it is tied to a head that is packed. Norms
    and gated networks of known form are computed in one call each. The originals are kept, so memory grows by the
    packed bytes; call `restore` before the model is saved, cast or trained.

    Between its operators PyTorch's own threads spin, in the way of ours: where prompts are long, start Python with
    ``OMP_WAIT_POLICY=PASSIVE``, or call ``torch.set_num_threads(1)``.

    Args:
        model: any model on the CPU, of transformers or not.
        weights: ``int4``, ``int8``, ``f32``, ``f16`` or ``bf16``.
        group: inputs that share a scale, 16, 32, 64 or 128.
        symmetric: a scale for each group; if false, a scale and a minimum.
        activations: precision of what the weights meet: ``a8``, ``a16``, ``f32``, or ``auto``, the engine's rule (8
            bits behind attention, 15 everywhere else).

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
    originals: list[tuple[nn.Module, str, nn.Module]] = []
    made: dict[int, Linear] = {}

    def put(name: str, new: nn.Module) -> None:
        path, _, leaf = name.rpartition(".")
        parent = model.get_submodule(path)
        originals.append((parent, leaf, parent._modules[leaf]))  # type: ignore[arg-type]
        parent._modules[leaf] = new.train(parent.training)

    model.__dict__[_ORIGINALS] = originals
    try:
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if not name or not _is_linear(module):
                continue
            if reason := _reason_to_skip(name, module):
                report.skipped[name] = reason
                continue
            if id(module) not in made:
                made[id(module)] = _packed(name, module, weights, group, symmetric, activations)
                report.bytes_before += module.weight.nbytes
                report.bytes_after += made[id(module)].matrix.nbytes
            layer = made[id(module)]
            report.packed[name] = f"{layer.matrix.format}, {layer.matrix.activations}"
            put(name, layer)
        for name, module in list(model.named_modules()):
            if not name:
                continue
            if is_rms_norm(module):
                put(name, RMSNorm(module))
                report.fused["norms in one call"] += 1
            elif activation := gated_activation(module):
                gate, up, down = (getattr(module, f"{which}_proj") for which in ("gate", "up", "down"))
                put(name, GatedMLP(gate, up, down, activation))
                report.fused["gated networks in one call"] += 1
            elif shares_input(module):
                layers = [getattr(module, f"{which}_proj") for which in "qkv"]
                for which, layer in zip("qkv", share_input(layers), strict=True):
                    put(f"{name}.{which}_proj", layer)
                report.fused["queries, keys and values in one call"] += 1
    except BaseException:
        restore(model)
        raise
    return report


def restore(model: nn.Module) -> None:
    """Puts back every module that `accelerate` has replaced; the model is then what it was, bit for bit.

    Raises:
        ValueError: the model is not accelerated.
    """
    originals = model.__dict__.pop(_ORIGINALS, None)
    if originals is None:
        raise ValueError("model: got one that is not accelerated, expected accelerate first")
    for parent, leaf, module in reversed(originals):
        parent._modules[leaf] = module


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
    if name.rpartition(".")[2] in _ROUTERS:
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
