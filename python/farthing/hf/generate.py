"""Drafters in transformers: a candidate generator, and a function for ``generate(custom_generate=...)``."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers.generation.candidate_generator import CandidateGenerator

from ..errors import UnsupportedError
from ..sampling import integer
from ..speculative.drafters import Drafter, Suffix, SuffixStore
from ..speculative.engine import Proposer
from ..speculative.host import Chain, HostedDrafter, HostedText
from ..speculative.pace import Pace, PassTimes, Survival

__all__ = ["FarthingCandidateGenerator", "generate"]


class FarthingCandidateGenerator(CandidateGenerator):  # type: ignore[misc, unused-ignore]
    """Any drafter as a candidate generator of transformers' assisted generation.

    Candidates come without logits: the host draws from its own law and compares, which leaves the law as it is. Drafts
    end before an EOS token, and one token short of ``max_length``, since the pass gives one more.

    Args:
        drafter: one of `farthing.speculative`, or any `farthing.speculative.Proposer`; None makes a `Suffix` with a
            store. Of trees, the chain of first children is taken.
        eos_token_ids: ids that end a text.
        max_length: most tokens of the text, prompt included.
        vocabulary: ids from here on do not exist.
        draft_tokens: tokens of each draft; None weighs measured pass times against how often drafts are right.
        times: pass times of the model, measured before.
        survival: how often the drafter was right before.

    Raises:
        UnsupportedError: the drafter can't work here.
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from farthing.hf import FarthingCandidateGenerator
        >>> from farthing.speculative import NGram
        >>> generator = FarthingCandidateGenerator(NGram("transformers"), draft_tokens=3)
        >>> ids, logits = generator.get_candidates(torch.tensor([[5, 6, 7, 8, 5, 6]]))
        >>> ids.tolist(), logits
        ([[5, 6, 7, 8, 5, 6, 7, 8, 5]], None)
    """

    requires_model_outputs = False

    def __init__(
        self,
        drafter: Drafter | Proposer | None = None,
        *,
        eos_token_ids: Iterable[int] = (),
        max_length: int | None = None,
        vocabulary: int | None = None,
        draft_tokens: int | None = None,
        times: PassTimes | None = None,
        survival: Survival | None = None,
    ) -> None:
        self._hosted = HostedDrafter(drafter, "transformers", vocabulary=vocabulary, with_logits=True)
        self._text = HostedText(self._hosted)
        self._stop_ids = frozenset(eos_token_ids)
        self._max_length = max_length
        self._fixed = None if draft_tokens is None else integer("draft_tokens", draft_tokens, 1)
        self._pace = Pace(times or PassTimes(), survival or Survival())
        self._proposed = Chain()
        #: Tokens of the last pass behind the text, and when it began.
        self._submitted: list[int] = []
        self._began = 0.0
        self._prefilled = False
        #: Tokens that were verified, and of these so many right.
        self.drafted = self.accepted = 0

    def get_candidates(  # type: ignore[override, unused-ignore]
        self,
        input_ids: torch.Tensor,
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, None]:
        """The text with drafted tokens behind it, (1, t) -> (1, t + n), and no logits.

        Raises:
            UnsupportedError: there is more than one text.
        """
        if input_ids.shape[0] != 1:
            works = "the host's loop takes one text at a time; call generate once for each"
            raise UnsupportedError(f"input_ids: got a batch of {input_ids.shape[0]}, expected 1: {works}")
        self._text.follow(input_ids[0].cpu().numpy())
        self._submitted = self._next(input_ids.shape[1])
        self._began = time.perf_counter()
        if not self._submitted:
            return input_ids, None
        drafted = torch.tensor([self._submitted], dtype=input_ids.dtype, device=input_ids.device)
        return torch.cat((input_ids, drafted), dim=1), None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Learns from a pass.

        Args:
            input_ids: the text with the new tokens, (1, t).
            scores: logits of the pass, behind the last token of the text and behind each drafted one, (1, n + 1, V).
            num_matches: drafted tokens that were right.
        """
        seconds = time.perf_counter() - self._began
        if self._prefilled:  # the first pass is the prompt's
            self._pace.passed(len(self._submitted) + 1, seconds)
        self._prefilled = True
        self.drafted += len(self._submitted)
        self.accepted += int(num_matches)
        wanted = self._hosted.wants_top
        rows = top = None
        if wanted and len(self._text.token_ids):
            rows = np.array([self._text.token_ids[-1], *self._submitted], np.uint32)
            top = scores[0].topk(min(wanted, scores.shape[-1])).indices.cpu().numpy()
        said = self._text.follow(input_ids[0].cpu().numpy(), rows=rows, top=top)
        if said is not None and len(self._proposed):
            self._pace.observe(self._proposed, self._proposed.right(said), len(said))
        self._proposed = Chain()

    def end(self) -> None:
        """The text is over."""
        self._text.end()

    def _next(self, length: int) -> list[int]:
        budget = self._fixed or self._pace.most
        if self._max_length is not None:
            budget = min(budget, self._max_length - length - 1)
        if self._fixed is None and not self._pace.asks():
            return []
        began = time.perf_counter()
        chain = self._proposed = self._text.draft(budget, stop_ids=self._stop_ids)
        if self._fixed is not None:
            return chain.token_ids
        return chain.token_ids[: self._pace.choose(chain, time.perf_counter() - began)]


