"""Fewer tokens: effort that is honoured, and what it costs in accuracy."""

from .comparison import Comparison, compare, plot
from .consistency import Consensus, self_consistency
from .evaluation import evaluate
from .grading import Grade, Grader
from .interpolation import interpolate
from .levels import Settled, truncation_levels
from .report import Answer, Report
from .tasks import Item, question, read_items

__all__ = [
    "Answer",
    "Comparison",
    "Consensus",
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
    "self_consistency",
    "truncation_levels",
]
