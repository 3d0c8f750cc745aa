"""transformers as the reference: GGUF files dequantised into its models, its logits, and distances between logits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Logits = npt.NDArray[np.float32]

# GGUF tensor name -> transformers parameter, both without `.weight` or `.bias`.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SANDWICH = BLOCK | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
CONFIGS = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "gemma3": "Gemma3TextConfig"}


def gguf_config(path: Path) -> Any:
    """The transformers configuration of a GGUF file."""
    import transformers
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()

    def field(name: str, default: Any = None) -> Any:
        entry = reader.fields.get(f"{architecture}.{name}")
        return default if entry is None else entry.contents()

    heads = field("attention.head_count")
    options: dict[str, Any] = {
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "max_position_embeddings": field("context_length"),
        # The file keeps float32 of a decimal number.
        "rms_norm_eps": float(f"{field('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(field("rope.freq_base", 10000.0)),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if architecture == "gemma3":
        options |= {
            "head_dim": field("attention.key_length"),
            "query_pre_attn_scalar": field("attention.key_length"),
            "sliding_window": field("attention.sliding_window"),
        }
    return getattr(transformers, CONFIGS[architecture])(**options)


def gguf_weights(path: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """(transformers parameter name, float32 value) of every tensor of a GGUF file."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    heads = reader.fields[f"{architecture}.attention.head_count"].contents()
    kv_heads = reader.fields[f"{architecture}.attention.head_count_kv"].contents()
    names = SANDWICH if architecture == "gemma3" else BLOCK
    for tensor in reader.tensors:
        shape = tuple(int(length) for length in reversed(tensor.shape))
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
        stem, suffix = tensor.name.rsplit(".", 1)
        if block := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
            layer, role = block.groups()
            name = f"model.layers.{layer}.{names[role]}"
            if architecture == "llama" and role in ("attn_q", "attn_k"):
                value = _half_split(value, heads if role == "attn_q" else kv_heads)
        else:
            name = OUTER[stem]
        if architecture == "gemma3" and name.endswith("norm"):
            value = value - 1.0
        yield f"{name}.{suffix}", value


def _half_split(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of q or k from interleaved rotary pairs (2i, 2i+1) to half-split ones (i, i + d/2)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # (heads, d/2, 2, k)
    return np.ascontiguousarray(np.moveaxis(pairs, 2, 1)).reshape(rows.shape)


def gguf_with_other_tokens(path: Path, out: Path, *, merges: int | None = None) -> Path:
    """The same model with its ids shuffled, and with the first ``merges`` merges only: another vocabulary, that is."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(path)
    count = len(reader.fields["tokenizer.ggml.tokens"].data)
    # The first ids are special ones, which the metadata names.
    order = np.concatenate([np.arange(64), 64 + np.random.default_rng(0).permutation(count - 64)])
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = field.contents()
        if name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            value = [value[at] for at in order]
        if name == "tokenizer.ggml.merges":
            value = value[:merges]
        kinds = field.types
        writer.add_key_value(name, value, kinds[0], kinds[1] if kinds[0] == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        rows = tensor.data.reshape(tuple(tensor.data.shape))
        rows = rows[order] if tensor.name in ("token_embd.weight", "output.weight") else rows
        writer.add_tensor(tensor.name, np.ascontiguousarray(rows), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def gguf_model(path: Path) -> PreTrainedModel:
    """A GGUF file as a transformers model in float32, eager attention. One copy of the weights in memory."""
    import torch
    import transformers

    config = gguf_config(path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    state = {name: torch.from_numpy(np.require(value, requirements="CW")) for name, value in gguf_weights(path)}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    # Buffers (rotary frequencies, Gemma's embedding scale) are not in the state: take them from a model without layers.
    small = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 0, "layer_types": None, "vocab_size": 1})
    small.layer_types = getattr(config, "layer_types", None)
    buffers = dict(transformers.AutoModelForCausalLM.from_config(small).named_buffers())
    for name, _ in list(model.named_buffers()):
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(owner, leaf, buffers[name])
    return model.eval()


def load(directory: Path) -> PreTrainedModel:
    """A checkpoint directory as a transformers model in float32, eager attention."""
    import torch
    import transformers

    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    return (
        getattr(transformers, name).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    )


def logits(model: PreTrainedModel, ids: list[int]) -> Logits:
    """(T, V) float32."""
    import torch

    with torch.inference_mode():
        values: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return values.float().numpy()


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """``count`` greedy tokens, everything computed anew for each: slow, and without a cache to be wrong."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids[-count:]


def log_softmax(values: Logits) -> npt.NDArray[np.float64]:
    """Natural-log probabilities of each row, in float64."""
    wide = values.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


class Agreement:
    """How far candidate logits (T, V) are from exact ones, over a text whose next ids are known."""

    def __init__(self, exact: Logits, candidate: Logits, ids: list[int]) -> None:
        self.max_abs = 0.0
        divergence, same, exact_nll, candidate_nll = 0.0, 0, 0.0, 0.0
        for row in range(0, len(exact), 128):  # in blocks: float64 rows of a large vocabulary are big
            rows = slice(row, row + 128)
            p, q = log_softmax(exact[rows]), log_softmax(candidate[rows])
            self.max_abs = max(self.max_abs, float(np.abs(exact[rows] - candidate[rows]).max()))
            divergence += float((np.exp(p) * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            following = np.array(ids[row + 1 : row + 1 + len(p)])
            exact_nll -= float(p[np.arange(len(following)), following].sum())
            candidate_nll -= float(q[np.arange(len(following)), following].sum())
        tokens = len(ids) - 1
        self.kl = divergence / len(exact)
        self.top1 = same / len(exact)
        self.exact_perplexity = float(np.exp(exact_nll / tokens))
        self.perplexity = float(np.exp(candidate_nll / tokens))

    @property
    def perplexity_change(self) -> float:
        """Relative change of the perplexity."""
        return self.perplexity / self.exact_perplexity - 1.0
