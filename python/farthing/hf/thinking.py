"""Thinking budgets and effort in transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, StoppingCriteria

from ..errors import UnsupportedError
from ..reasoning.controller import Controller, ThinkSpec
from ..reasoning.effort import EffortPlan, resolve_effort
from ..reasoning.hosts import Rows, limited
from ..reasoning.policy import Policy

__all__ = ["ThinkingLogitsProcessor", "ThinkingReport", "ThinkingStoppingCriteria"]

# Where nobody says how many tokens may come, no answer can be kept out of them.
_UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class ThinkingReport:
    """What the tokens of one row were.

    Attributes:
        thinking_tokens: drawn inside a thinking span.
        forced_tokens: dictated: the hand-over message and the end marker.
        answer_tokens: all others.
        stop: why thinking ended: ``natural``, ``budget``, ``grace``, ``loop``, ``eos_fix``, ``length``, or None.
    """

    thinking_tokens: int
    forced_tokens: int
    answer_tokens: int
    stop: str | None


class _Steered:
    """What processor and criterion share: how much thinking is wanted, and the rows that are followed."""

    def __init__(
        self,
        tokenizer: Any,
        policy: Policy | None,
        thinking_budget: int | None,
        effort: str | EffortPlan | None,
        max_new_tokens: int | None,
        spec: ThinkSpec | None,
    ) -> None:
        self.plan: EffortPlan | None = None
        if effort is not None:
            if isinstance(effort, EffortPlan):
                self.plan = effort
            else:
                self.plan = resolve_effort(
                    tokenizer,
                    effort,
                    max_tokens=max_new_tokens,
                    thinking_budget=thinking_budget,
                    thinks=None if spec is None and (policy is None or policy.end is None) else True,
                )
            if thinking_budget is None:
                thinking_budget = self.plan.budget
        if policy is None and self.plan is not None and self.plan.effort == "none" and thinking_budget == 0:
            policy = Policy(message="", ramp=None, loop_guard=False)  # nothing was thought: nothing is handed over
        policy = limited(policy, thinking_budget)
        if policy is None and self.plan is None:
            raise ValueError("policy: got None, expected a policy, a thinking_budget or an effort")
        most = _UNBOUNDED if max_new_tokens is None else max_new_tokens
        self._make: Callable[[Sequence[int]], Controller] | None = None
        if policy is not None:
            spec = spec or ThinkSpec.from_tokenizer(tokenizer, policy.start, policy.end, policy.message)
            self._make = lambda prompt: Controller(spec, policy, prompt, most)
            self._rows = Rows(lambda prompt: Controller(spec, policy, prompt.tolist(), most))
        self._spec = spec

    def _follow(self, input_ids: torch.Tensor) -> list[Controller]:
        return self._rows.follow(list(input_ids.detach().cpu().numpy().astype(np.int64)))


class ThinkingLogitsProcessor(_Steered, LogitsProcessor):
    """A thinking budget for ``model.generate``.

    Each row of the batch has a `farthing.reasoning.Controller`, kept from call to call and recognised by its text, so
    that beam search, assisted generation and further calls of ``generate`` are followed. Put it last among the
    processors of ``generate``: what it dictates must stand.

    Args:
        tokenizer: the model's; its thinking markers are looked up.
        policy: how much thinking is wanted, and how it is ended.
        thinking_budget: most tokens of thinking, hard.
        effort: instead, one of `farthing.reasoning.EFFORTS` or a plan; the prompt must be made by ``plan``.
        max_new_tokens: as given to ``generate``, so that the answer's reserve can be kept and ``effort`` has a measure.
        spec: the model's markers, if the tokenizer does not show them.

    Attributes:
        plan: how ``effort`` is honoured: the variables of the chat template and the words for the model.

    Raises:
        UnsupportedError: the tokenizer has no known markers, or the model can't honour the effort.
        ValueError: nothing is asked for.

    Example:
        ```python
        steer = ft.hf.ThinkingLogitsProcessor(tokenizer, effort="low", max_new_tokens=2048)
        prompt = tokenizer.apply_chat_template(
            steer.plan.conversation(messages),
            **steer.plan.template_kwargs,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokens = model.generate(**prompt, max_new_tokens=2048, logits_processor=[steer])
        print(steer.reports(tokens))
        ```
    """

    # Rows of a continuous batch come and go without a word about who they are.
    supports_continuous_batching = False

    def __init__(
        self,
        tokenizer: Any,
        policy: Policy | None = None,
        *,
        thinking_budget: int | None = None,
        effort: str | EffortPlan | None = None,
        max_new_tokens: int | None = None,
        spec: ThinkSpec | None = None,
    ) -> None:
        super().__init__(tokenizer, policy, thinking_budget, effort, max_new_tokens, spec)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (b, V) of what may come behind the texts ``input_ids`` (b, t)."""
        if self._make is None:
            return scores
        # Texts are followed on the host, and rows are steered there.
        steered = scores.detach().to("cpu", torch.float32, copy=True).contiguous()
        for row, controller in zip(steered.numpy(), self._follow(input_ids), strict=True):
            controller.process(row)
        return steered.to(scores.device, scores.dtype)

    def reports(self, tokens: torch.Tensor) -> list[ThinkingReport]:
        """What the tokens of each row were.

        Args:
            tokens: what ``generate`` returned (b, t), of its last call.

        Raises:
            UnsupportedError: no budget was at work, so nothing was followed.
        """
        if self._make is None or self._spec is None:
            raise UnsupportedError("a report without a budget is not supported; give a policy or a thinking_budget")
        ends, rows = set(self._spec.eos), []
        for ids, prompt in zip(tokens.tolist(), self._rows.prompts(), strict=True):
            controller = self._make(ids[:prompt])
            for token in ids[prompt:]:
                controller.push(token)
                if token in ends:  # padding follows
                    break
            counts = controller.thinking_tokens, controller.forced_tokens, controller.answer_tokens
            rows.append(ThinkingReport(*counts, controller.stop))
        return rows


class ThinkingStoppingCriteria(_Steered, StoppingCriteria):
    """Ends ``generate`` where the thinking ends, by itself or because its budget is spent.

    It is the first phase of the two-phase method that Qwen documents: generate the thinking, append `close`, generate
    the answer. `ThinkingLogitsProcessor` does the same in one call.

    Args:
        tokenizer: the model's; its thinking markers are looked up.
        policy: how much thinking is wanted.
        thinking_budget: most tokens of thinking.
        spec: the model's markers, if the tokenizer does not show them.
    """

    def __init__(
        self,
        tokenizer: Any,
        policy: Policy | None = None,
        *,
        thinking_budget: int | None = None,
        spec: ThinkSpec | None = None,
    ) -> None:
        super().__init__(tokenizer, policy, thinking_budget, None, None, spec)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Whether each of the texts ``input_ids`` (b, t) has ended its thinking, bool (b,)."""
        done = [controller.state in ("forcing", "answer") for controller in self._follow(input_ids)]
        return torch.tensor(done, device=input_ids.device)

    @property
    def close(self) -> list[int]:
        """What must be appended to a text whose thinking was cut off."""
        return [] if self._spec is None else self._spec.forced_close
