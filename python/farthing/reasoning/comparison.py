"""Reports of one set beside each other: paired differences, a table, plots."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import numpy.typing as npt

from ..tables import html_table, text_table
from .report import Report

__all__ = ["Comparison", "compare", "plot", "table"]

RESAMPLES = 10_000
_Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A report against a baseline on the same problems; prints as a table.

    Attributes:
        name: of the report.
        baseline: of the other.
        problems: that both have.
        accuracy: difference of the accuracies, report less baseline.
        accuracy_interval: its 95 % interval, by the bootstrap over problems.
        better: problems on which the report has the higher share of right answers.
        worse: problems on which it has the lower.
        p: two-sided probability of a split as uneven as that by chance (the exact sign test, McNemar's).
        saved: share of the baseline's tokens that the report saves.
        saved_interval: its 95 % interval.
    """

    name: str
    baseline: str
    problems: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    better: int
    worse: int
    p: float
    saved: float
    saved_interval: tuple[float, float]

    def _rows(self) -> list[tuple[str, str]]:
        low, high = self.accuracy_interval
        least, most = self.saved_interval
        return [
            (f"{self.name} against {self.baseline}", f"{self.problems} problems"),
            ("accuracy", f"{100 * self.accuracy:+.1f} points (95 %: {100 * low:+.1f} to {100 * high:+.1f})"),
            ("better / worse", f"{self.better} / {self.worse} problems, p = {self.p:.2g}"),
            ("tokens saved", f"{self.saved:.1%} (95 %: {least:.1%} to {most:.1%})"),
        ]

    def __str__(self) -> str:
        return text_table(self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows())


def compare(report: Report, baseline: Report) -> Comparison:
    """Compares problem by problem, which takes their difficulty out of the difference.

    Intervals are percentiles of 10,000 resamplings of the problems with a fixed seed, so they are always the same.

    Raises:
        ValueError: the reports have no problems in common.
    """
    shared = sorted(report.scores.keys() & baseline.scores.keys())
    if not shared:
        raise ValueError(f"baseline: {baseline.name} has no problem of {report.name}, expected the same set")

    def column(value: Callable[[str], float]) -> _Vector:
        return np.fromiter((value(item) for item in shared), np.float64, len(shared))

    difference = column(lambda item: report.scores[item] - baseline.scores[item])
    ours = column(lambda item: fmean(answer.tokens for answer in report.by_item[item]))
    theirs = column(lambda item: fmean(answer.tokens for answer in baseline.by_item[item]))
    # counts: (resamples, problems): how often each was drawn.
    counts = np.random.default_rng(0).multinomial(len(shared), [1 / len(shared)] * len(shared), RESAMPLES)
    differences = counts @ difference / len(shared)
    savings = 1 - (counts @ ours) / np.maximum(counts @ theirs, 1e-12)
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    return Comparison(
        name=report.name,
        baseline=baseline.name,
        problems=len(shared),
        accuracy=float(difference.mean()),
        accuracy_interval=_percentiles(differences),
        better=better,
        worse=worse,
        p=_sign_test(better, worse),
        saved=float(1 - ours.sum() / max(theirs.sum(), 1e-12)),
        saved_interval=_percentiles(savings),
    )


def table(reports: Sequence[Report], baseline: Report | None = None) -> str:
    """The reports as text, line by line, with their paired differences to the baseline."""
    header = ["", "problems", "accuracy", "tokens", "median", "unanswered", "cut off"]
    if baseline is not None:
        header += ["points against " + baseline.name, "95 %", "tokens saved"]
    rows = []
    for report in reports:
        row = [
            report.name,
            f"{len(report.scores)}",
            f"{report.accuracy:.1%}",
            f"{report.mean_tokens:.1f}",
            f"{report.median_tokens:g}",
            str(report.outcomes["unanswered"]),
            str(report.truncated),
        ]
        if baseline is not None:
            found = compare(report, baseline)
            low, high = found.accuracy_interval
            row += [f"{100 * found.accuracy:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", f"{found.saved:.1%}"]
        rows.append(row)
    return text_table(rows, header)


def plot(reports: Sequence[Report], path: str | os.PathLike[str]) -> None:
    """Draws accuracy against mean tokens, with standard errors, and the histogram of tokens, into an image file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    scatter, histogram = figure.subplots(1, 2)
    most = max(answer.tokens for report in reports for answer in report.answers)
    bins = np.linspace(0, most + 1, 41)
    for report in reports:
        bar = None if math.isnan(report.standard_error) else 100 * report.standard_error
        scatter.errorbar(report.mean_tokens, 100 * report.accuracy, bar, fmt="o", capsize=3, label=report.name)
        tokens = [answer.tokens for answer in report.answers]
        histogram.hist(tokens, bins, histtype="step", label=report.name)
    scatter.set(xlabel="mean tokens, probes included", ylabel="accuracy, %", title="accuracy against tokens")
    scatter.set_xlim(left=0)
    scatter.grid(alpha=0.3)
    scatter.legend(fontsize="small")
    histogram.set(xlabel="tokens of an answer", ylabel="answers", title="length")
    histogram.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _percentiles(values: _Vector) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _sign_test(better: int, worse: int) -> float:
    count = better + worse
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1)) / 2**count if count else 1.0
    return min(1.0, 2 * tail)
