"""Medusa heads from a model's own text, on a CPU, in minutes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..sampling import SamplingParams, integer

if TYPE_CHECKING:
    from ..llm import LLM, Conversation

__all__ = ["MedusaTraining", "train_medusa"]

Report = Callable[[str, int, int], None]
# Conversations that are written together.
ROUND = 64
# One text in so many is kept from training.
HELD_OUT = 10
BATCH = 512
LEARNING_RATE = 4e-3
# Added to the mean of an embedding's squares.
EPSILON = 1e-6
# Weight of each head's loss over the one before it.
DECAY = 0.8
# Target of positions behind the text's end, and of tokens that are not drafted.
NOTHING, STRANGER = -100, -1


@dataclass(frozen=True)
class MedusaTraining:
    """What came of a training.

    Attributes:
        path: directory of the heads.
        texts: texts that the model wrote.
        tokens: tokens of its answers.
        generation_seconds: time it took to write them.
        state_seconds: time it took to compute their states.
        training_seconds: time it took to fit the heads.
        accuracy: for each head the share of tokens of held-out texts that it names first.
    """

    path: Path
    texts: int
    tokens: int
    generation_seconds: float
    state_seconds: float
    training_seconds: float
    accuracy: list[float]


@dataclass(frozen=True)
class Examples:
    """States and the tokens that follow the next one.

    Attributes:
        states: (n, hidden), float16.
        following: (n,) the token behind each state.
        targets: (n, heads), places among the drafted tokens, `STRANGER` or `NOTHING`.
    """

    states: npt.NDArray[np.float16]
    following: npt.NDArray[np.uint32]
    targets: npt.NDArray[np.int64]


def train_medusa(
    model: LLM | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    prompts: Sequence[str | Conversation] | None = None,
    tokens: int = 200_000,
    max_tokens: int = 192,
    heads: int = 4,
    vocabulary: int = 8192,
    epochs: int = 2,
    seed: int = 0,
    progress: Report | None = None,
) -> MedusaTraining:
    """Trains Medusa heads (arXiv 2401.10774, the model frozen) on text that the model writes itself, and saves them.

    The model answers prompts greedily, many at a time; the heads learn to name the second to fifth token behind each
    state by the model's own output matrix, of which the most frequent tokens' rows are used. They read the first
    token too, which is known by the time they are asked, through a matrix that all share. Needs torch and safetensors.

    Args:
        model: an `LLM` without drafters, or what names one.
        directory: where ``medusa_lm_head.safetensors`` and ``config.json`` are written.
        prompts: what to answer, texts or conversations; None lets a model with a chat template write its own
            questions, by continuing the template's opening of a user's turn (Xu et al., arXiv 2406.08464).
        tokens: stop once the answers have so many tokens.
        max_tokens: longest answer.
        heads: number of heads.
        vocabulary: most tokens that are drafted: the most frequent ones of the answers.
        epochs: passes over the examples.
        seed: of the questions and of the order of the examples.
        progress: called with a stage, what is done and the total; None draws bars on a terminal.

    Returns:
        What it took, and how often each head is right on held-out texts.

    Raises:
        ValueError: a number out of range, or no prompts for a model without a chat template.
        ImportError: torch or safetensors is missing.

    Example:
        ``train_medusa("smollm2-135m", "heads")``, then ``LLM("smollm2-135m", speculation=Medusa("heads"))``
    """
    import safetensors.torch  # noqa: F401

    from ..cli.terminal import progress_bars
    from ..llm import LLM

    sizes = {"tokens": tokens, "max_tokens": max_tokens, "heads": heads, "vocabulary": vocabulary, "epochs": epochs}
    for name, value in sizes.items():
        integer(name, value, 1)
    llm = model if isinstance(model, LLM) else LLM(model, speculation=None, max_sequences=32)
    with progress_bars(quiet=progress is not None) as bars:
        report = progress or bars or (lambda *_: None)
        begin = perf_counter()
        texts = generate(llm, prompts, tokens, max_tokens, seed, report)
        generated = perf_counter()
        drafted = frequent(texts, vocabulary, llm.vocabulary)
        fit, held = split(llm, texts, drafted, heads, report)
        computed = perf_counter()
        weights, accuracy = train(llm, fit, held, drafted, epochs, seed, report)
        trained = perf_counter()
    path = Path(directory)
    save(path, weights, drafted, llm)
    count = sum(len(ids) - start for ids, start in texts)
    seconds = (generated - begin, computed - generated, trained - computed)
    return MedusaTraining(path, len(texts), count, *seconds, accuracy)


Text = tuple[npt.NDArray[np.uint32], int]


def generate(
    llm: LLM,
    prompts: Sequence[str | Conversation] | None,
    tokens: int,
    max_tokens: int,
    seed: int,
    report: Report,
) -> list[Text]:
    """Texts of at least ``tokens`` answered tokens, or all prompts' answers: (ids, where the answer begins)."""
    texts: list[Text] = []
    count = 0
    params = SamplingParams(max_tokens=max_tokens)._core
    for chosen in rounds(llm, prompts, seed):
        ready = [llm.chat_prompt(prompt) if not isinstance(prompt, str) else prompt for prompt in chosen]
        rendered = [not isinstance(prompt, str) for prompt in chosen]
        # Text of a template holds its begin token itself.
        ids = [
            np.array(llm._core.encode(text, not whole), np.uint32) for text, whole in zip(ready, rendered, strict=True)
        ]
        for prompt, stream in zip(ids, llm._core.submit(ids, [params] * len(ids), False), strict=True):
            answer = np.array(stream.wait().token_ids, np.uint32)
            texts.append((np.concatenate([prompt, answer]), len(prompt)))
            count += len(answer)
            report("answers", min(count, tokens), tokens)
        if count >= tokens:
            break
    return texts


