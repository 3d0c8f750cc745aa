"""Divergences over a whole vocabulary without its logits: a head's products, the loss and the gradients in one pass.

Rows go in blocks. torch multiplies (oneDNN, MKL) into two panels that all blocks share; Rust makes sums and gradient in
one look at each row; what the gradient still multiplies is the columns that it keeps.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from .._core import row_divergences, share_threads
from ..errors import UnsupportedError

__all__ = ["Divergence", "linear_divergence", "logits_divergence"]

# torch's threads spin behind its operators: threads of our own would wait for a core.
share_threads()

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Bytes of the two panels; products of fewer rows at once read the weights more often.
_PANELS = 160_000_000
# Above this share of the vocabulary gathering columns costs more than multiplying all.
_DENSE = 0.25
# Columns at once where products are summed in float32 beside bfloat16 factors.
_TILE = 8192


@dataclass(frozen=True)
class Divergence:
    """What `linear_divergence` returns.

    Attributes:
        loss: ``Σ row_weight · rows``, a scalar; float32, or float64 for float64 inputs. The only one with a gradient.
        rows: the divergence of each row in nats, (N,); 0 where the weight is 0.
        entropy: of the student's distribution in each row, in nats, (N,); 0 where the weight is 0.
        dropped: ``Σ|g|`` of the gradients by logits below the filter, weight included, (N,); 0 without a filter.
        clamped: logits of minus infinity on one side where the other side has probability.
        columns: share of the vocabulary's columns that the gradient has kept.
    """

    loss: torch.Tensor
    rows: torch.Tensor
    entropy: torch.Tensor
    dropped: torch.Tensor
    clamped: int
    columns: float
    _weight: torch.Tensor | None = None

    @cached_property
    def bound(self) -> torch.Tensor:
        """(N,): how far the filter has moved each row of the gradient of ``hidden``, in Euclidean norm, at most.

        ``dropped · max ‖weight_v‖``, for an upstream gradient of 1. Reads all weights once, when first asked for.
        """
        if self._weight is None or not bool(self.dropped.any()):
            return torch.zeros_like(self.dropped)
        tiles = (self._weight[start : start + _TILE] for start in range(0, len(self._weight), _TILE))
        norms = [torch.linalg.vector_norm(tile.float(), dim=1).max() for tile in tiles]
        return self.dropped * torch.stack(norms).max().to(self.dropped)


class _Side(NamedTuple):
    """Student or teacher."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None


