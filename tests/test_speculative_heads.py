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
from farthing.speculative import MTP, Eagle3, Medusa, train_medusa

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
    # The published model's number of layers stands in the class.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}.*" for layer in range(3, 3 + heads)]
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
    rows = _core.token_weights(path, np.arange(tiny.VOCABULARY, dtype=np.uint32), True)
    np.testing.assert_allclose(states @ rows.T, llm.logits(ids), atol=1e-4)
    with pytest.raises(ValueError, match="token id"):
        llm.hidden([1 << 20])


def eagle(path: Path, *, layout: str, target: Path, options: dict[str, Any]) -> Path:
    """A random EAGLE-3 drafter for a tiny model, which drafts every third token."""
    import torch
    from safetensors.torch import save_file

    width, drafted = 64, tiny.VOCABULARY // 3
    heads, pairs, head = 4, 2, 16
    prefix = "midlayer." if layout == "authors" else "layers.0."
    shapes = {
        "fc": (width, 3 * width),
        "lm_head": (drafted, width),
        prefix + "self_attn.q_proj": (heads * head, 2 * width),
        prefix + "self_attn.k_proj": (pairs * head, 2 * width),
        prefix + "self_attn.v_proj": (pairs * head, 2 * width),
        prefix + "self_attn.o_proj": (width, heads * head),
        prefix + "mlp.gate_proj": (112, width),
        prefix + "mlp.up_proj": (112, width),
        prefix + "mlp.down_proj": (width, 112),
    }
    weights = {f"{name}.weight": random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    norms = ["input_layernorm", "hidden_norm", "post_attention_layernorm"]
    for seed, name in enumerate([*(prefix + it for it in norms), "norm"]):
        weights[f"{name}.weight"] = norm(width, 50 + seed)
    weights["d2t"] = torch.arange(drafted) * 2
    weights["t2d"] = torch.arange(tiny.VOCABULARY) % 3 == 0
    weights["t2d"][3 * drafted :] = False
    block: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 112,
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
        "num_hidden_layers": 1,
        "vocab_size": tiny.VOCABULARY,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
    }
    if layout == "authors":
        config = {**block, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": drafted, **options}
    else:
        verifier = {"name_or_path": str(target), "architectures": ["LlamaForCausalLM"]}
        speculators = {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "default_proposal_method": "greedy",
            "verifier": verifier,
        }
        config = {
            "speculators_model_type": "eagle3",
            "transformer_layer_config": block,
            "speculators_config": speculators,
            "draft_vocab_size": drafted,
            **options,
        }
        weights["embed_tokens.weight"] = tensors(target)["model.embed_tokens.weight"]
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def eagle_logits(path: Path, target: Path, text: list[int], layers: list[int], before: bool, prefix: str) -> Any:
    """Logits behind a text whose last tokens were drafted by the block itself, as `speculators` computes them.

    ``text``: the model has seen `PROMPT` - 1 tokens of it.
    """
    import torch
    import transformers
    from torch.nn.functional import linear, silu
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    weights, known = tensors(path), PROMPT - 1
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager")

    def rms(x: Any, name: str) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weights[name + ".weight"]

    with torch.no_grad():
        states = model(torch.tensor([text[:known]]), output_hidden_states=True).hidden_states
        features = linear(torch.cat([states[layer][0] for layer in layers], -1), weights["fc.weight"])
        embeddings = model.model.embed_tokens(torch.tensor(text[1:]))
        rotary = LlamaRotaryEmbedding(transformers.LlamaConfig(hidden_size=64, num_attention_heads=4))
        while True:
            rows = len(features)
            normed = rms(features, prefix + "hidden_norm")
            both = torch.cat([rms(embeddings[:rows], prefix + "input_layernorm"), normed], -1)
            query, key, value = (
                linear(both, weights[f"{prefix}self_attn.{name}_proj.weight"]).view(1, rows, -1, 16).transpose(1, 2)
                for name in "qkv"
            )
            query, key = apply_rotary_pos_emb(query, key, *rotary(both, torch.arange(1, rows + 1)[None]))
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            mixed = linear(mixed.transpose(1, 2).reshape(rows, -1), weights[prefix + "self_attn.o_proj.weight"])
            stream = (normed if before else features) + mixed
            x = rms(stream, prefix + "post_attention_layernorm")
            gate, up, down = (weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            stream = stream + linear(silu(linear(x, gate)) * linear(x, up), down)
            if rows == len(text) - 1:
                return linear(rms(stream, "norm"), weights["lm_head.weight"])[-1].numpy()
            features = torch.cat([features, stream[-1:]])


@pytest.mark.parametrize(
    ("layout", "options", "layers"),
    [
        ("authors", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 1, 2]}}, [1, 1, 2]),
        ("speculators", {"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "norm_before_residual": True}, [1, 2, 3]),
    ],
)
def test_eagle_says_what_its_definition_says(
    tmp_path: Path, layout: str, options: dict[str, Any], layers: list[int]
) -> None:
    target = tmp_path / "target"
    tiny.build(replace(by_name("llama-2"), options={"num_hidden_layers": 4}), target)
    path = eagle(tmp_path / "eagle", layout=layout, target=target, options=options)
    text = tiny.prompt(PROMPT, tiny.VOCABULARY)
    beams, levels = 5, 4
    drafter = Eagle3(path, weights="f32", activations="f32")
    got, drafts, parents = drafted(target, drafter, np.array(text, np.uint32), beams)
    rows = got.reshape(-1, tiny.VOCABULARY // 3)
    assert len(rows) == 1 + (levels - 1) * beams
    before, prefix = "norm_before_residual" in options, "midlayer." if layout == "authors" else "layers.0."

    def expected(*branch: int) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = eagle_logits(path, target, [*text, *branch], layers, before, prefix)
        return logits

    np.testing.assert_allclose(rows[0], expected(), atol=1e-4)
    first = np.argsort(-rows[0])[:beams]
    for row, place in zip(rows[1:], first, strict=False):
        np.testing.assert_allclose(row, expected(3 * int(place)), atol=1e-4)
    # The likeliest of the second level, and of what is behind it.
    chances = [np.exp(row - np.logaddexp.reduce(row)) for row in rows]
    second = [(chances[0][a] * chances[1 + i][b], a, b) for i, a in enumerate(first) for b in np.argsort(-rows[1 + i])]
    for row, (_, a, b) in zip(rows[1 + beams :], sorted(second, reverse=True)[:2], strict=False):
        np.testing.assert_allclose(row, expected(3 * int(a), 3 * int(b)), atol=1e-4)
    assert drafts[0] == 3 * first[0]
    assert parents[0] == -1
    assert all(parent < place for place, parent in enumerate(parents))
    same_text(target, Eagle3(path), weights="f32")


def test_heads_are_trained_on_the_models_own_text(tmp_path: Path, smollm2: Path) -> None:
    stages: dict[str, tuple[int, int]] = {}
    prompts = [f"Count from {first} to {first + 5}:" for first in range(20)]
    llm = ft.LLM(smollm2, speculation=None, context=256)
    trained = train_medusa(
        llm,
        tmp_path / "heads",
        prompts=prompts,
        max_tokens=32,
        heads=2,
        vocabulary=300,
        epochs=30,
        progress=lambda stage, done, total: stages.update({stage: (done, total)}),
    )
    assert trained.texts == len(prompts)
    assert len(trained.accuracy) == 2
    assert trained.accuracy[0] > 0.1
    assert stages["training"][0] == stages["training"][1]
    params = ft.SamplingParams(max_tokens=32)
    expected = llm.generate(prompts[0], params)[0]
    drafting = ft.LLM(smollm2, speculation=Medusa(trained.path), draft_tokens=4, context=256)
    got = drafting.generate(prompts[0], params)[0]
    assert got.token_ids == expected.token_ids
    assert drafting.ledger.accepted > 5
    with pytest.raises(ValueError, match="heads"):
        train_medusa(llm, tmp_path, heads=0)


def test_training_without_a_template_needs_prompts(tmp_path: Path, tiny_directory: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="prompts"):
        train_medusa(tiny_directory("llama-2"), tmp_path)
