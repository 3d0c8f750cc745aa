"""Experts modules of transformers, read without a copy: what the views compute is what the module computes."""

from __future__ import annotations

import doctest
import importlib

import farthing as ft
import farthing.hf.experts
import pytest
import torch
from farthing.hf import Experts, describe_experts
from torch.nn import functional as F

# Folder, configuration class, experts class, sizes; the activation that is found, its limit and alpha.
SWIGLU = ("swiglu", 7.0, 1.702)
SILU = ("silu", None, None)
MODELS = [
    ("mixtral", "MixtralConfig", "MixtralExperts", "num_local_experts", SILU),
    ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeExperts", "num_experts", SILU),
    ("gpt_oss", "GptOssConfig", "GptOssExperts", "num_local_experts", SWIGLU),
    ("deepseek_v3", "DeepseekV3Config", "DeepseekV3Experts", "n_routed_experts", SILU),
    ("olmoe", "OlmoeConfig", "OlmoeExperts", "num_experts", SILU),
    ("granitemoe", "GraniteMoeConfig", "GraniteMoeExperts", "num_local_experts", SILU),
    ("lfm2_moe", "Lfm2MoeConfig", "Lfm2MoeExperts", "num_experts", SILU),
    ("mistral4", "Mistral4Config", "Mistral4Experts", "n_routed_experts", SILU),
    ("minimax_m2", "MiniMaxM2Config", "MiniMaxM2Experts", "num_local_experts", SILU),
    ("glm4_moe", "Glm4MoeConfig", "Glm4MoeExperts", "n_routed_experts", SILU),
    # Other layouts and functions
    ("deepseek_v4", "DeepseekV4Config", "DeepseekV4Experts", "n_routed_experts", ("silu", 10.0, None)),
    ("glm5_next", "Glm5NextTextConfig", "Glm5NextTextExperts", "n_routed_experts", ("silu", 2.5, None)),
    ("hy_v4", "HYV4Config", "HYV4Experts", "n_routed_experts", ("silu", 2.5, None)),
    ("minimax_m3_vl", "MiniMaxM3VLTextConfig", "MiniMaxM3VLExperts", "num_local_experts", SWIGLU),
    (
        "openai_privacy_filter",
        "OpenAIPrivacyFilterConfig",
        "OpenAIPrivacyFilterExperts",
        "num_local_experts",
        SWIGLU,
    ),
    ("nemotron_h", "NemotronHConfig", "NemotronHExperts", "n_routed_experts", ("relu_squared", None, None)),
    ("beam", "BeamConfig", "BeamExperts", "num_experts", (None, None, None)),
]


def build(folder: str, config_name: str, name: str, key: str) -> torch.nn.Module:
    home = f"transformers.models.{folder}"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96, key: 8}
    config = getattr(importlib.import_module(f"{home}.configuration_{folder}"), config_name)(**sizes)
    if folder in ("glm5_next", "hy_v4"):
        config.swiglu_limit = 2.5
    config._experts_implementation = "eager"
    module = getattr(importlib.import_module(f"{home}.modeling_{folder}"), name)(config)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.requires_grad_(False)


