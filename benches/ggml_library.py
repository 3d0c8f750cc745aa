"""Matrix products of ggml through its C interface, with the libraries that ``llama_cpp_library`` finds.

Weights lie where llama.cpp would put them: in the buffer that rearranges them for this CPU, where there is one for
their type. One graph multiplies all matrices with one input.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt

from .llama_cpp_library import PeerMissingError, find, open_ggml

F32, Q4_0, TQ2_0 = 0, 2, 35  # as in ggml.h
REARRANGED = {Q4_0}
CPU_DEVICE = 0


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_dev_by_type": (c_void_p, [c_int]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}


class Ggml:
    """ggml's CPU backend with a number of threads; ``cpu`` names the library of one CPU generation."""

    def __init__(self, threads: int, cpu: str | None = None) -> None:
        self._c = open_ggml(find().resolve(), cpu)
        for name, (result, arguments) in SIGNATURES.items():
            try:
                function = getattr(self._c, name)
            except AttributeError:
                raise PeerMissingError(f"the library of llama.cpp does not export {name}") from None
            function.restype, function.argtypes = result, arguments
        self._device = self._c.ggml_backend_dev_by_type(CPU_DEVICE)
        self._backend = self._c.ggml_backend_dev_init(self._device, None)
        self._procedure("ggml_backend_set_n_threads", None, c_void_p, c_int)(self._backend, threads)

    def _procedure(self, name: str, result: Any, *arguments: Any) -> Any:
        registry = self._c.ggml_backend_dev_backend_reg(self._device)
        address = self._c.ggml_backend_reg_get_proc_address(registry, name.encode())
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    def buffer_type(self, kind: int) -> int:
        """Where weights of a type are put."""
        if kind in REARRANGED:
            extra = self._procedure("ggml_backend_dev_get_extra_bufts", ctypes.POINTER(c_void_p), c_void_p)(
                self._device
            )
            if extra and extra[0]:
                return extra[0]
        return self._c.ggml_backend_dev_buffer_type(self._device)

    def quantize(self, kind: int, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """(N, bytes of a row) of weights (N, K)."""
        rows, columns = weights.shape
        packed = np.empty((rows, self._c.ggml_row_size(kind, columns)), np.uint8)
        source = np.ascontiguousarray(weights)
        self._c.ggml_quantize_chunk(kind, source.ctypes.data, packed.ctypes.data, 0, rows, columns, None)
        return packed

    def context(self) -> int:
        """Room for the descriptions of tensors and graphs."""
        return self._c.ggml_init(_InitParams(1 << 21, None, True))

    def matrices(self, kind: int, columns: int, packed: list[npt.NDArray[np.uint8]]) -> list[int]:
        """Matrices in memory of their own, kept until the process ends."""
        context = self.context()
        tensors = [self._c.ggml_new_tensor_2d(context, kind, columns, len(rows)) for rows in packed]
        if not self._c.ggml_backend_alloc_ctx_tensors_from_buft(context, self.buffer_type(kind)):
            raise MemoryError("ggml has no room for the matrices")
        for tensor, rows in zip(tensors, packed, strict=True):
            contiguous = np.ascontiguousarray(rows)
            self._c.ggml_backend_tensor_set(tensor, contiguous.ctypes.data, 0, contiguous.nbytes)
        return tensors

    def product(self, matrices: list[int], rows: int, x: npt.NDArray[np.float32]) -> Product:
        """The products of x (M, K) with every matrix (N, K)."""
        return Product(self, matrices, rows, x)


class Product:
    """One graph; ``compute`` runs it, ``read`` gives its outputs."""

    def __init__(self, ggml: Ggml, matrices: list[int], rows: int, x: npt.NDArray[np.float32]) -> None:
        self._c, self._backend = ggml._c, ggml._backend
        self._context = ggml.context()
        self._shape = (x.shape[0], rows)
        source = self._c.ggml_new_tensor_2d(self._context, F32, x.shape[1], x.shape[0])
        self._outputs = [self._c.ggml_mul_mat(self._context, matrix, source) for matrix in matrices]
        self._graph = self._c.ggml_new_graph(self._context)
        for output in self._outputs:
            self._c.ggml_build_forward_expand(self._graph, output)
        self._buffer = self._c.ggml_backend_alloc_ctx_tensors_from_buft(self._context, ggml.buffer_type(F32))
        x = np.ascontiguousarray(x)
        self._c.ggml_backend_tensor_set(source, x.ctypes.data, 0, x.nbytes)

    def compute(self) -> None:
        """Runs every product."""
        if status := self._c.ggml_backend_graph_compute(self._backend, self._graph):
            raise RuntimeError(f"ggml_backend_graph_compute: {status}")

    def read(self) -> list[npt.NDArray[np.float32]]:
        """(M, N) of each matrix."""
        found = [np.empty(self._shape, np.float32) for _ in self._outputs]
        for array, output in zip(found, self._outputs, strict=True):
            self._c.ggml_backend_tensor_get(output, array.ctypes.data, 0, array.nbytes)
        return found

    def __del__(self) -> None:
        self._c.ggml_backend_buffer_free(self._buffer)
        self._c.ggml_free(self._context)
