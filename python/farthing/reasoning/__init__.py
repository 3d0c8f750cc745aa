"""Fewer tokens: effort that is honoured, and thinking that keeps to a budget and ends well."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .controller import Controller, ThinkSpec
    from .effort import EFFORTS, EffortPlan, resolve_effort
    from .policy import REFLECTION_WORDS, Policy
    from .remote import RemoteAnswer, two_phase

__all__ = [
    "EFFORTS",
    "REFLECTION_WORDS",
    "Controller",
    "EffortPlan",
    "Policy",
    "RemoteAnswer",
    "ThinkSpec",
    "resolve_effort",
    "two_phase",
]

# Nothing is imported before it is used: every `SamplingParams` comes by here.
_HOMES = {
    "EFFORTS": "effort",
    "REFLECTION_WORDS": "policy",
    "Controller": "controller",
    "EffortPlan": "effort",
    "Policy": "policy",
    "RemoteAnswer": "remote",
    "ThinkSpec": "controller",
    "resolve_effort": "effort",
    "two_phase": "remote",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
