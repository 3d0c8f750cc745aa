"""The experts of a layer, packed once and run on the tokens that chose them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import UnsupportedError
from ..ledger import size
from ..matrix import check_words, restore, state
from ..sampling import integer, number

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Expert", "PackedExperts", "RunStatistics"]

_LAYOUTS = ("concatenated", "interleaved")


class Expert(NamedTuple):
    """The weights of one expert: numpy arrays, torch tensors or packed matrices.

    Attributes:
        gate: (I, H), None for experts without a gate.
        up: (I, H).
        down: (H, I).
        gate_bias: (I,) or None.
        up_bias: (I,) or None.
        down_bias: (H,) or None.
    """

    gate: Any
    up: Any
    down: Any
    gate_bias: Any = None
    up_bias: Any = None
    down_bias: Any = None


class RunStatistics(NamedTuple):
    """What a run has read.

    Attributes:
        tokens_per_expert: (E,) uint32 rows that each expert computed.
        distinct: experts with any.
        weight_bytes: of the experts that were read, once for each 512 tokens that have chosen one.
    """

    tokens_per_expert: npt.NDArray[np.uint32]
    distinct: int
    weight_bytes: int


class PackedExperts:
    """The experts of a layer with packed weights, on the CPU.

    Expert e computes ``f_e(x) = down · f(gate · x + gate_bias, up · x + up_bias) + down_bias``; a call gives each token
    ``Σ weight · f_id(x)`` over its choices, by ascending id, in float32 rounded once. A token's result depends on its
    own row, ids and weights alone, and has the same bits on any number of threads. Nothing can be changed afterwards.

    Args:
        experts: `Expert` for each, or six such values; read one by one, so an iterator keeps memory at the packed size
            plus one expert. Weights are float32, float16 or (torch) bfloat16, or come from `farthing.quantize`.
        weights: ``int4``, ``int8``, ``ternary``, ``mxfp4``, ``nf4``, ``iq4_nl``, ``f32``, ``f16`` or ``bf16``.
        activation: f. With gates ``silu`` and ``gelu_tanh`` mean ``activation(gate) · up``, and ``swiglu`` means
            ``(up + 1) · gate · sigmoid(alpha · gate)`` (gpt-oss); without, ``relu_squared`` of up.
        alpha: of ``swiglu``, 1.702 by default.
        limit: the gate is at most this, up between this and its negative, for ``silu`` (DeepSeek-V4) and ``swiglu``.
        group: inputs that share a scale, 16, 32, 64 or 128.
        symmetric: a scale for each group; if false, a scale and a minimum.
        activations: what the weights are multiplied with: ``a8``, ``a16``, ``f32`` or ``auto``, as for `quantize`.

    Raises:
        TypeError: an array of another type.
        ValueError: shapes or values that do not fit; names the expert.

    Example:
        >>> import numpy as np
        >>> import farthing as ft
        >>> random = np.random.default_rng(0)
        >>> gate_up = random.standard_normal((4, 2 * 48, 64), np.float32)
        >>> down = random.standard_normal((4, 64, 48), np.float32)
        >>> experts = ft.moe.PackedExperts.from_arrays(gate_up, down, "int8", group=32)
        >>> experts
        PackedExperts(4 experts, 64 → 48 → 64, silu, int8 g32 symmetric f16, a16, 39.9 kB)
        >>> x = random.standard_normal((3, 64), np.float32)
        >>> y = experts(x, np.array([[0, 2], [2, 3], [0, 3]]), np.full((3, 2), 0.5, np.float32))
        >>> y.shape, experts.statistics.tokens_per_expert.tolist()
        ((3, 64), [2, 0, 2, 2])
    """

    def __init__(
        self,
        experts: Iterable[Any],
        weights: str = "int4",
        *,
        activation: str = "silu",
        alpha: float | None = None,
        limit: float | None = None,
        group: int = 128,
        symmetric: bool = True,
        activations: str = "auto",
    ) -> None:
        check_words({"weights": weights, "activation": activation, "activations": activations}, symmetric)
        self._core = _core.pack_experts(
            _six(experts),
            activation=activation,
            alpha=None if alpha is None else number("alpha", alpha),
            limit=None if limit is None else number("limit", limit),
            weights=weights,
            group=integer("group", group, 1),
            symmetric=symmetric,
            activations=activations,
        )

    @classmethod
    def from_arrays(
        cls,
        gate_up: Any,
        down: Any,
        weights: str = "int4",
        *,
        gate_up_bias: Any = None,
        down_bias: Any = None,
        layout: str = "concatenated",
        transposed: bool = False,
        activation: str = "silu",
        **options: Any,
    ) -> Self:
        """Packs the experts that arrays of three axes hold.

        Args:
            gate_up: (E, 2I, H), or (E, H, 2I) if transposed; of up alone, (E, I, H), for ``relu_squared``.
            down: (E, H, I), or (E, I, H) if transposed.
            weights: format, as above.
            gate_up_bias: (E, 2I) or None.
            down_bias: (E, H) or None.
            layout: of the 2I: ``concatenated``, gate then up, or ``interleaved``, gate and up by turns (gpt-oss).
            transposed: as gpt-oss keeps them.
            activation: f, as above.
            options: the other arguments above.

        Raises:
            ValueError: shapes that do not fit.
        """
        if layout not in _LAYOUTS:
            raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(_LAYOUTS)}")
        gated = activation != "relu_squared"
        _check_shapes(gate_up, down, gate_up_bias, down_bias, transposed, gated)

        def experts() -> Iterator[Expert]:
            for e in range(len(down)):
                first, last = (gate_up[e].T, down[e].T) if transposed else (gate_up[e], down[e])
                bias = None if gate_up_bias is None else gate_up_bias[e]
                gate, up = _halves(first, layout) if gated else (None, first)
                gate_bias, up_bias = _halves(bias, layout) if gated and bias is not None else (None, bias)
                yield Expert(gate, up, last, gate_bias, up_bias, None if down_bias is None else down_bias[e])

        return cls(experts(), weights, activation=activation, **options)

    @classmethod
    def from_module(cls, module: Any, weights: str = "int4", **options: Any) -> Self:
        """Packs the experts of a transformers 5 module, such as ``model.model.layers[0].mlp.experts``.

        Args:
            module: see `farthing.hf.describe_experts`, which reads it.
            weights: format, as above.
            options: group, symmetric and activations, as above.

        Raises:
            UnsupportedError: the module computes something else, or its weights are no floats on the CPU.
        """
        from ..hf.experts import describe_experts

        experts = describe_experts(module)
        kind = type(module).__name__
        if experts.post_norm is not None:
            raise UnsupportedError(f"{kind}: it normalises what an expert gives, which packed experts do not")
        if experts.activation is None or experts.has_gate == (experts.activation == "relu_squared"):
            raise UnsupportedError(f"{kind}: between its products stands a function that packed experts do not know")
        return cls(experts, weights, activation=experts.activation, alpha=experts.alpha, limit=experts.limit, **options)

    def __call__(self, hidden: Any, ids: Any, weights: Any) -> Any:
        """Runs each token through its experts.

        Other Python threads run meanwhile. Gradients are not recorded: see `farthing.nn.Experts`.

        Args:
            hidden: (T, H) float32, float16 or (torch) bfloat16; numpy array or CPU tensor.
            ids: (T, K) integers; those of no expert, below 0 or from E on, are skipped, and an expert may occur twice.
            weights: (T, K) of the choices, of these types.

        Returns:
            (T, H), of the kind and type of ``hidden``.

        Raises:
            TypeError: an array of another type.
            ValueError: shapes that do not fit.
        """
        return self._core.run(hidden, _integers(ids), weights)

    def __len__(self) -> int:
        return self._core.shape[0]

    def __iter__(self) -> Iterator[Expert]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Expert:
        """A copy of one expert: packed matrices, and biases as float32 arrays."""
        return Expert(*self._core.expert(integer("expert", index, 0)))

    @property
    def num_experts(self) -> int:
        """E."""
        return self._core.shape[0]

    @property
    def intermediate_size(self) -> int:
        """I, of the first expert."""
        return self._core.shape[1]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self._core.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights; a token reads its K experts' share of them."""
        return self._core.nbytes

    @property
    def format(self) -> str:
        """What the stored bytes mean."""
        return self._core.format

    @property
    def activations(self) -> str:
        """Precision of what the weights are multiplied with."""
        return self._core.activations

    @property
    def activation(self) -> tuple[str, float | None, float | None]:
        """f, its alpha and its limit."""
        return self._core.activation

    @property
    def statistics(self) -> RunStatistics:
        """Of the last run, of whatever thread."""
        return RunStatistics(*self._core.last)

    def __repr__(self) -> str:
        experts, inner, hidden = self._core.shape
        kind = f"{self.activation[0]}, {self.format}, {self.activations}, {size(self.nbytes)}"
        return f"PackedExperts({experts} experts, {hidden} → {inner} → {hidden}, {kind})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.activation, [_state(expert) for expert in self])

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        """Nothing can change the experts, so a copy may share them."""
        return self