def rounds(llm: LLM, prompts: Sequence[str | Conversation] | None, seed: int) -> Iterator[Sequence[str | Conversation]]:
    """Prompts, some at a time; the model's own without end when there are none."""
    if prompts is not None:
        yield from (prompts[at : at + ROUND] for at in range(0, len(prompts), ROUND))
        return
    if not llm.has_chat_template:
        raise ValueError("prompts: got None, expected prompts for a model without a chat template")
    mark = "the user's words"
    opening = llm.chat_prompt([{"role": "user", "content": mark}]).split(mark)[0]
    while True:
        params = [
            SamplingParams(max_tokens=64, temperature=1.0, top_p=0.95, seed=seed + at)._core for at in range(ROUND)
        ]
        seed += ROUND
        streams = llm._core.submit([opening] * ROUND, params, True)
        questions = {text for stream in streams if (text := stream.wait().text.strip())}
        yield [[{"role": "user", "content": text}] for text in sorted(questions)]


def frequent(texts: list[Text], most: int, vocabulary: int) -> npt.NDArray[np.uint32]:
    """The most frequent tokens of the answers, most frequent first."""
    counts = Counter[int]()
    for ids, start in texts:
        counts.update(ids[start:].tolist())
    return np.array([token for token, _ in counts.most_common(min(most, vocabulary))], np.uint32)


def split(
    llm: LLM, texts: list[Text], drafted: npt.NDArray[np.uint32], heads: int, report: Report
) -> tuple[Examples, Examples]:
    """The examples of texts to fit, and of texts held out."""
    places = np.full(llm.vocabulary, STRANGER, np.int64)
    places[drafted] = np.arange(len(drafted))
    parts: tuple[list[Examples], list[Examples]] = ([], [])
    for number, (ids, start) in enumerate(texts):
        # Nothing is drafted before the first token is drawn: the state before it comes first.
        count = len(ids) - start - 1
        if count > 0:
            states = llm.hidden(ids[:-2])[start - 1 :].astype(np.float16)
            targets = np.full((count, heads), NOTHING, np.int64)
            for head in range(min(heads, count)):
                targets[: count - head, head] = places[ids[start + 1 + head :]]
            parts[number % HELD_OUT == HELD_OUT - 1].append(Examples(states, ids[start:-1], targets))
        report("states", number + 1, len(texts))
    if not parts[0] or not parts[1]:
        raise ValueError(f"prompts: got {len(texts)} texts, expected at least {HELD_OUT} with answers")
    return joined(parts[0]), joined(parts[1])