class _Options(NamedTuple):
    kind: str
    beta: float
    temperature: float
    filter: float
    row_block: int | None


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    *,
    labels: torch.Tensor | None = None,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    teacher_bias: torch.Tensor | None = None,
    teacher_scale: float | None = None,
    teacher_softcap: float | None = None,
    filter: float = 0.0,  # noqa: A002 - what the literature calls it
    valid_vocab: int | None = None,
    row_block: int | None = None,
) -> Divergence:
    """Divergence between ``softmax(hidden · weightᵀ)`` and a teacher's, on the CPU, without (N, V) logits.

    Gradients by ``hidden``, ``weight`` and ``bias`` are made in the forward pass and returned by ``loss.backward()``.
    Logits are ``softcap·tanh(scale·(hidden · weightᵀ + bias) / softcap) / temperature``. Log-probabilities are float32
    (float64 for float64 inputs) however the inputs are stored; products of bfloat16 are rounded to bfloat16, as torch
    rounds them. Minus infinity on one side where the other side has probability counts as a log-probability of -10,000.

    Args:
        hidden: the student's states, (N, H): float32, bfloat16 or float64. Under `torch.autocast` states and weights
            are multiplied in its type.
        weight: the student's head, (V, H), of the same type.
        teacher_hidden: (N, H'), without gradient. H' and the type may differ, but float64 goes with float64.
        teacher_weight: (V, H').
        row_weight: (N,), any sign; rows of weight 0 cost nothing. By default 1/N each, so that the loss is a mean. Put
            factors of the loss here: a loss multiplied later copies the gradient of the weight.
        labels: (N,) token ids in the teacher's place, for ``"cross_entropy"``.
        kind: ``"reverse_kl"`` KL(student‖teacher), ``"forward_kl"`` KL(teacher‖student), ``"jsd"``
            ``beta·KL(teacher‖m) + (1-beta)·KL(student‖m)`` with ``m = beta·teacher + (1-beta)·student``, or
            ``"cross_entropy"``.
        beta: of ``"jsd"``, between 0 and 1.
        temperature: divides the logits of both; the loss is not multiplied by its square.
        bias: (V,).
        scale: factor of the student's logits.
        softcap: cap of the student's logits.
        teacher_bias: (V,).
        teacher_scale: as ``scale``, which it is by default.
        teacher_softcap: as ``softcap``, which it is by default.
        filter: columns of the vocabulary where no row of a block has a gradient (by its logit, for weight 1) of at
            least this are left out of the gradients. 0 is exact; with peaked distributions 1e-4 leaves out nearly all
            columns; `Divergence.bound` says what that can change.
        valid_vocab: tokens from here on do not exist (padding of the vocabulary); heads may then differ in rows.
        row_block: rows at once; by default what fits two panels of 80 MB.

    Returns:
        See `Divergence`.

    Raises:
        ValueError: shapes or numbers that do not fit.
        UnsupportedError: another device or type.

    The gradients are those of CRISP (arXiv 2603.05433) and of generalized knowledge distillation (arXiv 2306.13649);
    leaving out small ones follows Cut Cross-Entropy (arXiv 2411.09009). Sums and gradients of a row have the same bits
    in any block; torch's products may not.

    Example:
        >>> import torch, farthing as ft
        >>> states, head = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
        >>> found = ft.reasoning.linear_divergence(states, head, torch.randn(3, 8), torch.randn(50, 8))
        >>> found.loss.backward()
        >>> tuple(head.grad.shape), bool(found.loss > 0)
        ((50, 8), True)
    """
    student = _side("", hidden, weight, bias, scale, softcap, valid_vocab)
    teacher: _Side | None = None
    if teacher_hidden is not None and teacher_weight is not None:
        parts = (teacher_hidden.detach(), teacher_weight.detach(), teacher_bias)
        other_scale = scale if teacher_scale is None else teacher_scale
        other_cap = softcap if teacher_softcap is None else teacher_softcap
        teacher = _side("teacher_", *parts, other_scale, other_cap, valid_vocab)
        if len(teacher.hidden) != len(hidden) or len(teacher.weight) != len(student.weight):
            got = f"{len(teacher.hidden)} rows and {len(teacher.weight)} tokens"
            expected = f"{len(hidden)} and {len(student.weight)}"
            raise ValueError(f"teacher: got {got}, expected {expected}; valid_vocab cuts padded vocabularies")
    if (teacher is None) == (labels is None):
        raise ValueError("expected teacher_hidden and teacher_weight, or labels")
    row_weight, labels = _rows(row_weight, labels, len(hidden))
    if row_block is not None and row_block < 1:
        raise ValueError(f"row_block: got {row_block}, expected at least 1")
    options = _Options(kind, beta, temperature, _checked_filter(filter), row_block)
    # What asks for gradients goes in by itself; the rest of the sides rides along.
    loss, rows, entropy, dropped, counts = _Linear.apply(
        student.hidden, weight, bias, student, teacher, labels, row_weight, options
    )
    return Divergence(loss, rows, entropy, dropped, int(counts[0]), float(counts[1]), student.weight.detach())