def _six(experts: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    for index, expert in enumerate(experts):
        six = tuple(expert)
        if len(six) != 6:
            raise ValueError(f"expert {index}: got {len(six)} values, expected the six of farthing.moe.Expert")
        yield six


def _integers(ids: Any) -> npt.NDArray[np.int64]:
    array = np.asarray(ids)
    if array.dtype.kind not in "iu" or array.ndim != 2:
        raise ValueError(f"ids: got {array.dtype} of shape {array.shape}, expected integers (T, K)")
    return array.astype(np.int64, copy=False)


def _halves(both: Any, layout: str) -> tuple[Any, Any]:
    half = len(both) // 2
    return (both[:half], both[half:]) if layout == "concatenated" else (both[::2], both[1::2])


def _check_shapes(gate_up: Any, down: Any, gate_up_bias: Any, down_bias: Any, transposed: bool, gated: bool) -> None:
    if len(down.shape) != 3:
        raise ValueError(f"down: got shape {tuple(down.shape)}, expected three axes")
    count, rows, columns = down.shape
    hidden, inner = (columns, rows) if transposed else (rows, columns)
    wide = 2 * inner if gated else inner
    expected = {
        "gate_up": (gate_up, (count, hidden, wide) if transposed else (count, wide, hidden)),
        "gate_up_bias": (gate_up_bias, (count, wide)),
        "down_bias": (down_bias, (count, hidden)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and tuple(array.shape) != shape:
            beside = f"beside a down of {tuple(down.shape)}"
            raise ValueError(f"{name}: got shape {tuple(array.shape)}, expected {shape} {beside}")


def _state(expert: Expert) -> tuple[Any, ...]:
    matrices = (None if matrix is None else state(matrix) for matrix in expert[:3])
    return (*matrices, *expert[3:])


def _restore(cls: type[PackedExperts], activation: tuple[Any, ...], states: list[tuple[Any, ...]]) -> PackedExperts:
    word, alpha, limit = activation
    experts = ((*(None if part is None else restore(part) for part in each[:3]), *each[3:]) for each in states)
    return cls(experts, activation=word, alpha=alpha, limit=limit)
