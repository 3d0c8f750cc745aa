"""The command line: ``farthing generate | chat | doctor | bench | plan | evaluate``.

Exit codes: 0 good, 1 a failure inside farthing, 2 wrong usage, 3 the model can't be used, 4 out of memory.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import _core
from . import bench, chat, doctor, evaluate, generate, plan
from .terminal import complain

__all__ = ["app", "main"]


class Commands(TyperGroup):
    """Turns exceptions into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if (code := complain(error)) is None:
                raise
            raise typer.Exit(code) from None


app = typer.Typer(
    cls=Commands,
    help="Cheaper answers from language models on the CPUs people already have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"farthing {_core.__version__}")
        raise typer.Exit


@app.callback()
def _farthing(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for command in (generate.generate, chat.chat, doctor.doctor, bench.bench, plan.plan, evaluate.evaluate):
    app.command()(command)


def main() -> None:
    """Entry point of the ``farthing`` script."""
    app()
