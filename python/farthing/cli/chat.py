"""``farthing chat``: a conversation, typed or piped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from ..completion import Completion, Stream
from ..errors import UnsupportedError
from . import options as opt
from .terminal import errors, progress_bars, think, write


def chat(
    model: opt.Model = "smollm2-135m",
    system: opt.System = None,
    ledger: Annotated[bool, typer.Option(help="Print what each answer cost.")] = False,
    max_tokens: opt.MaxTokens = 1024,
    temperature: opt.Temperature = 0.7,
    top_k: opt.TopK = None,
    top_p: opt.TopP = 0.95,
    min_p: opt.MinP = 0.0,
    repetition_penalty: opt.RepetitionPenalty = 1.0,
    seed: opt.Seed = None,
    effort: opt.Effort = None,
    weights: opt.Weights = "auto",
    activations: opt.Activations = "auto",
    kv: opt.Kv = "auto",
    threads: opt.Threads = None,
    context: opt.Context = None,
    expert_memory: opt.ExpertMemory = None,
) -> None:
    """Talk with a model.

    At a terminal: Ctrl-C stops an answer, Ctrl-D ends the conversation. Piped: every line is a turn.
    """
    from ..llm import LLM
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
    )
    with progress_bars() as progress:
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
    if not llm.has_chat_template:
        raise UnsupportedError(f"{model} has no chat template; use farthing generate {model} --raw")
    messages = [] if system is None else [{"role": "system", "content": system}]
    for line in _turns():
        messages.append({"role": "user", "content": line})
        try:
            completion = _answer(llm.stream(messages, params, on_thinking=think))
        except KeyboardInterrupt:  # before the answer began: the turn is taken back
            write()
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": completion.text})
        if ledger:
            errors.print(completion.ledger)


def _answer(stream: Stream) -> Completion:
    """Writes the answer as it comes; an interrupt ends it there."""
    try:
        write(stream)
    except KeyboardInterrupt:
        stream.close()
        write()
    return stream.completion


def _turns() -> Iterator[str]:
    """What the user says, line by line, empty lines left out."""
    if not sys.stdin.isatty():
        yield from (line for line in map(str.strip, sys.stdin) if line)
        return
    import readline  # noqa: F401 - gives input() its history and editing

    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            write()
            return
        if line:
            yield line
