"""``farthing doctor``: is this machine well, and what can it do?"""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from . import options as opt
from .terminal import errors

# What the cost curves are shown for: weights, inputs that share a scale.
CURVES = (("int4", 128), ("int4", 32), ("int8", 128), ("ternary", 1), ("bf16", 1))
ROWS = (2, 4, 8, 16, 32, 64)


def cost_curves(threads: int | None) -> dict[str, dict[int, float]]:
    """V(M) of 4096 x 4096 by format and activations."""
    from ..machine import cost_curve

    curves = {}
    for weights, group in CURVES:
        for activations in ("f32",) if weights == "bf16" else ("a8", "a16"):
            curve = cost_curve(weights, group=group, activations=activations, threads=threads)
            name = f"{weights} g{group} {activations}" if group > 1 else f"{weights} {activations}"
            curves[name] = {rows: curve.at(rows) for rows in ROWS}
    return curves


def doctor(
    threads: opt.Threads = None,
    cost: Annotated[
        bool, typer.Option("--cost", help="Also show the time of several rows over the time of one, 4096 x 4096.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Report instruction set, processors, threads, measured limits, self-tests of every kernel, versions and warnings.

    Exits with 1 when a kernel fails its self-test.
    """
    from .. import _core
    from ..ledger import size
    from ..machine import measure, memory, processors, warnings
    from ..names import ALIASES
    from ..tables import text_table
    from ..versions import versions

    limits, tests, room = measure(threads), _core.self_tests(), memory()
    usable, curves = processors(), cost_curves(threads) if cost else None
    failed = [f"{name} ({isa})" for name, isa, passed in tests if not passed]
    models = {name: str(alias.installed() or "not installed") for name, alias in ALIASES.items()}
    if as_json:
        report = {
            "isa": _core.isa(),
            "available_isas": _core.available_isas(),
            "processors": os.cpu_count(),
            "allowed": usable.allowed,
            "cores": usable.cores,
            "quota": usable.quota,
            "pinning": usable.pinning,
            "threads": limits.threads,
            "bandwidth": limits.bandwidth,
            "int8_rate": limits.int8_rate,
            "memory": room and {"total": room[0], "available": room[1]},
            "self_tests": [{"kernel": name, "isa": isa, "passed": passed} for name, isa, passed in tests],
            "models": models,
            "versions": versions(),
            "warnings": warnings(),
        } | ({"cost": curves} if curves else {})
        typer.echo(json.dumps(report))
    else:
        rows = [
            ("instruction set", f"{_core.isa()} (of {', '.join(_core.available_isas())})"),
            ("processors", str(usable)),
            ("threads", f"{limits.threads} (of {os.cpu_count()} processors)"),
            ("memory bandwidth", f"{size(limits.bandwidth)}/s, measured"),
            ("int8 rate", f"{limits.int8_rate / 1e12:.2f} TOP/s, measured"),
            ("memory", f"{size(room[1])} available of {size(room[0])}" if room else "unknown"),
            ("self-tests", f"{len(tests) - len(failed)} of {len(tests)} kernels passed"),
            *((f"model {name}", where) for name, where in models.items()),
            *((name, text) for name, text in versions().items() if name not in ("isa", "threads")),
        ]
        typer.echo(text_table(rows, left=True))
        if curves:
            body = [(name, *(f"{ratio:.2f}" for ratio in curve.values())) for name, curve in curves.items()]
            typer.echo(text_table(body, ("V(M) at M =", *map(str, ROWS))))
        for warning in warnings():
            errors.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    if failed:
        errors.print(f"self-test failed: {', '.join(failed)}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1)
