"""A GGUF file of a family gives the logits of the directory it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import farthing as ft
import gguf
import numpy as np
import pytest
import reference
import tiny
from farthing.plan import plan

# transformers' name -> GGUF's, as llama.cpp's converter has them.
COMMON = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
}
MOE = COMMON | {
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.router": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
GPT_OSS = {"mlp.router": "ffn_gate_inp", "post_attention_layernorm": "post_attention_norm"}
# model_type -> architecture, and whether rows of queries and keys are interleaved.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mixtral": ("llama", True),
    "qwen2_moe": ("qwen2moe", False),
    "qwen3_moe": ("qwen3moe", False),
    "olmoe": ("olmoe", False),
    "granite": ("granite", True),
    "granitemoe": ("granitemoe", True),
    "gpt_oss": ("gpt-oss", False),
}
LFM2 = COMMON | {
    "model.embedding_norm": "token_embd_norm",
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "conv.conv": "shortconv.conv",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


QWEN35 = COMMON | {
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def renamed(name: str, names: dict[str, str]) -> str:
    """The GGUF name of a tensor."""
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{names[part]}.{suffix}"
    return f"{names[stem]}.{suffix}"


def lfm2(directory: Path, path: Path) -> None:
    """Writes a directory of LFM2 as llama.cpp's converter does."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    writer = GGUFWriter(path, "lfm2")
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(len(tensors["model.layers.0.feed_forward.w1.weight"]))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    attends = [kind == "full_attention" for kind in config["layer_types"]]
    writer.add_head_count_kv([config["num_key_value_heads"] * here for here in attends])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    for name, value in tensors.items():
        writer.add_tensor(renamed(name, LFM2), value.squeeze(1) if name.endswith("conv.conv.weight") else value)
    finish(writer)


def qwen35(directory: Path, path: Path) -> None:
    """Writes a directory of Qwen3.5 as llama.cpp's converter does: value heads go round the key heads."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    writer = GGUFWriter(path, "qwen35")
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"] + 1)
    writer.add_nextn_predict_layers(1)  # a layer that drafts, not ours
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]))
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(key_dim)
    writer.add_ssm_group_count(keys)
    writer.add_ssm_time_step_rank(values)
    writer.add_ssm_inner_size(values * value_dim)
    writer.add_full_attention_interval(4)

    def round_keys(value: Any, axis: int, width: int) -> Any:
        shape = value.shape
        heads = value.reshape(*shape[:axis], keys, values // keys, width, *shape[axis + 1 :])
        return np.ascontiguousarray(heads.swapaxes(axis, axis + 1).reshape(shape))

    for name, value in load_file(directory / "model.safetensors").items():
        part = name.removesuffix(".weight").rpartition("linear_attn.")[2]
        if name.endswith("norm.weight") and part != "norm":
            value = value + 1
        if "linear_attn." not in name:
            writer.add_tensor(renamed(name, QWEN35), value)
            continue
        if part in ("in_proj_qkv", "conv1d"):
            value = value.squeeze(1) if part == "conv1d" else value
            split = 2 * keys * key_dim
            value = np.concatenate([value[:split], round_keys(value[split:], 0, value_dim)])
        elif part == "in_proj_z":
            value = round_keys(value, 0, value_dim)
        elif part == "out_proj":
            value = round_keys(value, 1, value_dim)
        elif part != "norm":
            value = round_keys(value, 0, 1)
        block = name.split(".")[2]
        if part == "A_log":
            writer.add_tensor(f"blk.{block}.ssm_a", -np.exp(value))
        elif part == "dt_bias":
            writer.add_tensor(f"blk.{block}.ssm_dt.bias", value)
        else:
            writer.add_tensor(renamed(name, QWEN35), value)
    finish(writer)


def moe(directory: Path, path: Path) -> None:
    """Writes a mixture of experts as llama.cpp's converters do: experts in one tensor, heads of Llama interleaved."""
    import torch
    from gguf import GGUFWriter

    model, config = reference.load(directory), json.loads((directory / "config.json").read_text())
    architecture, permuted = ARCHITECTURES[config["model_type"]]
    writer = GGUFWriter(path, architecture)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    if head_dim := config.get("head_dim"):
        writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_context_length(config["max_position_embeddings"])
    rotary = config["rope_parameters"]
    writer.add_rope_freq_base(rotary["rope_theta"])
    if rotary["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rotary["factor"])
        writer.add_rope_scaling_orig_ctx_len(rotary["original_max_position_embeddings"])
    if (window := config.get("sliding_window")) and config.get("use_sliding_window", True):
        writer.add_sliding_window(window)
    for name, add in {
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
        "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
    }.items():
        if name in config:
            add(config[name])
    # Some converters say of dense models that they have none.
    writer.add_expert_count(config.get("num_experts") or config.get("num_local_experts") or 0)
    for name, value in model.state_dict().items():
        block, _, part = name.removeprefix("model.layers.").partition(".") if "layers" in name else ("", "", "")
        if part.endswith(("q_proj.weight", "k_proj.weight")) and permuted:
            count = heads if "q_proj" in part else kv_heads
            halves = value.reshape(count, 2, -1, value.shape[-1])
            value = halves.transpose(1, 2).reshape(value.shape)
        if ".experts." not in name:
            if name != "lm_head.weight" or not config["tie_word_embeddings"]:
                names = MOE | GPT_OSS if architecture == "gpt-oss" else MOE
                writer.add_tensor(
                    renamed(name, names) if "sinks" not in name else f"blk.{block}.attn_sinks.weight", value.numpy()
                )
            continue
        leaf, bias = part.rpartition(".")[2], "bias" if part.endswith("bias") else "weight"
        if architecture == "gpt-oss":
            value = value if bias == "bias" else value.transpose(1, 2)
            gate, up = value[:, 0::2], value[:, 1::2]
        else:
            gate, up = value.chunk(2, dim=1)
        kinds = {"down": value} if leaf.startswith("down") else {"gate": gate, "up": up}
        for kind, experts in kinds.items():
            writer.add_tensor(f"blk.{block}.ffn_{kind}_exps.{bias}", torch.clone(experts).contiguous().numpy())
    finish(writer)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CASES = [
    "llama-2",
    "mixtral",
    "qwen3-moe",
    "qwen3-moe-mixed",
    "qwen2-moe",
    "olmoe",
    "granite",
    "granite-moe",
    "gpt-oss",
]


@pytest.mark.parametrize(("name", "convert"), [("lfm2", lfm2), ("qwen3_5", qwen35), *((name, moe) for name in CASES)])
def test_gguf_equals_directory(
    name: str, convert: Callable[[Path, Path], None], tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    directory, path = tiny_directory(name), tmp_path / "model.gguf"
    convert(directory, path)
    ids = tiny.prompt(60)
    expected = ft.LLM(directory, weights="f32").logits(ids)
    # Heads in another order are summed in another order.
    np.testing.assert_allclose(ft.LLM(path, weights="f32").logits(ids), expected, rtol=0, atol=5e-5)
    assert plan(path, weights="int8").resident_bytes == ft.LLM(path, weights="int8").explain().nbytes
