"""Fewer tokens: effort that is honoured."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .effort import EFFORTS, EffortPlan, resolve_effort

__all__ = ["EFFORTS", "EffortPlan", "resolve_effort"]

# Nothing is imported before it is used: every `SamplingParams` comes by here.
_HOMES = {"EFFORTS": "effort", "EffortPlan": "effort", "resolve_effort": "effort"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
