"""Routers: the choice and the weights of every family's own module, edge cases, statistics."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import math
import pickle
from collections.abc import Callable

import farthing as ft
import farthing.moe.router
import farthing.moe.statistics
import numpy as np
import pytest
import torch
from farthing.moe import RouterSpec, Routing, RoutingStatistics, families, route
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = 10_000

# Folder, configuration class, router class, and the sizes of a tiny model: 8, 16 or 32 experts.
TINY = [
    ("mixtral", "MixtralConfig", "MixtralTopKRouter", {"num_local_experts": 8}),
    ("minimax", "MiniMaxConfig", "MiniMaxTopKRouter", {"num_local_experts": 8}),
    ("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeTopKRouter", {"num_experts": 16}),
    ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeTopKRouter", {"num_experts": 16, "norm_topk_prob": True}),
    ("qwen3_next", "Qwen3NextConfig", "Qwen3NextTopKRouter", {"num_experts": 16}),
    ("qwen3_5_moe", "Qwen3_5MoeTextConfig", "Qwen3_5MoeTopKRouter", {"num_experts": 16}),
    ("qwen4_exp", "Qwen4ExpTextConfig", "Qwen4ExpTextTopKRouter", {"num_experts": 16}),
    ("olmoe", "OlmoeConfig", "OlmoeTopKRouter", {"num_experts": 8}),
    ("gpt_oss", "GptOssConfig", "GptOssTopKRouter", {"num_local_experts": 8}),
    ("granitemoe", "GraniteMoeConfig", "GraniteMoeTopKRouter", {"num_local_experts": 8}),
    ("granitemoeshared", "GraniteMoeSharedConfig", "GraniteMoeSharedTopKRouter", {"num_local_experts": 8}),
    ("granitemoehybrid", "GraniteMoeHybridConfig", "GraniteMoeHybridTopKRouter", {"num_local_experts": 8}),
    ("deepseek_v2", "DeepseekV2Config", "DeepseekV2TopkRouter", {"n_routed_experts": 16}),
    (
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2TopkRouter",
        {"n_routed_experts": 16, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    (
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3TopkRouter",
        {"n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 8, "topk_group": 4},
    ),
    ("deepseek_v3", "DeepseekV3Config", "DeepseekV3TopkRouter", {"n_routed_experts": 16, "norm_topk_prob": False}),
    ("deepseek_v32", "DeepseekV32Config", "DeepseekV32TopkRouter", {"n_routed_experts": 32}),
    ("glm4_moe", "Glm4MoeConfig", "Glm4MoeTopkRouter", {"n_routed_experts": 16}),
    ("glm_moe_dsa", "GlmMoeDsaConfig", "GlmMoeDsaTopkRouter", {"n_routed_experts": 16}),
    ("glm5_next", "Glm5NextTextConfig", "Glm5NextTextTopkRouter", {"n_routed_experts": 16}),
    ("hy_v3", "HYV3Config", "HYV3TopKRouter", {"num_experts": 16}),
    ("hy_v4", "HYV4Config", "HYV4TopkRouter", {"n_routed_experts": 16}),
    ("kimi_linear", "KimiLinearConfig", "KimiLinearTopkRouter", {"num_local_experts": 16}),
    ("minimax_m2", "MiniMaxM2Config", "MiniMaxM2TopKRouter", {"num_local_experts": 16}),
    ("lfm2_moe", "Lfm2MoeConfig", "Lfm2MoeTopKRouter", {"num_experts": 8}),
    (
        "lfm2_moe",
        "Lfm2MoeConfig",
        "Lfm2MoeTopKRouter",
        {"num_experts": 8, "use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
    ),
    ("mistral4", "Mistral4Config", "Mistral4TopkRouter", {"n_routed_experts": 16}),
    ("mistral4", "Mistral4Config", "Mistral4TopkRouter", {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}),
    ("deepseek_v4", "DeepseekV4Config", "DeepseekV4TopKRouter", {"n_routed_experts": 16}),
    ("deepseek_v4", "DeepseekV4Config", "DeepseekV4TopKRouter", {"n_routed_experts": 16, "scoring_func": "sigmoid"}),
    ("deepseek_v4", "DeepseekV4Config", "DeepseekV4HashRouter", {"n_routed_experts": 16}),
    ("llama4", "Llama4TextConfig", "Llama4Router", {"num_local_experts": 16, "num_experts_per_tok": 1}),
]
# Experts, experts per token and groups of released models.
REAL = [
    ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeTopKRouter", {"num_experts": 128, "num_experts_per_tok": 8}),
    ("qwen3_next", "Qwen3NextConfig", "Qwen3NextTopKRouter", {"num_experts": 512, "num_experts_per_tok": 10}),
    ("gpt_oss", "GptOssConfig", "GptOssTopKRouter", {"num_local_experts": 128, "num_experts_per_tok": 4}),
    (
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3TopkRouter",
        {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4},
    ),
    ("deepseek_v4", "DeepseekV4Config", "DeepseekV4TopKRouter", {"n_routed_experts": 256, "num_experts_per_tok": 6}),
    ("mistral4", "Mistral4Config", "Mistral4TopkRouter", {"n_routed_experts": 128, "num_experts_per_tok": 4}),
]


@dataclasses.dataclass
class Case:
    """A family's own router beside ours."""

    router: torch.nn.Module
    spec: RouterSpec
    config: object
    arguments: dict[str, torch.Tensor]

    def module(self, x: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, E) weights of the module, 0 where it chose nothing, and its logits."""
        kind = type(self.router).__name__
        bias = self.arguments.get("selection_bias")
        if kind == "Llama4Router":
            scores, logits = self.router(x)
            return scores, logits
        if kind == "DeepseekV4HashRouter":
            logits, weights, ids = self.router(x, tokens)
        elif kind in ("HYV3TopKRouter", "MiniMaxM2TopKRouter", "Lfm2MoeTopKRouter"):
            logits, weights, ids = self.router(x, bias)
        else:
            logits, weights, ids = self.router(x)
        return spread(ids, weights, self.spec.num_experts), logits

    def ours(self, x: torch.Tensor, tokens: torch.Tensor) -> Routing:
        """What `route` gives."""
        hashed = {"token_ids": tokens} if self.spec.hashed else {}
        return route(x, self.spec, self.router.weight, **self.arguments, **hashed)


def spread(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.zeros(len(ids), experts).scatter(1, ids, weights)


def build(folder: str, config_name: str, router_name: str, sizes: dict[str, object], hidden: int = 64) -> Case:
    home = f"transformers.models.{folder}"
    config_class = getattr(importlib.import_module(f"{home}.configuration_{folder}"), config_name)
    sizes = {"hidden_size": hidden, "num_experts_per_tok": 2, **sizes}
    config = config_class(**sizes)
    router = getattr(importlib.import_module(f"{home}.modeling_{folder}"), router_name)(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(len(router_name) + config.hidden_size)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layer = {"layer": 0 if "Hash" in router_name else 10} if folder == "deepseek_v4" else {}
    spec = RouterSpec.from_config(config, **layer)
    router.weight.copy_(randn(*router.weight.shape) * hidden**-0.5)
    arguments = {}
    if spec.logit_bias:
        arguments["logit_bias"] = router.bias.copy_(randn(spec.num_experts))
    if spec.selection_bias:
        bias = randn(spec.num_experts) * 0.1
        own = getattr(router, "e_score_correction_bias", None)
        arguments["selection_bias"] = bias if own is None else own.copy_(bias)
    if spec.hashed:
        rows = [torch.randperm(spec.num_experts, generator=generator)[: spec.top_k] for _ in range(len(router.tid2eid))]
        arguments["table"] = router.tid2eid.copy_(torch.stack(rows))
    return Case(router, spec, config, arguments)


def scores_of(spec: RouterSpec, logits: np.ndarray) -> np.ndarray:
    """(T, E) scores in double precision."""
    if spec.score == "softmax":
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)
    return {
        "identity": lambda x: x,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "sqrtsoftplus": lambda x: np.sqrt(np.logaddexp(0, x)),
    }[spec.score](logits)


def formula(
    spec: RouterSpec, logits: np.ndarray, selection_bias: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """§ the definition, in double precision: ids, weights, and how far each row's choice is from another one."""
    logits = logits.astype(np.float64)
    scores = scores_of(spec, logits)
    choice = scores + selection_bias
    margin = np.full(len(logits), np.inf)
    if spec.n_group > 1:
        best = -np.sort(-choice.reshape(len(logits), spec.n_group, spec.num_experts // spec.n_group), -1)
        group = best[..., 0] + best[..., 1] if spec.group_score == "top2" else best[..., 0]
        order = np.argsort(-group, -1, kind="stable")
        if spec.topk_group < spec.n_group:
            ranked = np.take_along_axis(group, order, -1)
            margin = ranked[:, spec.topk_group - 1] - ranked[:, spec.topk_group]
        keep = np.zeros(group.shape, bool)
        np.put_along_axis(keep, order[:, : spec.topk_group], True, -1)
        choice = np.where(keep.repeat(spec.num_experts // spec.n_group, -1), choice, spec.masked_fill)
    order = np.argsort(-choice, -1, kind="stable")
    ids = order[:, : spec.top_k]
    if spec.top_k < spec.num_experts:
        ranked = np.take_along_axis(choice, order, -1)
        margin = np.minimum(margin, ranked[:, spec.top_k - 1] - ranked[:, spec.top_k])
    weights = np.take_along_axis(scores, ids, -1)
    weights = scores_of(dataclasses.replace(spec, score=spec.post), weights)
    if spec.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + spec.norm_eps)
    return ids, weights * spec.routed_scaling_factor, margin


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and token ids of 10,000 rows."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, case.config.hidden_size, generator=generator)
    return x, torch.randint(0, getattr(case.config, "vocab_size", 10), (ROWS,), generator=generator)


def compare(case: Case, wanted: torch.Tensor, logits: torch.Tensor, got: Routing, bound: float = 1e-6) -> None:
    spec = case.spec
    assert got.ids.dtype == torch.int64
    assert got.weights.dtype == torch.float32
    assert got.ids.shape == got.weights.shape == (ROWS, spec.top_k)
    assert got.ids.sort(-1).values.diff(dim=-1).gt(0).all()
    chosen = spread(got.ids, torch.ones(ROWS, spec.top_k), spec.num_experts) > 0
    other = (chosen != (wanted != 0)).any(-1)
    if not spec.hashed:
        # Products are summed in another order: a row whose choice hangs on the last bit may differ.
        bias = case.arguments.get("selection_bias", torch.zeros(1)).numpy()
        margin = formula(spec, logits.numpy(), bias)[2]
        assert (margin[other.numpy()] < 1e-6).all()
    assert other.sum() <= (0 if spec.hashed else 3)
    ours = spread(got.ids, got.weights, spec.num_experts)
    assert (ours - wanted)[~other].abs().max() <= bound


def name_of(case: object) -> str:
    return case if isinstance(case, str) else ""


@pytest.mark.parametrize(("folder", "config", "router", "sizes"), TINY + REAL, ids=name_of)
def test_routers_choose_and_weigh_as_the_module(folder: str, config: str, router: str, sizes: dict) -> None:
    case = build(folder, config, router, sizes)
    x, tokens = inputs(case)
    with torch.no_grad():
        compare(case, *case.module(x, tokens), case.ours(x, tokens))


@pytest.mark.parametrize(("folder", "config", "router", "sizes"), REAL, ids=name_of)
def test_wide_rows_choose_and_weigh_as_the_module(folder: str, config: str, router: str, sizes: dict) -> None:
    """With 2048 inputs the two orders of summation show in the weights; from the same logits they are the same."""
    case = build(folder, config, router, sizes, hidden=2048)
    x, tokens = inputs(case)
    with torch.no_grad():
        wanted, logits = case.module(x, tokens)
        compare(case, wanted, logits, case.ours(x, tokens), bound=1e-5)
    # The module's logits hold its bias already.
    spec = dataclasses.replace(case.spec, logit_bias=False)
    bias = {name: value for name, value in case.arguments.items() if name == "selection_bias"}
    compare(case, wanted, logits, route(logits, spec, **bias))


@pytest.mark.parametrize(("folder", "config"), sorted({case[:2] for case in TINY}), ids=name_of)
def test_defaults_are_those_of_the_configuration_class(folder: str, config: str) -> None:
    cls = getattr(importlib.import_module(f"transformers.models.{folder}.configuration_{folder}"), config)
    missing = {"num_experts_per_tok": 6} if folder == "deepseek_v2" else {}
    layer = {"layer": 5} if folder == "deepseek_v4" else {}
    bare = RouterSpec.from_config({"model_type": cls.model_type, **missing}, **layer)
    assert RouterSpec.from_config(cls(**missing), **layer) == bare
    assert cls.model_type in families.MODEL_TYPES


def test_configurations_of_several_parts_and_other_names() -> None:
    text = {"model_type": "kimi_k2", "n_routed_experts": 384, "n_group": 1, "topk_group": 1}
    spec = RouterSpec.from_config({"model_type": "kimi_k25", "text_config": text})
    assert (spec.num_experts, spec.top_k, spec.n_group, spec.selection_bias) == (384, 8, 1, True)
    kimi = {"model_type": "kimi_linear", "num_experts": 256, "num_experts_per_token": 8, "num_expert_group": 1}
    assert not RouterSpec.from_config(kimi | {"moe_renormalize": False}).norm_topk_prob
    hashed = {"model_type": "deepseek_v4", "num_hash_layers": 2, "num_hidden_layers": 4}
    assert [RouterSpec.from_config(hashed, layer).hashed for layer in range(4)] == [True, True, False, False]
    for layer, message in ((None, "layer: got None"), (4, "layer: got 4, expected 0 to 3")):
        with pytest.raises(ValueError, match=message):
            RouterSpec.from_config(hashed, layer)
    with pytest.raises(ft.UnsupportedError, match="model_type='llama' has no known router; known are mixtral"):
        RouterSpec.from_config({"model_type": "llama"})
    with pytest.raises(ValueError, match="got no num_experts_per_tok"):
        RouterSpec.from_config({"model_type": "deepseek_v2"})
    with pytest.raises(ft.UnsupportedError, match="topk_method='noaux_tc'"):
        RouterSpec.from_config({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "topk_method": "noaux_tc"})


@st.composite
def specs(draw: Callable) -> RouterSpec:
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    each = draw(st.integers(2, 40))
    kept = draw(st.integers(1, groups))
    return RouterSpec(
        num_experts=groups * each,
        top_k=draw(st.integers(1, min(kept * each, 12))),
        score=draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus", "identity"])),
        n_group=groups,
        topk_group=kept,
        group_score=draw(st.sampled_from(["top2", "max"])),
        post=draw(st.sampled_from(["identity", "softmax", "sigmoid"])),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        selection_bias=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(specs(), st.integers(0, 2**32 - 1), st.integers(0, 9), st.booleans())
def test_any_spec_follows_the_formula(spec: RouterSpec, seed: int, rows: int, norm: bool) -> None:
    # Sums of raw logits may vanish, so only other weights are normalised.
    norm &= spec.score != "identity" or spec.post != "identity"
    spec = dataclasses.replace(spec, norm_topk_prob=norm, norm_eps=1e-20)
    random = np.random.default_rng(seed)
    logits = random.standard_normal((rows, spec.num_experts)).astype(np.float32)
    bias = random.standard_normal(spec.num_experts).astype(np.float32) if spec.selection_bias else None
    got = route(logits, spec, selection_bias=bias)
    ids, weights, margin = formula(spec, logits, 0.0 if bias is None else bias)
    clear = margin > 1e-6
    ours = spread(torch.from_numpy(got.ids), torch.from_numpy(got.weights), spec.num_experts).numpy()
    wanted = np.zeros(ours.shape)
    np.put_along_axis(wanted, ids, weights, -1)
    np.testing.assert_allclose(ours[clear], wanted[clear], rtol=2e-6, atol=2e-6)
    if norm:
        np.testing.assert_allclose(got.weights.sum(-1), spec.routed_scaling_factor, rtol=1e-6)
    assert (np.diff(np.sort(got.ids, -1), axis=-1) > 0).all()
    assert ((got.selected_mass > 0) & (got.selected_mass < 1 + 1e-6)).all()
    for row in range(rows):
        alone = route(logits[row : row + 1], spec, selection_bias=bias)
        assert np.array_equal(alone.ids[0], got.ids[row])
        assert np.array_equal(alone.weights[0], got.weights[row])


DEEPSEEK = RouterSpec(
    32, 4, "sigmoid", 8, 4, norm_topk_prob=True, norm_eps=1e-20, routed_scaling_factor=2.5, selection_bias=True
)


@pytest.mark.parametrize("spec", [RouterSpec(8, 2), RouterSpec(8, 8, norm_topk_prob=True), DEEPSEEK], ids=repr)
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("value", [0.0, -3.0, math.nan, math.inf, -math.inf, 1e30])
def test_equal_logits_give_distinct_experts(spec: RouterSpec, rows: int, value: float) -> None:
    bias = {"selection_bias": np.zeros(32, np.float32)} if spec.selection_bias else {}
    routing = route(np.full((rows, spec.num_experts), value, np.float32), spec, **bias)
    # The lower ids, and of every kept group as many as are wanted.
    assert (routing.ids == np.arange(spec.top_k)).all()
    if math.isfinite(value):
        share = 2.5 / 4 if spec.selection_bias else 1 / 8
        np.testing.assert_allclose(routing.weights, share, rtol=1e-6)


def test_nan_is_seen_and_never_preferred() -> None:
    logits = np.array([[0.0, math.nan, 2.0, 1.0]], np.float32)
    routing = route(logits, RouterSpec(4, 2))
    assert np.isnan(routing.weights).all()
    routing = route(logits, RouterSpec(4, 3, "sigmoid"))
    assert routing.ids.tolist() == [[2, 3, 0]]
    assert np.isfinite(routing.weights).all()
    routing = route(logits, RouterSpec(4, 4, "sigmoid"))
    assert routing.ids.tolist() == [[2, 3, 0, 1]]
    assert np.isnan(routing.weights[0, 3])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_one_expert_takes_all_and_another_nothing(name: str) -> None:
    case = build(*next(case for case in TINY if case[0] == name))
    with torch.no_grad():
        if "selection_bias" in case.arguments:
            case.arguments["selection_bias"][3] = 1.0
        case.router.weight[3] = 100.0
        case.router.weight[5] = -100.0
    x = torch.rand(50, 64, generator=torch.Generator().manual_seed(0)) + 0.1
    wanted, _ = case.module(x, x)
    got = case.ours(x, x)
    assert (got.ids[:, 0] == 3).all()
    loads = got.statistics().tokens_per_expert
    assert loads[3] == 50
    assert loads[5] == 0
    spec = case.spec
    torch.testing.assert_close(spread(got.ids, got.weights, spec.num_experts), wanted, rtol=0, atol=1e-6)


def test_any_array_of_the_same_numbers_routes_the_same() -> None:
    case = build(*TINY[0])
    x = torch.randn(7, 64)
    first = case.ours(x, x)
    packed = ft.quantize(case.router.weight, "f32")
    strided = torch.randn(64, 7).T.copy_(x)
    wide = torch.randn(7, 128)[:, ::2].copy_(x)
    with torch.no_grad():
        for other in (strided, wide, x.clone()):
            assert torch.equal(case.ours(other, x).ids, first.ids)
            assert torch.equal(case.ours(other, x).weights, first.weights)
        again = route(x, case.spec, packed)
        assert torch.equal(again.weights, first.weights)
        arrays = route(np.asfortranarray(x.numpy()), case.spec, case.router.weight.numpy())
    assert isinstance(arrays.ids, np.ndarray)
    assert np.array_equal(arrays.weights, first.weights.numpy())
    # Narrow types are widened exactly, weights as they are stored.
    half, weight = x.bfloat16(), case.router.weight.bfloat16()
    low = route(half, case.spec, weight)
    assert low.weights.dtype == torch.float32
    assert torch.equal(low.weights, route(half.float(), case.spec, weight.float()).weights)


def test_many_rows_on_many_threads_are_single_rows() -> None:
    logits = np.random.default_rng(0).standard_normal((5000, 128)).astype(np.float32)
    spec = RouterSpec(128, 8, norm_topk_prob=True)
    routing = route(logits, spec)
    for row in (0, 2499, 2500, 4999):
        alone = route(logits[row : row + 1], spec)
        assert np.array_equal(alone.weights[0], routing.weights[row])
        assert np.array_equal(alone.ids[0], routing.ids[row])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 9}, "top_k: got 9, expected 1 to 8 experts"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"num_experts": -1}, "num_experts: got -1"),
        ({"top_k": 2.5}, "top_k: got 2.5, expected an integer"),
        ({"n_group": 3}, "n_group: got 3, expected a divisor of 8 experts"),
        ({"n_group": 2, "topk_group": 3}, "topk_group: got 3, expected 1 to 2 groups"),
        ({"n_group": 4, "topk_group": 1, "top_k": 3}, "top_k: got 3, expected 1 to 2 experts in the kept groups"),
        ({"n_group": 8}, "groups of at least 2 experts"),
        ({"score": "relu"}, 'score: got "relu", expected one of identity, softmax, sigmoid, sqrtsoftplus'),
        ({"score": None}, "score: got None, expected a word"),
        ({"group_score": "mean"}, 'group_score: got "mean", expected one of top2, max'),
        ({"masked_fill": 1.0, "n_group": 2}, "masked_fill: got 1"),
        ({"norm_eps": -1.0, "norm_topk_prob": True}, "norm_eps: got -1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob: got 1, expected True or False"),
        ({"routed_scaling_factor": math.inf}, "routed_scaling_factor: got inf"),
        ({"routed_scaling_factor": "2"}, "routed_scaling_factor: got '2', expected a number"),
        ({"hashed": True, "selection_bias": True}, "hashed: got True"),
    ],
)
def test_impossible_specs_are_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterSpec(**{"num_experts": 8, "top_k": 2, **arguments})


