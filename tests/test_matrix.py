"""Packed matrices: what they compute, for which arrays, and what they refuse."""

from __future__ import annotations

import copy
import doctest
import pickle
import threading

import farthing as ft
import farthing.matrix
import numpy as np
import pytest
import torch

FORMATS = [("int4", 32, True), ("int4", 128, False), ("int8", 16, True), ("int8", 64, False), ("bf16", 128, True)]
OTHERS = [(name, 32, True) for name in ("f32", "f16", "ternary", "mxfp4", "nf4", "iq4_nl")]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding to the type, and the rounding of activations to 15 bits.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-3, torch.float16: 2e-3}


def weights(n: int = 100, k: int = 77) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) * k**-0.5


@pytest.mark.parametrize(("name", "group", "symmetric"), FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
def test_product_is_that_of_the_dequantised_weights(name: str, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    matrix = ft.quantize(weights(), name, group=group, symmetric=symmetric)
    exact = torch.from_numpy(matrix.dequantize())
    assert (exact - weights()).norm() / weights().norm() < (0.13 if name == "int4" else 0.01)
    bias = torch.randn(100).to(dtype)
    for shape in ((77,), (1, 77), (3, 5, 77), (70, 77), (0, 77), (2, 0, 77)):
        x = torch.randn(shape).to(dtype)
        for b in (None, bias):
            y = matrix.matmul(x, b)
            wanted = x.float() @ exact.T + (0 if b is None else b.float())
            assert y.dtype == dtype
            assert y.shape == (*shape[:-1], 100)
            torch.testing.assert_close(y.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        if dtype != torch.bfloat16:
            z = matrix.matmul(x.numpy(), bias.numpy())
            assert isinstance(z, np.ndarray)
            np.testing.assert_array_equal(z, y.numpy())


def test_the_same_weights_from_any_array_pack_the_same() -> None:
    for dtype in (torch.float32, torch.float16):
        w = weights().to(dtype)
        packed = ft.quantize(w, group=32).dequantize()
        strided = torch.empty(77, 100, dtype=dtype).T.copy_(w)
        for other in (w.numpy(), torch.nn.Parameter(w), strided, strided.numpy()):
            np.testing.assert_array_equal(ft.quantize(other, group=32).dequantize(), packed)
    w = weights().bfloat16()
    np.testing.assert_array_equal(ft.quantize(w).dequantize(), ft.quantize(w.float()).dequantize())


def test_inputs_in_any_order() -> None:
    matrix = ft.quantize(weights(), "int8", group=32)
    for x in (
        torch.randn(77, 6).T,
        torch.randn(6, 1).expand(6, 77),
        torch.randn(4, 6, 154)[1:, ::2, 77:],
        torch.randn(3, 77, dtype=torch.complex64).conj().imag,  # negated lazily
        torch.frombuffer(bytearray(77 * 4 + 1), dtype=torch.float32, count=77, offset=1),  # unaligned
    ):
        assert torch.equal(matrix.matmul(x), matrix.matmul(x.clone(memory_format=torch.contiguous_format)))
    grid = np.random.default_rng(0).standard_normal((6, 154)).astype(np.float32)
    for a in (grid[:, ::-2], np.asfortranarray(grid[:, :77]), grid[::-1, 77:]):
        np.testing.assert_array_equal(matrix.matmul(a), matrix.matmul(a.copy()))


def test_inputs_are_not_written() -> None:
    matrix = ft.quantize(weights())
    x = np.ones((3, 77), np.float32)
    x.flags.writeable = False
    matrix.matmul(x)
    assert (x == 1).all()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 76), ValueError, r"got shape \(3, 76\), expected \(\.\.\., 77\)"),
        (torch.tensor(1.0), ValueError, r"got shape \(\), expected \(\.\.\., 77\)"),
        (torch.zeros(3, 77, dtype=torch.float64), TypeError, "got torch.float64, expected torch.float32"),
        (torch.zeros(3, 77, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(3, 77, device="meta"), ValueError, "got a tensor on meta, expected one on cpu"),
        (torch.zeros(3, 77).to_sparse(), ft.UnsupportedError, "without data"),
        (torch.zeros(3, 77, requires_grad=True), ft.UnsupportedError, "requires a gradient"),
        (np.zeros((3, 77)), TypeError, "got float64, expected float32 or float16"),
        (np.zeros((3, 77), ">f4"), TypeError, "expected float32"),
        (np.ma.zeros((3, 77), np.float32), TypeError, "MaskedArray, expected a plain numpy.ndarray"),
        ([[0.0] * 77], TypeError, "got list, expected a numpy.ndarray or a torch.Tensor"),
        (None, TypeError, "got NoneType"),
    ],
    ids=str,
)
def test_other_inputs_are_refused(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ft.quantize(weights()).matmul(x)


def test_tensors_without_data_are_refused() -> None:
    from torch._subclasses import FakeTensorMode

    matrix = ft.quantize(weights())
    with FakeTensorMode():
        fake = torch.zeros(3, 77)
    with pytest.raises(ft.UnsupportedError, match=r"FakeTensor, expected torch\.Tensor itself"):
        matrix.matmul(fake)
    with pytest.raises(ft.UnsupportedError, match="without data"):
        torch.func.vmap(matrix.matmul)(torch.zeros(3, 77))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int5"}, 'weights: got "int5", expected one of int4, int8'),
        ({"weights": 4}, "weights: got 4, expected a word"),
        ({"group": 48}, "group size: got 48, expected 16, 32, 64 or 128"),
        ({"group": 0}, "group"),
        ({"activations": "a4"}, "activations"),
        ({"symmetric": 1}, "symmetric: got 1"),
    ],
)
def test_wrong_arguments_are_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ft.quantize(weights(), **arguments)


