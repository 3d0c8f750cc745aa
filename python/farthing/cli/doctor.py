"""``farthing doctor``: is this machine well, and what can it do?"""

from __future__ import annotations

import json
import os

import typer

from . import options as opt
from .terminal import errors


def doctor(threads: opt.Threads = None, as_json: opt.Json = False) -> None:
    """Report instruction set, threads, measured limits, self-tests of every kernel, versions and warnings.

    Exits with 1 when a kernel fails its self-test.
    """
    from .. import _core
    from ..ledger import size
    from ..machine import measure, memory, warnings
    from ..names import ALIASES
    from ..tables import text_table
    from ..versions import versions

    limits, tests, room = measure(threads), _core.self_tests(), memory()
    failed = [f"{name} ({isa})" for name, isa, passed in tests if not passed]
    models = {name: str(alias.installed() or "not installed") for name, alias in ALIASES.items()}
    if as_json:
        report = {
            "isa": _core.isa(),
            "available_isas": _core.available_isas(),
            "processors": os.cpu_count(),
            "threads": limits.threads,
            "bandwidth": limits.bandwidth,
            "int8_rate": limits.int8_rate,
            "memory": room and {"total": room[0], "available": room[1]},
            "self_tests": [{"kernel": name, "isa": isa, "passed": passed} for name, isa, passed in tests],
            "models": models,
            "versions": versions(),
            "warnings": warnings(),
        }
        typer.echo(json.dumps(report))
    else:
        rows = [
            ("instruction set", f"{_core.isa()} (of {', '.join(_core.available_isas())})"),
            ("threads", f"{limits.threads} (of {os.cpu_count()} processors)"),
            ("memory bandwidth", f"{size(limits.bandwidth)}/s, measured"),
            ("int8 rate", f"{limits.int8_rate / 1e12:.2f} TOP/s, measured"),
            ("memory", f"{size(room[1])} available of {size(room[0])}" if room else "unknown"),
            ("self-tests", f"{len(tests) - len(failed)} of {len(tests)} kernels passed"),
            *((f"model {name}", where) for name, where in models.items()),
            *((name, text) for name, text in versions().items() if name not in ("isa", "threads")),
        ]
        typer.echo(text_table(rows, left=True))
        for warning in warnings():
            errors.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    if failed:
        errors.print(f"self-test failed: {', '.join(failed)}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1)
