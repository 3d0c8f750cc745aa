"""Tiny random checkpoints of every model family, written by transformers itself.

Each is a directory as found on a hub: `config.json` and safetensors in float32. Weights are drawn so that activations
and logits are of order one (transformers' own initialisation gives logits near zero, which would hide errors), and
norms and biases are far from the identity. The seed is the name, so a checkpoint is the same on every machine.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 320


@dataclass(frozen=True)
class Tiny:
    """One checkpoint: a transformers configuration class and what differs from `BASE`."""

    name: str
    config_class: str
    options: dict[str, Any] = field(default_factory=dict)
    # Write config.json as transformers 4 did: rope_theta and rope_scaling instead of rope_parameters.
    legacy: bool = False


BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def rope(kind: str, theta: float = 10000.0, **options: Any) -> dict[str, Any]:
    """The rotary parameters of one kind."""
    return {"rope_type": kind, "rope_theta": theta, **options}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}

LLAMA = [
    Tiny("llama-2", "LlamaConfig", {"num_key_value_heads": 4, "rope_parameters": rope("default")}),
    Tiny(
        "llama-linear-tied",
        "LlamaConfig",
        {"tie_word_embeddings": True, "rope_parameters": rope("linear", factor=4.0), "num_hidden_layers": 3},
    ),
    Tiny(
        "llama-3-biases",
        "LlamaConfig",
        {
            "num_attention_heads": 8,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": rope("llama3", 500000.0, **LLAMA3),
        },
    ),
    Tiny("llama-yarn", "LlamaConfig", {"num_key_value_heads": 1, "rope_parameters": rope("yarn", **YARN)}),
    Tiny(
        "llama-3-legacy",
        "LlamaConfig",
        {"tie_word_embeddings": True, "rope_parameters": rope("llama3", 500000.0, **LLAMA3)},
        legacy=True,
    ),
    Tiny(
        "llama-yarn-legacy",
        "LlamaConfig",
        {"head_dim": 32, "rope_parameters": rope("yarn", **YARN, beta_fast=16.0, beta_slow=2.0, attention_factor=1.2)},
        legacy=True,
    ),
]
# SmolLM2 is a Llama; its 9 heads over 3 and a width that no vector divides are kept here.
SMOLLM2 = [
    Tiny(
        "smollm2",
        "LlamaConfig",
        {
            "hidden_size": 72,
            "intermediate_size": 150,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_parameters": rope("default", 100000.0),
        },
    ),
    Tiny(
        "smollm2-wide-heads",
        "LlamaConfig",
        {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 131},
    ),
    Tiny(
        "smollm2-legacy",
        "LlamaConfig",
        {
            "hidden_size": 36,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
        },
        legacy=True,
    ),
]
MISTRAL = [
    Tiny("mistral-window", "MistralConfig", {"sliding_window": 16, "num_hidden_layers": 3}),
    Tiny("mistral-no-window", "MistralConfig", {"sliding_window": None, "num_attention_heads": 8, "head_dim": 16}),
    Tiny(
        "mistral-window-legacy",
        "MistralConfig",
        {"sliding_window": 37, "head_dim": 24, "num_key_value_heads": 1, "tie_word_embeddings": True},
        legacy=True,
    ),
]
QWEN2 = [
    Tiny("qwen2", "Qwen2Config", {"rope_parameters": rope("default", 1000000.0)}),
    Tiny("qwen2-tied", "Qwen2Config", {"tie_word_embeddings": True, "num_key_value_heads": 1}, legacy=True),
    Tiny(
        "qwen2-window",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    Tiny("qwen2-window-unused", "Qwen2Config", {"use_sliding_window": False, "sliding_window": 24}, legacy=True),
]
QWEN3 = [
    Tiny("qwen3", "Qwen3Config", {"head_dim": 32, "rope_parameters": rope("default", 1000000.0)}),
    Tiny(
        "qwen3-tied-biases",
        "Qwen3Config",
        {"head_dim": 16, "num_attention_heads": 8, "attention_bias": True, "tie_word_embeddings": True},
        legacy=True,
    ),
    Tiny("qwen3-yarn", "Qwen3Config", {"hidden_size": 48, "head_dim": 24, "rope_parameters": rope("yarn", **YARN)}),
    Tiny(
        "qwen3-window",
        "Qwen3Config",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
]
SMOLLM3 = [
    Tiny("smollm3", "SmolLM3Config", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    Tiny(
        "smollm3-explicit",
        "SmolLM3Config",
        {
            "no_rope_layers": [0, 1, 0],
            "num_hidden_layers": 3,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    Tiny(
        "smollm3-yarn-legacy",
        "SmolLM3Config",
        {"no_rope_layer_interval": 2, "num_key_value_heads": 1, "rope_parameters": rope("yarn", 2000000.0, **YARN)},
        legacy=True,
    ),
]
# attn_logit_softcapping, which no released checkpoint sets, is not here: transformers reads it and leaves it unused.
GEMMA3 = [
    Tiny(
        "gemma3",
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {
                "sliding_attention": rope("default"),
                "full_attention": rope("linear", 1000000.0, factor=8.0),
            },
        },
    ),
    Tiny(
        "gemma3-softcap",
        "Gemma3TextConfig",
        {
            "hidden_size": 48,
            "sliding_window": 33,
            "head_dim": 16,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 48,
            "final_logit_softcapping": 4.0,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    Tiny(
        "gemma3-legacy",
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 3,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "sliding_attention": rope("default", 8000.0),
                "full_attention": rope("linear", 500000.0, factor=4.0),
            },
        },
        legacy=True,
    ),
]
# 36 and 40 are no multiples of any vector or group.
SPARSE: dict[str, Any] = {"intermediate_size": 40, "num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 1.5,
}
MOE = [
    Tiny("mixtral", "MixtralConfig", SPARSE),
    Tiny("mixtral-all", "MixtralConfig", {**SPARSE, "num_experts_per_tok": 6, "sliding_window": 20}),
    Tiny(
        "qwen3-moe",
        "Qwen3MoeConfig",
        {**SPARSE, "moe_intermediate_size": 36, "head_dim": 24, "norm_topk_prob": True},
    ),
    Tiny(
        "qwen3-moe-mixed",
        "Qwen3MoeConfig",
        {
            **SPARSE,
            "moe_intermediate_size": 72,
            "num_hidden_layers": 4,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 2,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    Tiny("qwen2-moe", "Qwen2MoeConfig", {**SPARSE, "moe_intermediate_size": 36, "shared_expert_intermediate_size": 52}),
    Tiny("olmoe", "OlmoeConfig", SPARSE),
    Tiny("olmoe-normalised", "OlmoeConfig", {**SPARSE, "norm_topk_prob": True, "num_experts_per_tok": 4}),
    Tiny("granite", "GraniteConfig", GRANITE),
    Tiny("granite-moe", "GraniteMoeConfig", {**SPARSE, **GRANITE}),
    Tiny(
        "gpt-oss",
        "GptOssConfig",
        {
            **SPARSE,
            "head_dim": 16,
            "sliding_window": 20,
            "num_hidden_layers": 3,
            "rope_parameters": rope("yarn", 150000.0, **YARN, truncate=False),
        },
    ),
]
LFM2_LAYERS = {"layer_types": ["conv", "full_attention", "conv", "conv"], "num_hidden_layers": 4}
LFM2 = [
    Tiny("lfm2", "Lfm2Config", {**LFM2_LAYERS, "block_multiple_of": 16, "norm_eps": 1e-4}),
    Tiny(
        "lfm2-biases-untied",
        "Lfm2Config",
        {
            **LFM2_LAYERS,
            "hidden_size": 44,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "conv_bias": True,
            "conv_L_cache": 7,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
    Tiny(
        "lfm2-legacy",
        "Lfm2Config",
        {"num_hidden_layers": 3, "full_attn_idxs": [1], "conv_L_cache": 2, "block_multiple_of": 8},
        legacy=True,
    ),
    Tiny(
        "lfm2-convolutions-only",
        "Lfm2Config",
        {"num_hidden_layers": 2, "layer_types": ["conv", "conv"], "conv_L_cache": 1, "block_ffn_dim_multiplier": 0.7},
    ),
]
DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
PARTIAL = {"partial_rotary_factor": 0.25}
QWEN_HYBRID = [
    Tiny("qwen3_5", "Qwen3_5TextConfig", {**DELTA, "rope_parameters": rope("default", 1000000.0, **PARTIAL)}),
    Tiny(
        "qwen3_5-biases-tied",
        "Qwen3_5TextConfig",
        {
            **DELTA,
            "hidden_size": 44,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_key_head_dim": 7,
            "linear_value_head_dim": 70,
            "linear_conv_kernel_dim": 2,
            "head_dim": 24,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": rope("default", partial_rotary_factor=0.5),
        },
    ),
    Tiny(
        "qwen3_next-dense",
        "Qwen3NextConfig",
        {**DELTA, "num_experts": 0, "linear_num_value_heads": 6, "rope_parameters": rope("default", **PARTIAL)},
    ),
    Tiny("qwen3_next-one-key-head", "Qwen3NextConfig", {**DELTA, "num_experts": 0, "linear_num_key_heads": 1}),
]
CHOSEN: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 28,
}
HYBRID_MOE = [
    Tiny("qwen3_next-moe", "Qwen3NextConfig", {**DELTA, **CHOSEN, "rope_parameters": rope("default", **PARTIAL)}),
    Tiny("qwen3_next-mixed", "Qwen3NextConfig", {**DELTA, **CHOSEN, "norm_topk_prob": False, "mlp_only_layers": [2]}),
    Tiny("qwen3_5-moe", "Qwen3_5MoeTextConfig", {**DELTA, **CHOSEN, "rope_parameters": rope("default", **PARTIAL)}),
    Tiny("lfm2-moe", "Lfm2MoeConfig", {**LFM2_LAYERS, **CHOSEN, "num_dense_layers": 1}),
    Tiny(
        "lfm2-moe-unbiased",
        "Lfm2MoeConfig",
        {
            **LFM2_LAYERS,
            **CHOSEN,
            "num_dense_layers": 0,
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
        },
    ),
]
LATENT: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 36,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
}
MLA = [
    Tiny(
        "deepseek-v3",
        "DeepseekV3Config",
        {**LATENT, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "rope_parameters": rope("default")},
    ),
    Tiny(
        "deepseek-v3-yarn",
        "DeepseekV3Config",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "attention_bias": True,
            "rope_interleave": False,
            "rope_parameters": rope("yarn", **YARN, mscale=1.0, mscale_all_dim=0.7),
        },
    ),
    Tiny(
        "deepseek-v3-equal-magnitudes",
        "DeepseekV3Config",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.7),
        },
    ),
    Tiny(
        "mistral4",
        "Mistral4Config",
        {
            **LATENT,
            "rope_parameters": {
                **rope("yarn", factor=8.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0),
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    Tiny(
        "mistral4-groups",
        "Mistral4Config",
        {**LATENT, "n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
    ),
]
MODELS = LLAMA + SMOLLM2 + MISTRAL + QWEN2 + QWEN3 + SMOLLM3 + GEMMA3 + LFM2 + QWEN_HYBRID + HYBRID_MOE + MOE + MLA


def build(tiny: Tiny, directory: Path, *, dtype: str = "float32", max_shard_size: str = "1GB") -> Path:
    """Writes the checkpoint into ``directory``."""
    import torch
    import transformers

    options = BASE | {"head_dim": None} | tiny.options
    if options["head_dim"] is None:
        del options["head_dim"]
    config = getattr(transformers, tiny.config_class)(**options)
    config.architectures = None  # save_pretrained fills it in
    # Not every family is known to AutoModelForCausalLM.
    model_class = getattr(transformers, tiny.config_class.replace("TextConfig", "Config")[:-6] + "ForCausalLM")
    model = model_class._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(zlib.crc32(tiny.name.encode()))

    def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # Gemma and the hybrids of Qwen store the difference from one
                offset = tiny.config_class.startswith(("Gemma", "Qwen3_5", "Qwen3Next")) and "linear_attn" not in name
                weight.copy_(normal(weight.shape, 0.3) + (0.0 if offset else 1.0))
            elif name.endswith("bias"):
                weight.copy_(normal(weight.shape, 0.3))
            else:  # rows of q and k larger than the rest, so that attention is not uniform
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                weight.copy_(normal(weight.shape, gain * weight.shape[-1] ** -0.5))
        for name, bias in model.named_buffers():
            if name.endswith(("expert_bias", "e_score_correction_bias")):
                bias.copy_(normal(bias.shape, 0.3))
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if tiny.legacy:
        path = directory / "config.json"
        path.write_text(json.dumps(legacy_config(json.loads(path.read_text())), indent=2))
    return directory


def legacy_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 wrote it."""
    config = {name: value for name, value in config.items() if name != "layer_types"}
    parameters = config.pop("rope_parameters")
    if config["model_type"] == "gemma3_text":
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config["num_hidden_layers"]  # one global layer, the last
        parameters = parameters["full_attention"]
    config["rope_theta"] = parameters["rope_theta"]
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    config["torch_dtype"] = config.pop("dtype")
    return config


def prompt(length: int, vocabulary: int = VOCABULARY, seed: int = 0) -> list[int]:
    """Random ids, beginning and end tokens left out."""
    return np.random.default_rng([seed, length]).integers(3, vocabulary, length).tolist()
