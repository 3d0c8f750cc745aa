"""Speculation: several tokens drafted cheaply, verified in one pass, and never another text than without."""

from .check import CaseReport, Coin, Report, check
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
    "Coin",
    "Intersection",
    "Report",
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
