"""Packed layers under transformers models: the engine's logits, and the model's own again afterwards."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import farthing as ft
import numpy as np
import pytest
import reference
import tiny
import torch
import transformers

# The engine's own grid.
GRID = {"weights": "int4", "group": 32, "symmetric": False}


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """Distance over length."""
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def accelerated_logits(model: transformers.PreTrainedModel, ids: list[int]) -> np.ndarray:
    """Logits of an accelerated model whose embedding, if it is tied, is that of the packed head, as in the engine."""
    embedding = model.get_input_embeddings()
    original = embedding.weight.data
    if model.config.tie_word_embeddings:
        embedding.weight.data = model.lm_head.weight
    try:
        return reference.logits(model, ids)
    finally:
        embedding.weight.data = original


@pytest.mark.parametrize("name", ["llama-3-biases", "smollm2", "mistral-window", "qwen2", "qwen3", "smollm3"])
def test_packed_logits_are_the_engines(name: str, tiny_directory: Callable[[str], Path]) -> None:
    """Exactly the same weights and products; only what lies between them is computed by torch."""
    directory = tiny_directory(name)
    model = reference.load(directory)
    embedding = model.get_input_embeddings().weight
    ids = tiny.prompt(60, model.config.vocab_size)
    exact = reference.logits(model, ids)
    for activations, bound in (("f32", 2e-5), ("a16", 1e-3)):
        if not model.config.tie_word_embeddings:  # the engine packs the embedding too
            original = embedding.data
            embedding.data = torch.from_numpy(ft.quantize(original, group=32, symmetric=False).dequantize())
        report = ft.hf.accelerate(model, **GRID, activations=activations)
        engine = ft.LLM(directory, weights="int4", activations=activations, kv="f32").logits(ids)
        assert relative(accelerated_logits(model, ids), engine) < bound
        assert len(report.packed) == 7 * model.config.num_hidden_layers + 1
        assert not report.skipped
        if not model.config.tie_word_embeddings:
            embedding.data = original
        ft.hf.restore(model)
        np.testing.assert_array_equal(reference.logits(model, ids), exact)


def test_smollm2_is_the_engines_and_comes_back(smollm2: Path, tmp_path: Path) -> None:
    """Real weights. Rounding of activations turns differences of the last bit into steps of the grid."""
    model = reference.gguf_model(smollm2)
    model.save_pretrained(tmp_path)
    ids = tiny.prompt(100, model.config.vocab_size)
    exact = reference.logits(model, ids)
    for activations, bound in (("a16", 1e-3), ("auto", 1e-2)):
        report = ft.hf.accelerate(model, **GRID, activations=activations)
        engine = ft.LLM(tmp_path, weights="int4", activations=activations, kv="f32").logits(ids)
        assert relative(accelerated_logits(model, ids), engine) < bound
        assert report.fused == {
            "norms in one call": 61,
            "gated networks in one call": 30,
            "queries, keys and values in one call": 30,
        }
        assert report.bytes_after < 0.16 * report.bytes_before
        assert report.packed["model.layers.3.self_attn.o_proj"].endswith("a8" if activations == "auto" else "a16")
        assert report.packed["model.layers.3.mlp.down_proj"].endswith("a16")
        ft.hf.restore(model)
        np.testing.assert_array_equal(reference.logits(model, ids), exact)


def test_one_bfloat16_model_generates_the_same_in_every_mode(tiny_directory: Callable[[str], Path]) -> None:
    """With a cache or without, one sequence or several."""
    model = reference.load(tiny_directory("smollm2")).bfloat16()
    ft.hf.accelerate(model, "int8", group=32)
    ids = torch.tensor([tiny.prompt(12, model.config.vocab_size)] * 2)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    both = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    one = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **options)
    assert both.dtype == torch.int64
    assert torch.equal(both[0], both[1])
    assert both.shape == (2, 24)
    assert torch.equal(one[0, :12], both[0, :12])


def test_gradients_flow_through_an_accelerated_model(tiny_directory: Callable[[str], Path]) -> None:
    model = reference.load(tiny_directory("llama-2"))
    ids = torch.tensor([tiny.prompt(9)])
    embedded = model.get_input_embeddings()(ids).detach()
    ft.hf.accelerate(model, "int8", group=32, activations="f32")

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=x).logits.float().log_softmax(-1)[0, -1, 5]

    x = embedded.clone().requires_grad_()
    traced = loss(x)
    traced.backward()
    with torch.no_grad():
        torch.testing.assert_close(loss(embedded), traced, rtol=1e-4, atol=1e-4)
        # Along a short step the loss is straight, and its difference still far above the rounding of float32.
        direction = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))
        direction /= direction.norm()
        step = 4e-3
        slope = (loss(embedded + step * direction) - loss(embedded - step * direction)) / (2 * step)
    torch.testing.assert_close((x.grad * direction).sum(), slope, rtol=0.01, atol=1e-3)


class Odd(torch.nn.Module):
    """Layers of every fate."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.nn.Linear(32, 48)
        self.again = self.plain
        self.router = torch.nn.Linear(32, 4)
        self.double = torch.nn.Linear(32, 8).double()
        self.away = torch.nn.Linear(32, 8, device="meta")
        self.hooked = torch.nn.Linear(32, 8)
        self.hooked.register_forward_hook(lambda *_: None)
        self.attention = torch.nn.MultiheadAttention(32, 2)
        self.conv = transformers.pytorch_utils.Conv1D(24, 32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.plain(x), self.again(x), self.router(x), self.hooked(x), self.conv(x)


def test_what_can_not_be_packed_stays_and_says_why() -> None:
    torch.manual_seed(0)
    model = Odd()
    x = torch.randn(3, 32)
    with torch.no_grad():
        before = model(x)
        report = ft.hf.accelerate(model, "int8", group=16)
        after = model(x)
    assert set(report.packed) == {"plain", "again", "conv"}
    assert model.plain is model.again
    assert {name: reason.split(",")[0] for name, reason in report.skipped.items()} == {
        "router": "it chooses experts",
        "double": "its weight is of torch.float64",
        "away": "its weight is a Parameter on meta",
        "hooked": "it has hooks",
        "attention.out_proj": "it is a NonDynamicallyQuantizableLinear",
    }
    for name in ("router stays", "packed, int8 g16 symmetric f16, a16", "bytes before"):
        assert name in str(report)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old, new, rtol=0.02, atol=0.02)
    other = copy.deepcopy(model)
    for each in (model, other):
        ft.hf.restore(each)
        with torch.no_grad():
            assert all(torch.equal(old, new) for old, new in zip(before, each(x), strict=True))


