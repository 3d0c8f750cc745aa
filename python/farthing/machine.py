"""What this machine is and what it can do, measured."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from . import _core
from .sampling import integer

__all__ = [
    "CostCurve",
    "Limits",
    "Processors",
    "cost_curve",
    "limits",
    "measure",
    "measured",
    "memory",
    "processors",
    "warnings",
]


@dataclass(frozen=True)
class Limits:
    """The two speeds nothing here can exceed.

    Attributes:
        threads: how many threads worked together.
        bandwidth: bytes read from memory per second.
        int8_rate: int8 operations per second, a multiplication and an addition counting two.
    """

    threads: int
    bandwidth: float
    int8_rate: float


@dataclass(frozen=True)
class Processors:
    """What of this machine's processors the process may use.

    Attributes:
        allowed: the CPUs of the affinity mask, empty where the system does not say.
        cores: how many of them are cores of their own; the others share one.
        quota: CPUs' worth of time that the control groups grant, or None without a limit.
        pinning: whether an engine that has a thread for each core pins them; ``FARTHING_PIN=0`` switches it off.
    """

    allowed: tuple[int, ...]
    cores: int
    quota: float | None
    pinning: bool

    def __str__(self) -> str:
        cores = f"{len(self.allowed)} allowed, {self.cores} cores" if self.allowed else "unknown"
        quota = "no quota" if self.quota is None else f"quota of {self.quota:g}"
        return f"{cores}; {quota}; pinning {'on' if self.pinning else 'off'}"


@dataclass(frozen=True)
class CostCurve:
    """The time of a product with many rows over the time with one: V(M).

    Attributes:
        ratios: for 1, 2, ... 64 rows; they never fall.
    """

    ratios: tuple[float, ...]

    def at(self, rows: int) -> float:
        """V of that many rows; beyond the measured ones in proportion."""
        rows, most = integer("rows", rows, 0), len(self.ratios)
        if rows == 0:
            return 0.0
        return self.ratios[rows - 1] if rows <= most else self.ratios[-1] * rows / most


def cost_curve(
    weights: str = "int4",
    *,
    group: int = 128,
    symmetric: bool = True,
    activations: str = "a8",
    shape: tuple[int, int] = (4096, 4096),
    threads: int | None = None,
) -> CostCurve:
    """How the time of a product grows with its rows on this machine, for a format of `farthing.quantize`.

    Measured with matrices that come from memory, in a fraction of a second, and kept in the cache directory for the
    CPU, instruction set, threads, format and shape class. It may steer scheduling; no result depends on it.

    Args:
        weights: as for `farthing.quantize`.
        group: as for `farthing.quantize`.
        symmetric: as for `farthing.quantize`.
        activations: as for `farthing.quantize`.
        shape: (N, K) of the matrix; both sides are rounded to powers of two from 64 to 8192.
        threads: by default what this process may use.

    Raises:
        ValueError: an argument is out of range, or no such format exists.

    Example:
        >>> from farthing.machine import cost_curve
        >>> curve = cost_curve("int4", group=32, shape=(256, 256))
        >>> curve.at(1), curve.at(64) >= curve.at(8) >= 1.0
        (1.0, True)
    """
    count = _core.default_threads() if threads is None else integer("threads", threads, 1)
    ratios = _core.cost_curve(
        weights,
        group=integer("group", group, 1),
        symmetric=symmetric,
        activations=activations,
        rows=integer("shape[0]", shape[0], 1),
        columns=integer("shape[1]", shape[1], 1),
        threads=count,
    )
    return CostCurve(tuple(ratios))


def processors() -> Processors:
    """The CPUs this process may use, their quota, and whether threads are pinned to them."""
    allowed, cores, quota = _core.processors()
    return Processors(tuple(allowed), cores, quota, _core.pinning())


_measured: dict[int, Limits] = {}


def measure(threads: int | None = None) -> Limits:
    """Measures the limits now, in about half a second; neighbours on the same machine lower them."""
    count = _core.default_threads() if threads is None else integer("threads", threads, 1)
    _measured[count] = Limits(count, *_core.probe_limits(count))
    return _measured[count]


def limits(threads: int | None = None) -> Limits:
    """The limits as last measured in this process, measured now if they never were."""
    return measured(threads) or measure(threads)


def measured(threads: int | None = None) -> Limits | None:
    """The limits as last measured in this process, if they were."""
    return _measured.get(threads or _core.default_threads())


def memory() -> tuple[int, int] | None:
    """(total, available) bytes of memory, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        entries = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
        return entries["MemTotal"], entries["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return None


def warnings() -> list[str]:
    """What about this machine's state makes measurements or answers slower than they need be."""
    found = []
    processors, threads = os.cpu_count() or 1, _core.default_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > processors - threads + 0.5:
        found.append(
            f"load average is {load:.1f} on {processors} processors: other work slows ours, and spins against it"
        )
    if threads > processors:
        found.append(f"{threads} threads are asked for on {processors} processors")
    if _core.isa() != _core.available_isas()[-1]:
        found.append(f"FARTHING_ISA keeps the kernels at {_core.isa()}; this machine has {_core.available_isas()[-1]}")
    if _core.isa() == "scalar":
        found.append("no vector instructions: expect a tenth of the usual speed or less")
    return found
