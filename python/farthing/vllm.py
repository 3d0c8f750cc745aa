"""In vLLM: drafters (a proposer for ``custom_class``, our cache for ``suffix``), and thinking budgets.

Importing this module imports nothing of vLLM.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import UnsupportedError
from .speculative.drafters import Drafter, Suffix, SuffixStore
from .speculative.engine import Proposer
from .speculative.host import HostedDrafter, HostedText
from .speculative.suffix_cache import SuffixDecodingCache, SuffixDecodingDraft

__all__ = ["DrafterProposer", "register_suffix_decoding", "thinking_processor"]

# Tokens that tell texts of one length apart before they are compared as a whole.
_TAIL = 16
_Fingerprint = tuple[int, bytes]


class DrafterProposer:
    """A drafter as vLLM's proposer of chains, ``num_speculative_tokens`` long at most.

    vLLM draws from its own law and compares, so the law of its text stays as it is. It names no requests and may
    permute its rows, so texts are recognised by what they say.

    Args:
        vllm_config: vLLM's.

    Raises:
        UnsupportedError: the drafter can't work there.

    Example:
        With `Suffix` and a store of its own:
        ``LLM(model, speculative_config={"method": "custom_class", "model": "farthing.vllm.DrafterProposer",
        "num_speculative_tokens": 7})``. With another drafter name a class of yours instead:

        >>> import farthing.vllm
        >>> from farthing.speculative import NGram
        >>> class Lookup(farthing.vllm.DrafterProposer):
        ...     def make_drafter(self):
        ...         return NGram("vllm", min_n=2)
    """

    def __init__(self, vllm_config: Any) -> None:
        self._most: int = vllm_config.speculative_config.num_speculative_tokens
        self._max_length: int = vllm_config.model_config.max_model_len
        self._max_texts: int = vllm_config.scheduler_config.max_num_seqs
        vocabulary = vllm_config.model_config.get_vocab_size()
        self._hosted = HostedDrafter(self.make_drafter(), "vLLM", vocabulary=vocabulary)
        # Texts by length and last tokens; those that were seen last come last.
        self._texts: dict[_Fingerprint, list[HostedText]] = {}

    def make_drafter(self) -> Drafter | Proposer:
        """Makes the drafter; a class of yours may make another."""
        return Suffix(SuffixStore())

    def load_model(self, *_: Any, **__: Any) -> None:
        """VLLM calls it; there is nothing to load."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: npt.NDArray[Any],
        token_ids_cpu: npt.NDArray[np.int32],
        slot_mappings: Any = None,  # noqa: ARG002
    ) -> list[list[int]]:
        """Tokens that may follow each row.

        Args:
            sampled_token_ids: tokens that the last pass added to each row; a row without any gets no draft.
            num_tokens_no_spec: length of each row, those tokens included, (b,).
            token_ids_cpu: tokens of all rows, (b, max_model_len).
            slot_mappings: unused.

        Returns:
            For each row at most ``num_speculative_tokens`` tokens, all below the size of the vocabulary.
        """
        drafts: list[list[int]] = []
        # Apart until all rows are done: two rows are never the same text, even where they say the same.
        seen: list[HostedText] = []
        for row, sampled in enumerate(sampled_token_ids):
            length = int(num_tokens_no_spec[row])
            if not len(sampled) or length >= self._max_length or self._hosted.stopped is not None:
                drafts.append([])
                continue
            token_ids = token_ids_cpu[row, :length]
            text = self._recognise(token_ids[: length - len(sampled)])
            text.follow(token_ids)
            seen.append(text)
            drafts.append(text.draft(min(self._most, self._max_length - length - 1)).token_ids)
        for text in seen:
            self._texts.setdefault(_fingerprint(text.token_ids), []).append(text)
        self._forget()
        return drafts

    def _recognise(self, token_ids: npt.NDArray[np.int32]) -> HostedText:
        """Takes out the text that says just this, or a new one."""
        fingerprint = _fingerprint(token_ids)
        texts = self._texts.get(fingerprint, [])
        for at, text in enumerate(texts):
            if np.array_equal(text.token_ids, token_ids):
                del texts[at]
                if not texts:
                    del self._texts[fingerprint]
                return text
        return HostedText(self._hosted)

    def _forget(self) -> None:
        """Ends the texts that were not seen for longest, if there are more than vLLM runs at once."""
        excess = sum(map(len, self._texts.values())) - self._max_texts
        for fingerprint in list(self._texts):
            if excess <= 0:
                break
            for text in self._texts.pop(fingerprint):
                text.end()
                excess -= 1