def test_twice_or_never_is_an_error_and_failures_change_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    with pytest.raises(ValueError, match="not accelerated"):
        ft.hf.restore(model)
    with torch.no_grad():
        model[1].weight[3, 4] = float("inf")
    layers = list(model)
    with pytest.raises(ValueError, match="1: weights: row 3, input 4"):
        ft.hf.accelerate(model)
    assert list(model) == layers
    with torch.no_grad():
        model[1].weight[3, 4] = 0.0
    ft.hf.accelerate(model)
    with pytest.raises(ValueError, match="accelerated already"):
        ft.hf.accelerate(model)


def test_fused_modules_are_only_used_for_what_they_compute(tiny_directory: Callable[[str], Path]) -> None:
    """Gemma's norm adds one to its weight, and its activation is the tanh form of GELU."""
    model = reference.load(tiny_directory("gemma3"))
    ids = tiny.prompt(20)
    exact = reference.logits(model, ids)
    report = ft.hf.accelerate(model, "f32")
    assert "norms in one call" not in report.fused
    assert report.fused["gated networks in one call"] == 4
    np.testing.assert_allclose(reference.logits(model, ids), exact, rtol=0, atol=1e-4)


def test_a_shared_input_that_changes_is_not_shared() -> None:
    from farthing.hf.fused import share_input
    from farthing.nn import Linear

    layers = share_input([Linear.from_linear(torch.nn.Linear(16, 8), group=16) for _ in range(3)])
    x = torch.randn(2, 16)
    with torch.no_grad():
        alone = [layer.matrix.matmul(x, layer.bias) for layer in layers]
        assert all(torch.equal(layer(x), y) for layer, y in zip(layers, alone, strict=True))
        layers[0](x)
        x.mul_(2.0)
        assert torch.equal(layers[1](x), layers[1].matrix.matmul(x, layers[1].bias))
        layers[0](x)
        assert torch.equal(layers[2](x.clone()), layers[2].matrix.matmul(x, layers[2].bias))
    with torch.inference_mode():
        assert torch.equal(layers[0](x), layers[0].matrix.matmul(x, layers[0].bias))


def test_examples_run() -> None:
    assert doctest.testmod(import_module("farthing.hf.accelerate")).failed == 0
