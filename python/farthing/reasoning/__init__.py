"""Fewer tokens: effort that is honoured, and models that are trained to need fewer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .divergence import Divergence, linear_divergence, logits_divergence
    from .opsdc import DIFFICULTY_AWARE, UNIFORM, PromptPair, Schedule, States, chat_pairs, opsdc_loss
    from .rollouts import EngineRollouts, TransformersRollouts
    from .training import Opsdc, StepReport

__all__ = [
    "DIFFICULTY_AWARE",
    "UNIFORM",
    "Divergence",
    "EngineRollouts",
    "Opsdc",
    "PromptPair",
    "Schedule",
    "States",
    "StepReport",
    "TransformersRollouts",
    "chat_pairs",
    "linear_divergence",
    "logits_divergence",
    "opsdc_loss",
]

# Training needs torch, which is not imported before it is used.
_HOMES = {
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

    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
