"""A mixture of experts made of the default model, as a checkpoint: SmolLM2-135M, its feed-forward networks split.

``notebooks/mixture_of_experts.ipynb`` explains the way: neurons clustered by their gates, routers and last matrices
fitted by least squares to what the dense layers did, then trained for some minutes. Here the third of the neurons that
adds most to the outputs is a shared expert, and the others are split. Weights are not renormalised (OLMoE's are not
either), so that to choose fewer experts changes nothing about the others, and one training with changing numbers of
experts serves all of them. The checkpoint is of type ``qwen2_moe``.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from farthing.moe import RouterSpec
from farthing.nn import SparseMoe
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

EXPERTS = 32
TOP_K = 8
# Experts for each token while it is trained.
CHOICES = [4, 6, 8]
# Layers at the bottom that stay dense.
KEPT = 1
WINDOW = 256
# Rows of text that least squares see.
FITTED = 8
# How far a router's weights are apart: 0 makes all of them 1, 1 makes them as far apart as the outputs' lengths.
SPREAD = 0.3
# Neurons of the shared expert.
SHARED = 512


def make(directory: Path, model: Any, ids: Any, minutes: float) -> None:
    """Splits and trains ``model``, a Llama of transformers in float32, on ``ids`` (N,), and writes the checkpoint.

    The model keeps the layers of the mixture.
    """
    torch.manual_seed(0)
    model.requires_grad_(False)
    dense = [block.mlp for block in model.model.layers[KEPT:]]
    rows = torch.as_tensor(ids)[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    rows = rows[torch.randperm(len(rows))]
    with torch.no_grad():
        inputs = _inputs(model, dense, rows[:FITTED])
        split = [_split(mlp, x) for mlp, x in zip(dense, inputs, strict=True)]
    _train(model, dense, split, rows, minutes)
    _write(directory, model, dense, split)
    _choose([layer.moe for layer in split], TOP_K)
    _use(model, split)


class Split(nn.Module):
    """What a dense layer becomes: an expert that every row meets, and a mixture."""

    def __init__(self, shared: nn.Module, moe: SparseMoe) -> None:
        super().__init__()
        self.shared, self.moe = shared, moe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x``: (..., H)."""
        y: torch.Tensor = self.shared(x) + self.moe(x)
        return y


def _part(mlp: Any, neurons: torch.Tensor) -> Any:
    """The network of some of the neurons."""
    part = copy.deepcopy(mlp)
    for name in ("gate_proj", "up_proj"):
        getattr(part, name).weight = nn.Parameter(getattr(mlp, name).weight[neurons], requires_grad=False)
    part.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, neurons], requires_grad=False)
    return part


def _split(mlp: Any, x: torch.Tensor) -> Split:
    """The layer's neurons, by how much they add to its outputs for ``x`` (T, H): those with most are shared."""
    inner = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    order = (inner.square().mean(0).sqrt() * mlp.down_proj.weight.norm(dim=0)).argsort(descending=True)
    rest = _part(mlp, order[SHARED:].sort().values)
    spec = RouterSpec(EXPERTS, TOP_K, norm_topk_prob=False, routed_scaling_factor=float(EXPERTS))
    moe = SparseMoe.from_dense(rest, EXPERTS, TOP_K, spec=spec)
    _fit(moe, x, rest(x))
    return Split(_part(mlp, order[:SHARED].sort().values), moe)


def _use(model: Any, layers: list[Any]) -> None:
    for block, layer in zip(model.model.layers[KEPT:], layers, strict=True):
        block.mlp = layer


def _choose(mixtures: list[SparseMoe], top_k: int) -> None:
    for moe in mixtures:
        moe.spec = replace(moe.spec, top_k=top_k)


def _inputs(model: Any, dense: list[Any], rows: Any) -> list[Any]:
    """What each dense layer reads of these rows of text, (T, H)."""
    found: list[Any] = []
    hooks = [mlp.register_forward_hook(lambda _, x, __: found.append(x[0].flatten(0, 1))) for mlp in dense]
    model.model(rows)
    for hook in hooks:
        hook.remove()
    return found


def _solve(rows: Any, targets: Any, ridge: float) -> Any:
    """M with the least |rows · M - targets|² + ridge · |M|², the ridge as a share of the rows' mean square."""
    squares = rows.T @ rows
    squares.diagonal().add_(ridge * squares.diagonal().mean())
    return torch.linalg.solve(squares, rows.T @ targets)


