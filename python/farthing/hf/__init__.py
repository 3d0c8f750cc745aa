"""Plug-ins for transformers. Importing this package imports torch."""

from .accelerate import Report, accelerate, restore
from .experts import Expert, Experts, describe_experts
from .generate import FarthingCandidateGenerator, generate
from .thinking import ThinkingLogitsProcessor, ThinkingReport, ThinkingStoppingCriteria

__all__ = [
    "Expert",
    "Experts",
    "FarthingCandidateGenerator",
    "Report",
    "ThinkingLogitsProcessor",
    "ThinkingReport",
    "ThinkingStoppingCriteria",
    "accelerate",
    "describe_experts",
    "generate",
    "restore",
]
