"""Problems with known answers: readers of public evaluation sets, and the question put to a model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError

__all__ = ["CONCISE", "PLAIN", "TASKS", "Item", "question", "read_items"]

# Our own wording. Which concise one, was chosen on training items of GSM8K alone (`benches/reasoning.py`).
PLAIN = "Solve this problem step by step. Put the final answer in \\boxed{}."
CONCISE = (
    "Solve this problem. Write one short line with its calculation for each step and nothing else, then the final"
    " answer in \\boxed{}."
)


@dataclass(frozen=True)
class Item:
    """A problem and its answer.

    Attributes:
        id: unique in its set.
        problem: the text put to the model.
        answer: the right answer: a number, LaTeX or text.
        level: difficulty, where the set has one: MATH's level, or the calculations in the reference solution.
    """

    id: str
    problem: str
    answer: str
    level: int | None = None


def question(item: Item, instruction: str = PLAIN) -> str:
    """The text that asks a model to solve ``item`` as ``instruction`` says."""
    return f"{instruction}\n\n{item.problem}"


def read_items(path: str | os.PathLike[str], task: str = "auto", limit: int | None = None) -> list[Item]:
    """Reads an evaluation set with one JSON object a line.

    Args:
        path: the file, UTF-8.
        task: ``gsm8k``, ``math500``, ``svamp``, ``multiarith``, ``generic`` (keys ``problem`` and ``answer``, and
            perhaps ``id`` and an integer ``level``), or ``auto``, which goes by the keys of the first line.
        limit: read so many items; None reads all.

    Raises:
        FormatError: names the line, what it has and what was expected.
        ValueError: an unknown task, or a limit below 1.
        OSError: the file can't be read.

    Examples:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "sums.jsonl"
        >>> _ = file.write_text('{"problem": "2 + 2", "answer": 4}')
        >>> read_items(file)
        [Item(id='1', problem='2 + 2', answer='4', level=None)]
    """
    if task != "auto" and task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected auto or one of {', '.join(TASKS)}")
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit: got {limit!r}, expected an integer ≥ 1")
    items: dict[str, Item] = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if limit is not None and len(items) == limit:
            break
        if not line.strip():
            continue
        where = f"{os.fspath(path)}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where}: no JSON: {error}") from None
        if not isinstance(record, dict):
            raise FormatError(f"{where}: got a JSON {type(record).__name__}, expected an object")
        if task == "auto":
            task = _task_of(record, where)
        item = TASKS[task](_Record(record, where, task), str(number))
        if item.id in items:
            raise FormatError(f"{where}: id {item.id!r} has been there before, expected ids that differ")
        items[item.id] = item
    if not items:
        raise FormatError(f"{os.fspath(path)}: no items, expected one JSON object a line")
    return list(items.values())


class _Record:
    """A line of a file; whatever it lacks is a FormatError with the place."""

    def __init__(self, values: Mapping[str, Any], where: str, task: str) -> None:
        self.values, self.where, self.task = values, where, task

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            raise FormatError(f"{self.where}: {key}: got {_short(value)}, expected text, as {self.task} has")
        return value.strip()

    def answer(self, key: str) -> str:
        """Text or a number; a whole one without its ``.0``."""
        value = self.values.get(key)
        if isinstance(value, str):
            return self.text(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise FormatError(f"{self.where}: {key}: got {_short(value)}, expected text or a finite number")
        return str(int(value)) if value == int(value) else repr(value)

    def name(self, key: str, default: str) -> str:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise FormatError(f"{self.where}: {key}: got {_short(value)}, expected text or an integer")
        return str(value)

    def level(self) -> int | None:
        value = self.values.get("level")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise FormatError(f"{self.where}: level: got {_short(value)}, expected an integer")
        return value


def _short(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]


def _gsm8k(record: _Record, number: str) -> Item:
    solution, mark, answer = record.text("answer").rpartition("####")
    if not mark or not answer.strip():
        raise FormatError(f"{record.where}: answer: got {_short(record.values['answer'])}, expected one behind ####")
    # Each calculation of the reference solution is annotated as <<…=…>>.
    return Item(number, record.text("question"), answer.strip(), solution.count("<<") or None)


def _math500(record: _Record, number: str) -> Item:
    return Item(record.name("unique_id", number), record.text("problem"), record.answer("answer"), record.level())


def _svamp(record: _Record, number: str) -> Item:
    body = record.text("Body")
    problem = f"{body}{'' if body[-1] in '.?!' else '.'} {record.text('Question')}"
    equation = record.values.get("Equation")
    steps = sum(equation.count(f" {sign} ") for sign in "+-*/") if isinstance(equation, str) else 0
    return Item(record.name("ID", number), problem, record.answer("Answer"), steps or None)


def _multiarith(record: _Record, number: str) -> Item:
    return Item(number, record.text("input"), record.answer("target"))


def _generic(record: _Record, number: str) -> Item:
    return Item(record.name("id", number), record.text("problem"), record.answer("answer"), record.level())


TASKS: dict[str, Callable[[_Record, str], Item]] = {
    "gsm8k": _gsm8k,
    "math500": _math500,
    "svamp": _svamp,
    "multiarith": _multiarith,
    "generic": _generic,
}
# Keys by which a set is known, the more special first.
_KEYS = {
    "math500": {"problem", "answer", "unique_id"},
    "generic": {"problem", "answer"},
    "gsm8k": {"question", "answer"},
    "svamp": {"Body", "Question", "Answer"},
    "multiarith": {"input", "target"},
}


def _task_of(record: Mapping[str, Any], where: str) -> str:
    for task, keys in _KEYS.items():
        if keys <= record.keys():
            return task
    expected = "; ".join(f"{', '.join(sorted(keys))} ({task})" for task, keys in _KEYS.items())
    raise FormatError(f"{where}: got keys {', '.join(map(str, record))}, expected {expected}"[:500])
