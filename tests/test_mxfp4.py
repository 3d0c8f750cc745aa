"""gpt-oss as released: experts in blocks of 4-bit floats, everything else in floats."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import farthing as ft
import numpy as np
import reference
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

SIZES = {"hidden_size": 64, "intermediate_size": 96}
EXPERTS = 6


def blocks(name: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes (experts, rows, columns / 32, 16) and scales (experts, rows, columns / 32)."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shape = (EXPERTS, rows, columns // 32)
    codes = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return codes, torch.randint(121, 124, shape, generator=generator, dtype=torch.uint8)


def test_released_blocks_equal_transformers(tmp_path: Path) -> None:
    by_name = {model.name: model for model in tiny.MODELS}
    gpt_oss = by_name["gpt-oss"]
    directory = tiny.build(tiny.Tiny("gpt-oss-mxfp4", gpt_oss.config_class, gpt_oss.options | SIZES), tmp_path)
    model = reference.load(directory)
    tensors = load_file(directory / "model.safetensors")
    hidden, width = SIZES.values()
    for layer, block in enumerate(model.model.layers):
        for kind, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            name = f"model.layers.{layer}.mlp.experts.{kind}"
            codes, scales = blocks(name, rows, columns)
            weights = convert_moe_packed_tensors(codes, scales, dtype=torch.float32)
            getattr(block.mlp.experts, kind).data.copy_(weights)
            del tensors[name]
            tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales}
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config))
    ids = tiny.prompt(70)
    exact = reference.logits(model, ids)
    for weights in ("f32", "auto"):
        llm = ft.LLM(directory, weights=weights, activations="f32", kv="f32")
        np.testing.assert_allclose(llm.logits(ids), exact, rtol=0, atol=1e-4)
    ours = ft.LLM(directory)
    formats = {matrix.role: matrix.format for matrix in ours.explain()}
    assert "mxfp4" in formats["expert_gate"]
    assert np.sqrt(np.mean((ours.logits(ids) - exact) ** 2)) < 2e-3 * exact.std()
