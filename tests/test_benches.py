"""The benches measure what they say: a wrong product is refused, a slice is a model."""

from __future__ import annotations

from pathlib import Path

import farthing as ft
import numpy as np
import pytest
import reference
from farthing.plan import plan

from benches import matmul_peers, moe_levers, moe_models, moe_split, random_gguf, slices
from benches.matmul_engines import ENGINES, GROUP, Sweep, dequantized, pack, symmetric_int4, ternary

SMALL = slices.Shape(hidden=256, feed_forward=512, layers=2, heads=4)


@pytest.fixture(scope="module")
def product() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (8, K), weights (N, K) and their product (8, N)."""
    random = np.random.default_rng(3)
    x, weights = (random.standard_normal((rows, 512)) for rows in (8, 96))
    return x, weights, x @ weights.T


def test_check_takes_what_is_rounded(product):
    expected = product[2]
    noise = np.random.default_rng(0).standard_normal(expected.shape) * expected.std()
    matmul_peers.check("exact", expected, expected, 1e-12)
    matmul_peers.check("rounded", expected + 6e-3 * noise, expected, 1e-2)


@pytest.mark.parametrize("wrong", ["noise", "one output", "not finite", "scale", "rows", "order", "transposed"])
def test_check_refuses_a_wrong_product(product, wrong):
    expected = product[2]
    output = expected.copy()
    if wrong == "noise":
        output += 3e-2 * expected.std() * np.random.default_rng(0).standard_normal(expected.shape)
    elif wrong == "one output":
        output[3, 7] += 0.2 * expected.std()
    elif wrong == "not finite":
        output[0, 0] = np.nan
    elif wrong == "scale":
        output *= 1.03
    elif wrong == "rows":
        output = output[[1, 0, *range(2, 8)]]
    elif wrong == "order":
        output = np.roll(output, 1, 1)
    else:
        output = output.T
    with pytest.raises(matmul_peers.WrongResultError, match=wrong):
        matmul_peers.check(wrong, output, expected, 1e-2)


class Exact:
    """A stand-in engine in float64; ``shift`` is how far the second matrix is moved, ``late`` rows go wrong."""

    precision = "bf16"

    def __init__(self, weights: np.ndarray, shift: int, late: bool) -> None:
        self.exact, self._late = weights, late
        self._matrices = [weights, np.roll(weights, shift, 0)]

    def sweep(self, x: np.ndarray) -> Sweep:
        products = [x @ matrix.T for matrix in self._matrices]
        if self._late and len(x) > 4:
            products[1][5] = 0.0
        return Sweep(lambda: products, lambda outputs: outputs)


def test_every_matrix_and_every_number_of_rows_is_verified(product):
    x, weights, _ = product
    matmul_peers.verify("right", Exact(weights, 1, late=False), x, [1, 8])
    with pytest.raises(matmul_peers.WrongResultError, match="1 rows, matrix 1"):
        matmul_peers.verify("same matrix twice", Exact(weights, 0, late=False), x, [1, 8])
    matmul_peers.verify("wrong at eight", Exact(weights, 1, late=True), x, [1, 4])
    with pytest.raises(matmul_peers.WrongResultError, match="8 rows, matrix 1"):
        matmul_peers.verify("wrong at eight", Exact(weights, 1, late=True), x, [1, 4, 8])


def test_limits_are_those_of_the_same_round():
    fast, slow = (matmul_peers.Round(speed, 1e12, {"farthing": 1e6 / speed}) for speed in (4e9, 2e9))
    times = {1: {"farthing": [2.5e-4, 5e-4], "peer": [1e-3]}, 100: {"farthing": [3e-4], "peer": [9e-4, 3e-4]}}
    disturbed = matmul_peers.Round(4e9, 5e11, {"farthing": 3e-4})
    first, second = matmul_peers.summary(times, {1: [fast, slow], 100: [disturbed]}, (1000, 1000), 1000_000)
    assert first["of_limit"] == pytest.approx(1.0)
    assert first["best_peer"] == "peer"
    assert first["times_best_peer"] == pytest.approx(1e-3 / 3.75e-4)
    assert not first["disturbed"]
    assert second["disturbed"]
    assert second["of_limit"] == pytest.approx(2e8 / 5e11 / 3e-4)
    assert second["over_floor"] == pytest.approx(3e-4 / (2e8 / 5e11 / 0.8))


@pytest.mark.parametrize("kind", ["int4", "ternary"])
@pytest.mark.parametrize("name", ["torch bf16", "torch int4pack", "ONNX Runtime", "OpenVINO"])
def test_peers_multiply_with_the_weights_they_say(name, kind):
    if name == "ONNX Runtime":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    elif name == "OpenVINO":
        pytest.importorskip("openvino")
    if kind == "ternary" and name in ("torch int4pack", "OpenVINO"):
        pytest.skip("4 bits only")
    random = np.random.default_rng(1)
    weights = matmul_peers.draw((128, 256), kind, random)
    engine = ENGINES[name](weights, kind, 2, 2)
    assert np.abs(engine.exact - weights).max() < 0.4 * weights.std()  # half a step of the coarsest
    x = random.standard_normal((5, 256), dtype=np.float32)
    x = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    matmul_peers.verify(name, engine, x, [1, 5])


def test_codes_hold_the_weights():
    random = np.random.default_rng(2)
    weights = matmul_peers.draw((6, 2 * GROUP), "int4", random)
    codes, scales = symmetric_int4(weights)
    assert np.all(np.abs(dequantized(codes, scales, 8) - weights) <= scales.max() * 0.5001)
    assert codes.min() >= 1
    assert codes.max() <= 15
    weights = matmul_peers.draw((6, 2 * GROUP), "ternary", random)
    np.testing.assert_array_equal(dequantized(*ternary(weights), 1), weights)
    assert pack(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack(np.array([[1, 2, 3, 0, 1]], np.uint8), 2).tolist() == [[0b00111001, 1]]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q8_0"])
def test_a_slice_is_a_model(kind, tmp_path: Path):
    path = random_gguf.write(tmp_path / "slice.gguf", slices.metadata(SMALL), slices.tensors(SMALL, kind))
    llm = ft.LLM(path, weights="f32")
    ids = llm.tokenizer.encode("The capital of France is")
    assert llm.tokenizer.decode(ids) == "The capital of France is"
    assert max(ids) < random_gguf.VOCABULARY == llm.vocabulary
    exact = reference.logits(reference.gguf_model(path), ids)
    assert exact.std() > 0.1
    np.testing.assert_allclose(llm.logits(ids), exact, atol=2e-3 * exact.std())
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "TQ2_0"])
def test_blocks_have_the_variance_of_a_trained_matrix(kind):
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    number, draw = random_gguf.TYPES[kind]
    values = dequantize(draw(np.random.default_rng(0), 64, 1024), GGMLQuantizationType(number))
    assert values.shape == (64, 1024)
    assert values.std() * 1024**0.5 == pytest.approx(1.0, abs=0.02)
    assert len(np.unique(values)) == {"TQ2_0": 3, "Q4_0": 15, "Q4_K": 16}[kind]


def test_ternary_rows_of_ik_llama_cpp():
    rows = random_gguf.iq2_bn(np.random.default_rng(0), 4, 256)
    assert rows.shape == (4, 4 + 256 // 4)  # a float32 scale before the codes
    assert rows[:, :4].copy().view(np.float32).ravel() == pytest.approx((1.5 / 256) ** 0.5)
    codes = rows[:, 4:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    assert np.unique(codes).tolist() == [0, 1, 2]


def test_a_random_model_of_experts_runs_and_is_planned(tmp_path: Path) -> None:
    """What a token reads is less than what is resident; the plan says what loading then does."""
    shape = moe_models.Shape("qwen3moe", 256, 2, 4, 2, 64, 256, 8, 2, 600, 1e4, 64, 64)
    path = random_gguf.write(tmp_path / "m.gguf", moe_models.metadata(shape), moe_models.tensors(shape, "Q4_0"))
    llm, foretold = ft.LLM(path), plan(path)
    (completion,) = llm.generate([3, 5, 7], ft.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert len(completion.token_ids) == 4
    assert foretold.resident_bytes == llm.explain().nbytes
    experts = [matrix for matrix in foretold.matrices if matrix.role.startswith("expert_")]
    assert len(experts) == 6
    assert {(matrix.count, matrix.used) for matrix in experts} == {(8, 2)}
    unread = sum(matrix.nbytes for matrix in experts) * 6 // 8
    embedding = next(matrix.nbytes for matrix in foretold.matrices if matrix.role == "embedding")
    assert foretold.bytes_per_token == foretold.resident_bytes - unread - embedding
    ledger = completion.ledger
    assert ledger.weight_bytes < ledger.passes * foretold.resident_bytes


def test_a_mixture_made_of_a_dense_model_is_what_the_engine_runs(tmp_path: Path) -> None:
    """The checkpoint computes what the trained modules do."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": moe_split.SHARED + 2 * moe_split.EXPERTS, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=512, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(96, (8 * moe_split.WINDOW,))
    directory = tmp_path / "mixture"
    moe_split.make(directory, model, ids, minutes=0)
    found = ft.LLM(directory, weights="f32").logits(ids[:50].numpy())
    with torch.no_grad():
        expected = model(ids[None, :50]).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    fewer = ft.LLM(moe_levers.fewer(directory, 4), weights="f32").explain()
    assert {(matrix.used, matrix.count) for matrix in fewer if matrix.role == "expert_up"} == {(4, moe_split.EXPERTS)}
