"""How evenly tokens spread over experts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..sampling import integer
from ..tables import html_table, text_table

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RoutingStatistics"]


class RoutingStatistics:
    """Counts over any number of routed rows, of one layer or of many.

    No row is ever dropped: experts have no capacity. Ids that are no expert, as expert parallelism marks slots of other
    machines, are counted as ``skipped``.

    Args:
        num_experts: E.

    Example:
        >>> import numpy as np
        >>> import farthing as ft
        >>> statistics = ft.moe.RoutingStatistics(4).record(np.array([[0, 1], [1, 2]]))
        >>> statistics.tokens_per_expert.tolist(), statistics.max_over_mean
        ([1, 2, 1, 0], 2.0)
        >>> print(statistics)
        tokens                                     2
        experts used                          3 of 4
        entropy                   1.040 of 1.386 nat
        greatest load                    2.00 × mean
        coefficient of variation                0.71
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = integer("num_experts", num_experts, 1)
        self._core = _core.RoutingStatistics(self.num_experts)
        self._has_mass = False

    def record(self, routing: Any, selected_mass: Any = None) -> Self:
        """Adds rows: what `route` gave, or an array (T, K) of ids, with or without their share of all scores (T,)."""
        ids = getattr(routing, "ids", routing)
        mass = getattr(routing, "selected_mass", selected_mass)
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"ids: got {ids.dtype}, expected integers")
        if mass is not None:
            mass = np.asarray(mass, np.float32)
            self._has_mass = True
        self._core.record(ids.astype(np.int64, copy=False), mass)
        return self

    @property
    def tokens(self) -> int:
        """Rows recorded."""
        return self._core.tokens

    @property
    def tokens_per_expert(self) -> npt.NDArray[np.uint64]:
        """(E,) rows that each expert got."""
        return self._core.tokens_per_expert

    @property
    def skipped(self) -> int:
        """Ids that were no expert."""
        return self._core.skipped

    @property
    def distinct(self) -> int:
        """Experts that got any row."""
        return self._core.distinct

    @property
    def entropy(self) -> float:
        """Entropy of the loads in nats: ``log E`` when all experts get as much, 0 when one gets everything."""
        return self._core.entropy

    @property
    def max_over_mean(self) -> float:
        """The greatest load over the mean one: 1 when all are equal."""
        return self._core.max_over_mean

    @property
    def coefficient_of_variation(self) -> float:
        """Standard deviation of the loads over their mean: 0 when all are equal."""
        return self._core.coefficient_of_variation

    @property
    def mean_mass(self) -> float | None:
        """Mean share of all experts' scores that the chosen ones had; None if none was recorded."""
        return self._core.mean_mass if self._has_mass else None

    def plot(self, axes: Any = None) -> Any:
        """Draws the sorted loads as shares of the mean; returns the axes. Needs matplotlib.

        Args:
            axes: matplotlib axes to draw on; new ones by default.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from error
        if axes is None:
            axes = pyplot.subplots()[1]
        loads = np.sort(self.tokens_per_expert.astype(np.float64))[::-1]
        mean = loads.mean() or 1.0
        axes.bar(np.arange(len(loads)), loads / mean, width=1.0)
        axes.axhline(1.0, color="black", linewidth=1)
        axes.set(xlabel="experts, most used first", ylabel="load / mean", title=f"{self.tokens} tokens")
        return axes

    def _rows(self) -> list[tuple[str, str]]:
        rows = [
            ("tokens", str(self.tokens)),
            ("experts used", f"{self.distinct} of {self.num_experts}"),
            ("entropy", f"{self.entropy:.3f} of {math.log(self.num_experts):.3f} nat"),
            ("greatest load", f"{self.max_over_mean:.2f} × mean"),
            ("coefficient of variation", f"{self.coefficient_of_variation:.2f}"),
        ]
        if self.mean_mass is not None:
            rows.append(("mass of the chosen", f"{self.mean_mass:.3f}"))
        if self.skipped:
            rows.append(("ids of no expert", str(self.skipped)))
        return rows

    def __str__(self) -> str:
        return text_table(self._rows())

    def __repr__(self) -> str:
        return f"RoutingStatistics({self.num_experts} experts, {self.tokens} tokens, {self.distinct} used)"

    def _repr_html_(self) -> str:
        return html_table(self._rows())
