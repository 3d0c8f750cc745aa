"""Fewer steps: tokens proposed cheaply, verified in one pass, and never another text than without."""

from .check import CaseReport, CheckReport, Coin, check
from .engine import Drafter, DrafterReport, DraftModel, SpeculationReport
from .verify import (
    Intersection,
    Verified,
    draw_gumbel,
    probabilities,
    verify_block,
    verify_ensemble,
    verify_greedy,
    verify_gumbel,
    verify_relaxed,
    verify_threshold,
    verify_tokens,
    verify_traversal,
    verify_tree,
    verify_typical,
)

__all__ = [
    "CaseReport",
    "CheckReport",
    "Coin",
    "DraftModel",
    "Drafter",
    "DrafterReport",
    "Intersection",
    "SpeculationReport",
    "Verified",
    "check",
    "draw_gumbel",
    "probabilities",
    "verify_block",
    "verify_ensemble",
    "verify_greedy",
    "verify_gumbel",
    "verify_relaxed",
    "verify_threshold",
    "verify_tokens",
    "verify_traversal",
    "verify_tree",
    "verify_typical",
]