def _fit(moe: Any, x: Any, y: Any) -> None:
    """Router and last matrices by least squares, from a layer's inputs and outputs (T, H)."""
    gate, up = moe.experts.gate_up_proj.chunk(2, 1)  # (E, I, H) both
    down = moe.experts.down_proj  # (E, H, I)
    inner = F.silu(torch.einsum("th,eih->tei", x, gate)) * torch.einsum("th,eih->tei", x, up)
    lengths = torch.stack([(inner[:, e] @ down[e].T).norm(dim=-1) for e in range(EXPERTS)], 1).log()
    moe.weight.copy_(_solve(x, lengths - lengths.mean(1, keepdim=True), 0.01).T * SPREAD)
    wide = down.transpose(1, 2).flatten(0, 1)  # (E · I, H)
    scale = 1 / y.norm(dim=-1, keepdim=True)  # so that every token counts as much
    read, left_out = [], []
    for part, top_k in zip(torch.arange(len(x)).chunk(len(CHOICES)), CHOICES, strict=True):
        _choose([moe], top_k)
        moe(x[part])
        chosen = torch.zeros(len(part), EXPERTS).scatter_(1, moe.routing.ids, moe.routing.weights)
        read.append((inner[part] * chosen[..., None]).flatten(1) * scale[part])
        left_out.append(y[part] * scale[part] - read[-1] @ wide)
    change = _solve(torch.cat(read), torch.cat(left_out), 0.5)
    down += change.view(EXPERTS, -1, down.shape[1]).transpose(1, 2)


def _train(model: Any, dense: list[Any], split: list[Split], rows: Any, minutes: float) -> None:
    """Routers and last matrices learn to predict as the dense model does."""
    sparse = [layer.moe for layer in split]
    downs, routers = [moe.experts.down_proj for moe in sparse], [moe.weight for moe in sparse]
    for parameter in (*downs, *routers):
        parameter.requires_grad_(True)
    for moe in sparse:
        moe.experts.gate_up_proj.requires_grad_(False)
    rates = [2e-4, 1e-3]
    groups = [{"params": part, "lr": rate} for part, rate in zip((downs, routers), rates, strict=True)]
    optimizer = torch.optim.Adam(groups)
    start, step = time.perf_counter(), 0
    while (spent := (time.perf_counter() - start) / 60) < minutes:
        batch = rows[step % len(rows)][None]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 5) * (1 - spent / minutes)
        _use(model, dense)
        with torch.no_grad():
            teacher = model(batch).logits.log_softmax(-1)
        _use(model, split)
        _choose(sparse, CHOICES[step % len(CHOICES)])
        student = model(batch).logits.log_softmax(-1)
        loss = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()
        (loss + sum(moe.auxiliary_loss(balance=1e-3, z=0.0) for moe in sparse) / len(sparse)).backward()
        torch.nn.utils.clip_grad_norm_([*downs, *routers], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            print(f"step {step}: KL from the dense model {loss.item():.2f}", flush=True)


def _write(directory: Path, model: Any, dense: list[Any], split: list[Split]) -> None:
    """The checkpoint, as `qwen2_moe` has it; the routers' scale goes into the experts' last matrices."""
    _use(model, dense)
    config = model.config
    tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = len(tensors[f"{prefix}self_attn.{name}.weight"])
            tensors[f"{prefix}self_attn.{name}.bias"] = torch.zeros(rows)
        if layer < KEPT:
            continue
        shared, moe = split[layer - KEPT].shared, split[layer - KEPT].moe
        for name in ("gate", "up", "down"):
            del tensors[f"{prefix}mlp.{name}_proj.weight"]
        tensors[f"{prefix}mlp.gate.weight"] = moe.weight
        gate, up = moe.experts.gate_up_proj.chunk(2, 1)
        for name, experts in (("gate", gate), ("up", up), ("down", EXPERTS * moe.experts.down_proj)):
            for expert, weight in enumerate(experts):
                tensors[f"{prefix}mlp.experts.{expert}.{name}_proj.weight"] = weight
        # Its sigmoid is a half.
        for name, factor in (("gate", 1), ("up", 1), ("down", 2)):
            weight = factor * getattr(shared, f"{name}_proj").weight
            tensors[f"{prefix}mlp.shared_expert.{name}_proj.weight"] = weight
        tensors[f"{prefix}mlp.shared_expert_gate.weight"] = torch.zeros(1, config.hidden_size)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.detach().clone().contiguous() for name, value in tensors.items()}, directory / "model.safetensors"
    )
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    kept += ("num_key_value_heads", "max_position_embeddings", "rope_parameters", "tie_word_embeddings", "hidden_act")
    words = {name: getattr(config, name) for name in kept} | {
        "model_type": "qwen2_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": False,
        "moe_intermediate_size": (config.intermediate_size - SHARED) // EXPERTS,
        "shared_expert_intermediate_size": SHARED,
        "mlp_only_layers": list(range(KEPT)),
        "decoder_sparse_step": 1,
    }
    (directory / "config.json").write_text(json.dumps(words, indent=1))
