"""Wrong files, wrong arguments, wrong wishes: each is an error that says what was got and what would have worked."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import farthing as ft
import numpy as np
import pytest
import tiny


@pytest.fixture
def directory(tiny_directory: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(tiny_directory("llama-2"), copy)
    return copy


@pytest.fixture(scope="module")
def llm(tiny_directory: Callable[[str], Path]) -> ft.LLM:
    return ft.LLM(tiny_directory("llama-2"), context=128)


@pytest.fixture(scope="module")
def chatter(smollm2: Path) -> ft.LLM:
    return ft.LLM(smollm2, context=256)


# --- checkpoint directories ------------------------------------------------------------------------------------------


def configure(**changes: Any) -> Callable[[Path], None]:
    """Changes values of config.json; `...` removes one."""

    def damage(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: void((directory / name).write_bytes(content))


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def void(_: object) -> None:
    """For lambdas that are called for their effect."""


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes the JSON header of model.safetensors."""

    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        tensors = json.loads(content[8 : 8 + length])
        change(tensors)
        encoded = json.dumps(tensors).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])

    return damage


NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


def index(weight_map: Any) -> Callable[[Path], None]:
    """Puts an index of shards in the place of the one file."""

    def damage(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def without_norm(tensors: dict[str, Any]) -> None:
    tensors["model.other.weight"] = tensors.pop(NORM)


DAMAGED: dict[str, Callable[[Path], None]] = {
    "no config": remove("config.json"),
    "empty config": write("config.json", b""),
    "config is no JSON": write("config.json", b'{"hidden_size": 64'),
    "config is a list": write("config.json", b"[]"),
    "config is no UTF-8": write("config.json", b'{"model_type": "\xff\xfe"}'),
    "deeply nested config": write("config.json", b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "no model type": configure(model_type=...),
    "model type is a number": configure(model_type=7),
    "no hidden size": configure(hidden_size=...),
    "hidden size is text": configure(hidden_size="64"),
    "hidden size is zero": configure(hidden_size=0),
    "hidden size is negative": configure(hidden_size=-64),
    "hidden size is huge": configure(hidden_size=2**62),
    "hidden size differs from the tensors": configure(hidden_size=128),
    "layers missing in the file": configure(num_hidden_layers=3),
    "layers beyond counting": configure(num_hidden_layers=2**40),
    "no layers": configure(num_hidden_layers=0),
    "vocabulary differs from the tensors": configure(vocab_size=tiny.VOCABULARY + 1),
    "vocabulary is huge": configure(vocab_size=2**60),
    "heads not divisible by kv heads": configure(num_attention_heads=4, num_key_value_heads=3),
    "no kv heads": configure(num_key_value_heads=0),
    "odd head dimension": configure(head_dim=15),
    "epsilon is text": configure(rms_norm_eps="small"),
    "epsilon is negative": configure(rms_norm_eps=-1.0),
    "rope parameters are a list": configure(rope_parameters=[1]),
    "rope theta is zero": configure(rope_parameters={"rope_type": "default", "rope_theta": 0.0}),
    "rope factor is missing": configure(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
    "rope factor is zero": configure(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}),
    "no tensors": remove("model.safetensors"),
    "empty tensors": write("model.safetensors", b""),
    "tensors are noise": write("model.safetensors", bytes(range(256)) * 40),
    "header longer than the file": write("model.safetensors", struct.pack("<Q", 2**40) + b"{}"),
    "truncated tensors": truncate,
    "tensor missing": header(without_norm),
    "tensor of another shape": header(lambda t: t[NORM].update(shape=[8, 8])),
    "tensor of a huge shape": header(lambda t: t[NORM].update(shape=[2**32, 2**32])),
    "tensor of unknown type": header(lambda t: t[NORM].update(dtype="F7")),
    "tensor beyond the end": header(lambda t: t[NORM].update(data_offsets=[2**40, 2**40 + 256])),
    "tensor backwards": header(lambda t: t[NORM].update(data_offsets=t[NORM]["data_offsets"][::-1])),
    "tensors overlap": header(lambda t: t[NORM].update(data_offsets=[0, 256])),
    "offsets are text": header(lambda t: t[NORM].update(data_offsets=["0", "256"])),
    "index is no map": index(["model-00001-of-00001.safetensors"]),
    "index names a missing shard": index({NORM: "model-00002-of-00001.safetensors"}),
    "index leads out of the directory": index({NORM: "../model.safetensors", EMBEDDING: "../model.safetensors"}),
    "index names an absolute path": index({NORM: "/dev/zero"}),
    "index puts a tensor in the wrong shard": index({"not.there": "model-00001-of-00001.safetensors"}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_directory(case: str, directory: Path) -> None:
    DAMAGED[case](directory)
    with pytest.raises(ft.FormatError) as caught:
        ft.LLM(directory)
    assert "got" in str(caught.value) or "expected" in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["conv"]},
        {"layer_types": ["conv", "full_attention", "conv", "linear_attention"]},
        {"layer_types": ["full_attention"] * 4},
        {"layer_types": ..., "full_attn_idxs": [4]},
        {"layer_types": ..., "full_attn_idxs": [-1]},
        {"layer_types": ..., "full_attn_idxs": 1},
        {"conv_L_cache": 0},
        {"conv_L_cache": 4},
        {"conv_L_cache": 2**40},
        {"conv_bias": True},
        {"conv_bias": "yes"},
        {"norm_eps": 0.0},
        {"block_multiple_of": 0},
        {"block_multiple_of": 7},
        {"block_ffn_dim_multiplier": 1e300},
        {"block_ff_dim": 2**62},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_damaged_convolutions(changes: dict[str, Any], tiny_directory: Callable[[str], Path], tmp_path: Path) -> None:
    """LFM2: layers of two kinds, whose shapes follow from the configuration."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(tiny_directory("lfm2"), copy)
    configure(**changes)(copy)
    with pytest.raises(ft.FormatError) as caught:
        ft.LLM(copy)
    assert "got" in str(caught.value) or "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_5", {"layer_types": ["conv"] * 4}),
        ("qwen3_5", {"layer_types": ["linear_attention"] * 3}),
        ("qwen3_5", {"layer_types": ["linear_attention"] * 4}),
        ("qwen3_5", {"linear_num_value_heads": 3}),
        ("qwen3_5", {"linear_num_key_heads": 0}),
        ("qwen3_5", {"linear_num_key_heads": 4}),
        ("qwen3_5", {"linear_key_head_dim": 17}),
        ("qwen3_5", {"linear_value_head_dim": 2**40}),
        ("qwen3_5", {"linear_conv_kernel_dim": 0}),
        ("qwen3_5", {"linear_conv_kernel_dim": 3}),
        ("qwen3_5", {"partial_rotary_factor": "all"}),
        ("qwen3_5", {"full_attention_interval": 0}),
        ("qwen3_5", {"attention_bias": True}),
        ("qwen3_next-dense", {"linear_num_value_heads": 4}),
        ("qwen3_next-dense", {"num_experts": -1}),
        ("qwen3_next-dense", {"num_experts": 8, "mlp_only_layers": [4]}),
    ],
    ids=str,
)
def test_damaged_delta_rules(
    name: str, changes: dict[str, Any], tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """Hybrids of Qwen, likewise."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(tiny_directory(name), copy)
    configure(**changes)(copy)
    with pytest.raises(ft.FormatError) as caught:
        ft.LLM(copy)
    assert "got" in str(caught.value) or "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"num_local_experts": 5}),
        ("mixtral", {"num_local_experts": 0}),
        ("mixtral", {"num_experts_per_tok": 7}),
        ("mixtral", {"intermediate_size": 41}),
        ("qwen3-moe", {"mlp_only_layers": "none"}),
        ("qwen3-moe", {"decoder_sparse_step": 0}),
        ("qwen2-moe", {"shared_expert_intermediate_size": 53}),
        ("granite-moe", {"num_experts": 7}),
        ("granite-moe", {"residual_multiplier": 0.0}),
        ("gpt-oss", {"swiglu_limit": -1.0}),
        ("gpt-oss", {"intermediate_size": 36}),
        ("deepseek-v3", {"n_group": 3}),
        ("deepseek-v3", {"topk_group": 5}),
        ("deepseek-v3", {"qk_rope_head_dim": 7}),
        ("deepseek-v3", {"kv_lora_rank": 35}),
        ("lfm2-moe", {"num_dense_layers": -1}),
        ("qwen3_next-moe", {"num_experts_per_tok": 7}),
    ],
)
def test_damaged_mixtures(
    name: str, changes: dict[str, Any], tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """Experts and latent attention, likewise."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(tiny_directory(name), copy)
    configure(**changes)(copy)
    with pytest.raises((ft.FormatError, ValueError)) as caught:
        ft.LLM(copy)
    assert "got" in str(caught.value) or "expected" in str(caught.value)


def test_undamaged_directory(directory: Path) -> None:
    """The fixture itself loads, so the cases above fail for the reason they name."""
    assert ft.LLM(directory).logits([1]).shape == (1, tiny.VOCABULARY)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mamba"},
        {"model_type": "deepseek_v4"},
        {"hidden_act": "relu6"},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
    ids=lambda changes: next(iter(changes.items()))[0] + " " + str(next(iter(changes.values())))[:20],
)
def test_unsupported_model_says_what_works(changes: dict[str, Any], directory: Path) -> None:
    configure(**changes)(directory)
    with pytest.raises(ft.UnsupportedError) as caught:
        ft.LLM(directory)
    assert len(str(caught.value)) > 30  # what was got, and what would work


def test_tensor_of_integers_says_what_works(directory: Path) -> None:
    """The file is well formed, and its type is known, but no weight is an integer."""
    header(lambda tensors: tensors[NORM].update(dtype="I32"))(directory)
    with pytest.raises(ft.UnsupportedError, match=r"I32.*F32"):
        ft.LLM(directory)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    """A pickle that would run code on loading stays closed."""
    trap = tmp_path / "trap"
    pickle = b"cbuiltins\nopen\n(V" + str(trap).encode() + b"\nVw\ntR."
    (tmp_path / "model").mkdir()
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"):
        path = tmp_path / "model" / name
        path.write_bytes(pickle)
        with pytest.raises(ft.UnsupportedError, match="safetensors"):
            ft.LLM(path)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ft.UnsupportedError, match="safetensors"):
        ft.LLM(tmp_path / "model")
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGUF" + struct.pack("<I", 3),
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62) + b"general.architecture",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64),
        b"GGML" + bytes(200),
        b"PK\x03\x04" + bytes(200),
    ],
    ids=["empty", "magic", "version", "v1", "v99", "big-endian", "tensors", "keys", "key", "bare", "ggml", "zip"],
)
def test_damaged_gguf(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises((ft.FormatError, ft.UnsupportedError)):
        ft.LLM(path)


def test_truncated_gguf(smollm2: Path, tmp_path: Path) -> None:
    """A download that broke off, at many places."""
    whole = smollm2.read_bytes()
    path = tmp_path / "model.gguf"
    for length in (3, 4, 8, 24, 100, 5000, 500_000, 1_500_000, 5_000_000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ft.FormatError):
            ft.LLM(path)


@pytest.mark.parametrize(
    "name", ["no-such-model", "no/such-model", "./missing.gguf", "/nowhere/model.gguf", "", "a" * 300]
)
def test_missing_model(name: str) -> None:
    with pytest.raises(ft.ModelNotFoundError) as caught:
        ft.LLM(name)
    assert isinstance(caught.value, FileNotFoundError)


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", "int5"),
        ("weights", 4),
        ("activations", "a4"),
        ("kv", "int3"),
        ("threads", 0),
        ("threads", -1),
        ("threads", "two"),
        ("threads", True),
        ("threads", 10**9),
        ("max_sequences", 0),
        ("max_sequences", None),
        ("context", 0),
        ("context", 10**6),
        ("chunk", 0),
        ("chunk", 1.5),
        ("kv_pages", 0),
    ],
)
def test_wrong_option(name: str, value: Any, tiny_directory: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=f"{name}.*got.*expected"):
        ft.LLM(tiny_directory("llama-2"), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("weights", "ternary"), ("speculation", "ngram"), ("speculation", object())]
)
def test_unsupported_option(name: str, value: Any, tiny_directory: Callable[[str], Path]) -> None:
    with pytest.raises(ft.UnsupportedError, match=f"{name}.*not supported.*auto"):
        ft.LLM(tiny_directory("llama-2"), **{name: value})


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "10"),
        ("max_tokens", True),
        ("max_tokens", 2**70),
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", INFINITY),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_k", 0),
        ("top_k", -5),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", NAN),
        ("min_p", -0.01),
        ("min_p", 1.0),
        ("min_p", NAN),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", INFINITY),
        ("presence_penalty", NAN),
        ("presence_penalty", INFINITY),
        ("frequency_penalty", NAN),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("stop", ""),
        ("stop", ["fine", ""]),
        ("stop", 3),
        ("stop", [3]),
        ("ignore_eos", "yes"),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", "all"),
    ],
)
def test_wrong_sampling_parameter(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.*got.*expected"):
        ft.SamplingParams(**{name: value})


def test_unknown_names_are_errors(tiny_directory: Callable[[str], Path]) -> None:
    with pytest.raises(TypeError, match="temprature"):
        ft.SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="thread"):
        ft.LLM(tiny_directory("llama-2"), thread=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        np.array([], dtype=np.int64),
        [tiny.VOCABULARY],
        [3, -1],
        [3, 2**40],
        [3, 1.5],
        [3, "a"],
        [[[3]]],
        np.array([3.0, 4.0]),
        np.zeros((2, 2, 2), np.int64),
        list(range(3, 3 + 128)),  # as long as the context: no room for an answer
        list(range(3, 3 + 200)),
        None,
        3,
        b"bytes",
    ],
    ids=lambda prompt: str(prompt)[:24].replace("\n", " "),
)
def test_wrong_prompt(prompt: Any, llm: ft.LLM) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        llm.generate([prompt] if isinstance(prompt, list) and not prompt else prompt, ft.SamplingParams(max_tokens=2))
    assert str(caught.value)
    with pytest.raises((ValueError, TypeError)):
        list(llm.stream(prompt, ft.SamplingParams(max_tokens=2)))
    # The engine goes on.
    assert len(llm.generate([3, 4], ft.SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_one_wrong_prompt_among_good_ones(llm: ft.LLM) -> None:
    with pytest.raises(ValueError, match=r"got.*expected"):
        llm.generate([[3, 4], [tiny.VOCABULARY], [5]], ft.SamplingParams(max_tokens=2))


def test_no_prompts_give_no_completions(llm: ft.LLM) -> None:
    assert llm.generate([]) == []
    assert llm.chat([]) == []


def test_wrong_params(llm: ft.LLM) -> None:
    with pytest.raises(ValueError, match=r"params.*got 1.*expected"):
        llm.generate([[3], [4]], [ft.SamplingParams()])
    with pytest.raises(ValueError, match=r"params.*got.*expected"):
        llm.generate([3], {"max_tokens": 3})  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [[], [tiny.VOCABULARY], [-1], [1.5], [[1, 2]], "text", None, list(range(129))])
def test_wrong_ids_for_logits(ids: Any, llm: ft.LLM) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        llm.logits(ids)
    assert str(caught.value)


def test_text_without_tokenizer(llm: ft.LLM) -> None:
    with pytest.raises(ft.UnsupportedError, match="token ids"):
        llm.generate("text")
    with pytest.raises(ft.UnsupportedError, match="token"):
        llm.tokenizer.encode("text")
    with pytest.raises(ft.UnsupportedError, match="chat"):
        llm.chat([{"role": "user", "content": "text"}])


@pytest.mark.parametrize(
    "messages",
    [
        "hello",
        [{"role": "user"}],
        [{"content": "hello"}],
        [{"role": "user", "content": object()}],
        ["hello"],
        None,
    ],
    ids=str,
)
def test_wrong_messages(messages: Any, chatter: ft.LLM) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        chatter.chat(messages, ft.SamplingParams(max_tokens=1))
    assert str(caught.value)


def test_wrong_prices(llm: ft.LLM) -> None:
    (completion,) = llm.generate([3, 4], ft.SamplingParams(max_tokens=2))
    assert completion.ledger.cost({}) == 0.0
    for prices in ({"gpu_hour": 1.0}, {"cpu_hour": -1.0}, {"cpu_hour": NAN}, {"cpu_hour": "1"}):
        with pytest.raises(ValueError, match=r"prices.*got.*expected"):
            completion.ledger.cost(prices)  # type: ignore[arg-type]