def test_wrong_weights_are_errors() -> None:
    with pytest.raises(ValueError, match=r"w: got shape \(3,\), expected \(N, K\)"):
        ft.quantize(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"got \(0, 4\), expected two positive sizes"):
        ft.quantize(np.zeros((0, 4), np.float32))
    w = weights()
    w[3, 5] = float("nan")
    with pytest.raises(ValueError, match="row 3, input 5: got weight NaN"):
        ft.quantize(w)
    w[3, 5] = 1e9
    with pytest.raises(ValueError, match="row 3, group 0: got scale"):
        ft.quantize(w)


@pytest.mark.parametrize(("name", "group", "symmetric"), [*FORMATS, *OTHERS])
def test_copies_and_pickles_are_the_same_matrix(name: str, group: int, symmetric: bool) -> None:
    matrix = ft.quantize(weights(), name, group=group, symmetric=symmetric, activations="auto")
    assert copy.deepcopy(matrix) is matrix
    again = pickle.loads(pickle.dumps(matrix))
    assert (again.shape, again.format, again.activations) == (matrix.shape, matrix.format, matrix.activations)
    assert again.nbytes == matrix.nbytes
    np.testing.assert_array_equal(again.dequantize(), matrix.dequantize())
    x = torch.randn(4, 77)
    assert torch.equal(again.matmul(x), matrix.matmul(x))


def test_damaged_pickles_are_errors() -> None:
    state = farthing.matrix.state(ft.quantize(weights(), "int4", group=32))
    for damage in (
        {"columns": 79},
        {"columns": 10**18},
        {"group": 0},
        {"group": 64},
        {"scales": state["scales"][1:]},
        {"activations": "auto"},
        {"weights": "f32"},
        {"scales": np.full_like(state["scales"], np.inf)},
    ):
        with pytest.raises(ValueError, match=r"got|expected"):
            farthing.matrix.restore(state | damage)


def test_attributes_tell_what_it_is() -> None:
    matrix = ft.quantize(weights(128, 256), "int4", group=128, symmetric=False, activations="a8")
    assert matrix.shape == (128, 256)
    assert matrix.format == "int4 g128 minimum f16"
    assert matrix.activations == "a8"
    assert matrix.nbytes == 128 * 256 // 2 + 128 * 2 * 4
    assert repr(matrix) == "PackedMatrix(128 × 256, int4 g128 minimum f16, a8, 17408 bytes)"
    with pytest.raises(AttributeError):
        matrix.shape = (1, 1)


def test_threads_may_share_a_matrix() -> None:
    matrix = ft.quantize(weights(640, 512), "int4", group=32)
    inputs = [torch.randn(size, 512) for size in (1, 3, 90, 200)]
    wanted = [matrix.matmul(x) for x in inputs]
    wrong = []

    def work() -> None:
        for _ in range(30):
            wrong.extend(1 for x, y in zip(inputs, wanted, strict=True) if not torch.equal(matrix.matmul(x), y))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_rows_do_not_depend_on_each_other() -> None:
    """Parts of a long input, other rows and the number of threads leave every bit of a row alone."""
    matrix = ft.quantize(weights(48, 4096), "int4", group=64)
    x = torch.randn(4300, 4096).bfloat16()
    y = matrix.matmul(x)
    for row in (0, 63, 64, 4095, 4096, 4299):
        assert torch.equal(matrix.matmul(x[row]), y[row])


def test_examples_run() -> None:
    assert doctest.testmod(farthing.matrix).failed == 0


@pytest.mark.parametrize("weights", ["ternary", "mxfp4", "nf4", "iq4_nl"])
def test_formats_without_a_minimum_say_so(weights: str) -> None:
    w = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    with pytest.raises(ValueError, match=f"symmetric: got False, expected True for {weights}"):
        ft.quantize(w, weights, group=32, symmetric=False)
    m = ft.quantize(w, weights, group=32, activations="a16")
    x = np.eye(64, dtype=np.float32)
    np.testing.assert_allclose(m.matmul(x), m.dequantize().T, atol=1e-3)
