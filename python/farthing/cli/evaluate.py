"""``farthing evaluate``: accuracy against tokens on problems with known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .terminal import progress_bars

REASONING = "Reasoning"


def evaluate(
    data: Annotated[Path, typer.Option("--data", "-d", help="Problems and answers, one JSON object a line.")],
    model: opt.Model = "smollm2-135m",
    task: Annotated[
        str, typer.Option(help="How to read them: auto, gsm8k, math500, svamp, multiarith or generic.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(help="Take so many problems.")] = None,
    samples: Annotated[int, typer.Option(help="Answers to each problem; above 1 with a temperature.")] = 1,
    effort: Annotated[
        str | None, typer.Option(help="Reasoning effort: none, minimal, … max.", rich_help_panel=REASONING)
    ] = None,
    thinking_budget: Annotated[
        int | None, typer.Option(help="Most tokens of thinking.", rich_help_panel=REASONING)
    ] = None,
    concise: Annotated[bool, typer.Option("--concise", help="Ask for few words.", rich_help_panel=REASONING)] = False,
    max_tokens: opt.MaxTokens = 1024,
    temperature: opt.Temperature = 0.0,
    top_k: opt.TopK = None,
    top_p: opt.TopP = 1.0,
    seed: opt.Seed = None,
    weights: opt.Weights = "auto",
    activations: opt.Activations = "auto",
    kv: opt.Kv = "auto",
    threads: opt.Threads = None,
    context: opt.Context = None,
    price: Annotated[
        list[str] | None,
        typer.Option(help="input_per_million=…, output_per_million=… or cpu_hour=…; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write figures and answers as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy, tokens and lengths into an image file.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Compare, problem by problem, with a report that --out wrote.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Grade a model's answers: accuracy, tokens by difficulty, right answers per thousand tokens, cost.

    An "Answer:" line or a boxed answer may be right, symbolically; missing and cut-off answers are counted apart.
    """
    from dataclasses import asdict

    from ..llm import LLM
    from ..reasoning import Report, compare, read_items
    from ..reasoning import evaluate as run
    from ..reasoning import plot as draw
    from ..sampling import SamplingParams

    prices = _prices(price or [])
    # What can fail fails before the model is loaded.
    items, other = read_items(data, task, limit), None if baseline is None else Report.load(baseline)
    if other and not other.scores.keys() & {item.id for item in items}:
        raise ValueError(f"--baseline: {baseline} has no problem of {data}, expected a report of the same set")
    wishes = {"effort": effort, "thinking_budget": thinking_budget}
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        **{name: wish for name, wish in wishes.items() if wish is not None},  # type: ignore[arg-type]
    )
    with progress_bars(quiet=as_json) as progress:
        llm = LLM(
            model,
            weights=weights,
            activations=activations,
            kv=kv,
            threads=threads,
            context=context,
            progress=progress,
        )
        report = run(llm, items, params, samples=samples, concise=concise, progress=progress)
    cost = report.cost(prices) if prices else None
    comparison = compare(report, other) if other else None
    if out:
        report.save(out)
    if plot:
        draw([report, other] if other else [report], plot)
    if as_json:
        content = {"name": report.name, "settings": dict(report.settings), "summary": report.summary(), "cost": cost}
        typer.echo(json.dumps(content | ({"comparison": asdict(comparison)} if comparison else {})))
        return
    typer.echo(str(report))
    if cost is not None:
        typer.echo(f"cost of all answers  {cost:.6g}")
    if comparison:
        typer.echo(f"\n{comparison}")


def _prices(words: list[str]) -> dict[str, float]:
    """``name=number`` words; `Report.cost` knows the names."""
    from ..ledger import checked_prices

    prices = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            prices[name] = float(number)
        except ValueError:
            raise ValueError(f"--price: got {word!r}, expected name=number, such as output_per_million=0.6") from None
    return checked_prices(prices) if prices else {}
