"""Balanced clusters of rows: k-means in which every cluster has as many."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["balanced_clusters"]


def balanced_clusters(rows: Any, count: int, *, seed: int = 0, rounds: int = 50) -> npt.NDArray[np.int64]:
    """Clusters rows, as many to each cluster, by k-means with stable assignment.

    Centres start as those of k-means++. In each round rows and centres are matched so that no row and centre, both
    with a farther partner, would rather have each other; then centres become the means of their rows.

    Args:
        rows: (N, D) numbers.
        count: clusters, a divisor of N.
        seed: of the first centres.
        rounds: at most as many; fewer where nothing changes any more.

    Returns:
        (N,) the cluster of each row.

    Raises:
        ValueError: N is not divisible, or a number is not finite.

    Example:
        >>> import numpy as np
        >>> rows = np.array([[0.0], [9.0], [0.1], [9.1], [0.2], [20.0]])
        >>> labels = balanced_clusters(rows, 2)
        >>> bool(labels[0] == labels[2] == labels[4] != labels[5])
        True
    """
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(f"rows: got shape {rows.shape} or numbers that are not finite, expected finite (N, D)")
    if count < 1 or len(rows) == 0 or len(rows) % count:
        raise ValueError(f"count: got {count}, expected a divisor of {len(rows)} rows")
    centres = _first_centres(rows, count, np.random.default_rng(seed))
    labels = np.full(len(rows), -1)
    for _ in range(rounds):
        before, labels = labels, _match(_distances(rows, centres), len(rows) // count)
        if np.array_equal(before, labels):
            break
        centres = np.stack([rows[labels == cluster].mean(0) for cluster in range(count)])
    return labels


def _distances(rows: npt.NDArray[np.float64], centres: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N, count) squared, less the square of the row."""
    squares: npt.NDArray[np.float64] = (centres**2).sum(-1) - 2 * rows @ centres.T
    return squares


def _first_centres(rows: npt.NDArray[np.float64], count: int, random: np.random.Generator) -> npt.NDArray[np.float64]:
    chosen = [int(random.integers(len(rows)))]
    nearest = np.full(len(rows), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, ((rows - rows[chosen[-1]]) ** 2).sum(-1))
        total = nearest.sum()
        # Equal rows are at no distance from one another.
        chosen.append(int(random.choice(len(rows), p=nearest / total)) if total > 0 else len(chosen))
    return rows[chosen]


def _match(distances: npt.NDArray[np.float64], room: int) -> npt.NDArray[np.int64]:
    """Rows ask their nearest centre that has not refused them; a centre keeps the ``room`` nearest."""
    count = distances.shape[1]
    left = distances.copy()
    labels = np.full(len(distances), -1)
    while (free := np.flatnonzero(labels < 0)).size:
        labels[free] = left[free].argmin(-1)
        for cluster in range(count):
            members = np.flatnonzero(labels == cluster)
            if len(members) > room:
                refused = members[np.argsort(distances[members, cluster], kind="stable")[room:]]
                labels[refused] = -1
                left[refused, cluster] = np.inf
    return labels
