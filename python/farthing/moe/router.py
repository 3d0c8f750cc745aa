"""Routers: from hidden states or logits to experts and their weights, for every family."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core
from .._core import PackedMatrix
from ..matrix import pack
from ..sampling import integer, number
from . import families
from .statistics import RoutingStatistics

__all__ = ["RouterSpec", "Routing", "route"]

# Words that make no number of a bool, and no bool of a number.
_FLAGS = ("norm_topk_prob", "apply_to_input", "logit_bias", "selection_bias", "hashed")


@dataclass(frozen=True)
class RouterSpec:
    """How a layer chooses experts; its weights are given to `route`.

    With logits ``l = x · Wᵀ + logit_bias``: scores ``s = score(l)``; the chosen are the ``top_k`` greatest of
    ``s + selection_bias`` in the kept groups, lower ids among equals; their weights are ``post(s)``, divided by
    ``Σ + norm_eps`` if normalised, times the scaling factor. All in float32.

    Args:
        num_experts: E.
        top_k: K, experts for each token.
        score: ``softmax`` over all experts, ``sigmoid``, ``sqrtsoftplus`` (DeepSeek-V4) or ``identity``.
        n_group: groups of experts with consecutive ids; the best of them are kept first (DeepSeek-V3).
        topk_group: groups kept.
        group_score: ``top2``, the sum of a group's two best scores (DeepSeek-V3), or ``max`` (DeepSeek-V2).
        masked_fill: what experts of other groups count, ``-inf`` or 0.
        post: ``identity``, or the function that makes weights of the chosen scores: ``softmax`` over them, ``sigmoid``.
        norm_topk_prob: divide weights by their sum.
        norm_eps: added to that sum.
        routed_scaling_factor: multiplies the weights at the end.
        apply_to_input: weights multiply what experts read, not what they give (Llama 4).
        logit_bias: the router adds a bias (E,) to its logits (gpt-oss).
        selection_bias: a bias (E,) takes part in the choice, never in the weights (``e_score_correction_bias``).
        hashed: experts are looked up in a table (V, K) by token id (the first layers of DeepSeek-V4).

    Raises:
        ValueError: no row can be routed this way; names the argument, what it got and what it expected.

    Example:
        >>> import farthing as ft
        >>> spec = ft.moe.RouterSpec(128, 8, norm_topk_prob=True)
        >>> spec.num_experts, spec.score
        (128, 'softmax')
        >>> ft.moe.RouterSpec(128, 8, n_group=3)
        Traceback (most recent call last):
        ValueError: n_group: got 3, expected a divisor of 128 experts
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2"
    masked_fill: float = float("-inf")
    post: str = "identity"
    norm_topk_prob: bool = False
    norm_eps: float = 0.0
    routed_scaling_factor: float = 1.0
    apply_to_input: bool = False
    logit_bias: bool = False
    selection_bias: bool = False
    hashed: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "n_group", "topk_group"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 0))
        for name in ("masked_fill", "norm_eps", "routed_scaling_factor"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        for name in ("score", "group_score", "post"):
            if not isinstance(word := getattr(self, name), str):
                raise ValueError(f"{name}: got {word!r}, expected a word such as {getattr(type(self), name)!r}")
        for name in _FLAGS:
            if not isinstance(flag := getattr(self, name), bool):
                raise ValueError(f"{name}: got {flag!r}, expected True or False")
        if self.hashed and (self.selection_bias or self.n_group > 1):
            raise ValueError("hashed: got True, expected False with a selection bias or groups, which choose by score")
        _core_spec(self)

    @classmethod
    def from_config(cls, config: Any, layer: int | None = None) -> RouterSpec:
        """The router of a model, from its transformers configuration or the content of its ``config.json``.

        Args:
            config: object or mapping with a ``model_type``; what it leaves out is as in the type's configuration class.
            layer: index of the layer; only DeepSeek-V4, whose first layers look experts up, asks for it.

        Raises:
            UnsupportedError: a model type without a mixture of experts, or one that is not known; lists those that are.
            ValueError: a value is missing or impossible.

        Example:
            >>> import farthing as ft
            >>> ft.moe.RouterSpec.from_config({"model_type": "mixtral", "num_local_experts": 8})
            RouterSpec(num_experts=8, top_k=2, norm_topk_prob=True)
        """
        return cls(**families.arguments(config, layer))

    def __repr__(self) -> str:
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return f"RouterSpec({', '.join(f'{name}={value!r}' for name, value, usual in values if value != usual)})"


@lru_cache(maxsize=256)
def _core_spec(spec: RouterSpec) -> _core.RouterSpec:
    return _core.RouterSpec(
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        score=spec.score,
        n_group=spec.n_group,
        topk_group=spec.topk_group,
        group_score=spec.group_score,
        masked_fill=spec.masked_fill,
        post=spec.post,
        norm_eps=spec.norm_eps if spec.norm_topk_prob else None,
        scale=spec.routed_scaling_factor,
    )


@dataclass(frozen=True)
class Routing:
    """Where each row goes; numpy arrays, or torch tensors if the rows were one.

    Attributes:
        ids: (T, K) int64 experts, distinct in a row, the first choice first.
        weights: (T, K) float32 of these experts.
        selected_mass: (T,) float32, the share of all experts' scores that the chosen ones have (of the softmax where
            scores are the logits themselves).
        num_experts: E.
    """

    ids: Any
    weights: Any
    selected_mass: Any
    num_experts: int

    def statistics(self) -> RoutingStatistics:
        """How evenly the rows spread over the experts."""
        return RoutingStatistics(self.num_experts).record(self)


def route(
    x: Any,
    spec: RouterSpec,
    weight: Any = None,
    *,
    logit_bias: Any = None,
    selection_bias: Any = None,
    table: Any = None,
    token_ids: Any = None,
) -> Routing:
    """Chooses experts for each row, as the router of the model does in float32.

    A row's result depends on that row alone, and has the same bits on every instruction set. Ids are distinct whatever
    the logits are. A NaN among them makes the row's weights NaN under softmax; else its expert is chosen last.

    Args:
        x: (T, H) hidden states if there is a weight, else (T, E) logits; float32, float16 or (torch) bfloat16.
        spec: how to choose.
        weight: (E, H) of the router, an array of these types, or a matrix that `quantize` packed as ``f32``, ``bf16``
            or ``f16``: an array is packed anew at each call.
        logit_bias: (E,) if the spec says so.
        selection_bias: (E,) if the spec says so.
        table: (V, K) integers if the spec is hashed.
        token_ids: (T,) integers if the spec is hashed.

    Returns:
        Ids, weights, and the share of all scores that they have.

    Raises:
        TypeError: an array of another type.
        ValueError: shapes or values that do not fit; biases and tables that the spec does not ask for, or that are
            missing.

    Example:
        >>> import numpy as np
        >>> import farthing as ft
        >>> spec = ft.moe.RouterSpec(4, 2, norm_topk_prob=True)
        >>> routing = ft.moe.route(np.array([[0, 1, -1, 1]], np.float32), spec)
        >>> routing.ids.tolist(), routing.weights.tolist()
        ([[1, 3]], [[0.5, 0.5]])
        >>> w = ft.quantize(np.eye(4, 8, dtype=np.float32), "f32")
        >>> ft.moe.route(np.eye(3, 8, dtype=np.float32), spec, w).ids[:, 0].tolist()
        [0, 1, 2]
    """
    if not isinstance(spec, RouterSpec):
        raise ValueError(f"spec: got {spec!r}, expected a RouterSpec")
    given = {
        "logit_bias": (logit_bias, spec.logit_bias),
        "selection_bias": (selection_bias, spec.selection_bias),
        "table": (table, spec.hashed),
        "token_ids": (token_ids, spec.hashed),
    }
    for name, (value, asked) in given.items():
        if (value is not None) != asked:
            got, expected = ("None", "an array") if asked else ("an array", "None")
            raise ValueError(f"{name}: got {got}, expected {expected} for {spec}")
    if weight is not None and not isinstance(weight, PackedMatrix):
        weight = pack(weight, _float_format(weight), 128, True, "f32")
    ids, weights, mass = _core.route(
        x,
        _core_spec(spec),
        weight,
        logit_bias=logit_bias,
        selection_bias=selection_bias,
        table=None if table is None else integers("table", table, 2),
        token_ids=None if token_ids is None else integers("token_ids", token_ids, 1),
    )
    if isinstance(x, np.ndarray):
        return Routing(ids, weights, mass, spec.num_experts)
    tensor = sys.modules["torch"].from_numpy
    return Routing(tensor(ids), tensor(weights), tensor(mass), spec.num_experts)


def _float_format(weight: Any) -> str:
    dtype = str(getattr(weight, "dtype", ""))
    return "bf16" if "bfloat16" in dtype else "f16" if "float16" in dtype else "f32"


def integers(name: str, value: Any, ndim: int) -> npt.NDArray[np.int64]:
    """An array of integers as int64, with as many axes."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.ndim != ndim:
        got = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"{name}: got {got}, expected integers with {ndim} axes")
    return array.astype(np.int64, copy=False)
