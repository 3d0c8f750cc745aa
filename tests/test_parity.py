"""Every family equals transformers in float32 on tiny random checkpoints, and on one small trained one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import farthing as ft
import numpy as np
import pytest
import reference
import tiny

GREEDY = ft.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("name", [model.name for model in tiny.MODELS])
def test_tiny_checkpoint_equals_transformers(name: str, tiny_directory: Callable[[str], Path]) -> None:
    directory = tiny_directory(name)
    model = reference.load(directory)
    llm = ft.LLM(directory, weights="f32", threads=2)
    for length in (1, 57, 150):
        ids = tiny.prompt(length, model.config.vocab_size)
        exact, ours = reference.logits(model, ids), llm.logits(ids)
        assert ours.shape == exact.shape
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-4)
    prompt = tiny.prompt(57, model.config.vocab_size)
    (completion,) = llm.generate(prompt, GREEDY)
    assert completion.token_ids == reference.greedy(model, prompt, GREEDY.max_tokens)
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    "name", ["lfm2", "lfm2-biases-untied", "lfm2-convolutions-only", "qwen3_5", "qwen3_next-dense"]
)
def test_states_survive_chunks(name: str, tiny_directory: Callable[[str], Path]) -> None:
    """What a layer carries from one chunk to the next is what transformers has within one prompt."""
    directory = tiny_directory(name)
    model = reference.load(directory)
    ids = tiny.prompt(150, model.config.vocab_size)
    exact = reference.logits(model, ids)
    for chunk in (1, 7, 64):
        ours = ft.LLM(directory, weights="f32", threads=2, chunk=chunk).logits(ids)
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-4)


def test_text_model_inside_another(tiny_directory: Callable[[str], Path], tmp_path: Path) -> None:
    """Checkpoints of Qwen3.5 have a part for images too; the text model is found among them."""
    from safetensors.numpy import load_file, save_file

    directory = tiny_directory("qwen3_5")
    tensors = load_file(directory / "model.safetensors")
    nested = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
    nested["model.visual.blocks.0.norm1.weight"] = np.ones(8, np.float32)
    save_file(nested, tmp_path / "model.safetensors")
    text = json.loads((directory / "config.json").read_text())
    tied = text.pop("tie_word_embeddings")
    whole = {"model_type": "qwen3_5", "tie_word_embeddings": tied, "text_config": text, "vision_config": {"depth": 1}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    ids = tiny.prompt(40)
    assert np.array_equal(ft.LLM(tmp_path).logits(ids), ft.LLM(directory).logits(ids))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sharded_half_precision_checkpoint(dtype: str, tmp_path: Path) -> None:
    """16-bit weights are exact in float32; the index of several shards is followed."""
    by_name = {model.name: model for model in tiny.MODELS}
    tiny.build(by_name["qwen3"], tmp_path, dtype=dtype, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = tiny.prompt(90)
    exact = reference.logits(reference.load(tmp_path), ids)
    np.testing.assert_allclose(ft.LLM(tmp_path, weights="f32").logits(ids), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("weights", "bound"), [("bf16", 0.02), ("int8", 0.06), ("int4", 0.7)])
def test_other_weight_formats_are_near(weights: str, bound: float, tiny_directory: Callable[[str], Path]) -> None:
    """Rounding of weights moves logits, relative to their deviation, by no more than its step explains."""
    for name in ("llama-2", "smollm2", "gemma3"):
        directory = tiny_directory(name)
        ids = tiny.prompt(90)
        exact = reference.logits(reference.load(directory), ids)
        ours = ft.LLM(directory, weights=weights).logits(ids)
        assert bound / 10 < np.sqrt(np.mean((ours - exact) ** 2)) / exact.std() < bound


def test_stories260k_tells_its_story(data: Path) -> None:
    """A trained model of 260,000 parameters, with a known greedy continuation and likelihood."""
    directory = data / "stories260k-hf"
    llm = ft.LLM(directory, weights="f32")
    (completion,) = llm.generate(
        [[1, 403, 407, 261, 378]], ft.SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    )
    assert completion.text.startswith(
        ", there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball. "
        "She wanted to play with it, but it was too high.\nLily's mom said"
    )
    model = reference.load(directory)
    ids = [1, 403, 407, 261, 378, *completion.token_ids]
    np.testing.assert_allclose(llm.logits(ids), reference.logits(model, ids), rtol=0, atol=2e-4)
