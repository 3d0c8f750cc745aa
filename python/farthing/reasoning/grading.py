"""Is an answer right? By the dual-path rule, with math-verify in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Timer
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..sampling import integer

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["OUTCOMES", "Grade", "Grader", "last_answer_line", "last_boxed", "plain_number"]

OUTCOMES = ("right", "wrong", "unanswered", "failed")
VERIFIER = [sys.executable, "-m", "farthing.reasoning.verifier"]
_LINE = re.compile(r"^[ \t>*_#`-]*(?:the\s+)?(?:final\s+)?answer[ \t*_`]*:[ \t*_`]*(.*)$", re.IGNORECASE | re.MULTILINE)
_NUMBER = re.compile(r"([-+]?)\s*(?:\\?\$)?\s*(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?:\s*/\s*(\d+))?")


@dataclass(frozen=True)
class Grade:
    """What became of an answer.

    Attributes:
        outcome: ``right``, ``wrong``, ``unanswered`` (nothing in the text gives an answer) or ``failed`` (the grader
            hung, died or gave up; the answer may have been right).
        error: what went wrong where the outcome is ``failed``.
    """

    outcome: str
    error: str | None = None


def last_answer_line(text: str) -> str | None:
    r"""What stands behind the last ``Answer:`` at the start of a line, or on the line below it; None without.

    Examples:
        >>> last_answer_line("Answer: 3? No. **Answer:** 4\nFinal answer: 5!.")
        '5!'
    """
    for found in reversed(list(_LINE.finditer(text))):
        content = found[1].strip() or next((line for line in text[found.end() :].splitlines() if line.strip()), "")
        # Not "!": it may be a factorial.
        if content := content.strip(" \t*_`.,;:?\"'“”‘’"):
            return content
    return None


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{…}`` that closes and is not empty; None without.

    Examples:
        >>> last_boxed(r"\boxed{1}, or rather \boxed{\frac{1}{2}}, \boxed{")
        '\\frac{1}{2}'
    """
    for start in reversed([found.end() for found in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1] != "\\" else 0
            if depth == 0:
                if content := text[start:place].strip():
                    return content
                break
    return None


def plain_number(text: str) -> Fraction | None:
    """The number that ``text`` is, exactly, if it is one and nothing else; a dollar in front and commas are allowed.

    Examples:
        >>> plain_number("$1,234.50"), plain_number("3/4"), plain_number("12 apples")
        (Fraction(2469, 2), Fraction(3, 4), None)
    """
    found = _NUMBER.fullmatch(text.strip().removesuffix(".").strip("$ "))
    if found is None or len(text) > 60 or (found[4] and not int(found[4])):
        return None
    sign, whole, decimals, below = found.groups()
    return Fraction(sign + whole.replace(",", "") + (decimals or "")) / int(below or 1)


class Grader:
    r"""Grades answers in the background, several at a time.

    An answer is right if its last ``Answer:`` line or its full text (whose last ``\boxed{}`` counts most) equals the
    reference, symbolically. Plain numbers are compared exactly and at once; the rest is math-verify's, in processes
    that are killed when they take too long. A text that was cut off before it gave an answer is unanswered: the last
    number of a half-finished sentence is no answer.

    Args:
        workers: processes at most.
        seconds: longest time for one answer; beyond it the outcome is ``failed``.

    Raises:
        UnsupportedError: math-verify is not installed.
        ValueError: an argument is out of range.

    Examples:
        >>> with Grader(workers=1) as grader:
        ...     grader.grade("0.5", r"It is \boxed{\frac{1}{2}}.").result().outcome
        'right'
    """

    def __init__(self, workers: int = 2, seconds: float = 20.0) -> None:
        if find_spec("math_verify") is None:
            raise UnsupportedError("grading needs math-verify: pip install 'farthing[evaluate]'")
        if isinstance(seconds, bool) or not seconds > 0:
            raise ValueError(f"seconds: got {seconds!r}, expected a number above 0")
        count = integer("workers", workers, 1, 256)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="farthing-grader")
        self._idle: SimpleQueue[_Verifier] = SimpleQueue()
        self._verifiers = [_Verifier(seconds) for _ in range(count)]
        for verifier in self._verifiers:
            self._idle.put(verifier)

    def grade(self, gold: str, text: str, *, truncated: bool = False) -> Future[Grade]:
        """Begins to grade ``text`` against the reference ``gold``; ``truncated`` says that it was cut off."""
        return self._threads.submit(self._grade, gold, text, truncated)

    def _grade(self, gold: str, text: str, truncated: bool) -> Grade:
        line, boxed = last_answer_line(text), last_boxed(text)
        if line is not None:
            line = last_boxed(line) or line
        undecided = [candidate for candidate in (line, boxed) if candidate is not None]
        if (expected := plain_number(gold)) is not None:
            numbers = {candidate: plain_number(candidate) for candidate in undecided}
            if expected in numbers.values():
                return Grade("right")
            # As near as a rounding, math-verify decides.
            undecided = [each for each, number in numbers.items() if number is None or _near(expected, number)]
        answered = line is not None or boxed is not None
        if not answered and truncated:
            return Grade("unanswered")
        # A boxed answer is what the full text says; without one, math-verify looks for the last expression.
        texts = [f"\\boxed{{{each}}}" for each in undecided] + ([] if boxed is not None else [text])
        if not texts:
            return Grade("wrong")
        verifier = self._idle.get()
        try:
            reply = verifier.ask(gold, texts)
        finally:
            self._idle.put(verifier)
        if reply.get("right") is True:
            return Grade("right")
        if reply.get("error"):
            return Grade("failed", str(reply["error"])[:300])
        return Grade("wrong" if answered or reply.get("read") else "unanswered")

    def close(self) -> None:
        """Ends the processes; answers that were not graded yet are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for verifier in self._verifiers:
            verifier.close()
        self._threads.shutdown()
        for verifier in self._verifiers:
            verifier.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Verifier:
    """One process, started when it is first needed and again after it had to be killed."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def ask(self, gold: str, texts: list[str]) -> dict[str, Any]:
        """The reply; one with an ``error`` if none came in time."""
        if self._closed:
            return {"error": "the grader was closed"}
        if self._process is None:
            self._process = self._start()
        process, late = self._process, Event()

        def kill() -> None:
            late.set()
            process.kill()

        watch = Timer(self._seconds, kill)
        watch.start()
        reply = None
        try:
            if process.stdin and process.stdout:  # both are pipes
                process.stdin.write(json.dumps({"gold": gold, "texts": texts}) + "\n")
                process.stdin.flush()
                reply = json.loads(process.stdout.readline())
        except (OSError, ValueError):  # a pipe without a reader, or no reply
            pass
        finally:
            watch.cancel()
        if late.is_set() or not isinstance(reply, dict):
            self.end()
        if isinstance(reply, dict):
            return reply
        return {"error": f"no reply in {self._seconds:g} s" if late.is_set() else "the process ended without a reply"}

    def close(self) -> None:
        """Ends the process under whoever asks it; call `end` when nobody does any more."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()

    def end(self) -> None:
        """Ends the process and forgets it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        return subprocess.Popen(  # noqa: S603 - our own module
            VERIFIER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )


def _near(one: Fraction, other: Fraction) -> bool:
    return abs(one - other) <= max(abs(one), abs(other)) / 1000
