"""Whole mixture-of-experts models with random weights, beside llama.cpp and ik_llama.cpp.

``python -m benches.moe_models [--models olmoe-1b-7b] [--format Q4_0] [--prompts 16 512] [--decode 32] [--rounds 5]``

Configurations are those of published models, vocabularies included; weights are random, so routing is close to
uniform, the hardest case for memory. Every engine's likeliest token must agree before anything is timed. Also printed
is what ``farthing plan`` foretells, with the bandwidth probed in the same minute. Files are kept in ``--cache``.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from farthing.plan import plan

from .end_to_end import Rates, compare, table, tests
from .random_gguf import Tensor, made, tokenizer

ENGINES = ["farthing", "farthing a8", "llama.cpp"]


@dataclass(frozen=True)
class Shape:
    """A model of experts whose attention is Llama's."""

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    experts: int
    chosen: int
    vocabulary: int
    theta: float
    # Numbers that a norm of queries and one of keys have; none without.
    query_norm: int = 0
    key_norm: int = 0


MODELS = {
    # OLMoE's sizes as a Qwen3 MoE, since ik_llama.cpp does not know OLMoE: norms go over each head.
    "olmoe-1b-7b": Shape("qwen3moe", 2048, 16, 16, 16, 128, 1024, 64, 8, 50304, 1e4, 128, 128),
    # A quarter of the layers of Qwen3-30B-A3B, since the whole is 17 GB.
    "qwen3-30b-a3b-quarter": Shape("qwen3moe", 2048, 12, 32, 4, 128, 768, 128, 8, 151936, 1e6, 128, 128),
    # A quarter of Mixtral 8x7B.
    "mixtral-8x7b-quarter": Shape("llama", 4096, 8, 32, 8, 128, 14336, 8, 2, 32000, 1e6),
}


def metadata(shape: Shape) -> dict[str, Any]:
    """What llama.cpp and farthing ask for."""
    fields = {
        "block_count": shape.layers,
        "context_length": 4096,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.width,
        "expert_feed_forward_length": shape.width,
        "expert_count": shape.experts,
        "expert_used_count": shape.chosen,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": shape.theta,
        "vocab_size": shape.vocabulary,
    }
    named = {f"{shape.architecture}.{key}": value for key, value in fields.items()}
    return {"general.architecture": shape.architecture, **named, **tokenizer(shape.vocabulary)}


def tensors(shape: Shape, kind: str) -> list[Tensor]:
    """Every tensor; embedding and head in Q8_0, routers in F32."""
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found: list[Tensor] = [("token_embd", "Q8_0", shape.vocabulary, shape.hidden)]
    for layer in range(shape.layers):
        block: list[Tensor] = [
            ("attn_norm", "F32", 1, shape.hidden),
            ("attn_q", kind, wide, shape.hidden),
            ("attn_k", kind, narrow, shape.hidden),
            ("attn_v", kind, narrow, shape.hidden),
            ("attn_output", kind, shape.hidden, wide),
            ("ffn_norm", "F32", 1, shape.hidden),
            ("ffn_gate_inp", "F32", shape.experts, shape.hidden),
            ("ffn_gate_exps", kind, shape.width, shape.hidden, shape.experts),
            ("ffn_up_exps", kind, shape.width, shape.hidden, shape.experts),
            ("ffn_down_exps", kind, shape.hidden, shape.width, shape.experts),
        ]
        if shape.query_norm:
            block += [("attn_q_norm", "F32", 1, shape.query_norm), ("attn_k_norm", "F32", 1, shape.key_norm)]
        found += [(f"blk.{layer}.{name}", *rest) for name, *rest in block]  # type: ignore[misc]
    return [*found, ("output_norm", "F32", 1, shape.hidden), ("output", "Q8_0", shape.vocabulary, shape.hidden)]


def main() -> None:
    """Makes the files, compares the engines and the plan with what was measured."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["olmoe-1b-7b"], choices=list(MODELS))
    parser.add_argument("--format", default="Q4_0", choices=["Q4_0", "Q4_K"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 512], help="tokens of each prompt")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode one by one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--cache", type=Path, default=home / "farthing" / "models")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    arguments = parser.parse_args()
    what, figures = tests(arguments.prompts, arguments.decode), {}
    for name in arguments.models:
        path = arguments.cache / f"{name}-{arguments.format}.gguf"
        model = made(path, metadata(MODELS[name]), tensors(MODELS[name], arguments.format))
        rates: Rates = compare(model, arguments.engines, what, threads=arguments.threads, rounds=arguments.rounds)
        figures[name] = rates
        print(f"\n{name} {arguments.format}, {arguments.threads} threads, median of {arguments.rounds} rounds (range)")
        print(table(rates), flush=True)
        foretold = plan(model, threads=arguments.threads)
        decode = median(rates["farthing"][f"decode {arguments.decode}"])
        rate = foretold.expected_rate
        print(
            f"plan: {rate:.1f} tok/s foretold, {decode:.1f} measured ({rate / decode - 1:+.0%})\n{foretold}", flush=True
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