def test_arguments_that_do_not_fit_are_errors() -> None:
    x = np.zeros((3, 8), np.float32)
    hashed, table = RouterSpec(8, 2, hashed=True), np.array([[0, 1], [2, 8]])
    biased = RouterSpec(8, 2, selection_bias=True)
    tokens = np.zeros(3, np.int64)
    for arguments, error, message in [
        ({"spec": RouterSpec(9, 2)}, ValueError, r"x: got shape \(3, 8\), expected \(T, 9\), 9 logits"),
        ({"x": x[0]}, ValueError, r"x: got shape \(8,\), expected \(T, 8\)"),
        ({"x": x.astype(int)}, TypeError, "x: got int64, expected float32 or float16"),
        ({"spec": "mixtral"}, ValueError, "spec: got 'mixtral', expected a RouterSpec"),
        ({"weight": np.zeros((8, 9), np.float32)}, ValueError, r"x: got shape \(3, 8\), expected \(T, 9\), 9 inputs"),
        ({"weight": np.zeros((7, 8), np.float32)}, ValueError, "weight: got 7 rows, expected 8 rows, one for each"),
        ({"weight": ft.quantize(np.ones((8, 8), np.float32), "int8")}, ValueError, "routers are not quantised"),
        ({"selection_bias": np.zeros(8, np.float32)}, ValueError, "selection_bias: got an array, expected None"),
        ({"spec": biased}, ValueError, "selection_bias: got None, expected an array"),
        ({"spec": biased, "selection_bias": np.zeros(7, np.float32)}, ValueError, r"got shape \(7,\), expected \(8,\)"),
        ({"spec": hashed}, ValueError, "table: got None"),
        ({"spec": hashed, "table": table}, ValueError, "token_ids: got None"),
        ({"spec": hashed, "table": table, "token_ids": tokens[1:]}, ValueError, "token_ids: got 2, expected 3"),
        ({"spec": hashed, "table": table, "token_ids": tokens + 1}, ValueError, "table: got expert 8 for token 1"),
        ({"spec": hashed, "table": table, "token_ids": tokens - 1}, ValueError, "token_ids: got -1, expected 0 or"),
        ({"spec": hashed, "table": table, "token_ids": tokens + 2}, ValueError, "below the 2 rows of the table"),
        ({"spec": hashed, "table": table[:, :1], "token_ids": tokens}, ValueError, r"table: got shape \(2, 1\)"),
        ({"spec": hashed, "table": table * 1.0, "token_ids": tokens}, ValueError, "table: got float64 of shape"),
    ]:
        with pytest.raises(error, match=message):
            route(**{"x": x, "spec": RouterSpec(8, 2), **arguments})
    with pytest.raises(ft.UnsupportedError, match="requires a gradient"):
        route(torch.zeros(1, 8, requires_grad=True), RouterSpec(8, 2))