def activate(experts: Experts, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """f, as its documentation says."""
    if experts.limit is not None:
        assert gate is not None
        gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
    if experts.activation == "swiglu":
        return (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
    f = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu_squared": lambda x: F.relu(x) ** 2}
    return f[experts.activation](up) if gate is None else f[experts.activation](gate) * up


def multiply(experts: Experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each row through its experts, in plain torch."""
    out = torch.zeros_like(x)
    for row, slot in ((row, slot) for row in range(len(x)) for slot in range(ids.shape[1])):
        expert = experts[int(ids[row, slot])]
        gate = None if expert.gate is None else F.linear(x[row], expert.gate, expert.gate_bias)
        up = F.linear(x[row], expert.up, expert.up_bias)
        known = experts.activation is not None
        inner = activate(experts, gate, up) if known else experts.apply_gate(torch.cat([gate, up]))
        out[row] += F.linear(inner, expert.down, expert.down_bias) * weights[row, slot]
    return out


@pytest.mark.parametrize(
    ("folder", "config", "name", "key", "wanted"), MODELS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_views_compute_what_the_module_computes(folder: str, config: str, name: str, key: str, wanted: tuple) -> None:
    module = build(folder, config, name, key)
    experts = describe_experts(module)
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size) == (8, 64, 96)
    assert (experts.activation, experts.limit, experts.alpha) == wanted
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 64, generator=generator) * 6  # far enough for every limit
    ids = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(20)])
    weights = torch.rand(20, 3, generator=generator)
    eager = module(x, ids, weights)
    got = multiply(experts, x, ids, weights)
    assert (got - eager).abs().max() <= 1e-6 * eager.abs().max()
    if experts.limit is not None:
        assert max(F.linear(x, expert.up, expert.up_bias).abs().max() for expert in experts) > experts.limit


@pytest.mark.parametrize("index", [0, 2, 15], ids=["plain", "turns", "ungated"])
def test_nothing_is_copied(index: int) -> None:
    module = build(*MODELS[index][:4])
    storages = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    for expert in describe_experts(module):
        assert {part.untyped_storage().data_ptr() for part in expert if part is not None} <= storages
    with torch.no_grad():
        module.down_proj.zero_()
    assert all((expert.down == 0).all() for expert in describe_experts(module))


def test_llama4_lies_alike() -> None:
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    module = Llama4TextExperts(Llama4TextConfig(hidden_size=64, intermediate_size=96, num_local_experts=4))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    experts = describe_experts(module)
    x = torch.randn(4 * 5, 64)  # sorted by expert
    with torch.no_grad():
        wanted = module(x)
        got = multiply(experts, x, torch.arange(4).repeat_interleave(5)[:, None], torch.ones(20, 1))
        inner = F.linear(x[0], torch.cat([experts[0].gate, experts[0].up]))
        own = F.linear(experts.apply_gate(inner), experts[0].down)
        assert (own - got[0]).abs().max() <= 1e-6 * wanted.abs().max()
    assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_gates_without_known_source_are_the_modules_own() -> None:
    module = build(*MODELS[0][:4])
    module.__class__ = type("Other", (type(module),), {"_apply_gate": lambda _, both: both.chunk(2, -1)[1]})
    experts = describe_experts(module)
    assert experts.activation is None
    assert torch.equal(experts.apply_gate(torch.arange(4.0)), torch.tensor([2.0, 3.0]))
    module = build(*MODELS[0][:4])
    module.act_fn = torch.nn.Mish()
    assert describe_experts(module).activation is None


def test_indices_end() -> None:
    experts = describe_experts(build(*MODELS[0][:4]))
    assert len(list(experts)) == len(experts) == 8
    for index in (8, -1):
        with pytest.raises(IndexError, match=f"expert: got {index}, expected 0 to 7"):
            experts[index]


def test_other_modules_are_refused() -> None:
    with pytest.raises(ft.UnsupportedError, match="Linear is no experts module of transformers 5"):
        describe_experts(torch.nn.Linear(2, 2))
    module = build(*MODELS[0][:4])
    for weight, message in [
        (torch.zeros(8, 64, 96, dtype=torch.uint8), "down_proj: got torch.uint8 on cpu, expected float32"),
        (torch.zeros(8, 64, 96, device="meta"), "got torch.float32 on meta"),
        (torch.zeros(8, 64, 95), r"got \(8, 192, 64\) beside a down_proj of \(8, 64, 95\), expected \(8, 190, 64\)"),
    ]:
        module.down_proj = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ft.UnsupportedError, match=message):
            describe_experts(module)


def test_examples_run() -> None:
    assert doctest.testmod(farthing.hf.experts).failed == 0
