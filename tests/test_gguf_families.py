"""A GGUF file of a family gives the logits of the directory it was made from."""

from __future__ import annotations

import json
import re
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
    "feed_forward.gate": "ffn_gate_inp",
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


def stacked(tensors: dict[str, Any], writer: Any, names: dict[str, str]) -> dict[str, Any]:
    """Writes each layer's experts as one tensor for each kind of matrix; returns the other tensors."""
    experts: dict[tuple[str, str], dict[int, Any]] = {}
    others = {}
    for name, value in tensors.items():
        found = re.fullmatch(r"model\.layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight", name)
        if found:
            experts.setdefault((found[1], names[found[3]]), {})[int(found[2])] = value
        else:
            others[name] = value
    assert experts
    for (layer, kind), values in experts.items():
        writer.add_tensor(f"blk.{layer}.ffn_{kind}_exps.weight", np.stack([values[i] for i in range(len(values))]))
    return others


KINDS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def lfm2(directory: Path, path: Path) -> None:
    """Writes a directory of LFM2, dense or with experts, as llama.cpp's converter does."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    mixture = config["model_type"] == "lfm2_moe"
    writer = GGUFWriter(path, "lfm2moe" if mixture else "lfm2")
    writer.add_embedding_length(config["hidden_size"])
    if mixture:
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        tensors = stacked(tensors, writer, {"w1": "gate", "w3": "up", "w2": "down"})
    else:
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
        if name.endswith("expert_bias"):
            writer.add_tensor(f"blk.{name.split('.')[2]}.exp_probs_b.bias", value)
        else:
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


def qwen3next(directory: Path, path: Path) -> None:
    """Writes a directory of Qwen3-Next as llama.cpp's converter does: queries, keys, values and gates taken apart."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    writer = GGUFWriter(path, "qwen3next")
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]))
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(key_dim)
    writer.add_ssm_group_count(keys)
    writer.add_ssm_time_step_rank(values)
    writer.add_ssm_inner_size(values * value_dim)
    writer.add_full_attention_interval(4)
    tensors = load_file(directory / "model.safetensors")
    if config["num_experts"]:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
        tensors = stacked(tensors, writer, KINDS)
    for name, value in tensors.items():
        block = name.removeprefix("model.layers.").partition(".")[0]
        part = name.removesuffix(".weight").rpartition("linear_attn.")[2]
        if name.endswith("norm.weight") and part != "norm":
            writer.add_tensor(renamed(name, MOE | QWEN35), value + 1)
        elif part == "in_proj_qkvz":
            wide = values // keys * value_dim
            heads = value.reshape(keys, -1, value.shape[-1])
            parts = np.split(heads, np.cumsum([key_dim, key_dim, wide]), axis=1)
            query, key, inner, gate = (part.reshape(-1, value.shape[-1]) for part in parts)
            writer.add_tensor(f"blk.{block}.attn_qkv.weight", np.concatenate([query, key, inner]))
            writer.add_tensor(f"blk.{block}.attn_gate.weight", np.ascontiguousarray(gate))
        elif part == "in_proj_ba":
            writer.add_tensor(f"blk.{block}.ssm_ba.weight", value)
        elif part == "A_log":
            writer.add_tensor(f"blk.{block}.ssm_a", -np.exp(value))
        elif part == "dt_bias":
            writer.add_tensor(f"blk.{block}.ssm_dt.bias", value)
        else:
            # One gate is no matrix.
            writer.add_tensor(renamed(name, MOE | QWEN35), value.squeeze())
    finish(writer)


DEEPSEEK = MOE | {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def deepseek2(directory: Path, path: Path, *, gating: int = 2, joined: bool = False) -> None:
    """Writes a directory of DeepSeek-V3 as llama.cpp's converter does; or did, while it kept ``kv_b_proj`` joined."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    writer = GGUFWriter(path, "deepseek2")
    heads, latent = config["num_attention_heads"], config["kv_lora_rank"]
    plain, rotated, values = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_context_length(config["max_position_embeddings"])
    rotary = config["rope_parameters"]
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_rope_dimension_count(rotated)
    if rotary["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rotary["factor"])
        writer.add_rope_scaling_orig_ctx_len(rotary["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * rotary["mscale_all_dim"])
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rotated)
    writer.add_value_length(latent)
    writer.add_key_length_mla(plain + rotated)
    writer.add_value_length_mla(values)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType(gating))
    for name, value in stacked(load_file(directory / "model.safetensors"), writer, KINDS).items():
        block = name.removeprefix("model.layers.").partition(".")[0]
        if name.endswith("e_score_correction_bias"):
            writer.add_tensor(f"blk.{block}.exp_probs_b.bias", value)
        elif not name.endswith("kv_b_proj.weight"):
            writer.add_tensor(renamed(name, DEEPSEEK), value)
        elif joined:
            writer.add_tensor(f"blk.{block}.attn_kv_b.weight", value)
        else:
            maps = value.reshape(heads, plain + values, latent)
            keys = np.ascontiguousarray(maps[:, :plain].transpose(0, 2, 1))
            writer.add_tensor(f"blk.{block}.attn_k_b.weight", keys)
            writer.add_tensor(f"blk.{block}.attn_v_b.weight", np.ascontiguousarray(maps[:, plain:]))
    finish(writer)


def old_deepseek2(directory: Path, path: Path) -> None:
    deepseek2(directory, path, joined=True)


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
                named = renamed(name, names) if "sinks" not in name else f"blk.{block}.attn_sinks.weight"
                # The gate of a shared expert is no matrix.
                writer.add_tensor(named, value.squeeze().numpy())
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


OTHERS = [
    ("lfm2", lfm2),
    ("lfm2-moe", lfm2),
    ("qwen3_5", qwen35),
    ("qwen3_next-moe", qwen3next),
    ("qwen3_next-dense", qwen3next),
    ("deepseek-v3", deepseek2),
    ("deepseek-v3-equal-magnitudes", deepseek2),
    ("deepseek-v3", old_deepseek2),
]


@pytest.mark.parametrize(("name", "convert"), [*OTHERS, *((name, moe) for name in CASES)])
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


def test_deepseek_v2_is_refused(tiny_directory: Callable[[str], Path], tmp_path: Path) -> None:
    deepseek2(tiny_directory("deepseek-v3"), tmp_path / "model.gguf", gating=1)
    with pytest.raises(ft.UnsupportedError, match="expert_gating_func 1"):
        ft.LLM(tmp_path / "model.gguf")
