"""What this machine is and what it can do, measured."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from . import _core
from .sampling import integer

__all__ = ["Limits", "limits", "measure", "measured", "memory", "warnings"]


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
