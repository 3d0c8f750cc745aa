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
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .end_to_end import Rates, compare, table, tests

Bytes = npt.NDArray[np.uint8]
ALIGNMENT = 32
VOCABULARY = 512
FORMATS = ["Q4_0", "Q4_K", "ternary"]
ENGINES = ["farthing", "farthing a8", "llama.cpp"]


@dataclass(frozen=True)
class Shape:
    """A Llama with as many key heads as heads."""

    hidden: int = 4096
    feed_forward: int = 11008
    layers: int = 8
    heads: int = 32


# --- blocks of random codes, of variance 1 / columns; each function gives (rows, bytes of a row) ------------------


def _half(value: float, shape: tuple[int, ...]) -> Bytes:
    return np.broadcast_to(np.array([value], np.float16).view(np.uint8), (*shape, 2))


def q4_0(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """Scale, 16 bytes of codes around 8."""
    codes = random.integers(0, 256, (rows, columns // 32, 16), np.uint8)
    return np.concatenate([_half(columns**-0.5 / 4.61, codes.shape[:2]), codes], 2).reshape(rows, -1)


def q4_k(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """Scale and minimum of the block, the same six bits for all of its eight groups (63), 128 bytes of codes."""
    codes = random.integers(0, 256, (rows, columns // 256, 128), np.uint8)
    blocks = codes.shape[:2]
    scale = columns**-0.5 / 4.61 / 63
    fields = [_half(scale, blocks), _half(7.5 * scale, blocks), np.full((*blocks, 12), 255, np.uint8), codes]
    return np.concatenate(fields, 2).reshape(rows, -1)


# Bytes of four codes, each 0, 1 or 2.
FOUR = np.array([a | b << 2 | c << 4 | d << 6 for a in range(3) for b in range(3) for c in range(3) for d in range(3)])


def tq2_0(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """64 bytes of codes around 1, scale."""
    codes = FOUR.astype(np.uint8)[random.integers(0, 81, (rows, columns // 256, 64), np.uint8)]
    return np.concatenate([codes, _half((1.5 / columns) ** 0.5, codes.shape[:2])], 2).reshape(rows, -1)


def iq2_bn(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """One float32 scale for the row, then codes around 1."""
    codes = FOUR.astype(np.uint8)[random.integers(0, 81, (rows, columns // 4), np.uint8)]
    scale = np.broadcast_to(np.array([(1.5 / columns) ** 0.5], np.float32).view(np.uint8), (rows, 4))
    return np.concatenate([scale, codes], 1)


def q8_0(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """Scale, 32 codes; of variance 1."""
    codes = np.clip(random.normal(0, 30, (rows, columns // 32, 32)), -127, 127).astype(np.int8).view(np.uint8)
    return np.concatenate([_half(1 / 30, codes.shape[:2]), codes], 2).reshape(rows, -1)


# Number of the type in ggml.h, and the blocks.
TYPES: dict[str, tuple[int, Callable[[np.random.Generator, int, int], Bytes]]] = {
    "Q4_0": (2, q4_0),
    "Q8_0": (8, q8_0),
    "Q4_K": (12, q4_k),
    "TQ2_0": (35, tq2_0),
    "IQ2_BN": (135, iq2_bn),  # ik_llama.cpp's own
}
F32 = 0

# --- the file ---------------------------------------------------------------------------------------------------------


def tensors(shape: Shape, kind: str) -> list[tuple[str, str, int, int]]:
    """(name, type, rows, columns) of every tensor; the norms have one row of ones."""
    square, wide, tall = (
        (shape.hidden, shape.hidden),
        (shape.feed_forward, shape.hidden),
        (shape.hidden, shape.feed_forward),
    )
    found = [("token_embd", "Q8_0", VOCABULARY, shape.hidden)]
    for layer in range(shape.layers):
        found += [(f"blk.{layer}.{norm}_norm", "F32", 1, shape.hidden) for norm in ("attn", "ffn")]
        found += [(f"blk.{layer}.attn_{role}", kind, *square) for role in ("q", "k", "v", "output")]
        found += [(f"blk.{layer}.ffn_{role}", kind, *wide) for role in ("gate", "up")]
        found.append((f"blk.{layer}.ffn_down", kind, *tall))
    return [*found, ("output_norm", "F32", 1, shape.hidden), ("output", "Q8_0", VOCABULARY, shape.hidden)]


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges: the 256 bytes as GPT-2 writes them, 255 pairs of letters, an end token."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte = {value: chr(value) for value in shown}
    byte |= {value: chr(256 + i) for i, value in enumerate(v for v in range(256) if v not in byte)}
    letters = "etaoinshrdlucmfw"
    pairs = [(a, b) for a in letters for b in letters][: VOCABULARY - 257]
    tokens = [*(byte[value] for value in range(256)), *(a + b for a, b in pairs), "<|end|>"]
    return tokens, [f"{a} {b}" for a, b in pairs]


def metadata(shape: Shape) -> dict[str, Any]:
    """What llama.cpp and farthing ask for."""
    tokens, merges = vocabulary()
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
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * (VOCABULARY - 1) + [3],
        "tokenizer.ggml.eos_token_id": VOCABULARY - 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    """The number of the value's type, and the value."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    items = [_string(item) if isinstance(item, str) else struct.pack("<i", item) for item in value]
    return struct.pack("<IIQ", 9, 8 if isinstance(value[0], str) else 5, len(value)) + b"".join(items)


def write(path: Path, shape: Shape, kind: str, seed: int = 0) -> Path:
    """Writes a model whose matrices have the type ``kind``, one of TYPES."""
    random, described = np.random.default_rng(seed), tensors(shape, kind)
    sizes, unit = {}, np.random.default_rng(0)
    for _, type_name, _, columns in described:
        sizes[type_name, columns] = 4 * columns if type_name == "F32" else TYPES[type_name][1](unit, 1, columns).size
    fields, header, offset = metadata(shape), bytearray(), 0
    header += struct.pack("<4sIQQ", b"GGUF", 3, len(described), len(fields))
    for name, value in fields.items():
        header += _string(name) + _value(value)
    for name, type_name, rows, columns in described:
        norm = type_name == "F32"
        extents = (columns,) if norm else (columns, rows)
        header += _string(f"{name}.weight") + struct.pack(f"<I{len(extents)}Q", len(extents), *extents)
        header += struct.pack("<IQ", F32 if norm else TYPES[type_name][0], offset)
        offset += _padded(rows * sizes[type_name, columns])
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        _put(file, bytes(header))
        for _, type_name, rows, columns in described:
            norm = type_name == "F32"
            _put(file, np.ones(columns, np.float32) if norm else TYPES[type_name][1](random, rows, columns))
    return partial.rename(path)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _put(file: BinaryIO, data: bytes | npt.NDArray[Any]) -> None:
    file.write(data)
    file.write(bytes(-file.tell() % ALIGNMENT))


def slice_file(cache: Path, shape: Shape, kind: str) -> Path:
    """The file of one type, made if it is not there."""
    path = cache / f"slice-{shape.hidden}x{shape.feed_forward}x{shape.layers}-{kind}.gguf"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"making {path.name}", flush=True)
        write(path, shape, kind)
    return path


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
