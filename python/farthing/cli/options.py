"""Options that several commands take, with one meaning everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

ENGINE = "Engine"
SAMPLING = "Sampling"

Model = Annotated[
    str,
    typer.Argument(
        help="A .gguf file, a checkpoint directory, smollm2-135m, or a Hub id (repo, repo@revision, repo:file)."
    ),
]
Weights = Annotated[str, typer.Option(help="auto, f32, bf16, int8 or int4.", rich_help_panel=ENGINE)]
Activations = Annotated[str, typer.Option(help="auto, a8, a16 or f32.", rich_help_panel=ENGINE)]
Kv = Annotated[str, typer.Option(help="Keys and values: auto, f32, f16 or bf16.", rich_help_panel=ENGINE)]
Threads = Annotated[
    int | None, typer.Option(help="Threads; by default what this process may use.", rich_help_panel=ENGINE)
]
Context = Annotated[
    int | None, typer.Option(help="Longest sequence in tokens; by default the model's own.", rich_help_panel=ENGINE)
]
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        help="Most memory for a mixture's experts, such as 2GB, the others on disk; by default all are in memory.",
        rich_help_panel=ENGINE,
    ),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.", rich_help_panel=SAMPLING)
]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.", rich_help_panel=SAMPLING)
]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.", rich_help_panel=SAMPLING)]
TopP = Annotated[float, typer.Option(help="Keep tokens up to this probability.", rich_help_panel=SAMPLING)]
MinP = Annotated[
    float, typer.Option(help="Drop tokens less likely than this times the likeliest.", rich_help_panel=SAMPLING)
]
RepetitionPenalty = Annotated[float, typer.Option(help="1 does nothing.", rich_help_panel=SAMPLING)]
Seed = Annotated[int | None, typer.Option(help="Fixed noise for the draws.", rich_help_panel=SAMPLING)]
Effort = Annotated[
    str | None,
    typer.Option(
        help="How much the model thinks: none, minimal, low, medium, high, xhigh or max.", rich_help_panel=SAMPLING
    ),
]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text the answer ends before; may be repeated.", rich_help_panel=SAMPLING)
]
System = Annotated[str | None, typer.Option("--system", "-s", help="System message.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
