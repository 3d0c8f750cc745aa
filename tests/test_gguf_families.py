"""A GGUF file of a family gives the bits of the directory it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import farthing as ft
import numpy as np
import pytest
import tiny
from farthing.plan import plan

# transformers' name -> GGUF's, as llama.cpp's converter has them; in a block unless the name begins with `model.` or `lm_`.
COMMON = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
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


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("name", "convert"), [("lfm2", lfm2)])
def test_gguf_equals_directory(
    name: str, convert: Callable[[Path, Path], None], tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    directory, path = tiny_directory(name), tmp_path / "model.gguf"
    convert(directory, path)
    ids = tiny.prompt(60)
    expected = ft.LLM(directory, weights="f32").logits(ids)
    assert np.array_equal(ft.LLM(path, weights="f32").logits(ids), expected)
    assert plan(path, weights="int8").resident_bytes == ft.LLM(path, weights="int8").explain().nbytes
