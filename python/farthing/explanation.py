"""What a model is made of, matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from . import _core
from .ledger import size
from .tables import html_table, text_table

__all__ = ["Explanation", "Matrix"]

HEADER = ("matrix", "layers", "shape", "format", "activations", "kernel", "bytes")
KIND = ("rows", "columns", "format", "activations", "kernel")


@dataclass(frozen=True)
class Matrix:
    """One matrix, or the matrices of a layer's experts that do the same.

    Attributes:
        layer: index of its block; None for embedding and head.
        role: what it does.
        count: 1, or the number of experts.
        used: of which one token uses so many.
        rows: outputs.
        columns: inputs.
        format: how its weights are packed.
        activations: precision of what it is multiplied by.
        kernel: instruction set of the kernel that multiplies it.
        nbytes: bytes that all of them take.
        on_disk: whether they are on disk, from where those come to memory that are needed (``expert_memory``).
    """

    layer: int | None
    role: str
    count: int
    used: int
    rows: int
    columns: int
    format: str
    activations: str
    kernel: str
    nbytes: int
    on_disk: bool


class Explanation(list[Matrix]):
    """Every matrix in order; prints as a table with one line for all that are alike.

    Attributes:
        resident_bytes: bytes of them in memory, at most.
        lossy: what changes the model's answers beside the formats of its weights, in words; empty without such levers.
    """

    resident_bytes: int = 0
    lossy: tuple[str, ...] = ()

    @classmethod
    def of(cls, reports: Iterable[_core.MatrixReport], resident_bytes: int, lossy: Iterable[str] = ()) -> Explanation:
        """From the core's records."""
        names = Matrix.__dataclass_fields__
        explanation = cls(Matrix(**{name: getattr(report, name) for name in names}) for report in reports)
        explanation.resident_bytes = resident_bytes
        explanation.lossy = tuple(lossy)
        return explanation

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices together."""
        return sum(matrix.nbytes for matrix in self)

    @property
    def disk_bytes(self) -> int:
        """Bytes of those on disk; what is in memory of them is a copy."""
        return sum(matrix.nbytes for matrix in self if matrix.on_disk)

    def _rows(self) -> list[tuple[str, ...]]:
        def kind(matrix: Matrix) -> Any:
            return tuple(getattr(matrix, name) for name in ("role", "count", "used", "on_disk", *KIND))

        order = {key: index for index, key in enumerate(dict.fromkeys(map(kind, self)))}
        alike = groupby(sorted(self, key=lambda matrix: order[kind(matrix)]), key=kind)
        rows = [
            (
                f"{key[0]} (disk)" if key[3] else key[0],
                _spans(group),
                _shape(group[0]),
                *key[-3:],
                size(sum(each.nbytes for each in group)),
            )
            for key, group in ((key, list(members)) for key, members in alike)
        ]
        rows.append(("all", "", "", "", "", "", size(self.nbytes)))
        if self.disk_bytes:
            read = sum(matrix.nbytes // matrix.count * matrix.used for matrix in self if matrix.on_disk)
            rows.append(("on disk", "", "", "", "", "", size(self.disk_bytes)))
            rows.append(("in memory, at most", "", "", "", "", "", size(self.resident_bytes)))
            rows.append(("of those on disk, read per token", "", "", "", "", "", size(read)))
        return [*rows, *(("lossy", "", what, "", "", "", "") for what in self.lossy)]

    def __str__(self) -> str:
        return text_table(self._rows(), HEADER)

    def _repr_html_(self) -> str:
        return html_table(self._rows(), HEADER)


def _shape(matrix: Matrix) -> str:
    """``1024 × 2048``, of experts ``8 of 64 × 1024 × 2048``."""
    experts = "" if matrix.count == 1 else f"{matrix.used} of {matrix.count} × "
    return f"{experts}{matrix.rows} × {matrix.columns}"


def _spans(matrices: list[Matrix]) -> str:
    """The layers in short: ``0–29``, ``0, 2, 4–7``."""
    layers = [matrix.layer for matrix in matrices if matrix.layer is not None]
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{first}–{last}" if first < last else str(first) for first, last in spans)