def test_specs_are_values() -> None:
    assert pickle.loads(pickle.dumps(DEEPSEEK)) == DEEPSEEK
    assert dataclasses.replace(DEEPSEEK, n_group=4).n_group == 4
    assert hash(RouterSpec(8, 2)) == hash(RouterSpec(8, 2))
    assert repr(RouterSpec(8, 2, "sigmoid", hashed=True)) == (
        "RouterSpec(num_experts=8, top_k=2, score='sigmoid', hashed=True)"
    )
    assert RouterSpec(**dataclasses.asdict(DEEPSEEK)) == DEEPSEEK


def test_statistics_are_their_definitions() -> None:
    routing = route(np.random.default_rng(1).standard_normal((500, 16)).astype(np.float32), RouterSpec(16, 3))
    statistics = routing.statistics()
    loads = np.bincount(routing.ids.ravel(), minlength=16)
    shares = loads / loads.sum()
    assert np.array_equal(statistics.tokens_per_expert, loads)
    assert (statistics.tokens, statistics.distinct, statistics.skipped) == (500, 16, 0)
    assert math.isclose(statistics.entropy, -(shares * np.log(shares)).sum())
    assert math.isclose(statistics.max_over_mean, loads.max() / loads.mean())
    assert math.isclose(statistics.coefficient_of_variation, loads.std() / loads.mean())
    assert math.isclose(statistics.mean_mass, routing.weights.sum(-1).mean(), rel_tol=1e-5)
    both = statistics.record(torch.tensor([[15, 15, 0], [1, 2, 3]]))
    assert both is statistics
    assert statistics.tokens == 502
    assert statistics.tokens_per_expert[15] == loads[15] + 2


