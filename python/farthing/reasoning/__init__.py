"""Fewer tokens: effort that is honoured, what it costs in accuracy, and models trained to need fewer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .comparison import Comparison, compare, plot
from .consistency import Consensus, self_consistency
from .evaluation import evaluate
from .grading import Grade, Grader
from .interpolation import interpolate
from .levels import Settled, truncation_levels
from .report import Answer, Report
from .tasks import Item, question, read_items

if TYPE_CHECKING:
    from .divergence import Divergence, linear_divergence, logits_divergence
    from .opsdc import DIFFICULTY_AWARE, UNIFORM, PromptPair, Schedule, States, chat_pairs, opsdc_loss
    from .rollouts import EngineRollouts, TransformersRollouts
    from .training import Opsdc, StepReport

__all__ = [
    "DIFFICULTY_AWARE",
    "UNIFORM",
    "Answer",
    "Comparison",
    "Consensus",
    "Divergence",
    "EngineRollouts",
    "Grade",
    "Grader",
    "Item",
    "Opsdc",
    "PromptPair",
    "Report",
    "Schedule",
    "Settled",
    "States",
    "StepReport",
    "TransformersRollouts",
    "chat_pairs",
    "compare",
    "evaluate",
    "interpolate",
    "linear_divergence",
    "logits_divergence",
    "opsdc_loss",
    "plot",
    "question",
    "read_items",
    "self_consistency",
    "truncation_levels",
]

# Training needs torch, which is not imported before it is used.
_TORCH = {
    "DIFFICULTY_AWARE": "opsdc",
    "UNIFORM": "opsdc",
    "Divergence": "divergence",
    "EngineRollouts": "rollouts",
    "Opsdc": "training",
    "PromptPair": "opsdc",
    "Schedule": "opsdc",
    "States": "opsdc",
    "StepReport": "training",
    "TransformersRollouts": "rollouts",
    "chat_pairs": "opsdc",
    "linear_divergence": "divergence",
    "logits_divergence": "divergence",
    "opsdc_loss": "opsdc",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _TORCH:
        value = getattr(import_module(f".{_TORCH[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
