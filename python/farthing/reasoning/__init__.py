"""Fewer tokens: effort that is honoured, and what it costs in accuracy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import Comparison, compare, plot
    from .consistency import Consensus, self_consistency
    from .effort import EFFORTS, EffortPlan, resolve_effort
    from .evaluation import evaluate
    from .grading import Grade, Grader
    from .interpolation import interpolate
    from .levels import Settled, truncation_levels
    from .report import Answer, Report
    from .tasks import Item, question, read_items

__all__ = [
    "EFFORTS",
    "Answer",
    "Comparison",
    "Consensus",
    "EffortPlan",
    "Grade",
    "Grader",
    "Item",
    "Report",
    "Settled",
    "compare",
    "evaluate",
    "interpolate",
    "plot",
    "question",
    "read_items",
    "resolve_effort",
    "self_consistency",
    "truncation_levels",
]

# Nothing is imported before it is used: every `SamplingParams` comes by here.
_HOMES = {
    "Comparison": "comparison",
    "compare": "comparison",
    "plot": "comparison",
    "Consensus": "consistency",
    "self_consistency": "consistency",
    "EFFORTS": "effort",
    "EffortPlan": "effort",
    "resolve_effort": "effort",
    "evaluate": "evaluation",
    "Grade": "grading",
    "Grader": "grading",
    "interpolate": "interpolation",
    "Settled": "levels",
    "truncation_levels": "levels",
    "Answer": "report",
    "Report": "report",
    "Item": "tasks",
    "question": "tasks",
    "read_items": "tasks",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
