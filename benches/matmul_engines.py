"""Engines that multiply low-bit matrices, for ``matmul_peers``: each holds several matrices and sweeps over all.

A sweep multiplies the same float32 or bfloat16 rows with every matrix, whole operations: activations are quantised
inside, outputs come back in the type of the inputs. Graph engines run a sweep as one graph with an operation for each
matrix, as they would in a model: their fastest way. Matrix i has the rows of the first one moved down by i, so that no
engine can take two for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .llama_cpp_library import PeerMissingError

Array = npt.NDArray[np.float32]
GROUP = 128
# What the arithmetic of a class may cost, as the root mean square error over that of the outputs.
TOLERANCE = {"bf16": 5e-3, "a8": 1e-2}


@dataclass
class Sweep:
    """``run`` multiplies with every matrix; ``read`` turns what it returned into float32 outputs (M, N)."""

    run: Callable[[], Any]
    read: Callable[[Any], list[Array]]


class Engine(Protocol):
    """One engine with its matrices."""

    precision: str
    # Bytes of one matrix.
    nbytes: int
    # float64 (N, K) of the first matrix, as this engine rounded it.
    exact: npt.NDArray[np.float64]

    def sweep(self, x: Array) -> Sweep:
        """Prepares x (M, K)."""


class Farthing:
    """farthing's packed matrices, one call for each."""

    precision = "a8"

    def __init__(self, weights: Array, kind: str, copies: int, _threads: int) -> None:
        import farthing as ft

        if not hasattr(ft, "quantize"):
            raise PeerMissingError("this farthing has no quantize")
        # Matrices work on the processors that the process may use.
        options = {"group": GROUP, "symmetric": True} if kind == "int4" else {}
        rolled = (np.roll(weights, i, 0) for i in range(copies))
        try:
            self._matrices = [ft.quantize(matrix, kind, activations="a8", **options) for matrix in rolled]
        except (ft.UnsupportedError, ValueError) as error:
            raise PeerMissingError(str(error)) from None
        self.nbytes = self._matrices[0].nbytes
        self.exact = np.asarray(self._matrices[0].dequantize(), np.float64)

    def sweep(self, x: Array) -> Sweep:
        return Sweep(lambda: [matrix.matmul(x) for matrix in self._matrices], lambda outputs: outputs)


class TorchBf16:
    """torch's linear in bfloat16."""

    precision = "bf16"

    def __init__(self, weights: Array, _kind: str, copies: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        first = torch.from_numpy(weights).bfloat16()
        self._matrices = [first.roll(i, 0) for i in range(copies)]
        self.nbytes = first.nbytes
        self.exact = first.double().numpy()

    def sweep(self, x: Array) -> Sweep:
        rows, linear = self._torch.from_numpy(x).bfloat16(), self._torch.nn.functional.linear
        return Sweep(lambda: [linear(rows, matrix) for matrix in self._matrices], _from_torch)


class TorchInt4:
    """torch's weight-only 4-bit product for CPUs."""

    precision = "bf16"

    def __init__(self, weights: Array, kind: str, copies: int, threads: int) -> None:
        import torch

        if kind != "int4":
            raise PeerMissingError("torch has 4 bits only")
        torch.set_num_threads(threads)
        self._multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        self._torch = torch
        codes, scales = symmetric_int4(weights)
        scale = torch.from_numpy(scales).bfloat16()  # (N, K / GROUP)
        zero = torch.zeros_like(scale)
        self._matrices = []
        for i in range(copies):
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                torch.from_numpy(np.roll(codes, i, 0).astype(np.int32)), 2
            )
            pairs = torch.stack([scale.roll(i, 0).t(), zero.t()], 2).contiguous()  # (K / GROUP, N, 2)
            self._matrices.append((packed, pairs))
        self.nbytes = sum(tensor.nbytes for tensor in self._matrices[0])
        self.exact = dequantized(codes, scale.float().numpy(), 8)

    def sweep(self, x: Array) -> Sweep:
        rows, multiply = self._torch.from_numpy(x).bfloat16(), self._multiply
        return Sweep(
            lambda: [multiply(rows, packed, GROUP, pairs) for packed, pairs in self._matrices],
            _from_torch,
        )


def _from_torch(outputs: Any) -> list[Array]:
    return [output.float().numpy() for output in outputs]


