"""Drafters with weights of their own: the logits of their heads, and texts that do not depend on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import farthing as ft
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from farthing import _core
from farthing.speculative import MTP, Medusa

PROMPT = 37


def tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def store(path: Path, extra: dict[str, Any], **config: Any) -> None:
    """Adds tensors to a checkpoint, and values to its configuration."""
    from safetensors.torch import save_file

    merged = {name: tensor.contiguous() for name, tensor in (tensors(path) | extra).items()}
    save_file(merged, path / "model.safetensors", metadata={"format": "pt"})
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def random(*shape: int, seed: int) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5


def norm(width: int, seed: int) -> Any:
    return 1.0 + 0.3 * random(width, seed=seed) * width**0.5


def by_name(name: str) -> tiny.Tiny:
    return next(model for model in tiny.MODELS if model.name == name)


def deepseek(path: Path, heads: int) -> Path:
    """A tiny DeepSeek-V3 whose last layers are heads for further tokens."""
    model = by_name("deepseek-v3")
    layers = 3
    tiny.build(replace(model, options=model.options | {"num_hidden_layers": layers + heads}), path)
    width = 64
    extra = {}
    for head in range(heads):
        prefix = f"model.layers.{layers + head}."
        extra |= {
            prefix + "enorm.weight": norm(width, 4 * head),
            prefix + "hnorm.weight": norm(width, 4 * head + 1),
            prefix + "shared_head.norm.weight": norm(width, 4 * head + 2),
            prefix + "eh_proj.weight": random(width, 2 * width, seed=4 * head + 3),
        }
    store(path, extra, num_hidden_layers=layers, num_nextn_predict_layers=heads)
    return path


def drafted(path: Path, drafter: Any, ids: npt.NDArray[np.uint32], count: int) -> tuple[Any, list[int], list[int]]:
    logits, tokens, parents = _core.draft_logits(path, drafter._core, ids, count)
    return logits, tokens, parents


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_of_deepseek_say_what_transformers_says(tmp_path: Path, heads: int) -> None:
    import torch
    import transformers
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    path = deepseek(tmp_path / "deepseek", heads)
    ids = tiny.prompt(PROMPT, tiny.VOCABULARY)
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    mtp = MtpModel.from_pretrained(model)
    given = torch.tensor([ids])
    with torch.no_grad():
        states = model(given[:, :-1], output_hidden_states=True).hidden_states[-1]
        positions = torch.arange(1, PROMPT)[None]
        cache = MtpCache(config=model.config.get_mtp_config())
        tokens, logits, _ = mtp(given[:, 1:], states, None, positions, cache)
    got, drafts, parents = drafted(path, MTP(path, weights="f32", activations="f32"), np.array(ids, np.uint32), heads)
    assert drafts == tokens[0].tolist()
    assert parents == list(range(-1, heads - 1))
    np.testing.assert_allclose(got.reshape(heads, -1), logits[0].numpy(), atol=1e-4)


def qwen(path: Path, name: str) -> tuple[Path, Any, Any]:
    """A tiny Qwen3.5 with a head for further tokens, and both as torch modules."""
    import torch
    import transformers
    from transformers.modeling_layers import MtpLayer

    tiny.build(by_name(name), path)
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    config = model.config
    index = config.layer_types.index("full_attention")
    block = model.model.layers[index]
    layer = MtpLayer(config, type(block), type(block.input_layernorm), index)
    with torch.no_grad():
        for number, (part, weight) in enumerate(layer.named_parameters()):
            drawn = random(*weight.shape, seed=number)
            weight.copy_(0.3 * drawn * weight.shape[-1] ** 0.5 if "norm" in part else drawn)
    names = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}
    extra = {}
    for part, weight in layer.state_dict().items():
        first, _, rest = part.partition(".")
        if rest.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(weight):
                gate, up = both.chunk(2)
                prefix = f"mtp.layers.0.mlp.experts.{expert}."
                extra |= {prefix + "gate_proj.weight": gate.clone(), prefix + "up_proj.weight": up.clone()}
        elif rest.endswith("experts.down_proj"):
            for expert, down in enumerate(weight):
                extra[f"mtp.layers.0.mlp.experts.{expert}.down_proj.weight"] = down.clone()
        else:
            extra[f"mtp.{names[first]}.{rest}" if first in names else f"mtp.layers.0.{rest}"] = weight.clone()
    store(path, extra, mtp_num_hidden_layers=1)
    return path, model, layer.eval()


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5-moe", "qwen3_next-moe"])
def test_heads_of_qwen_say_what_transformers_modules_say(tmp_path: Path, name: str) -> None:
    import torch

    count = 3
    path, model, layer = qwen(tmp_path / name, name)
    text = tiny.prompt(PROMPT, tiny.VOCABULARY)
    expected = []
    with torch.no_grad():
        states = model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states[-1]
        for _ in range(count):
            # The single head goes on with its own states; all rows at once, without a cache.
            rows = states.shape[1]
            positions = torch.arange(1, rows + 1)[None]
            embeddings = model.model.embed_tokens(torch.tensor([text[1:]]))
            mask = torch.full((rows, rows), torch.finfo(torch.float32).min).triu(1)[None, None]
            rotary = model.model.rotary_emb(embeddings, positions)
            out = layer(embeddings, states, rotary, mask, positions, None)
            expected.append(model.lm_head(out[0, -1]))
            text = [*text, int(expected[-1].argmax())]
            states = torch.cat([states, out[:, -1:]], 1)
    ids = np.array(tiny.prompt(PROMPT, tiny.VOCABULARY), np.uint32)
    got, drafts, _ = drafted(path, MTP(path, weights="f32", activations="f32"), ids, count)
    assert drafts == text[PROMPT:]
    np.testing.assert_allclose(got.reshape(count, -1), torch.stack(expected).numpy(), atol=1e-4)


def same_text(path: Path, drafter: Any, **options: Any) -> ft.LLM:
    """Texts with and without the drafter are equal; the engine with it."""
    plain = ft.LLM(path, speculation=None, **options)
    prompts = [tiny.prompt(length, plain.vocabulary) for length in (3, 31, 40)]
    settings = [
        ft.SamplingParams(max_tokens=40, temperature=0.8 * (index % 2), seed=3, ignore_eos=True, logprobs=2)
        for index in range(3)
    ]
    expected = plain.generate(prompts, settings)
    llm = ft.LLM(path, speculation=drafter, draft_tokens=5, chunk=16, **options)
    # More sequences than pages: some lose theirs and are computed again.
    few = ft.LLM(path, speculation=drafter, draft_tokens=3, kv_pages=5, **options)
    for engine in (llm, few):
        got = engine.generate(prompts, settings)
        assert [it.token_ids for it in got] == [it.token_ids for it in expected]
        assert [it.logprobs for it in got] == [it.logprobs for it in expected]
        assert engine.ledger.drafted > 20
        assert engine.speculation is not None
        assert all(report.stopped is None for report in engine.speculation.drafters)
    return llm


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("vocabulary", [None, 64])
def test_heads_of_deepseek_leave_the_text_alone(tmp_path: Path, heads: int, vocabulary: int | None) -> None:
    path = deepseek(tmp_path / "deepseek", heads)
    same_text(path, MTP(path, vocabulary=vocabulary), weights="f32")


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next-moe"])
def test_heads_of_qwen_leave_the_text_alone(tmp_path: Path, name: str) -> None:
    path, _, _ = qwen(tmp_path / name, name)
    same_text(path, MTP(path), weights="f32")


def test_heads_belong_to_their_checkpoint(tmp_path: Path, tiny_directory: Callable[[str], Path]) -> None:
    other = tiny_directory("llama-2")
    with pytest.raises(ft.UnsupportedError, match="without heads"):
        ft.LLM(other, speculation=MTP(other))
    path = deepseek(tmp_path / "deepseek", 1)
    with pytest.raises(ft.UnsupportedError, match="those of the checkpoint"):
        ft.LLM(other, speculation=MTP(path))


def medusa(path: Path, *, width: int, heads: int, blocks: int, outputs: int = 0, prefix: str = "") -> Path:
    """Random heads in the public layout."""
    import torch
    from safetensors.torch import save_file

    weights: dict[str, Any] = {}
    for head in range(heads):
        for block in range(blocks):
            seed = 100 * head + 10 * block
            weights[f"{prefix}{head}.{block}.linear.weight"] = random(width, width, seed=seed)
            weights[f"{prefix}{head}.{block}.linear.bias"] = random(width, seed=seed + 1)
        if outputs:
            weights[f"{prefix}{head}.{blocks}.weight"] = random(outputs, width, seed=seed + 2)
    path.mkdir()
    save_file({name: tensor.to(torch.float32) for name, tensor in weights.items()}, path / "medusa_lm_head.safetensors")
    config = {"medusa_num_heads": heads, "medusa_num_layers": blocks, "base_model_name_or_path": "x"}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("blocks", "outputs", "prefix"), [(1, 0, ""), (2, tiny.VOCABULARY, "medusa_head.")])
def test_medusa_heads_say_what_their_definition_says(
    tmp_path: Path, tiny_directory: Callable[[str], Path], blocks: int, outputs: int, prefix: str
) -> None:
    import torch
    from safetensors.torch import load_file
    from torch.nn.functional import linear, silu

    path, heads = tiny_directory("llama-2"), 3
    where = medusa(tmp_path / "heads", width=64, heads=heads, blocks=blocks, outputs=outputs, prefix=prefix)
    ids = np.array(tiny.prompt(PROMPT, tiny.VOCABULARY), np.uint32)
    state = torch.from_numpy(ft.LLM(path, weights="f32", speculation=None).hidden(ids[:-1])[-1])
    weights = load_file(where / "medusa_lm_head.safetensors")
    shared = tensors(path)["lm_head.weight"]
    expected = []
    for head in range(heads):
        x = state
        for block in range(blocks):
            name = f"{prefix}{head}.{block}.linear"
            x = x + silu(linear(x, weights[name + ".weight"], weights[name + ".bias"]))
        expected.append(linear(x, weights.get(f"{prefix}{head}.{blocks}.weight", shared)))
    got, drafts, parents = drafted(path, Medusa(where), ids, 60)
    np.testing.assert_allclose(got.reshape(heads, -1), torch.stack(expected).numpy(), atol=1e-4)
    likeliest = [int(logits.argmax()) for logits in expected]
    assert (drafts[0], parents[0]) == (likeliest[0], -1)
    # Every node stands behind one of the depth before it, no likelier than it.
    chances = torch.stack(expected).softmax(-1).numpy()
    depth, chance = [], []
    for token, parent in zip(drafts, parents, strict=True):
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
        chance.append(float(chances[depth[-1], token]) * (chance[parent] if parent >= 0 else 1.0))
    assert max(depth) == heads - 1
    assert chance == sorted(chance, reverse=True) or np.allclose(chance, sorted(chance, reverse=True), rtol=1e-4)


@pytest.mark.parametrize("name", ["llama-2", "qwen3_next-moe", "gemma3"])
def test_medusa_heads_leave_the_text_alone(tmp_path: Path, tiny_directory: Callable[[str], Path], name: str) -> None:
    width = json.loads((tiny_directory(name) / "config.json").read_text())["hidden_size"]
    where = medusa(tmp_path / "heads", width=width, heads=3, blocks=1)
    same_text(tiny_directory(name), Medusa(where), weights="f32")
    if width % 32 == 0:
        same_text(tiny_directory(name), Medusa(where, weights="int4", vocabulary=50), weights="f32")


def test_medusa_heads_must_fit(tmp_path: Path, tiny_directory: Callable[[str], Path]) -> None:
    path = tiny_directory("llama-2")
    with pytest.raises(ft.UnsupportedError, match="width 32"):
        ft.LLM(path, speculation=Medusa(medusa(tmp_path / "narrow", width=32, heads=2, blocks=1)))
    with pytest.raises(ft.UnsupportedError, match="another vocabulary"):
        ft.LLM(path, speculation=Medusa(medusa(tmp_path / "other", width=64, heads=2, blocks=1, outputs=99)))
    broken = medusa(tmp_path / "broken", width=64, heads=2, blocks=1)
    for config, match in [({"medusa_num_heads": 3}, "2.0.linear"), ({"medusa_num_heads": "x"}, "medusa_num_heads")]:
        (broken / "config.json").write_text(json.dumps(config))
        with pytest.raises(ft.FormatError, match=match):
            ft.LLM(path, speculation=Medusa(broken))
    with pytest.raises(ft.FormatError):
        ft.LLM(path, speculation=Medusa(tmp_path / "nowhere"))


def test_drafters_with_weights_stand_beside_each_other(tmp_path: Path) -> None:
    path = deepseek(tmp_path / "deepseek", 1)
    heads = medusa(tmp_path / "heads", width=64, heads=2, blocks=1)
    llm = same_text(path, [Medusa(heads), MTP(path)], weights="f32")
    assert llm.speculation is not None
    assert [report.drafted > 0 for report in llm.speculation.drafters] == [True, False]


def test_states_are_what_the_head_reads(tiny_directory: Callable[[str], Path]) -> None:
    path = tiny_directory("llama-2")
    llm = ft.LLM(path, weights="f32", speculation=None, chunk=16)
    ids = tiny.prompt(PROMPT, tiny.VOCABULARY)
    states = llm.hidden(ids)
    assert states.shape == (PROMPT, 64)
    rows = _core.head_weights(path, np.arange(tiny.VOCABULARY, dtype=np.uint32))
    np.testing.assert_allclose(states @ rows.T, llm.logits(ids), atol=1e-4)
    with pytest.raises(ValueError, match="token id"):
        llm.hidden([1 << 20])
