"""What the commands share: where they write, progress bars, and how an error ends a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import FarthingError, FormatError, ModelNotFoundError, UnsupportedError

__all__ = ["complain", "conversation", "errors", "output", "progress_bars", "write"]

Report = Callable[[str, int, int], None]

output = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False)


def complain(error: Exception) -> int | None:
    """Prints ``error`` as one line; its exit code, or None for one that only a programmer can read."""
    if isinstance(error, BrokenPipeError):  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, MemoryError):
        code = 4
    elif isinstance(error, (FormatError, ModelNotFoundError, UnsupportedError, OSError)):
        code = 3
    elif isinstance(error, ValueError):
        code = 2
    elif isinstance(error, FarthingError):
        code = 1
    else:
        return None
    line = " ".join(str(error).split()) or type(error).__name__
    errors.print("[bold red]error:[/] ", end="", soft_wrap=True)
    errors.print(line, markup=False, soft_wrap=True)
    return code


@contextmanager
def progress_bars(*, quiet: bool = False) -> Iterator[Report | None]:
    """Bars on the terminal for the stages that report progress; None when nobody would see them."""
    if quiet or not errors.is_terminal or os.environ.get("CI"):
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    tasks = {}
    with Progress(*columns, console=errors, transient=True) as progress:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield report


def write(*pieces: Iterable[str]) -> None:
    """Text to standard output as it comes, and a line end."""
    for part in pieces:
        for piece in part:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def think(piece: str) -> None:
    """A piece of thinking, dimmed, to standard error: the answer stays alone on standard output."""
    errors.print(piece, end="", style="dim", markup=False, soft_wrap=True)


def conversation(system: str | None, user: str) -> list[dict[str, str]]:
    """A first turn."""
    turns = {"system": system, "user": user}
    return [{"role": role, "content": content} for role, content in turns.items() if content is not None]