class OnnxRuntime:
    """ONNX Runtime's MatMulNBits with int8 activations (accuracy level 4), one node for each matrix."""

    precision = "a8"

    def __init__(self, weights: Array, kind: str, copies: int, threads: int) -> None:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        bits = 4 if kind == "int4" else 2
        codes, scales = symmetric_int4(weights) if kind == "int4" else ternary(weights)
        n, k = weights.shape
        packed = pack(codes, bits).reshape(n, k // GROUP, GROUP * bits // 8)
        points = np.full((n, pack(np.zeros((1, k // GROUP), np.uint8), bits).size), _repeated(1, bits), np.uint8)
        nodes, constants, outputs = [], [], []
        for i in range(copies):
            names = [f"weights{i}", f"scales{i}"] + ([f"points{i}"] if kind == "ternary" else [])
            for name, array in zip(names, (packed, scales, points), strict=False):
                constants.append(numpy_helper.from_array(np.roll(array, i, 0), name))
            attributes = {"K": k, "N": n, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
            nodes.append(
                helper.make_node("MatMulNBits", ["x", *names], [f"y{i}"], domain="com.microsoft", **attributes)
            )
            outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["m", n]))
        rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])
        model = helper.make_model(
            helper.make_graph(nodes, "sweep", [rows], outputs, constants),
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
            ir_version=10,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Its threads spin for 40 ms after a run by default, against the next engine; this is enough to meet the next
        # operation and costs the run itself nothing.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._value, self._rows, self._copies = onnxruntime.OrtValue, n, copies
        self.nbytes = packed.nbytes + scales.nbytes
        self.exact = dequantized(codes, scales, 8 if kind == "int4" else 1)

    def sweep(self, x: Array) -> Sweep:
        binding = self._session.io_binding()
        binding.bind_cpu_input("x", x)
        outputs = [np.empty((len(x), self._rows), np.float32) for _ in range(self._copies)]
        for i, output in enumerate(outputs):
            binding.bind_ortvalue_output(f"y{i}", self._value.ortvalue_from_numpy(output))
        return Sweep(
            lambda: self._session.run_with_iobinding(binding),
            lambda _: [value.numpy() for value in binding.get_outputs()],
        )


class OpenVino:
    """OpenVINO with 4-bit constants and activations quantised by group, one product for each matrix."""

    precision = "a8"

    def __init__(self, weights: Array, kind: str, copies: int, threads: int) -> None:
        import openvino as ov
        from openvino import opset13 as op

        if kind != "int4":
            raise PeerMissingError("compared in 4 bits only")
        codes, scales = symmetric_int4(weights)
        n, k = weights.shape
        scales = scales.astype(np.float16)
        self._keep: list[Any] = []  # constants share memory with these

        def nibbles(values: npt.NDArray[np.uint8], shape: list[int]) -> Any:
            packed = pack(values.reshape(1, -1), 4).reshape(-1)
            self._keep.append(packed)
            tensor = ov.Tensor(packed, ov.Shape(shape), ov.Type.u4)
            self._keep.append(tensor)
            return op.convert(op.constant(tensor, shared_memory=True), "f16")

        x = op.parameter([-1, k], np.float32, name="x")
        products = []
        for i in range(copies):
            grouped = nibbles(np.roll(codes, i, 0), [n, k // GROUP, GROUP])
            point = nibbles(np.full((n, k // GROUP, 1), 8, np.uint8), [n, k // GROUP, 1])
            scale = op.constant(np.roll(scales, i, 0)[..., None])
            matrix = op.reshape(op.multiply(op.subtract(grouped, point), scale), [n, k], special_zero=False)
            products.append(op.matmul(x, op.convert(matrix, "f32"), False, True))
        model = ov.Model([op.result(product) for product in products], [x], "sweep")
        self._compiled = ov.Core().compile_model(
            model,
            "CPU",
            {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP},
        )
        self.nbytes = n * k // 2 + scales.nbytes
        self.exact = dequantized(codes, scales.astype(np.float32), 8)

    def sweep(self, x: Array) -> Sweep:
        request = self._compiled.create_infer_request()
        return Sweep(
            lambda: request.infer([x], share_inputs=True, share_outputs=True),
            lambda outputs: [np.array(value, np.float32) for value in outputs.values()],
        )


class GgmlEngine:
    """ggml, whose own quantiser makes the matrices: Q4_0 or TQ2_0."""

    precision = "a8"

    def __init__(self, weights: Array, kind: str, copies: int, threads: int, cpu: str | None = None) -> None:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        from .ggml_library import Q4_0, TQ2_0, Ggml

        self._ggml = Ggml(threads, cpu)
        code = Q4_0 if kind == "int4" else TQ2_0
        packed = self._ggml.quantize(code, weights)
        self._rows = len(weights)
        self._matrices = self._ggml.matrices(code, weights.shape[1], [np.roll(packed, i, 0) for i in range(copies)])
        self.nbytes = packed.nbytes
        self.exact = dequantize(packed, GGMLQuantizationType(code)).astype(np.float64)

    def sweep(self, x: Array) -> Sweep:
        product = self._ggml.product(self._matrices, self._rows, x)
        return Sweep(product.compute, lambda _: product.read())


ENGINES: dict[str, Callable[..., Engine]] = {
    "farthing": Farthing,
    "torch bf16": TorchBf16,
    "torch int4pack": TorchInt4,
    "ONNX Runtime": OnnxRuntime,
    "OpenVINO": OpenVino,
    "ggml": GgmlEngine,
}


def symmetric_int4(weights: Array) -> tuple[npt.NDArray[np.uint8], Array]:
    """Codes (N, K) around 8 and scales (N, K / GROUP), by the largest absolute value of each group."""
    grouped = weights.reshape(len(weights), -1, GROUP)
    scales = np.abs(grouped).max(2) / 7
    codes = np.rint(grouped / np.maximum(scales, 1e-30)[..., None]) + 8
    return codes.astype(np.uint8).reshape(weights.shape), scales.astype(np.float32)


def ternary(weights: Array) -> tuple[npt.NDArray[np.uint8], Array]:
    """Codes (N, K) around 1 and scales (N, K / GROUP) of weights that are 0 or ± one number."""
    scale = np.abs(weights).max()
    codes = np.rint(weights / scale).astype(np.int8) + 1
    return codes.astype(np.uint8), np.full((len(weights), weights.shape[1] // GROUP), scale, np.float32)


def dequantized(codes: npt.NDArray[np.uint8], scales: Array, zero: int) -> npt.NDArray[np.float64]:
    """float64 (N, K)."""
    values = codes.reshape(len(codes), -1, GROUP).astype(np.float64) - zero
    return (values * scales.astype(np.float64)[..., None]).reshape(codes.shape)


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes (N, K) packed along K, the first in the lowest bits; K is padded with zeros to whole bytes."""
    each = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    parts = padded.reshape(len(codes), -1, each)
    return np.bitwise_or.reduce(parts << (np.arange(each, dtype=np.uint8) * bits), 2).astype(np.uint8)


def _repeated(code: int, bits: int) -> int:
    return sum(code << shift for shift in range(0, 8, bits))