class _Model:
    """What is known of a model, for the texts to come."""

    def __init__(self) -> None:
        self.times = PassTimes()
        self.drafter = Suffix(SuffixStore())
        self.survival: dict[str, Survival] = {}


_models: WeakKeyDictionary[torch.nn.Module, _Model] = WeakKeyDictionary()


class _Assisted:
    """A model whose candidate generator is ours; the model itself is left as it is, for other threads."""

    def __init__(self, model: Any, generator: FarthingCandidateGenerator) -> None:
        self._farthing_model, self._farthing_generator = model, generator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._farthing_model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._farthing_model(*args, **kwargs)

    def _get_candidate_generator(self, **_: Any) -> FarthingCandidateGenerator:
        return self._farthing_generator


def generate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    drafter: Drafter | Proposer | None = None,
    draft_tokens: int | None = None,
    **model_kwargs: Any,
) -> Any:
    """Transformers' assisted generation with a drafter of ours, for ``model.generate(custom_generate=...)``.

    Greedy text is the model's own, as far as its float kernels give the same logits for one row and for several; drawn
    text has the model's law, but seeds give other draws than without, since the host draws for each row of a pass.
    transformers 5.23 hands no ``streamer`` to custom functions.

    Args:
        model: as the host calls it, with all arguments down to ``streamer``.
        input_ids: the prompt, (1, t).
        logits_processor: the host's.
        stopping_criteria: the host's.
        generation_config: the host's.
        synced_gpus: the host's.
        streamer: the host's.
        drafter: see `FarthingCandidateGenerator`; None is a `Suffix` whose store is the model's, for all its texts.
        draft_tokens: tokens of each draft; None weighs measured pass times, kept with the model, against how often
            drafts are right, so that drafts that do not pay are not submitted.
        model_kwargs: the host's.

    Returns:
        What ``model.generate`` gives.

    Raises:
        UnsupportedError: the host's loop can't do it: several texts or answers, beams, encoders, states of fixed
            size, no cache or a static one; or the drafter can't work here.

    Example:
        ``model.generate(ids, max_new_tokens=64, custom_generate=farthing.hf.generate, drafter=NGram("vllm", min_n=2))``
    """
    _require(model, input_ids, generation_config, model_kwargs)
    if model not in _models:
        _models[model] = _Model()
    known = _models[model]
    drafter = known.drafter if drafter is None else drafter
    eos = getattr(generation_config, "_eos_token_tensor", None)
    generator = FarthingCandidateGenerator(
        drafter,
        eos_token_ids=() if eos is None else eos.reshape(-1).tolist(),
        max_length=generation_config.max_length,
        vocabulary=model.config.get_text_config().vocab_size,
        draft_tokens=draft_tokens,
        times=known.times,
        survival=known.survival.setdefault(getattr(drafter, "name", type(drafter).__name__), Survival()),
    )
    try:
        return type(model)._assisted_decoding(
            _Assisted(model, generator),
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    finally:
        generator.end()


def _require(model: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """An UnsupportedError for what the host's loop for drafts can't do."""
    one = "the host's loop for drafts takes one text; call generate once for each"
    cache = "the host's loop for drafts takes tokens back, from a dynamic cache"
    implementation = generation_config.cache_implementation
    static = type(model_kwargs.get("past_key_values")).__name__ == "StaticCache"
    for refused, got, works in (
        (input_ids.shape[0] != 1, f"a batch of {input_ids.shape[0]}", one),
        (generation_config.num_return_sequences != 1, "num_return_sequences above 1", one),
        (generation_config.num_beams not in (None, 1), "beams", "leave num_beams out"),
        (model.config.is_encoder_decoder, "a model with an encoder", "use a decoder-only model"),
        (getattr(model, "_is_stateful", False), "a model whose state can't go back", "generate without drafts"),
        (not model_kwargs.get("use_cache"), "use_cache=False", cache),
        (static or implementation in ("static", "hybrid", "sliding_window"), "a static cache", cache),
    ):
        if refused:
            raise UnsupportedError(f"farthing.hf.generate: got {got}: {works}")
