"""GGUF files with random weights, for measuring: written without loading anything, hundreds of MB a second.

A model is its metadata and its tensors: (name, type, rows, columns) or, where one tensor holds all experts,
(name, type, rows, columns, experts). F32 tensors of one row are norms: ones; other weights have a variance of
1 / columns.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Tensor = tuple[str, str, int, int] | tuple[str, str, int, int, int]
ALIGNMENT = 32
VOCABULARY = 512

# --- blocks of random codes, of variance 1 / columns; each function gives (rows, bytes of a row) ------------------


def _half(value: float, shape: tuple[int, ...]) -> Bytes:
    return np.broadcast_to(np.array([value], np.float16).view(np.uint8), (*shape, 2))


# Bytes of two codes, each from 1 to 15.
EVEN = np.array([a | b << 4 for a in range(1, 16) for b in range(1, 16)], np.uint8)


def q4_0(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """Scale, 16 bytes of codes 1 to 15: with a mean other than 8, routers would send all tokens to the same experts."""
    codes = EVEN[random.integers(0, 225, (rows, columns // 32, 16), np.uint8)]
    return np.concatenate([_half(columns**-0.5 / 4.32, codes.shape[:2]), codes], 2).reshape(rows, -1)


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


def f32(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """Ones for a norm, else normal numbers."""
    values = np.ones((1, columns)) if rows == 1 else random.normal(0, columns**-0.5, (rows, columns))
    return values.astype(np.float32).view(np.uint8)


# Number of the type in ggml.h, and the blocks.
TYPES: dict[str, tuple[int, Callable[[np.random.Generator, int, int], Bytes]]] = {
    "F32": (0, f32),
    "Q4_0": (2, q4_0),
    "Q8_0": (8, q8_0),
    "Q4_K": (12, q4_k),
    "TQ2_0": (35, tq2_0),
    "IQ2_BN": (135, iq2_bn),  # ik_llama.cpp's own
}


# --- the file ---------------------------------------------------------------------------------------------------------


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges: the 256 bytes as GPT-2 writes them, 255 pairs of letters, an end token, unused tokens."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte = {value: chr(value) for value in shown}
    byte |= {value: chr(256 + i) for i, value in enumerate(v for v in range(256) if v not in byte)}
    letters = "etaoinshrdlucmfw"
    pairs = [(a, b) for a in letters for b in letters][: VOCABULARY - 257]
    tokens = [*(byte[value] for value in range(256)), *(a + b for a, b in pairs), "<|end|>"]
    tokens += [f"<|unused {i}|>" for i in range(size - len(tokens))]
    return tokens, [f"{a} {b}" for a, b in pairs]


def tokenizer(size: int = VOCABULARY) -> dict[str, Any]:
    """Metadata of a vocabulary that every engine can read."""
    tokens, merges = vocabulary(size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * (VOCABULARY - 1) + [3] * (size - VOCABULARY + 1),
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


def write(path: Path, fields: dict[str, Any], described: Sequence[Tensor], seed: int = 0) -> Path:
    """Writes a model."""
    random, unit = np.random.default_rng(seed), np.random.default_rng(0)
    header, offset = bytearray(), 0
    header += struct.pack("<4sIQQ", b"GGUF", 3, len(described), len(fields))
    for name, value in fields.items():
        header += _string(name) + _value(value)
    for name, kind, rows, columns, *experts in described:
        number, blocks = TYPES[kind]
        extents = (columns,) if rows == 1 else (columns, rows, *experts)
        header += _string(f"{name}.weight") + struct.pack(f"<I{len(extents)}Q", len(extents), *extents)
        header += struct.pack("<IQ", number, offset)
        offset += _padded(rows * (experts[0] if experts else 1) * blocks(unit, 1, columns).size)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        _put(file, bytes(header))
        for _, kind, rows, columns, *experts in described:
            for _ in range(experts[0] if experts else 1):
                file.write(TYPES[kind][1](random, rows, columns))
            file.write(bytes(-file.tell() % ALIGNMENT))
    return partial.rename(path)


def made(path: Path, fields: dict[str, Any], described: Sequence[Tensor]) -> Path:
    """The file, written if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {path.name}", flush=True)
        write(path, fields, described)
    return path


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _put(file: BinaryIO, data: bytes | npt.NDArray[Any]) -> None:
    file.write(data)
    file.write(bytes(-file.tell() % ALIGNMENT))
