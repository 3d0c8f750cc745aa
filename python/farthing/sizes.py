"""Sizes of memory as people write them."""

from __future__ import annotations

import re
from typing import Any

from .sampling import integer

__all__ = ["byte_count"]

UNITS = {"": 1} | {f"{prefix}B": 1000**power for power, prefix in enumerate(["", "k", "M", "G", "T"])}
UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate(["K", "M", "G", "T"], 1)}
_LOWER = {unit.lower(): size for unit, size in UNITS.items()}


def byte_count(name: str, value: Any) -> int:
    """The bytes that ``value`` stands for: a number, or text such as ``"2GB"``, ``"1.5 GiB"`` or ``"4096"``.

    Args:
        name: of the argument, for errors.
        value: an integer ≥ 1, or a number with a unit; kB, MB, GB and TB are powers of 1000, KiB to TiB of 1024.

    Raises:
        ValueError: it is no size.

    Examples:
        >>> byte_count("expert_memory", "1.5GB")
        1500000000
    """
    if not isinstance(value, str):
        return integer(name, value, 1)
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-zA-Z]*)\s*", value)
    size = _LOWER.get(found[2].lower()) if found else None
    count = 0 if found is None or size is None else int(float(found[1]) * size)
    if not 1 <= count < 2**63:
        raise ValueError(f'{name}: got {value!r}, expected bytes or a size such as "2GB" or "500MiB"')
    return count
