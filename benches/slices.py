"""The first layers of a 7B model with random weights, beside llama.cpp and ik_llama.cpp.

``python -m benches.slices [--formats Q4_0 Q4_K ternary] [--prompts 4 8 16 512] [--decode 32] [--rounds 5]``

Shapes are Llama 2 7B's (hidden 4096, feed-forward 11008, 32 heads) with 8 layers, so that a file is ten times the last
cache and yet loads in a second. The vocabulary has 512 tokens: the head is a thousandth of the work. ``ternary`` is
TQ2_0, and for ik_llama.cpp, which has no such type, its own IQ2_BN. Files are kept in ``--cache``, 3 GB in all.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .end_to_end import Rates, compare, table, tests
from .random_gguf import VOCABULARY, Tensor, made, tokenizer

FORMATS = ["Q4_0", "Q4_K", "ternary"]
ENGINES = ["farthing", "farthing a8", "llama.cpp"]


@dataclass(frozen=True)
class Shape:
    """A Llama with as many key heads as heads."""

    hidden: int = 4096
    feed_forward: int = 11008
    layers: int = 8
    heads: int = 32


def tensors(shape: Shape, kind: str) -> list[Tensor]:
    """(name, type, rows, columns) of every tensor; the norms have one row of ones."""
    square, wide, tall = (
        (shape.hidden, shape.hidden),
        (shape.feed_forward, shape.hidden),
        (shape.hidden, shape.feed_forward),
    )
    found: list[Tensor] = [("token_embd", "Q8_0", VOCABULARY, shape.hidden)]
    for layer in range(shape.layers):
        found += [(f"blk.{layer}.{norm}_norm", "F32", 1, shape.hidden) for norm in ("attn", "ffn")]
        found += [(f"blk.{layer}.attn_{role}", kind, *square) for role in ("q", "k", "v", "output")]
        found += [(f"blk.{layer}.ffn_{role}", kind, *wide) for role in ("gate", "up")]
        found.append((f"blk.{layer}.ffn_down", kind, *tall))
    return [*found, ("output_norm", "F32", 1, shape.hidden), ("output", "Q8_0", VOCABULARY, shape.hidden)]


def metadata(shape: Shape) -> dict[str, Any]:
    """What llama.cpp and farthing ask for."""
    return {
        "general.architecture": "llama",
        "llama.block_count": shape.layers,
        "llama.context_length": 2048,
        "llama.embedding_length": shape.hidden,
        "llama.feed_forward_length": shape.feed_forward,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": shape.hidden // shape.heads,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": VOCABULARY,
        **tokenizer(),
    }


def slice_file(cache: Path, shape: Shape, kind: str) -> Path:
    """The file of one type, made if it is not there."""
    path = cache / f"slice-{shape.hidden}x{shape.feed_forward}x{shape.layers}-{kind}.gguf"
    return made(path, metadata(shape), tensors(shape, kind))


def main() -> None:
    """Parses the command line, makes the files and prints a table for each format."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 8, 16, 512], help="tokens of each prompt")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode one by one")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--cache", type=Path, default=home / "farthing" / "slices")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    arguments = parser.parse_args()
    shape, what = Shape(layers=arguments.layers), tests(arguments.prompts, arguments.decode)
    figures: dict[str, Rates] = {}
    for name in arguments.formats:
        ternary = name == "ternary"
        model = slice_file(arguments.cache, shape, "TQ2_0" if ternary else name)
        ik_model = slice_file(arguments.cache, shape, "IQ2_BN") if ternary else model
        figures[name] = compare(
            model, arguments.engines, what, threads=arguments.threads, rounds=arguments.rounds, ik_model=ik_model
        )
        print(
            f"\n{name}, {shape.layers} layers, {arguments.threads} threads, median of {arguments.rounds} rounds (range)"
        )
        print(table(figures[name]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