def joined(parts: list[Examples]) -> Examples:
    """All examples, one after the other."""
    return Examples(
        np.concatenate([part.states for part in parts]),
        np.concatenate([part.following for part in parts]),
        np.concatenate([part.targets for part in parts]),
    )


def train(
    llm: LLM,
    fit: Examples,
    held: Examples,
    drafted: npt.NDArray[np.uint32],
    epochs: int,
    seed: int,
    report: Report,
) -> tuple[dict[str, Any], list[float]]:
    """The heads' tensors, and each head's share of right first guesses on ``held``."""
    import torch
    from torch.nn.functional import cross_entropy, linear, silu

    before = torch.get_num_threads()
    torch.set_num_threads(llm.threads)
    generator = torch.Generator().manual_seed(seed)
    output = torch.from_numpy(_core.token_weights(llm.path, drafted, True))
    table = torch.from_numpy(_core.token_weights(llm.path, np.arange(llm.vocabulary, dtype=np.uint32), False))
    table *= torch.rsqrt(table.square().mean(-1, keepdim=True) + EPSILON)
    heads, hidden = fit.targets.shape[1], fit.states.shape[1]
    weights = {"token.weight": torch.zeros(hidden, hidden)}
    for head in range(heads):
        weights[f"{head}.0.linear.weight"] = torch.zeros(hidden, hidden)
        weights[f"{head}.0.linear.bias"] = torch.zeros(hidden)
    parameters = [tensor.requires_grad_() for tensor in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    steps = epochs * -(-len(fit.states) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)

    def states(examples: Examples, chosen: Any) -> Any:
        following = torch.from_numpy(examples.following[chosen].astype(np.int64))
        plain = torch.from_numpy(examples.states[chosen].astype(np.float32))
        return plain + linear(table[following], weights["token.weight"])

    def logits(states: Any, head: int) -> Any:
        name = f"{head}.0.linear"
        return linear(states + silu(linear(states, weights[name + ".weight"], weights[name + ".bias"])), output)

    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(fit.states), generator=generator).numpy()
        for at in range(0, len(order), BATCH):
            chosen = order[at : at + BATCH]
            read = states(fit, chosen)
            targets = torch.from_numpy(np.where(fit.targets[chosen] == STRANGER, NOTHING, fit.targets[chosen]))
            # A mean over nothing has no value.
            useful = [head for head in range(heads) if bool((targets[:, head] != NOTHING).any())]
            losses = [
                DECAY**head * cross_entropy(logits(read, head), targets[:, head], ignore_index=NOTHING)
                for head in useful
            ]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            step += 1
            report("training", step, steps)
    right, seen = np.zeros(heads), np.zeros(heads)
    with torch.no_grad():
        for at in range(0, len(held.states), BATCH):
            read = states(held, slice(at, at + BATCH))
            for head in range(heads):
                target = held.targets[at : at + BATCH, head]
                right[head] += (logits(read, head).argmax(-1).numpy() == target).sum()
                seen[head] += (target != NOTHING).sum()
    torch.set_num_threads(before)
    return {name: tensor.detach() for name, tensor in weights.items()}, (right / np.maximum(seen, 1)).tolist()


def save(path: Path, weights: dict[str, Any], drafted: npt.NDArray[np.uint32], llm: LLM) -> None:
    """Writes the heads as the public ones lie, and beside them the tokens they draft and what the first token adds."""
    import torch
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half() if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    save_file(tensors | {"tokens": torch.from_numpy(drafted.astype(np.int64))}, path / "medusa_lm_head.safetensors")
    config = {
        "model_type": "medusa",
        "medusa_num_heads": sum(name.endswith("bias") for name in weights),
        "medusa_num_layers": 1,
        "hidden_size": weights["token.weight"].shape[0],
        "vocab_size": llm.vocabulary,
        "base_model_name_or_path": llm.path.name,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
