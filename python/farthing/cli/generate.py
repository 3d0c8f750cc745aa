"""``farthing generate``: one prompt, one answer, and what it cost."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from ..errors import UnsupportedError
from . import options as opt
from .terminal import conversation, errors, progress_bars, think, write


def generate(
    model: opt.Model = "smollm2-135m",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt; by default standard input.")] = None,
    system: opt.System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    max_tokens: opt.MaxTokens = 256,
    temperature: opt.Temperature = 0.0,
    top_k: opt.TopK = None,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    repetition_penalty: opt.RepetitionPenalty = 1.0,
    seed: opt.Seed = None,
    effort: opt.Effort = None,
    stop: opt.Stop = None,
    weights: opt.Weights = "auto",
    activations: opt.Activations = "auto",
    kv: opt.Kv = "auto",
    threads: opt.Threads = None,
    context: opt.Context = None,
    expert_memory: opt.ExpertMemory = None,
    as_json: opt.Json = False,
) -> None:
    """Answer one prompt; the text goes to standard output, the ledger to standard error."""
    from ..llm import LLM
    from ..machine import limits
    from ..sampling import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        effort=effort,
        stop=stop or (),
    )
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give a prompt: --prompt TEXT, or text on standard input", param_hint="--prompt")
        prompt = sys.stdin.read()
    with progress_bars(quiet=as_json) as progress:
        llm = LLM(
            model,
            weights=weights,
            activations=activations,
            kv=kv,
            threads=threads,
            context=context,
            expert_memory=expert_memory,
            max_sequences=1,
            progress=progress,
        )
        if raw or not llm.has_chat_template:
            if system is not None:
                raise UnsupportedError("--system without a chat template is not supported; put it in the prompt")
            request: str | list[dict[str, str]] = prompt
        else:
            request = conversation(system, prompt)
        stream = llm.stream(request, params, progress=progress, on_thinking=None if as_json else think)
        first = next(stream, "")  # the prompt's own progress ends with the first piece
    with stream:
        if as_json:
            typer.echo(json.dumps(asdict(stream.completion)))
            return
        write([first], stream)
    limits(llm.threads)  # measured after the answer, so that the ledger can hold its bandwidth against it
    errors.print(stream.completion.ledger)
    if (plan := stream.completion.effort) is not None:
        errors.print(f"effort {plan.effort}: {plan.summary}", markup=False)
