"""``farthing plan``: what a model will need, before loading it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from . import options as opt


def plan(
    model: opt.Model = "smollm2-135m",
    weights: opt.Weights = "auto",
    activations: opt.Activations = "auto",
    kv: opt.Kv = "auto",
    threads: opt.Threads = None,
    expert_memory: opt.ExpertMemory = None,
    matrices: Annotated[bool, typer.Option("--matrices", help="Show every kind of matrix.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Predict memory, bytes per token and speed from the headers and this machine's measured limits."""
    from ..plan import plan as predict

    found = predict(
        model, weights=weights, activations=activations, kv=kv, threads=threads, expert_memory=expert_memory
    )
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    typer.echo(str(found))
    if matrices:
        typer.echo(f"\n{found.matrices}")
