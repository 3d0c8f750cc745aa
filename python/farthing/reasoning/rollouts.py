"""Answers of a model in training: by the engine from a copy of its weights, or by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

__all__ = ["EngineRollouts", "Rollouts", "TransformersRollouts"]


class Rollouts(Protocol):
    """Anything that answers prompts; `Opsdc` calls it once a step."""

    def __call__(self, model: Any, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """An answer to each prompt as token ids, its end token included if there is one.

        Args:
            model: the student as it is now, in training mode.
            prompts: token ids.
            seed: differs from step to step.
        """
        ...


class TransformersRollouts:
    """Answers by ``model.generate``: always from the current weights.

    Args:
        max_new_tokens: longest answer; cut ones are used too.
        temperature: of the draws; nothing is truncated.
        autocast: compute in this type, such as ``torch.bfloat16``.
    """

    def __init__(
        self, max_new_tokens: int = 256, *, temperature: float = 1.0, autocast: torch.dtype | None = None
    ) -> None:
        self.max_new_tokens, self.temperature, self.autocast = max_new_tokens, temperature, autocast

    def __call__(self, model: Any, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """See `Rollouts`."""
        ends = _end_tokens(model)
        padding = min(ends)
        width = max(map(len, prompts))
        ids = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        training = model.training
        model.eval()
        try:
            with (
                torch.random.fork_rng(devices=[]),
                torch.no_grad(),
                torch.autocast("cpu", self.autocast, enabled=self.autocast is not None),
            ):
                torch.manual_seed(seed)
                sequences = model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=self.temperature,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=self.max_new_tokens,
                    eos_token_id=sorted(ends),
                    pad_token_id=padding,
                )
        finally:
            model.train(training)
        return [_until_end(row, ends) for row in sequences[:, width:].tolist()]


class EngineRollouts:
    """Answers by farthing's engine, from a copy of the student that is written and loaded anew.

    With ``every`` above 1 the answers of the steps in between come from weights that are up to ``every - 1`` steps old,
    and packed weights round: both only choose the answers on which the loss is computed, which is exact for any answer.

    Args:
        tokenizer: of transformers; its files go beside the weights.
        every: steps between two copies.
        max_new_tokens: longest answer; cut ones are used too.
        temperature: of the draws; nothing is truncated.
        dtype: of the copy's file.
        options: for `farthing.LLM`, such as ``weights="int8"``; ``speculation`` is None unless it is given.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        every: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.bfloat16,
        **options: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"every: got {every}, expected at least 1")
        self.tokenizer, self.every, self.dtype = tokenizer, every, dtype
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.options = {"speculation": None, **options}
        self._engine: Any = None
        self._age = 0

    def __call__(self, model: Any, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """See `Rollouts`."""
        from ..sampling import SamplingParams

        if self._engine is None or self._age >= self.every:
            self._engine = None  # its memory first
            self._engine = self._load(model)
            self._age = 0
        self._age += 1
        params = [
            SamplingParams(max_tokens=self.max_new_tokens, temperature=self.temperature, seed=seed * 2**20 + index)
            for index in range(len(prompts))
        ]
        return [list(done.token_ids) for done in self._engine.generate([list(prompt) for prompt in prompts], params)]

    def _load(self, model: Any) -> Any:
        from ..llm import LLM

        with TemporaryDirectory(prefix="farthing-rollouts-") as directory:
            save_checkpoint(model, self.tokenizer, directory, self.dtype)
            # The engine copies what it packs and keeps maps of the rest open; the files may go.
            return LLM(directory, **self.options)


def save_checkpoint(model: Any, tokenizer: Any, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes weights in ``dtype`` (tied ones once), configuration and tokenizer."""
    from safetensors.torch import save_file

    names = dict(model.named_parameters())
    weights = {name: weight.detach().to(dtype or weight.dtype).contiguous() for name, weight in names.items()}
    save_file(weights, Path(directory) / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise ValueError("model.generation_config.eos_token_id: got None, expected the tokens that end an answer")
    return {ends} if isinstance(ends, int) else set(ends)


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    for length, token in enumerate(tokens, 1):
        if token in ends:
            return tokens[:length]
    return tokens