def _fingerprint(token_ids: npt.NDArray[Any]) -> _Fingerprint:
    return len(token_ids), token_ids[-_TAIL:].astype(np.uint32).tobytes()


def register_suffix_decoding() -> None:
    """Registers `farthing.speculative.SuffixDecodingCache` as ``arctic_inference.suffix_decoding``.

    vLLM's ``{"method": "suffix"}`` then uses it. It is an entry point of the group ``vllm.general_plugins``, which vLLM
    calls in each of its processes, and does nothing unless ``FARTHING_VLLM_SUFFIX=1`` is set.

    Raises:
        UnsupportedError: arctic-inference itself is installed.

    Example:
        >>> import os, farthing.vllm
        >>> os.environ["FARTHING_VLLM_SUFFIX"] = "0"
        >>> farthing.vllm.register_suffix_decoding()  # does nothing
    """
    if os.environ.get("FARTHING_VLLM_SUFFIX") != "1":
        return
    present = sys.modules.get("arctic_inference")
    if getattr(present, "__farthing__", False):
        return
    if present is not None or importlib.util.find_spec("arctic_inference") is not None:
        works = "uninstall it, or unset FARTHING_VLLM_SUFFIX to use it"
        raise UnsupportedError(f"FARTHING_VLLM_SUFFIX=1, but arctic_inference is installed: {works}")
    package, module = (ModuleType(name) for name in ("arctic_inference", "arctic_inference.suffix_decoding"))
    # vLLM looks for the package by its specification and imports it.
    package.__spec__ = ModuleSpec("arctic_inference", None, is_package=True)
    module.__spec__ = ModuleSpec("arctic_inference.suffix_decoding", None)
    vars(package).update(__path__=[], __farthing__=True, suffix_decoding=module)
    vars(module).update(SuffixDecodingCache=SuffixDecodingCache, SuffixDecodingDraft=SuffixDecodingDraft)
    sys.modules["arctic_inference"] = package
    sys.modules["arctic_inference.suffix_decoding"] = module
    logging.getLogger("farthing").warning("vLLM's suffix decoding uses farthing's cache (FARTHING_VLLM_SUFFIX=1)")


def thinking_processor() -> type:
    """The class of a logits processor that keeps thinking within the budgets of requests.

    It serves vLLM's V1 and V2 model runners alike. Each request says in ``SamplingParams.extra_args`` what it wants:
    ``thinking_budget``, a hard number of tokens, and ``thinking``, the arguments of a `farthing.reasoning.Policy`; one
    without is left as it is. What can't be read is refused when the request comes. Effort is the chat template's:
    `farthing.reasoning.resolve_effort` says which ``chat_template_kwargs`` and which budget it takes.

    It is no entry point of ``vllm.logits_processors``, since that would put it into every engine. vLLM's V1 runner
    takes no logits processors together with speculative decoding. A grammar must leave thinking free (vLLM's
    ``reasoning_parser`` does that), for it comes before logits processors.

    Raises:
        UnsupportedError: vLLM is not installed.

    Example:
        ```python
        llm = vllm.LLM(model, logits_processors=["farthing.vllm:ThinkingProcessor"])
        llm.chat(messages, vllm.SamplingParams(max_tokens=2048, extra_args={"thinking_budget": 512}))
        ```

        On the command line, ``vllm serve MODEL --logits-processors farthing.vllm:ThinkingProcessor``; requests then
        carry ``"vllm_xargs": {"thinking_budget": 512}``; there ``thinking`` is JSON in a text.
    """
    from .reasoning.vllm import make_processor

    return make_processor()


def __getattr__(name: str) -> Any:
    if name == "ThinkingProcessor":
        return thinking_processor()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
