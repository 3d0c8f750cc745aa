"""Torch modules with packed weights: the same function traced, differentiated, saved and loaded."""

from __future__ import annotations

import copy
import doctest
import io
import warnings

import farthing as ft
import farthing.nn
import pytest
import torch
from farthing._core import share_threads
from farthing.nn import BitLinear, Linear, bit_linear, linear, ops
from torch.library import opcheck
from torch.nn import functional as F


def pair(bias: bool = True, **options: object) -> tuple[torch.nn.Linear, Linear]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(80, 48, bias=bias)
    return layer, Linear.from_linear(layer, **{"weights": "int4", "group": 32, **options})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", ["int4", "int8", "bf16"])
def test_linear_stands_in_for_torchs(weights: str, bias: bool) -> None:
    layer, packed = pair(bias, weights=weights)
    x = torch.randn(4, 3, 80)
    wanted = F.linear(x, packed.weight, layer.bias)
    torch.testing.assert_close(packed(x), wanted, rtol=2e-4, atol=2e-4)
    with torch.no_grad():
        assert torch.equal(packed(x), packed(x.clone().requires_grad_()))
    assert (packed.in_features, packed.out_features) == (80, 48)
    assert [name for name, _ in packed.named_parameters()] == (["bias"] if bias else [])
    assert weights in repr(packed)


def test_gradients_are_those_of_the_dequantised_layer() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _, packed = pair()
        x = torch.randn(5, 80, dtype=dtype, requires_grad=True)
        packed(x).square().sum().backward()
        y, bias = x.detach().clone().requires_grad_(), packed.bias.detach().clone().requires_grad_()
        F.linear(y.float(), packed.weight, bias).to(dtype).square().sum().backward()
        bound = 2e-2 if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(x.grad, y.grad, rtol=bound, atol=bound)
        torch.testing.assert_close(packed.bias.grad, bias.grad, rtol=bound, atol=bound)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("shape", [(3, 80), (0, 80), (2, 3, 80), (80,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_operators_pass_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _, packed = pair()
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    strided = torch.randn(*shape[:-1], 160, dtype=dtype)[..., ::2]
    gradient = torch.randn(*shape[:-1], 48, dtype=dtype, requires_grad=True)
    for given in (x, strided):
        opcheck(ops.linear, (given, packed.bias, packed._number, 48))
        opcheck(ops.linear, (given, None, packed._number, 48))
    opcheck(ops.linear_gradient, (gradient, packed._number, 80))


def test_compiles_without_a_break() -> None:
    """Inductor, one graph, forward and backward."""
    _, first = pair()
    model = torch.nn.Sequential(first, torch.nn.SiLU(), Linear.from_linear(torch.nn.Linear(48, 8), group=16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(model, fullgraph=True)
        x = torch.randn(3, 80, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        compiled_gradient, x.grad = x.grad, None
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), y)
    torch.testing.assert_close(model(x), y)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, compiled_gradient)


@pytest.mark.parametrize(("weights", "symmetric"), [("int4", True), ("int4", False), ("int8", True), ("f16", True)])
def test_state_dict_round_trips(weights: str, symmetric: bool) -> None:
    _, packed = pair(weights=weights, symmetric=symmetric, activations="a8" if weights == "int4" else "auto")
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(packed).state_dict(), file)
    file.seek(0)
    loaded = torch.nn.Sequential(Linear(80, 48))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 80)
    assert torch.equal(loaded(x), packed(x))
    assert repr(loaded[0]) == repr(packed)
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), packed(x))


def test_the_state_of_a_torch_layer_loads() -> None:
    layer, packed = pair()
    other = Linear(80, 48, weights="int4", group=32)
    with pytest.raises(RuntimeError, match="no weights yet"):
        other(torch.randn(80))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 80)
    assert torch.equal(other(x), packed(x))


def test_wrong_states_are_errors() -> None:
    _, packed = pair()
    with pytest.raises(RuntimeError, match=r"got shape \(48, 80\), expected \(40, 80\)"):
        Linear(80, 40).load_state_dict(packed.state_dict())
    state = packed.state_dict()
    with pytest.raises(RuntimeError, match="codes"):
        Linear(80, 48).load_state_dict(state | {"codes": state["codes"][:, 1:]})
    with pytest.raises(RuntimeError, match="words"):
        Linear(80, 48).load_state_dict({"bias": state["bias"]})


def bit_pair() -> tuple[BitLinear, torch.Tensor]:
    torch.manual_seed(1)
    layer = BitLinear(96, 40)
    with torch.no_grad():
        layer.weight.mul_(0.3)
    return layer, torch.randn(5, 96) * torch.logspace(-2, 2, 5).unsqueeze(1)


def test_bit_linear_is_transformers_online_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    from transformers.integrations.bitnet import AutoBitLinear

    layer, x = bit_pair()
    reference = AutoBitLinear(96, 40, online_quant=True)
    reference.load_state_dict(layer.state_dict())
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = layer(x), reference(y)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(layer.weight.grad, reference.weight.grad)
    assert torch.equal(layer.bias.grad, reference.bias.grad)


def test_bit_linear_computes_with_integers_in_evaluation() -> None:
    layer, x = bit_pair()
    trained = layer(x)
    with torch.no_grad():
        evaluated = layer.eval()(x)
        torch.testing.assert_close(evaluated, trained, rtol=2e-6, atol=2e-6 * float(trained.abs().max()))
        assert (layer(x.bfloat16()).float() - trained).norm() < 0.02 * trained.norm()
        # New weights are packed anew, however they came.
        layer.weight.copy_(torch.randn_like(layer.weight))
        torch.testing.assert_close(layer(x), layer.train()(x), rtol=2e-6, atol=1e-3)
        layer.weight.data = torch.randn_like(layer.weight)
        torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=2e-6, atol=1e-3)


def test_bit_linear_learns() -> None:
    torch.manual_seed(2)
    target = torch.randn(8, 32).sign()
    layer = BitLinear(32, 8)
    optimiser = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(200):
        x = torch.randn(64, 32)
        loss = F.mse_loss(layer(x), x @ target.T)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_examples_run() -> None:
    for module in (linear, bit_linear):
        assert doctest.testmod(module).failed == 0
    names = {"BitLinear", "Experts", "FloatExperts", "Linear", "SparseMoe", "load_balancing_loss", "router_z_loss"}
    assert set(farthing.nn.__all__) == names


def test_products_run_on_the_threads_of_torch() -> None:
    """Whoever does the work, and however many threads are lent, the bits are the same."""
    assert share_threads()
    w = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(5))
    x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(6))
    packed = ft.quantize(w, "int4", group=32)
    expected = packed.matmul(x)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(packed.matmul(x), expected)
    torch.set_num_threads(before)
