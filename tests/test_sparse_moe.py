"""The trainable mixture of experts: the router of `route`, the losses of transformers, and split networks."""

from __future__ import annotations

import copy
import doctest
import io
import warnings
from importlib import import_module

import farthing as ft
import farthing.nn
import numpy as np
import pytest
import torch
from farthing.moe import PackedExperts, RouterSpec, balanced_clusters, route
from farthing.nn import FloatExperts, SparseMoe, load_balancing_loss, router_z_loss, routing
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

SPECS = [
    RouterSpec(8, 2),
    RouterSpec(8, 3, norm_topk_prob=True, norm_eps=1e-20, routed_scaling_factor=2.5),
    RouterSpec(8, 2, score="identity", post="softmax", logit_bias=True),
    RouterSpec(8, 2, score="sigmoid", n_group=4, topk_group=2, selection_bias=True, norm_topk_prob=True),
    RouterSpec(8, 2, score="sigmoid", n_group=2, topk_group=1, group_score="max", masked_fill=0.0),
    RouterSpec(8, 4, score="sqrtsoftplus", norm_topk_prob=True),
    RouterSpec(8, 1, score="identity", post="sigmoid", apply_to_input=True),
    RouterSpec(8, 8, norm_topk_prob=True),
]


def layer_of(spec: RouterSpec, **options: object) -> SparseMoe:
    torch.manual_seed(0)
    layer = SparseMoe(48, 40, spec, **options)
    with torch.no_grad():
        layer.weight.normal_()
        if layer.bias is not None:
            layer.bias.normal_()
        if layer.selection_bias is not None:
            layer.selection_bias.normal_(0, 0.1)
    return layer


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_any_router_chooses_as_route_does(spec: RouterSpec) -> None:
    layer = layer_of(spec)
    x = torch.randn(500, 48)
    y = layer(x)
    got = layer.routing
    biases = {"selection_bias": layer.selection_bias} if spec.selection_bias else {}
    if spec.logit_bias:
        biases["logit_bias"] = layer.bias.detach()
    wanted = route(x, spec, layer.weight.detach(), **biases)
    assert torch.equal(got.ids, wanted.ids)
    torch.testing.assert_close(got.weights.detach(), wanted.weights, rtol=1e-4, atol=1e-6)
    assert layer.statistics().tokens == 500
    # The definition
    out = torch.zeros_like(x)
    for row, slot in np.ndindex(*got.ids.shape):
        expert, weight = got.ids[row, slot], got.weights[row, slot]
        given = x[row] * weight if spec.apply_to_input else x[row]
        gate, up = (layer.experts.gate_up_proj[expert] @ given).chunk(2)
        one = layer.experts.down_proj[expert] @ (F.silu(gate) * up)
        out[row] += one if spec.apply_to_input else one * weight
    torch.testing.assert_close(y, out, rtol=1e-4, atol=1e-5)
    if spec.top_k < 8:
        (y.square().mean() + layer.auxiliary_loss()).backward()
        assert layer.weight.grad.abs().sum() > 0
        assert layer.experts.down_proj.grad.abs().sum() > 0


def test_equal_logits_go_to_lower_ids_as_in_route() -> None:
    for spec in (RouterSpec(8, 3), RouterSpec(8, 3, n_group=4, topk_group=2)):
        ids, weights = routing.choose(torch.zeros(2, 8), spec)
        wanted = route(torch.zeros(2, 8), spec)
        assert torch.equal(ids, wanted.ids)
        torch.testing.assert_close(weights, wanted.weights)


def test_hashed_routers_look_up() -> None:
    spec = RouterSpec(8, 2, score="sqrtsoftplus", hashed=True, norm_topk_prob=True)
    table = torch.stack([torch.randperm(8)[:2] for _ in range(30)])
    layer = layer_of(spec, table=table)
    x, tokens = torch.randn(2, 6, 48), torch.randint(0, 30, (2, 6))
    layer(x, tokens)
    wanted = route(x.view(12, 48), spec, layer.weight.detach(), table=table, token_ids=tokens.view(-1))
    assert torch.equal(layer.routing.ids, wanted.ids)
    torch.testing.assert_close(layer.routing.weights.detach(), wanted.weights, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="token_ids: got None"):
        layer(x)
    with pytest.raises(ValueError, match="table: got None"):
        SparseMoe(48, 40, spec)
    with pytest.raises(ValueError, match="table: got a tensor, expected None"):
        SparseMoe(48, 40, RouterSpec(8, 2), table=table)
    with pytest.raises(ValueError, match=r"table: got shape \(30, 1\), expected \(V, 2\)"):
        SparseMoe(48, 40, spec, table=table[:, :1])


