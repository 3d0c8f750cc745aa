"""Fewer tokens: effort that is honoured, what it costs in accuracy, and models trained to need fewer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import Comparison, compare, plot
    from .consistency import Consensus, self_consistency
    from .controller import Controller, ThinkSpec
    from .divergence import Divergence, linear_divergence, logits_divergence
    from .effort import EFFORTS, EffortPlan, resolve_effort
    from .evaluation import evaluate
    from .grading import Grade, Grader
    from .interpolation import interpolate
    from .levels import Settled, truncation_levels
    from .opsdc import DIFFICULTY_AWARE, UNIFORM, PromptPair, Schedule, States, chat_pairs, opsdc_loss
    from .policy import REFLECTION_WORDS, Policy, Probe
    from .remote import RemoteAnswer, two_phase
    from .report import Answer, Report
    from .rollouts import EngineRollouts, TransformersRollouts
    from .tasks import Item, question, read_items
    from .training import Opsdc, StepReport

__all__ = [
    "DIFFICULTY_AWARE",
    "EFFORTS",
    "REFLECTION_WORDS",
    "UNIFORM",
    "Answer",
    "Comparison",
    "Consensus",
    "Controller",
    "Divergence",
    "EffortPlan",
    "EngineRollouts",
    "Grade",
    "Grader",
    "Item",
    "Opsdc",
    "Policy",
    "Probe",
    "PromptPair",
    "RemoteAnswer",
    "Report",
    "Schedule",
    "Settled",
    "States",
    "StepReport",
    "ThinkSpec",
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
    "resolve_effort",
    "self_consistency",
    "truncation_levels",
    "two_phase",
]

# Nothing is imported before it is used: every `SamplingParams` comes by here, and training needs torch.
_HOMES = {
    "Comparison": "comparison",
    "compare": "comparison",
    "plot": "comparison",
    "Consensus": "consistency",
    "self_consistency": "consistency",
    "Controller": "controller",
    "ThinkSpec": "controller",
    "Divergence": "divergence",
    "linear_divergence": "divergence",
    "logits_divergence": "divergence",
    "EFFORTS": "effort",
    "EffortPlan": "effort",
    "resolve_effort": "effort",
    "evaluate": "evaluation",
    "Grade": "grading",
    "Grader": "grading",
    "interpolate": "interpolation",
    "Settled": "levels",
    "truncation_levels": "levels",
    "DIFFICULTY_AWARE": "opsdc",
    "UNIFORM": "opsdc",
    "PromptPair": "opsdc",
    "Schedule": "opsdc",
    "States": "opsdc",
    "chat_pairs": "opsdc",
    "opsdc_loss": "opsdc",
    "REFLECTION_WORDS": "policy",
    "Policy": "policy",
    "Probe": "policy",
    "RemoteAnswer": "remote",
    "two_phase": "remote",
    "Answer": "report",
    "Report": "report",
    "EngineRollouts": "rollouts",
    "TransformersRollouts": "rollouts",
    "Item": "tasks",
    "question": "tasks",
    "read_items": "tasks",
    "Opsdc": "training",
    "StepReport": "training",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
