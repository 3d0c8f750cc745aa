"""llama.cpp through its C interface, as any installed build has it.

Where it is looked for, in this order:

1. ``LLAMA_CPP_LIBRARY``: a directory with ``libllama*.so`` and ``libggml*.so``, or one shared library with everything;
2. the npm package ``@node-llama-cpp/linux-x64`` (``npm install --prefix .venv/peers @node-llama-cpp/linux-x64``): one
   library per CPU generation, the best is taken at load, so it is a fair llama.cpp on every x86-64 machine;
3. the Python packages ``llama-cpp-python`` and ``xllamacpp``. A wheel of the latter is built for AVX2 alone and decodes
   slower than llama.cpp can where there is AVX-512.

Only functions whose parameters have been stable for years are called. Of the two parameter structures the first fields
alone are named; the rest keeps llama.cpp's own defaults. They are passed by value, in a buffer larger than they are.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint8, c_uint32, c_void_p
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parent.parent


class PeerMissingError(RuntimeError):
    """No llama.cpp is installed."""


class _ModelParams(Structure):
    _fields_ = [("rest", c_uint8 * 512)]


class _ContextParams(Structure):
    _fields_ = [("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("rest", c_uint8 * 500)]


class _Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


def find() -> Path:
    """The directory of llama.cpp's libraries, or its single library."""
    if given := os.environ.get("LLAMA_CPP_LIBRARY"):
        return Path(given)
    node = ROOT / ".venv" / "peers" / "node_modules" / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"
    if node.is_dir():
        return node
    for package, below in (("llama_cpp", "lib"), ("xllamacpp", "xllamacpp.abi3.so")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None and (path := Path(spec.origin).parent / below).exists():
            return path
    raise PeerMissingError(
        "no llama.cpp found: npm install --prefix .venv/peers @node-llama-cpp/linux-x64, pip install llama-cpp-python, "
        "pip install xllamacpp, or LLAMA_CPP_LIBRARY=DIRECTORY"
    )


_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


SIGNATURES = {
    "llama_log_set": (None, [_LOG, c_void_p]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_get_one": (_Batch, [POINTER(c_int32), c_int32]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_synchronize": (None, [c_void_p]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_print_system_info": (c_char_p, []),
}


@_LOG
def _silent(_level: int, _text: bytes, _data: int) -> None:
    pass


def open_ggml(where: Path, cpu: str | None = None) -> ctypes.CDLL:
    """The library with every `ggml_` function, its backends loaded and its log silenced.

    ``cpu`` takes the library of one CPU generation from a build that has them, in place of the best.
    """
    if where.is_file():
        if cpu:
            raise PeerMissingError(f"{where.name} has no library of its own for {cpu}")
        return ctypes.CDLL(str(where))
    ggml = _unsuffixed(where, "libggml")
    for path in [*sorted(where.glob("libggml-base*.so")), *sorted(where.glob("libggml-cpu.so")), ggml]:
        core = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    core.ggml_log_set.argtypes = [_LOG, c_void_p]
    core.ggml_log_set(_silent, None)
    if cpu:
        core.ggml_backend_load.argtypes, core.ggml_backend_load.restype = [c_char_p], c_void_p
        if not any(core.ggml_backend_load(os.fsencode(path)) for path in where.glob(f"libggml-cpu-{cpu}*.so")):
            raise PeerMissingError(f"no libggml-cpu-{cpu} in {where}")
    else:
        # Builds with one library per CPU generation choose here.
        core.ggml_backend_load_all_from_path.argtypes = [c_char_p]
        core.ggml_backend_load_all_from_path(os.fsencode(where))
    return core


def _unsuffixed(where: Path, stem: str) -> Path:
    # Versions are part of some names: libllama.v0.5.0.so beside libllama-common.so.
    for path in sorted(where.glob(f"{stem}*.so")):
        if not path.name.startswith(f"{stem}-"):
            return path
    raise PeerMissingError(f"no {stem} in {where}")


def _open(where: Path) -> ctypes.CDLL:
    """The library with every `llama_` function, its backends loaded and its log silenced."""
    library = open_ggml(where)
    if where.is_dir():
        library = ctypes.CDLL(str(_unsuffixed(where, "libllama")))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_silent, None)
    library.llama_backend_init()
    return library


class LlamaCpp:
    """One model in llama.cpp, one sequence."""

    def __init__(self, model: Path, *, threads: int, context: int = 2048) -> None:
        where = find().resolve()
        self._c = _open(where)
        self.description = f"{where.name}: {self._c.llama_print_system_info().decode().strip()}"
        self._model = self._c.llama_model_load_from_file(os.fsencode(model), self._c.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp can't load {model}")
        params = self._c.llama_context_default_params()
        assert (params.n_batch, params.n_ubatch) == (2048, 512), "llama.cpp's parameters have another layout"
        params.n_ctx = context
        self._context = self._c.llama_init_from_model(self._model, params)
        self._c.llama_set_n_threads(self._context, threads, threads)
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self.vocabulary = self._c.llama_vocab_n_tokens(self._vocab)

    def clear(self) -> None:
        """Forgets the sequence."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def decode(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Appends the ids in one batch; logits (V,) of the last, valid until the next call."""
        tokens = (c_int32 * len(ids))(*ids)
        if status := self._c.llama_decode(self._context, self._c.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode: {status}")
        self._c.llama_synchronize(self._context)
        return np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._context, -1), (self.vocabulary,))

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits (T, V) of a fresh sequence."""
        self.clear()
        rows = np.empty((len(ids), self.vocabulary), np.float32)
        batch = self._c.llama_batch_init(512, 0, 1)
        for start in range(0, len(ids), 512):
            part = ids[start : start + 512]
            batch.n_tokens = len(part)
            for index, token in enumerate(part):
                batch.token[index], batch.pos[index] = token, start + index
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
            if status := self._c.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode: {status}")
            values = self._c.llama_get_logits(self._context)
            rows[start : start + len(part)] = np.ctypeslib.as_array(values, (len(part), self.vocabulary))
        return rows

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """The ids of a text; special tokens written in it are recognised."""
        encoded = text.encode()
        room = len(encoded) + 8
        tokens = (c_int32 * room)()
        count = self._c.llama_tokenize(self._vocab, encoded, len(encoded), tokens, room, add_special, True)
        if count < 0:
            raise RuntimeError(f"llama_tokenize: {count}")
        return list(tokens[:count])
