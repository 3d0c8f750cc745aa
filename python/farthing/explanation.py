"""What a loaded model is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from . import _core
from .ledger import size
from .tables import html_table, text_table

__all__ = ["Explanation"]

HEADER = ("matrix", "shape", "format", "activations", "kernel", "bytes")


class Explanation(Sequence["_core.MatrixReport"]):
    """One report per matrix; prints as a table, equal matrices of successive layers in one line."""

    def __init__(self, reports: list[_core.MatrixReport]) -> None:
        self._reports = reports

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(report.nbytes for report in self._reports)

    def __len__(self) -> int:
        return len(self._reports)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        return self._reports[index]

    def __iter__(self) -> Iterator[_core.MatrixReport]:
        return iter(self._reports)