def logits_divergence(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    row_weight: torch.Tensor | None = None,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Divergence:
    """As `linear_divergence`, from logits that exist: (N, V) and (N, V), with a gradient as large as ``logits``.

    Example:
        >>> import torch, farthing as ft
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> ft.reasoning.logits_divergence(logits, torch.zeros(2, 4)).rows.tolist()
        [0.0, 0.0]
    """
    for name, x in (("logits", logits), ("teacher_logits", teacher_logits)):
        _check(name, x, 2)
    if logits.shape != teacher_logits.shape:
        raise ValueError(f"teacher_logits: got shape {tuple(teacher_logits.shape)}, expected {tuple(logits.shape)}")
    if logits.shape[1] == 0:
        raise ValueError("logits: got no columns, expected at least one token")
    row_weight, _ = _rows(row_weight, None, len(logits))
    options = _Options(kind, beta, temperature, 0.0, None)
    loss, rows, entropy, counts = _Logits.apply(logits, teacher_logits.detach(), row_weight, options)
    return Divergence(loss, rows, entropy, torch.zeros_like(rows), int(counts[0]), 1.0)


def _check(name: str, x: torch.Tensor, dimensions: int) -> None:
    if x.dim() != dimensions:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {dimensions} dimensions")
    if x.device.type != "cpu":
        raise UnsupportedError(f"{name}: got a tensor on {x.device}, expected one on cpu")
    if x.dtype not in _DTYPES:
        raise UnsupportedError(f"{name}: got {x.dtype}, expected torch.float32, torch.bfloat16 or torch.float64")


def _side(
    prefix: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    valid: int | None,
) -> _Side:
    _check(prefix + "hidden", hidden, 2)
    _check(prefix + "weight", weight, 2)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        hidden = hidden.to(dtype)
    elif hidden.dtype != weight.dtype:
        raise ValueError(f"{prefix}weight: got {weight.dtype}, expected {hidden.dtype} as {prefix}hidden")
    if hidden.shape[1] != weight.shape[1]:
        expected = f"(V, {hidden.shape[1]})"
        raise ValueError(f"{prefix}weight: got shape {tuple(weight.shape)}, expected {expected}")
    size = len(weight) if valid is None else valid
    if not 0 < size <= len(weight):
        raise ValueError(f"valid_vocab: got {valid} for {len(weight)} rows of {prefix}weight, expected 1 to that")
    if bias is not None:
        _check(prefix + "bias", bias, 1)
        if len(bias) != len(weight):
            raise ValueError(f"{prefix}bias: got shape {tuple(bias.shape)}, expected ({len(weight)},)")
        bias = bias.detach()[:size]
    return _Side(hidden, weight[:size], bias, scale, softcap)


def _rows(
    row_weight: torch.Tensor | None, labels: torch.Tensor | None, rows: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    for name, x in (("row_weight", row_weight), ("labels", labels)):
        if x is not None and tuple(x.shape) != (rows,):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected ({rows},)")
    if row_weight is None:
        row_weight = torch.full((rows,), 1.0 / max(rows, 1), dtype=torch.float64)
    return row_weight.detach().double(), None if labels is None else labels.detach().long()


def _checked_filter(x: float) -> float:
    if not 0.0 <= x < 1.0:
        raise ValueError(f"filter: got {x}, expected a number from 0 to below 1")
    return x


def _array(x: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same memory for Rust; bfloat16 as bits."""
    x = x.detach()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _empty(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """An array in huge pages where the system has them (numpy asks for those, torch does not)."""
    if dtype == torch.bfloat16:
        return torch.from_numpy(np.empty((rows, columns), np.uint16)).view(dtype)
    return torch.from_numpy(np.empty((rows, columns), np.float64 if dtype == torch.float64 else np.float32))


def _zeros(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of which memory is taken where they are written, in small pages: few rows of many will be."""
    size = like.numel() * dtype.itemsize
    if size == 0:
        return torch.zeros(like.shape, dtype=dtype)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=dtype).view(like.shape)


def _numbers(side: _Side | None, temperature: float) -> tuple[Any, float, float | None, float]:
    if side is None:
        return None, 1.0, None, 1.0
    bias = None if side.bias is None else side.bias.double().contiguous().numpy()
    return bias, side.scale, side.softcap, temperature


class _Panel:
    """Room for the products of some rows with a head, or none where oneDNN makes its own.

    For float32, torch.mm goes to MKL, which reaches two fifths of oneDNN's rate on AMD's processors; oneDNN is reached
    through the operator that torch.compile uses.
    """

    def __init__(self, rows: int, tokens: int, dtype: torch.dtype) -> None:
        onednn = dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self.linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if onednn else None
        self.room = None if self.linear else _empty(rows, tokens, dtype)

    def products(self, states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """``states · headᵀ``: (r, H), (V, H) to (r, V); good until the next call."""
        if self.room is None and self.linear is not None:
            made: torch.Tensor = self.linear(states, head, None, "none", [], "")
            return made
        room = self.room if self.room is not None else _empty(len(states), len(head), states.dtype)
        return torch.mm(states, head.t(), out=room[: len(states)])

    def back(self, slopes: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
        """``slopes · head``: (r, V), (V, H) into ``out`` (r, H)."""
        if self.linear is not None:
            out.copy_(self.linear(slopes, head.t(), None, "none", [], ""))
        else:
            torch.mm(slopes, head, out=out)


class _Figures:
    """Rows of figures, in the order of the rows that have weight."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.divergence, self.entropy, self.dropped = (np.zeros(rows) for _ in range(3))
        self.clamped = 0

    def put(self, where: slice, found: tuple[Any, ...]) -> None:
        self.divergence[where], self.entropy[where], self.dropped[where] = found[:3]
        self.clamped += int(found[3].sum())

    def tensors(self, active: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Loss, divergence, entropy and what the filter dropped, of all rows."""
        loss = (torch.from_numpy(self.divergence) * weights[active]).sum().to(self.dtype)
        rows = []
        for figures in (self.divergence, self.entropy, self.dropped):
            row = torch.zeros(len(active), dtype=torch.float64)
            row[active] = torch.from_numpy(figures)
            rows.append(row.to(self.dtype))
        return loss, *rows


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        student: _Side,
        teacher: _Side | None,
        labels: torch.Tensor | None,
        row_weight: torch.Tensor,
        options: _Options,
    ) -> tuple[torch.Tensor, ...]:
        dtype = hidden.dtype
        head = student.weight.detach().to(dtype)
        active = row_weight != 0
        every = bool(active.all())

        def of(x: torch.Tensor) -> torch.Tensor:
            return x if every else x[active]

        states, weights = of(hidden.detach()), of(row_weight)
        count, tokens = len(states), len(head)
        teacher_states = teacher_head = None
        if teacher is not None:
            teacher_states = of(teacher.hidden)
            teacher_head = teacher.weight.to(teacher_states.dtype)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wanted = wants_hidden or wants_weight or wants_bias
        block = min(options.row_block or _rows_of_panels(tokens, states, teacher_states), max(count, 1))
        panel = _Panel(block, tokens, dtype)
        other = None if teacher_states is None else _Panel(block, tokens, teacher_states.dtype)
        figures = _Figures(count, dtype)
        of_hidden = torch.empty_like(states) if wants_hidden else None
        of_bias = torch.zeros(tokens, dtype=torch.promote_types(dtype, torch.float32)) if wants_bias else None
        of_weight = _WeightGradient(weight, states, block) if wants_weight else None
        of_student, of_teacher = _numbers(student, options.temperature), _numbers(teacher, options.temperature)
        kept = 0
        for start in range(0, count, block):
            rows = slice(start, min(start + block, count))
            z, against = panel.products(states[rows], head), None
            if other is not None and teacher_states is not None and teacher_head is not None:
                against = other.products(teacher_states[rows], teacher_head)
            found = row_divergences(
                _array(z),
                None if against is None else _array(against),
                None if labels is None else of(labels)[rows].contiguous().numpy(),
                weights[rows].contiguous().numpy(),
                kind=options.kind,
                beta=options.beta,
                of_student=of_student,
                of_teacher=of_teacher,
                threshold=options.filter if wanted else None,
            )
            del against  # its memory, for what follows
            columns = torch.from_numpy(found[4])
            dense = len(columns) > _DENSE * tokens
            if dense:
                found[2].fill(0.0)
            figures.put(rows, found)
            kept += (tokens if dense else len(columns)) * (rows.stop - start)
            if not wanted:
                pass
            elif dense:
                if of_hidden is not None:
                    panel.back(z, head, of_hidden[rows])
                if of_weight is not None:
                    of_weight.add(z, states[rows])
                if of_bias is not None:
                    of_bias += z.sum(0, dtype=of_bias.dtype)
            else:
                wide = torch.promote_types(dtype, torch.float32)
                slopes = z.index_select(1, columns).to(wide)
                if of_hidden is not None:
                    of_hidden[rows] = (slopes @ head.index_select(0, columns).to(wide)).to(dtype)
                if of_weight is not None:
                    of_weight.add_columns(columns, slopes, states[rows])
                if of_bias is not None:
                    of_bias.index_add_(0, columns, slopes.sum(0))
            del z
        loss, divergence, entropy, dropped = figures.tensors(active, row_weight)
        if of_hidden is not None and not every:
            whole = torch.zeros_like(hidden)
            whole[active] = of_hidden
            of_hidden = whole
        if of_bias is not None and bias is not None:
            whole = torch.zeros_like(bias)
            whole[:tokens] = of_bias
            of_bias = whole
        ctx.save_for_backward(of_hidden, None if of_weight is None else of_weight.finish(), of_bias)
        counts = torch.tensor([figures.clamped, kept / max(count * tokens, 1)], dtype=torch.float64)
        ctx.mark_non_differentiable(divergence, entropy, dropped, counts)
        return loss, divergence, entropy, dropped, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return (*_scaled(ctx.saved_tensors, upstream), None, None, None, None, None)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, teacher: torch.Tensor, row_weight: torch.Tensor, options: _Options
    ) -> tuple[torch.Tensor, ...]:
        dtype = logits.dtype
        # Becomes the gradient.
        slopes = logits.detach().clone(memory_format=torch.contiguous_format)
        figures = _Figures(len(slopes), dtype)
        teacher = teacher.to(torch.float64) if dtype == torch.float64 else teacher
        plain = (None, 1.0, None, options.temperature)
        found = row_divergences(
            _array(slopes),
            _array(teacher.contiguous()),
            None,
            row_weight.contiguous().numpy(),
            kind=options.kind,
            beta=options.beta,
            of_student=plain,
            of_teacher=plain,
            threshold=0.0 if ctx.needs_input_grad[0] else None,
        )
        figures.put(slice(None), found)
        loss, divergence, entropy, _ = figures.tensors(torch.ones(len(slopes), dtype=torch.bool), row_weight)
        ctx.save_for_backward(slopes if ctx.needs_input_grad[0] else None)
        counts = torch.tensor([figures.clamped], dtype=torch.float64)
        ctx.mark_non_differentiable(divergence, entropy, counts)
        return loss, divergence, entropy, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return (*_scaled(ctx.saved_tensors, upstream), None, None, None)


def _scaled(gradients: tuple[torch.Tensor | None, ...], upstream: torch.Tensor) -> list[torch.Tensor | None]:
    # What is handed on untouched needs no copy: autograd makes it the parameter's gradient.
    if float(upstream) == 1.0:
        return list(gradients)
    return [None if gradient is None else gradient * upstream.to(gradient.dtype) for gradient in gradients]


def _rows_of_panels(tokens: int, states: torch.Tensor, teacher_states: torch.Tensor | None) -> int:
    sides = [states] if teacher_states is None else [states, teacher_states]
    rows = _PANELS // (tokens * sum(side.element_size() for side in sides))
    # Products like multiples of 16.
    return max(16, rows // 16 * 16)


class _WeightGradient:
    """Sums the gradient of a head over blocks of rows; in float32 where the head has less."""

    def __init__(self, weight: torch.Tensor, states: torch.Tensor, block: int) -> None:
        self.weight, self.dtype = weight, weight.dtype
        self.tokens = 0
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.single = len(states) <= block
        self.total: torch.Tensor | None = None
        self.parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, slopes: torch.Tensor, states: torch.Tensor) -> None:
        """``slopesᵀ · states`` for slopes (r, V) and states (r, H)."""
        tokens = slopes.shape[1]
        if slopes.dtype == self.dtype and (self.single or self.dtype == self.wide):
            if self.total is None:
                self.total = _empty(len(self.weight), self.weight.shape[1], self.dtype)
                self.total[tokens:].zero_()
                torch.mm(slopes.t(), states, out=self.total[:tokens])
            else:
                self.total[:tokens].addmm_(slopes.t(), states)
            return
        if self.total is None:
            self.total = _empty(len(self.weight), self.weight.shape[1], self.wide).zero_()
        states = states.to(self.wide)
        for start in range(0, tokens, _TILE):
            tile = slice(start, min(start + _TILE, tokens))
            self.total[tile].addmm_(slopes[:, tile].t().to(self.wide), states)

    def add_columns(self, columns: torch.Tensor, slopes: torch.Tensor, states: torch.Tensor) -> None:
        """As `add`, for some columns (k,) of the slopes: (r, k)."""
        self.parts.append((columns, slopes, states))

    def finish(self) -> torch.Tensor:
        """The gradient, like the head."""
        if self.parts:
            union = torch.unique(torch.cat([columns for columns, _, _ in self.parts]))
            some = torch.zeros(len(union), self.weight.shape[1], dtype=self.wide)
            for columns, slopes, states in self.parts:
                product = slopes.t() @ states.to(slopes.dtype)
                some.index_add_(0, torch.searchsorted(union, columns), product.to(self.wide))
            if self.total is None:
                self.total = _zeros(self.weight, self.dtype)
                self.total[union] = some.to(self.dtype)
            else:
                self.total.index_add_(0, union, some.to(self.total.dtype))
        if self.total is None:
            self.total = _zeros(self.weight, self.dtype)
        return self.total.to(self.dtype)