def test_losses_are_those_of_transformers_and_the_papers() -> None:
    logits = torch.randn(100, 8, requires_grad=True)
    ids = logits.topk(3).indices
    ours = load_balancing_loss(logits, ids)
    theirs = load_balancing_loss_func((logits,), 8, 3)
    torch.testing.assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, logits)[0])
    # Uniform loads and shares: K; everything on one: E.
    even = torch.arange(8).repeat(2)[:, None]
    for score in ("softmax", "sigmoid", "sqrtsoftplus", "identity"):
        assert load_balancing_loss(torch.zeros(16, 8), even, score).item() == pytest.approx(1.0)
    one = torch.full((16, 8), -40.0).index_fill(1, torch.tensor([3]), 40.0)
    assert load_balancing_loss(one, torch.full((16, 1), 3)).item() == pytest.approx(8.0)
    assert router_z_loss(torch.zeros(5, 8)).item() == pytest.approx(np.log(8) ** 2)


def test_a_router_learns_to_spread() -> None:
    layer = layer_of(RouterSpec(8, 2, norm_topk_prob=True))
    with torch.no_grad():
        layer.weight[0] += 1.0
    x = torch.randn(256, 48) + 0.5
    layer(x)
    before = layer.statistics().coefficient_of_variation
    optimiser = torch.optim.Adam(layer.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        layer(x)
        layer.auxiliary_loss(balance=1.0).backward()
        optimiser.step()
    assert layer.statistics().coefficient_of_variation < 0.5 * before


def test_packed_experts_let_the_router_learn() -> None:
    layer = layer_of(RouterSpec(8, 2, norm_topk_prob=True))
    x = torch.randn(64, 48)
    exact = layer(x).detach()
    assert layer.pack("int8", group=16, activations="f32") is layer
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    y = layer(x)
    assert (y - exact).norm() < 0.02 * exact.norm()
    target = torch.randn(64, 48)
    optimiser = torch.optim.Adam(layer.parameters(), 0.05)
    first = F.mse_loss(y, target).item()
    for _ in range(30):
        optimiser.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimiser.step()
    assert loss.item() < first
    with pytest.raises(ValueError, match="experts: got packed ones"):
        layer.pack()


def test_layers_over_packed_experts() -> None:
    gate_up, down = torch.randn(4, 64, 48) * 0.1, torch.randn(4, 48, 32) * 0.1
    packed = PackedExperts.from_arrays(gate_up, down, "int4", group=16)
    layer = SparseMoe.from_packed(packed, RouterSpec(4, 2))
    x = torch.randn(3, 5, 48)
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(y.view(15, 48), packed(x.view(15, 48), layer.routing.ids, layer.routing.weights))
    with pytest.raises(ValueError, match="packed: got 4 experts, expected 8"):
        SparseMoe.from_packed(packed, RouterSpec(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(compiled(x), y)


def test_layers_are_copied_saved_and_loaded() -> None:
    layer = layer_of(RouterSpec(8, 2, norm_topk_prob=True))
    x = torch.randn(6, 48)
    with pytest.raises(RuntimeError, match="got no call yet"):
        layer.statistics()
    for _ in range(2):  # with parameters, then packed
        y = layer(x)
        other = copy.deepcopy(layer)
        assert other.routing is None
        assert torch.equal(other(x), y)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        fresh = SparseMoe(48, 40, layer.spec)
        if not isinstance(layer.experts, FloatExperts):
            fresh.pack("int8", group=16)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(fresh(x), y)
        if isinstance(layer.experts, FloatExperts):
            layer.pack("int4", group=16)
    half = layer_of(RouterSpec(8, 2)).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


def dense(hidden: int = 48, inner: int = 96) -> LlamaMLP:
    torch.manual_seed(3)
    return LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_attention_heads=4)).requires_grad_(
        False
    )


@pytest.mark.parametrize("num_experts", [1, 4, 12, 96])
def test_all_experts_of_a_split_network_are_the_network(num_experts: int) -> None:
    """The perfect test."""
    mlp = dense()
    x = torch.randn(30, 48)
    layer = SparseMoe.from_dense(mlp, num_experts, num_experts)
    ids = torch.arange(num_experts).expand(30, -1)
    ones = torch.ones(30, num_experts)
    torch.testing.assert_close(layer.experts(x, ids, ones), mlp(x), rtol=0, atol=1e-5)
    packed = PackedExperts.from_arrays(layer.experts.gate_up_proj.detach(), layer.experts.down_proj.detach(), "f32")
    torch.testing.assert_close(packed(x, ids, ones), mlp(x), rtol=0, atol=1e-5)
    with torch.no_grad():
        layer.weight.zero_()  # the default router's weights sum to K: equal, they are 1
    torch.testing.assert_close(layer(x), mlp(x), rtol=0, atol=1e-5)


def test_split_networks_keep_what_matters() -> None:
    """Neurons that wake together fall into one expert, and the router finds it: far better than a random split."""
    mlp = dense(inner=128)
    with torch.no_grad():
        directions = torch.randn(8, 48).repeat_interleave(16, 0)
        mlp.gate_proj.weight.copy_((directions + 0.1 * torch.randn(128, 48))[torch.randperm(128)])
    x = torch.randn(200, 48)
    layer = SparseMoe.from_dense(mlp, 8, 4)
    ids = layer.weight.detach()
    labels = torch.cdist(mlp.gate_proj.weight, ids).argmin(-1)
    assert torch.bincount(labels, minlength=8).tolist() == [16] * 8
    layer(x)
    kept = layer.experts(x, layer.routing.ids, torch.ones(200, 4))
    random_ids = torch.stack([torch.randperm(8)[:4] for _ in range(200)])
    random = layer.experts(x, random_ids, torch.ones(200, 4))
    assert (kept - mlp(x)).norm() < 0.5 * (random - mlp(x)).norm()


def test_networks_that_can_not_be_split_are_refused() -> None:
    with pytest.raises(ft.UnsupportedError, match="Linear: expected linear gate_proj"):
        SparseMoe.from_dense(torch.nn.Linear(4, 4), 2, 1)
    mlp = dense()
    with pytest.raises(ValueError, match="count: got 5, expected a divisor of 96 rows"):
        SparseMoe.from_dense(mlp, 5, 1)
    with pytest.raises(ValueError, match="expected 4 experts and top_k 2"):
        SparseMoe.from_dense(mlp, 4, 2, spec=RouterSpec(4, 1))
    mlp.act_fn = torch.nn.Mish()
    with pytest.raises(ft.UnsupportedError, match="LlamaMLP"):
        SparseMoe.from_dense(mlp, 4, 2)
    with pytest.raises(ValueError, match="activation: got 'relu'"):
        SparseMoe(4, 4, RouterSpec(2, 1), activation="relu")


def test_clusters_are_balanced_stable_and_near() -> None:
    from sklearn.cluster import KMeans

    random = np.random.default_rng(0)
    centres = random.standard_normal((6, 10)) * 4
    rows = (centres.repeat(20, 0) + random.standard_normal((120, 10)))[random.permutation(120)]
    labels = balanced_clusters(rows, 6, seed=1)
    assert np.bincount(labels).tolist() == [20] * 6
    assert np.array_equal(labels, balanced_clusters(rows, 6, seed=1))
    spread = sum(((rows[labels == c] - rows[labels == c].mean(0)) ** 2).sum() for c in range(6))
    free = KMeans(6, n_init=10, random_state=0).fit(rows).inertia_  # not balanced by force, so at most as far
    assert spread <= 1.05 * free
    # Whatever the rows are, loads are equal.
    for rows in (np.zeros((12, 3)), np.ones((12, 3)).cumsum(0) ** 3, random.standard_normal((12, 3))):
        for count in (1, 2, 3, 12):
            assert np.bincount(balanced_clusters(rows, count), minlength=count).tolist() == [12 // count] * count
    for rows, count in ((np.zeros(4), 2), (np.full((4, 1), np.nan), 2), (np.zeros((4, 1)), 3), (np.zeros((0, 1)), 1)):
        with pytest.raises(ValueError, match="got"):
            balanced_clusters(rows, count)


def test_examples_run() -> None:
    for name in ("farthing.nn.sparse_moe", "farthing.nn.routing", "farthing.moe.clusters"):
        assert doctest.testmod(import_module(name)).failed == 0
