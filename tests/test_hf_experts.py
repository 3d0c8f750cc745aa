"""Packed experts: under transformers' models, through the registered implementation, and alone on arrays."""

from __future__ import annotations

import copy
import doctest
import io
import itertools
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import farthing as ft
import farthing.nn
import numpy as np
import pytest
import reference
import tiny
import torch
import transformers
from farthing._core import share_threads
from farthing.moe import PackedExperts
from farthing.nn import Experts, expert_ops
from torch.library import opcheck
from torch.nn import functional as F

# The model types of one registration: what their configurations have beside `tiny.BASE`.
SPARSE = {**tiny.SPARSE, "moe_intermediate_size": 40}
MODELS = {
    "MixtralConfig": SPARSE,
    "Qwen3MoeConfig": {**SPARSE, "head_dim": 24, "norm_topk_prob": True},
    "GptOssConfig": {**SPARSE, "head_dim": 16, "sliding_window": 20},
    "DeepseekV3Config": {**tiny.LATENT, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "OlmoeConfig": SPARSE,
    "GraniteMoeConfig": {**SPARSE, **tiny.GRANITE},
    "Lfm2MoeConfig": {
        **SPARSE,
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "Mistral4Config": tiny.LATENT,
    "MiniMaxM2Config": {**SPARSE, "head_dim": 16},
    "Glm4MoeConfig": {**SPARSE, "n_routed_experts": 6, "first_k_dense_replace": 1, "head_dim": 16},
}


def model_of(config_class: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose logits are of order one."""
    config = getattr(transformers, config_class)(**{**tiny.BASE, **MODELS[config_class]})
    config._experts_implementation = "eager"
    config._attn_implementation = "eager"
    model = getattr(transformers, config_class.replace("Config", "ForCausalLM"))(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
            if weight.is_floating_point() and "inv_freq" not in name:
                noise = torch.randn(weight.shape, generator=generator)
                scale = 0.3 if "norm" in name or "bias" in name else weight.shape[-1] ** -0.5
                weight.copy_(noise * scale + (1.0 if "norm" in name and "bias" not in name else 0.0))
    return model.eval()


def routers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    words = {"router", "gate", "shared_expert_gate"}
    return {name: module for name, module in model.named_modules() if not words.isdisjoint(name.split("."))}


@pytest.mark.parametrize("config_class", MODELS)
def test_logits_of_every_family(config_class: str) -> None:
    model = model_of(config_class)
    ids = tiny.prompt(40)
    exact = reference.logits(model, ids)
    assert np.abs(exact).max() > 0.5
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    for experts, bound in (("f32", None), ("bf16", 1e-2), ("int8", 2e-2), ("int4", 0.25)):
        report = ft.hf.accelerate(model, None, experts=experts, group=16)
        assert report.packed
        assert not report.skipped
        assert all(model.get_submodule(name).down_proj is None for name in report.packed)
        assert model.config._experts_implementation == "farthing"
        got = reference.logits(model, ids)
        if bound is None:
            np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5)
        else:
            # A close call of a router may fall another way, so most rows are near, not all.
            far = np.linalg.norm(got - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
            assert np.median(far) < bound
        ft.hf.restore(model)
        assert model.config._experts_implementation == "eager"
        after = dict(model.named_parameters())
        assert list(after) == list(before)
        assert all(id(after[name]) == was and torch.equal(after[name], value) for name, (was, value) in before.items())
        np.testing.assert_array_equal(reference.logits(model, ids), exact)


@pytest.mark.parametrize("config_class", MODELS)
def test_routers_are_never_touched(config_class: str) -> None:
    model = model_of(config_class)
    before = routers(model)
    assert before
    report = ft.hf.accelerate(model, "int8", experts="int8", group=16)
    assert routers(model) == before
    assert {"experts", "lm_head"} <= {name.rpartition(".")[2] for name in report.packed}
    exact = reference.logits(model_of(config_class), tiny.prompt(20))
    assert np.linalg.norm(reference.logits(model, tiny.prompt(20)) - exact) < 0.1 * np.linalg.norm(exact)


def test_generates_as_eager_does() -> None:
    model = model_of("Qwen3MoeConfig")
    ids = torch.tensor([tiny.prompt(12)])
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    ft.hf.accelerate(model, None, experts="f32")
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), wanted)
    assert model.config._experts_implementation == "farthing"
    half = model.bfloat16()
    assert half.generate(ids, attention_mask=torch.ones_like(ids), **options).shape == (1, 24)


def test_copies_are_accelerated_and_restored_apart() -> None:
    model = model_of("OlmoeConfig")
    ids = tiny.prompt(20)
    exact = reference.logits(model, ids)
    ft.hf.accelerate(model, "int8", experts="int8", group=16)
    near = reference.logits(model, ids)
    other = copy.deepcopy(model)
    ft.hf.restore(model)
    np.testing.assert_array_equal(reference.logits(other, ids), near)
    np.testing.assert_array_equal(reference.logits(model, ids), exact)
    ft.hf.restore(other)
    np.testing.assert_array_equal(reference.logits(other, ids), exact)


def test_none_leaves_a_part_alone() -> None:
    model = model_of("MixtralConfig")
    everything = {name: module for name, module in model.named_modules() if "experts.packed" not in name}
    report = ft.hf.accelerate(model, None, experts="int4", group=16)
    assert {name.rpartition(".")[2] for name in report.packed} == {"experts"}
    assert {name: module for name, module in model.named_modules() if "experts.packed" not in name} == everything
    assert 0 < report.bytes_after < 0.4 * report.bytes_before
    ft.hf.restore(model)
    report = ft.hf.accelerate(model, "int8", experts=None, group=16)
    assert not any(name.endswith("experts") for name in report.packed)
    assert model.config._experts_implementation == "eager"
    ft.hf.restore(model)
    assert not ft.hf.accelerate(model, None, experts=None).packed


def test_what_is_not_known_stays_and_says_why() -> None:
    model = model_of("MixtralConfig")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    first.act_fn = torch.nn.Mish()
    ids = tiny.prompt(20)
    exact = reference.logits(model, ids)
    report = ft.hf.accelerate(model, None, experts="f32")
    assert list(report.packed) == ["model.layers.1.mlp.experts"]
    assert "a function that packed experts do not know" in report.skipped["model.layers.0.mlp.experts"]
    assert second.down_proj is None
    np.testing.assert_allclose(reference.logits(model, ids), exact, rtol=0, atol=1e-5)  # the first is eager's
    with torch.no_grad():
        first.act_fn = torch.nn.SiLU()
        ft.hf.restore(model)
        first.gate_up_proj[2, 5, 7] = float("nan")
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts: gate of expert 2: weights: row 5, input 7"):
        ft.hf.accelerate(model, None, experts="int4")
    assert second.down_proj is not None
    assert model.config._experts_implementation == "eager"


def test_gradients_are_those_of_the_dequantised_model() -> None:
    """To what the experts read, and to the router."""
    model = model_of("GptOssConfig")
    ids = torch.tensor([tiny.prompt(9)])

    def gradients() -> list[torch.Tensor]:
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.zero_grad()
        model(inputs_embeds=x).logits.float().log_softmax(-1)[0, :, 5].sum().backward()
        return [x.grad, *(layer.mlp.router.weight.grad.clone() for layer in model.model.layers)]

    exact = gradients()
    ft.hf.accelerate(model, None, experts="f32")
    for got, wanted in zip(gradients(), exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def layer_of(
    count: int, inner: int, hidden: int, seed: int = 0, scale: float = 0.15
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random gate_up, down, and their biases."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, 2 * inner, hidden), (count, hidden, inner), (count, 2 * inner), (count, hidden)]
    gate_up, down, *biases = (torch.randn(shape, generator=generator) * scale for shape in shapes)
    return gate_up, down, *biases


def inputs_of(tokens: int, choices: int, experts: int, hidden: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator)
    ids = torch.randint(0, experts, (tokens, choices), generator=generator)
    return x, ids, torch.rand(tokens, choices, generator=generator)


def slowly(packed: PackedExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The definition, in double precision, on dequantised weights."""
    word, alpha, limit = packed.activation
    bound = float("inf") if limit is None else limit
    out = torch.zeros(x.shape, dtype=torch.float64)
    for e in range(len(packed)):
        expert = packed[e]
        matrices = [None if matrix is None else torch.from_numpy(matrix.dequantize()).double() for matrix in expert[:3]]
        gate_bias, up_bias, down_bias = (None if b is None else torch.from_numpy(b).double() for b in expert[3:])
        tokens, slots = torch.where(ids == e)
        rows = x[tokens].double()
        up = F.linear(rows, matrices[1], up_bias)
        if matrices[0] is None:
            inner = up.relu() ** 2
        else:
            gate = F.linear(rows, matrices[0], gate_bias).clamp(max=bound)
            up = up.clamp(-bound, bound)
            if word == "swiglu":
                inner = (up + 1) * gate * torch.sigmoid(alpha * gate)
            else:
                inner = (F.silu(gate) if word == "silu" else F.gelu(gate, approximate="tanh")) * up
        out.index_add_(0, tokens, F.linear(inner, matrices[2], down_bias) * weights[tokens, slots, None].double())
    return out


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


@pytest.mark.parametrize("count", [1, 8, 64, 128])
@pytest.mark.parametrize("weights", ["f32", "int8", "int4"])
def test_any_routing_follows_the_definition(count: int, weights: str) -> None:
    """Tails, duplicates in a row, experts that nobody chose, ids of no expert."""
    gate_up, down, *_ = layer_of(count, 36, 52)
    packed = PackedExperts.from_arrays(gate_up, down, weights, group=16, activations="a8")
    bound = 1e-6 if weights == "f32" else 2e-2
    for tokens, choices in itertools.product((1, 2, 3, 8, 33, 257), (1, 2, 4, 8)):
        x, ids, chances = inputs_of(tokens, choices, count, 52, seed=tokens + choices)
        if tokens == 8:
            ids[:] = count - 1  # one hot expert
        if tokens == 33:
            ids[::2, 0], ids[1::2, 0] = count, -1
            ids[5] = 2**40
        with torch.no_grad():
            got = packed(x, ids, chances)
        wanted = slowly(packed, x, ids, chances)
        assert distance(got, wanted) <= bound
        loads = torch.bincount(ids[(ids >= 0) & (ids < count)], minlength=count)
        assert packed.statistics.tokens_per_expert.tolist() == loads.tolist()
        assert packed.statistics.distinct == int((loads > 0).sum())
        for row in (0, tokens // 2, tokens - 1):  # no row depends on others
            alone = packed(x[row : row + 1], ids[row : row + 1], chances[row : row + 1])
            assert torch.equal(alone[0], got[row])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "swiglu", "relu_squared", "clamped"])
def test_activations_and_biases(activation: str) -> None:
    gate_up, down, gate_up_bias, down_bias = layer_of(4, 40, 48, scale=0.5)
    options: dict = {"activation": activation}
    if activation == "relu_squared":
        gate_up, gate_up_bias = gate_up[:, :40], gate_up_bias[:, :40]
    if activation in ("swiglu", "clamped"):
        options = {"activation": "swiglu", "alpha": 1.5, "limit": 2.0} if activation == "swiglu" else {"limit": 2.0}
    for biases in ({"gate_up_bias": gate_up_bias, "down_bias": down_bias}, {"down_bias": down_bias}, {}):
        packed = PackedExperts.from_arrays(gate_up, down, "f32", **options, **biases)
        inputs = inputs_of(20, 3, 4, 48)
        assert distance(packed(*inputs), slowly(packed, *inputs)) < 1e-6
        layer = Experts(packed)
        x, ids, weights = inputs
        x, weights = x.requires_grad_(), weights.requires_grad_()
        layer(x, ids, weights).square().sum().backward()
        got = (x.grad, weights.grad)
        x.grad = weights.grad = None
        slowly(packed, x, ids, weights).square().sum().backward()
        for ours, wanted in zip(got, (x.grad, weights.grad), strict=True):
            assert distance(ours, wanted.double()) < 1e-5


def test_layouts_are_the_same_experts() -> None:
    gate_up, down, gate_up_bias, down_bias = layer_of(3, 24, 32)
    turns = torch.stack(gate_up.chunk(2, 1), 2).flatten(1, 2)
    turns_bias = torch.stack(gate_up_bias.chunk(2, 1), 2).flatten(1, 2)
    biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    given = inputs_of(9, 2, 3, 32)
    wanted = PackedExperts.from_arrays(gate_up, down, "int8", group=16, **biases)(*given)
    biases["gate_up_bias"] = turns_bias
    options = {"layout": "interleaved", "group": 16, **biases}
    assert torch.equal(PackedExperts.from_arrays(turns, down, "int8", **options)(*given), wanted)
    transposed = PackedExperts.from_arrays(turns.mT, down.mT, "int8", transposed=True, **options)
    assert torch.equal(transposed(*given), wanted)
    arrays = {name: value.numpy() for name, value in biases.items()}
    packed = PackedExperts.from_arrays(turns.numpy(), down.numpy(), "int8", group=16, layout="interleaved", **arrays)
    got = packed(*(part.numpy() for part in given))
    assert isinstance(got, np.ndarray)
    assert np.array_equal(got, wanted.numpy())
    one_by_one = PackedExperts((packed[e] for e in range(3)), "int4")  # packed already: as they are
    assert torch.equal(one_by_one(*given), wanted)
    assert one_by_one.format == packed.format
    assert one_by_one.nbytes == packed.nbytes


def test_a_module_is_packed_as_it_lies() -> None:
    module = model_of("GptOssConfig").model.layers[0].mlp.experts.requires_grad_(False)
    packed = PackedExperts.from_module(module, "f32")
    assert packed.activation == ("swiglu", pytest.approx(1.702), 7.0)
    x, ids, weights = inputs_of(20, 2, 6, 64)
    x *= 8
    torch.testing.assert_close(packed(x, ids, weights), module(x, ids, weights), rtol=1e-5, atol=1e-4)
    with pytest.raises(ft.UnsupportedError, match="Linear is no experts module"):
        PackedExperts.from_module(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_and_strides(dtype: torch.dtype) -> None:
    gate_up, down, *_ = layer_of(5, 32, 48)
    packed = PackedExperts.from_arrays(gate_up.to(dtype), down.to(dtype), "int8", group=16)
    x, ids, weights = inputs_of(7, 2, 5, 48)
    x, weights = x.to(dtype), weights.to(dtype)
    y = packed(x, ids, weights)
    assert y.dtype == dtype
    assert torch.equal(y, packed(x.float(), ids, weights.float()).to(dtype))
    strided = torch.stack([x, x + 1], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(packed(strided, ids.mT.contiguous().mT, weights), y)
    assert torch.equal(packed(x, ids.int(), weights), y)
    assert packed(x[:0], ids[:0], weights[:0]).shape == (0, 48)
    nothing = packed(x, ids[:, :0], weights[:, :0])
    assert torch.equal(nothing, torch.zeros_like(x))
    assert torch.equal(packed(x, torch.full_like(ids, -1), weights), torch.zeros_like(x))


def test_threads_do_not_change_bits() -> None:
    """Neither those that do the work, nor those that call at the same time."""
    assert share_threads()
    gate_up, down, *_ = layer_of(16, 128, 256)
    packed = PackedExperts.from_arrays(gate_up, down, "int4", group=32)
    given = inputs_of(200, 4, 16, 256)
    expected = packed(*given)
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        assert torch.equal(packed(*given), expected)
    torch.set_num_threads(before)
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(lambda _: packed(*given), range(16)))


def test_wrong_arguments_are_errors() -> None:
    gate_up, down, gate_up_bias, down_bias = layer_of(3, 24, 32)
    packed = PackedExperts.from_arrays(gate_up, down, "int8", group=16)
    x, ids, weights = inputs_of(4, 2, 3, 32)
    for given, error, message in [
        ((x[:, 1:], ids, weights), ValueError, r"hidden: got shape \(4, 31\), expected \(T, 32\)"),
        ((x, ids[1:], weights), ValueError, r"ids: got shape \(3, 2\), expected \(4, K\)"),
        ((x, ids.float(), weights), ValueError, "ids: got float32"),
        ((x, ids, weights[:, :1]), ValueError, r"weights: got shape \(4, 1\), expected \(4, 2\)"),
        ((x.double(), ids, weights), TypeError, "hidden: got torch.float64"),
        ((x, ids, weights.clone().requires_grad_()), ft.UnsupportedError, "farthing.nn"),
    ]:
        with pytest.raises(error, match=message):
            packed(*given)
    for options, message in [
        ({"weights": "int5"}, "^weights: got .int5., expected one of int4"),
        ({"group": 17}, "gate of expert 0: weights: group size: got 17"),
        ({"activation": "tanh"}, "activation: got .tanh., expected one of silu"),
        ({"alpha": 1.0}, "alpha: got 1, expected None for silu"),
        ({"limit": -1.0}, "limit: got -1, expected a number above 0"),
        ({"layout": "turned"}, "layout: got 'turned'"),
        ({"activation": "relu_squared"}, r"gate_up: got shape \(3, 48, 32\), expected \(3, 24, 32\)"),
        ({"transposed": True}, "gate_up: got shape"),
        ({"gate_up_bias": down_bias}, r"gate_up_bias: got shape \(3, 32\), expected \(3, 48\)"),
        ({"gate_up_bias": gate_up_bias / 0}, "gate of expert 0: bias: got inf|nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            PackedExperts.from_arrays(gate_up, down, **{"weights": "int4", "group": 16, **options})
    with pytest.raises(ValueError, match="experts: got none, expected at least one"):
        PackedExperts([])
    with pytest.raises(ValueError, match="expert 0: got 3 values"):
        PackedExperts([(gate_up[0, :24], gate_up[0, 24:], down[0])])
    six = (gate_up[0, :24], gate_up[0, 24:], down[0], None, None, None)
    with pytest.raises(ValueError, match=r"down of expert 1: got shape \(24, 32\), expected \(32, 24\)"):
        PackedExperts([six, (*six[:2], down[0].T, *six[3:])], "f32")
    with pytest.raises(ValueError, match="gate of expert 0: got none, expected one"):
        PackedExperts([(None, gate_up[0, 24:], down[0], None, None, None)], "f32")
    with pytest.raises(IndexError, match="expert: got 3, expected 0 to 2"):
        packed[3]


@pytest.mark.parametrize("weights", ["int4", "f32", "ternary"])
def test_states_and_pickles_round_trip(weights: str) -> None:
    gate_up, down, gate_up_bias, down_bias = layer_of(3, 24, 32)
    options = {"activation": "swiglu", "group": 16, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    packed = PackedExperts.from_arrays(gate_up, down, weights, **options)
    given = inputs_of(5, 2, 3, 32)
    wanted = packed(*given)
    assert torch.equal(pickle.loads(pickle.dumps(packed))(*given), wanted)
    assert copy.deepcopy(packed) is packed
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(Experts(packed)).state_dict(), file)
    file.seek(0)
    loaded = torch.nn.Sequential(Experts())
    with pytest.raises(RuntimeError, match="no weights yet"):
        loaded[0](*given)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded[0](*given), wanted)
    assert repr(loaded[0]) == repr(Experts(packed))
    state = Experts(packed).state_dict()
    with pytest.raises(RuntimeError, match="words"):
        Experts().load_state_dict({})
    with pytest.raises(RuntimeError, match="got arrays of"):
        Experts().load_state_dict(state | {"up_bias": state["up_bias"][1:]})
    other = Experts(PackedExperts.from_arrays(gate_up[:2], down[:2], weights, group=16))
    with pytest.raises(RuntimeError, match=r"got \(E, I, H\) = \(3, 24, 32\), expected \(2, 24, 32\)"):
        other.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(tokens: int, dtype: torch.dtype) -> None:
    gate_up, down, *_ = layer_of(3, 24, 32)
    layer = Experts(PackedExperts.from_arrays(gate_up, down, "int8", group=16))
    x, ids, weights = inputs_of(tokens, 2, 3, 32)
    x = x.to(dtype)
    opcheck(expert_ops.experts, (x.clone().requires_grad_(), ids, weights.requires_grad_(), layer._number))
    strided = torch.stack([x, x], -1)[..., 0]
    opcheck(expert_ops.experts, (strided, ids, weights, layer._number))
    opcheck(expert_ops.experts_gradient, (x, x, ids, weights.detach(), layer._number))


def test_compiles_without_a_break() -> None:
    """Inductor, one graph, a whole model: forward and backward."""
    model = model_of("Qwen3MoeConfig")
    ft.hf.accelerate(model, None, experts="int8", group=16)
    moe = model.model.layers[0].mlp
    x = torch.randn(1, 5, 64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(moe, fullgraph=True)
        y = compiled(x)
        y.square().sum().backward()
        compiled_gradient, x.grad = x.grad, None
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), y)
        ids = torch.tensor([tiny.prompt(20)])
        with torch.no_grad():
            whole = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
            torch.testing.assert_close(whole, model(ids, use_cache=False).logits, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(moe(x), y)
    moe(x).square().sum().backward()
    torch.testing.assert_close(x.grad, compiled_gradient)


def test_examples_run() -> None:
    for name in ("farthing.hf.accelerate", "farthing.moe.experts", "farthing.nn.experts"):
        assert doctest.testmod(import_module(name)).failed == 0
