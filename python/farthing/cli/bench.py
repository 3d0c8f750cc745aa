"""``farthing bench``: how fast a model runs here."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer

from . import options as opt
from .terminal import errors, progress_bars


def bench(
    model: opt.Model = "smollm2-135m",
    weights: opt.Weights = "auto",
    activations: opt.Activations = "auto",
    kv: opt.Kv = "auto",
    threads: opt.Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times everything is measured; the median counts.")] = 5,
    as_json: opt.Json = False,
) -> None:
    """Measure prompts of 16 and 512 tokens and decoding, beside the limits measured in the same rounds."""
    from ..bench import bench as measure
    from ..llm import LLM
    from ..machine import warnings

    with progress_bars(quiet=as_json) as progress:
        llm = LLM(model, weights=weights, activations=activations, kv=kv, threads=threads, progress=progress)
        watch = partial(progress, "rounds") if progress else None
        length = min(512, llm.context - 1)
        speeds = measure(llm, prompts=(16, length), rounds=rounds, watch=watch)
    if as_json:
        rows = [{"work": s.work, "tokens_per_second": s.rate, "limit": s.limit, "reached": s.share} for s in speeds]
        typer.echo(json.dumps({"model": str(llm.path), "threads": llm.threads, "speeds": rows}))
        return
    typer.echo(str(speeds))
    for warning in warnings():
        errors.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
