"""What an evaluation found: accuracy, tokens and cost."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from .. import _core
from ..errors import FormatError
from ..ledger import checked_prices
from ..tables import html_table, text_table
from .grading import OUTCOMES

__all__ = ["Answer", "Report", "answer_of", "wilson"]


@dataclass(frozen=True)
class Answer:
    """One graded answer and what it cost.

    Attributes:
        item: id of the problem.
        sample: which of its answers, from 0.
        level: the problem's difficulty, where its set has one.
        outcome: ``right``, ``wrong``, ``unanswered`` or ``failed`` (the grader's failure).
        error: the grader's, where it failed.
        truncated: the answer was cut off by ``max_tokens`` or the context.
        text: the answer.
        prompt_tokens, thinking_tokens, answer_tokens, forced_tokens, probe_tokens, cpu_seconds: from its ledger.
        thinking_stop: why thinking ended, as `Completion` says.
    """

    item: str
    sample: int
    level: int | None
    outcome: str
    error: str | None
    truncated: bool
    text: str
    prompt_tokens: int
    thinking_tokens: int
    answer_tokens: int
    forced_tokens: int
    probe_tokens: int
    cpu_seconds: float
    thinking_stop: str | None = None

    @property
    def tokens(self) -> int:
        """Everything behind the prompt: thinking, answer (forced text is in them) and probes."""
        return self.thinking_tokens + self.answer_tokens + self.probe_tokens


_TYPES: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "bool": lambda value: isinstance(value, bool),
    "float": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
    "int | None": lambda value: value is None or (isinstance(value, int) and not isinstance(value, bool)),
    "str | None": lambda value: value is None or isinstance(value, str),
}


@dataclass(frozen=True)
class Report:
    """An evaluation; prints as a table.

    Attributes:
        name: what it is called in tables and plots.
        answers: every graded answer.
        settings: how they were made: model, prompt, sampling.
    """

    name: str
    answers: tuple[Answer, ...]
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not self.answers:
            raise ValueError("answers: got none, expected at least one")

    @cached_property
    def by_item(self) -> dict[str, list[Answer]]:
        """The answers to each problem."""
        found: dict[str, list[Answer]] = {}
        for answer in self.answers:
            found.setdefault(answer.item, []).append(answer)
        return found

    @cached_property
    def scores(self) -> dict[str, float]:
        """Share of right answers to each problem."""
        return {item: fmean(each.outcome == "right" for each in some) for item, some in self.by_item.items()}

    @property
    def accuracy(self) -> float:
        """Mean share of right answers over the problems; unanswered and failed ones are not right."""
        return fmean(self.scores.values())

    @property
    def standard_error(self) -> float:
        """Of the accuracy, over problems."""
        return stdev(self.scores.values()) / math.sqrt(len(self.scores)) if len(self.scores) > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of Wilson's score interval on the number of problems; several samples make it wider than need be."""
        return wilson(self.accuracy, len(self.scores))

    @property
    def outcomes(self) -> dict[str, int]:
        """Answers by outcome."""
        return {name: sum(answer.outcome == name for answer in self.answers) for name in OUTCOMES}

    @property
    def truncated(self) -> int:
        """Answers that were cut off, whatever their outcome."""
        return sum(answer.truncated for answer in self.answers)

    @property
    def thinking_stops(self) -> dict[str, int]:
        """Why thinking ended, where there was any, the most frequent reason first."""
        return dict(Counter(answer.thinking_stop for answer in self.answers if answer.thinking_stop).most_common())

    @property
    def mean_tokens(self) -> float:
        """Tokens an answer, probes and forced text included."""
        return fmean(answer.tokens for answer in self.answers)

    @property
    def median_tokens(self) -> float:
        """The same, the median."""
        return median(answer.tokens for answer in self.answers)

    @property
    def accuracy_per_1k(self) -> float:
        """Right answers per thousand tokens."""
        return 1000 * self.accuracy / self.mean_tokens if self.mean_tokens else math.nan

    def mean(self, field: str) -> float:
        """Mean of a counting field of `Answer`, such as ``probe_tokens``."""
        return fmean(getattr(answer, field) for answer in self.answers)

    def levels(self) -> dict[int, Report]:
        """A report for each level of difficulty, from the lowest; empty where the set has none."""
        found = sorted({answer.level for answer in self.answers if answer.level is not None})
        return {
            level: Report(
                f"{self.name}, level {level}",
                tuple(each for each in self.answers if each.level == level),
                self.settings,
            )
            for level in found
        }

    def cost(self, prices: Mapping[str, float]) -> float:
        """What all answers cost together, as `Ledger.cost` counts."""
        output = sum(answer.thinking_tokens + answer.answer_tokens for answer in self.answers)
        prompt = sum(answer.prompt_tokens for answer in self.answers)
        return _core.cost(prompt, output, sum(answer.cpu_seconds for answer in self.answers), **checked_prices(prices))

    def summary(self) -> dict[str, Any]:
        """The figures as JSON can hold them."""
        low, high = self.interval
        error = self.standard_error
        return {
            "items": len(self.scores),
            "accuracy": self.accuracy,
            "standard_error": None if math.isnan(error) else error,
            "interval": [low, high],
            "outcomes": self.outcomes,
            "truncated": self.truncated,
            "thinking_stops": self.thinking_stops,
            "mean_tokens": self.mean_tokens,
            "median_tokens": self.median_tokens,
            "accuracy_per_1k": self.accuracy_per_1k,
            **{name: self.mean(name) for name in ("thinking_tokens", "answer_tokens", "forced_tokens", "probe_tokens")},
            "levels": {
                str(level): {
                    "items": len(part.scores),
                    "accuracy": part.accuracy,
                    "mean_tokens": part.mean_tokens,
                    "median_tokens": part.median_tokens,
                }
                for level, part in self.levels().items()
            },
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the settings, the figures and every answer as JSON."""
        content = {
            "name": self.name,
            "settings": dict(self.settings),
            "summary": self.summary(),
            "answers": [asdict(answer) for answer in self.answers],
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Reads what `save` wrote.

        Raises:
            FormatError: the file is something else.
        """
        try:
            content = json.loads(Path(path).read_bytes())
            name, settings, rows = (content[key] for key in ("name", "settings", "answers"))
            if not isinstance(name, str) or not isinstance(settings, dict) or not isinstance(rows, list) or not rows:
                raise ValueError("expected a name, settings and answers")
            return cls(name, tuple(map(answer_of, rows)), settings)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"{os.fspath(path)}: not a report: {error!r}") from None

    def _rows(self) -> list[tuple[str, str]]:
        low, high = self.interval
        outcomes, samples = self.outcomes, len(self.answers) / len(self.scores)
        parts = ("thinking", "answer", "forced", "probe")
        means = {part: self.mean(f"{part}_tokens") for part in parts}
        rows = [
            ("problems", f"{len(self.scores)}" + (f", {samples:.3g} answers each" if samples != 1 else "")),
            ("accuracy", f"{self.accuracy:.1%} ± {self.standard_error:.1%} (95 %: {low:.1%} to {high:.1%})"),
            *((word, str(outcomes[word])) for word in ("unanswered", "failed") if outcomes[word]),
            *([("cut off", str(self.truncated))] if self.truncated else []),
            *((f"thinking ended: {reason}", str(count)) for reason, count in self.thinking_stops.items()),
            ("tokens", f"{self.mean_tokens:.1f} mean, {self.median_tokens:g} median"),
            *((f"of them {part}", f"{mean:.1f}") for part, mean in means.items() if mean and part != "answer"),
            ("right per 1k tokens", f"{self.accuracy_per_1k:.2f}"),
        ]
        rows += [
            (f"level {level}", f"{part.accuracy:.1%} of {len(part.scores)}, {part.mean_tokens:.1f} tokens")
            for level, part in self.levels().items()
        ]
        return rows

    def __str__(self) -> str:
        return text_table(self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows(), caption=self.name)


def answer_of(values: Mapping[str, Any]) -> Answer:
    """The answer that a JSON object holds; ValueError if it doesn't."""
    if not isinstance(values, Mapping) or values.keys() != {field.name for field in fields(Answer)}:
        raise ValueError(f"got {str(values)[:80]}, expected the fields of an answer")
    for field in fields(Answer):
        if not _TYPES[str(field.type)](values[field.name]):
            raise ValueError(f"{field.name}: got {str(values[field.name])[:80]}, expected {field.type}")
    if values["outcome"] not in OUTCOMES:
        raise ValueError(f"outcome: got {values['outcome']!r}, expected one of {', '.join(OUTCOMES)}")
    return Answer(**values)


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share of ``count``.

    Examples:
        >>> [round(end, 3) for end in wilson(0.0, 10)]
        [0.0, 0.278]
    """
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