def test_sentinels_are_skipped_and_counted() -> None:
    statistics = RoutingStatistics(4).record(np.array([[-1, 0], [4, 3], [2**62, 3]], np.int64))
    assert statistics.tokens_per_expert.tolist() == [1, 0, 0, 2]
    assert statistics.skipped == 3
    assert "ids of no expert" in str(statistics)
    assert statistics.mean_mass is None
    assert repr(statistics) == "RoutingStatistics(4 experts, 3 tokens, 2 used)"
    assert statistics._repr_html_().startswith("<table>")


def test_wrong_statistics_are_errors() -> None:
    for arguments, message in [
        ((np.zeros((2, 2)),), "ids: got float64, expected integers"),
        ((np.zeros(2, np.int64),), r"ids: got shape \(2,\), expected \(T, K\)"),
        ((np.zeros((2, 2), np.int64), np.zeros(3, np.float32)), r"selected_mass: got shape \(3,\), expected \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            RoutingStatistics(4).record(*arguments)
    with pytest.raises(ValueError, match="num_experts: got 0"):
        RoutingStatistics(0)


def test_statistics_can_be_drawn() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    axes = RoutingStatistics(3).record(np.array([[2, 2], [2, 0]])).plot()
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([2.25, 0.75, 0.0])
    assert RoutingStatistics(3).plot(axes) is axes
    pyplot.close("all")


@pytest.mark.parametrize("module", [farthing.moe.router, farthing.moe.statistics])
def test_examples_run(module: object) -> None:
    assert doctest.testmod(module).failed == 0
