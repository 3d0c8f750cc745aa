"""Fewer tokens: effort that is honoured, and what it costs in accuracy."""

from .comparison import Comparison, compare, plot
from .evaluation import evaluate
from .grading import Grade, Grader
from .report import Answer, Report
from .tasks import Item, question, read_items

__all__ = [
    "Answer",
    "Comparison",
    "Grade",
    "Grader",
    "Item",
    "Report",
    "compare",
    "evaluate",
    "plot",
    "question",
    "read_items",
]
