"""Weights between two checkpoints: an effort knob at load time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FormatError, UnsupportedError
from ..sampling import number

__all__ = ["interpolate"]

_INDEX = "model.safetensors.index.json"
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = ("F32", "F16", "BF16")
_HEADER = 100 << 20  # no header is longer
_CHUNK = 1 << 22  # values at a time
# Keys of config.json by which the same weights compute something else.
_SAME = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
    "layer_norm_eps",
    "hidden_act",
    "num_experts_per_tok",
)


def interpolate(
    long: str | os.PathLike[str], short: str | os.PathLike[str], lam: float, out: str | os.PathLike[str]
) -> Path:
    """Lossy. Writes a checkpoint whose weights are ``(1 - lam) · long + lam · short``.

    Between a model that reasons at length and one that was trained from it to be brief lies a range of models of every
    length between, without further training (the first step of DART, arXiv 2511.01170; between Instruct and Thinking
    models, arXiv 2510.10977). Tensors are read, mixed in float32 and written piece by piece, so memory does not grow
    with the model. ``lam`` 0 gives the bytes of ``long``'s tensors, 1 those of ``short``'s where the types agree.

    Args:
        long: a Hugging Face checkpoint directory with safetensors files; configuration, tokenizer, file layout and data
            types are taken from it.
        short: a directory with the same tensors, in float32, float16 or bfloat16; a tied output head stands for its
            embedding.
        lam: 0 to 1.
        out: a directory that does not exist yet.

    Returns:
        ``out``.

    Raises:
        ValueError: ``lam`` is out of range, or the checkpoints do not fit; names the tensor or key.
        FormatError: a file is damaged.
        UnsupportedError: a tensor that differs is neither float32, float16 nor bfloat16.
        FileExistsError: ``out`` exists.

    Example:
        ``ft.reasoning.interpolate("base", "compressed", 0.5, "between")``
    """
    share = number("lam", lam)
    if not 0 <= share <= 1:
        raise ValueError(f"lam: got {lam!r}, expected a number from 0 to 1")
    target = Path(out)
    if target.exists():
        raise FileExistsError(f"{target} exists, expected a directory to make")
    ours, theirs = _Checkpoint(Path(long)), _Checkpoint(Path(short))
    pairs = _pairs(ours, theirs)
    # Whoever finds the directory finds it whole.
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for path in sorted(ours.path.iterdir()):
            if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
                shutil.copyfile(path, partial / path.name)
        for name, shard in ours.shards.items():
            with (partial / name).open("wb") as file:
                file.write(shard.header)
                for tensor in shard.tensors:  # in the order of their bytes
                    for piece in _mix(tensor, pairs[tensor.name], share):
                        file.write(piece)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a file: ``data`` maps its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    @property
    def kind(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class _Shard:
    header: bytes
    tensors: list[_Tensor]


class _Checkpoint:
    """A directory: its configuration, and its tensors by file and by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _json(path / "config.json")
        if (path / _INDEX).exists():
            weight_map = _json(path / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise FormatError(f"{path / _INDEX}: weight_map: expected tensors and their files")
            names = sorted(set(weight_map.values()))
            if any(Path(name).name != name for name in names):
                raise FormatError(f"{path / _INDEX}: weight_map: got {names}, expected files beside it")
        else:
            weight_map, names = None, ["model.safetensors"]
        self.shards = {name: _shard(path / name) for name in names}
        self.tensors = {tensor.name: tensor for shard in self.shards.values() for tensor in shard.tensors}
        if missing := sorted((weight_map or {}).keys() - self.tensors.keys()):
            raise FormatError(f"{path / _INDEX}: {missing[0]} is in no file")

    @property
    def tied(self) -> bool:
        return "lm_head.weight" not in self.tensors


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: no JSON: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


def _shard(path: Path) -> _Shard:
    """The tensors of a safetensors file, checked against its size, in the order of their bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER):
            raise FormatError(f"{path}: {size} bytes with a header of {length}, expected a safetensors file")
        header = file.read(length)
    try:
        entries = json.loads(header)
        if not isinstance(entries, dict):
            raise TypeError("expected an object")
        entries.pop("__metadata__", None)
        data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        tensors = []
        for name, entry in entries.items():
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in (*shape, begin, end)):
                raise TypeError(f"{name}: shape and offsets must be integers")
            count = 1
            for each in shape:
                count *= each
            if dtype not in _BYTES:
                raise UnsupportedError(f"{path}: {name}: type {dtype} is not supported, only {', '.join(_BYTES)}")
            if begin > end or end > size - 8 - length or end - begin != count * _BYTES[dtype]:
                raise ValueError(f"{name}: bytes {begin} to {end} of {size - 8 - length} for {dtype} {list(shape)}")
            tensors.append((begin, _Tensor(name, dtype, shape, data[8 + length + begin : 8 + length + end])))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: header: {error!r}") from None
    tensors.sort(key=lambda pair: pair[0])
    place = 0
    for begin, tensor in tensors:
        if begin != place:
            raise FormatError(f"{path}: {tensor.name}: begins at byte {begin}, expected {place}")
        place += tensor.data.size
    if place != size - 8 - length:
        raise FormatError(f"{path}: {size - 8 - length} bytes of tensors, {place} in the header")
    return _Shard(len(header).to_bytes(8, "little") + header, [tensor for _, tensor in tensors])


def _pairs(ours: _Checkpoint, theirs: _Checkpoint) -> dict[str, _Tensor]:
    """For each tensor of ``ours`` the one of ``theirs``; ValueError where they do not fit."""
    for key in _SAME:
        if ours.config.get(key) != theirs.config.get(key):
            got, expected = theirs.config.get(key), ours.config.get(key)
            raise ValueError(f"{theirs.path}: {key} is {got!r}, expected {expected!r} as in {ours.path}")
    other = dict(theirs.tensors)
    embedding = next((name for name in other if name.endswith("embed_tokens.weight")), None)
    if embedding and theirs.tied and not ours.tied:
        other["lm_head.weight"] = other[embedding]
    if ours.tied and not theirs.tied:
        head = other.pop("lm_head.weight")
        if embedding is None or head.dtype != other[embedding].dtype or not _equal(head, other[embedding]):
            raise ValueError(
                f"lm_head.weight: {theirs.path} has one of its own, which {ours.path} ties to its embedding"
            )
    for names, there, here in (
        (ours.tensors.keys() - other.keys(), theirs, ours),
        (other.keys() - ours.tensors.keys(), ours, theirs),
    ):
        if names:
            raise ValueError(f"{min(names)}: in {here.path}, but not in {there.path}")
    for name, tensor in ours.tensors.items():
        match = other[name]
        if tensor.shape != match.shape:
            raise ValueError(f"{name}: {match.kind} in {theirs.path}, expected {tensor.kind} as in {ours.path}")
        floats = tensor.dtype in _FLOATS and match.dtype in _FLOATS
        if not floats and not (tensor.dtype == match.dtype and _equal(tensor, match)):
            raise UnsupportedError(f"{name}: {tensor.kind} and {match.kind} differ, and only {', '.join(_FLOATS)} mix")
    return other


def _equal(one: _Tensor, other: _Tensor) -> bool:
    step = _CHUNK
    return one.data.size == other.data.size and all(
        np.array_equal(one.data[at : at + step], other.data[at : at + step]) for at in range(0, one.data.size, step)
    )


def _mix(ours: _Tensor, theirs: _Tensor, share: float) -> Iterator[bytes]:
    """The bytes of the mixture, in the type of ``ours``."""
    if share == 0 or ours.dtype not in _FLOATS or (share == 1 and ours.dtype == theirs.dtype):
        source = ours if share == 0 or ours.dtype not in _FLOATS else theirs
        for at in range(0, source.data.size, _CHUNK):
            yield source.data[at : at + _CHUNK].tobytes()
        return
    count = ours.data.size // _BYTES[ours.dtype]
    for at in range(0, count, _CHUNK):
        one, other = (_values(each, at, min(at + _CHUNK, count)) for each in (ours, theirs))
        yield _stored(one * np.float32(1 - share) + other * np.float32(share), ours.dtype)


def _values(tensor: _Tensor, begin: int, end: int) -> npt.NDArray[np.float32]:
    width = _BYTES[tensor.dtype]
    raw = tensor.data[begin * width : end * width].tobytes()
    if tensor.dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f4" if tensor.dtype == "F32" else "<f2").astype(np.float32)


def _stored(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "BF16":
        bits = values.view(np.uint32)
        # To the nearest, ties to even; a NaN stays one.
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype("<u2").tobytes()
    return values.astype("<f4" if dtype == "F32" else "<f2").tobytes()
