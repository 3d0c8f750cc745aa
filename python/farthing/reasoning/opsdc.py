"""On-policy self-distillation for conciseness: the loss, the prompts and the teacher's schedule.

The student answers its plain prompt; its teacher is an older copy of itself that is asked to be concise and reads the
same answer. The student moves towards what the teacher would have said at each token: no labels, no rewards. The method
is CRISP, first published as OPSDC (arXiv 2603.05433).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .divergence import Divergence, linear_divergence, logits_divergence
from .tasks import PLAIN

__all__ = ["DIFFICULTY_AWARE", "UNIFORM", "PromptPair", "Schedule", "States", "chat_pairs", "opsdc_loss"]

_UNIFORM = (
    "Be brief and be right. Write only the steps that the result rests on: no introduction, no repetition, "
    "no comments on your own work."
)
_DIFFICULTY = (
    " A right answer matters more than a short one. Where the problem is easy, go straight to the result. Where it "
    "takes several steps, keep each step that the result depends on, every case and exception, and one short check at "
    "the end."
)
_BOX = " Put the final answer in \\boxed{}."


@dataclass(frozen=True)
class PromptPair:
    """What student and teacher are asked, with ``{question}`` where the question goes."""

    student: str
    teacher: str

    def __post_init__(self) -> None:
        for name in ("student", "teacher"):
            if "{question}" not in getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a text with {{question}} in it")


#: The teacher is to be brief everywhere. Compresses most, and loses accuracy on hard problems.
UNIFORM = PromptPair(f"{PLAIN}\n\n{{question}}", f"{_UNIFORM}{_BOX}\n\n{{question}}")
#: The teacher is to be brief where the problem is easy. The safe choice.
DIFFICULTY_AWARE = PromptPair(UNIFORM.student, f"{_UNIFORM}{_DIFFICULTY}{_BOX}\n\n{{question}}")


def chat_pairs(
    tokenizer: Any, pair: PromptPair = DIFFICULTY_AWARE, **template_arguments: Any
) -> Callable[[str], tuple[list[int], list[int]]]:
    """From a question to the token ids of the student's and the teacher's prompt, by the model's chat template.

    Args:
        tokenizer: one of transformers.
        pair: what is asked.
        template_arguments: passed to the template, such as ``enable_thinking=True``.
    """

    def ids(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **template_arguments
        )
        tokens: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return tokens

    def prompts(question: str) -> tuple[list[int], list[int]]:
        # Not `format`: questions have braces of their own.
        return ids(pair.student.replace("{question}", question)), ids(pair.teacher.replace("{question}", question))

    return prompts


@dataclass(frozen=True)
class Schedule:
    """When the teacher becomes a copy of the student: after every ``every``-th step, counted from 1; None: never.

    50 is the published choice. Every step collapses (accuracy 61 % instead of 96 % on MATH-500), and so does a moving
    average that follows closely; a teacher that is never renewed compresses about half as much.

    Example:
        >>> import farthing as ft
        >>> [step for step in range(1, 101) if ft.reasoning.Schedule(50).due(step)]
        [50, 100]
    """

    every: int | None = 50

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"every: got {self.every}, expected at least 1, or None for never")

    def due(self, step: int) -> bool:
        """Whether the teacher is renewed behind ``step``."""
        return self.every is not None and step > 0 and step % self.every == 0

    def after(self, step: int, teacher: torch.nn.Module, student: torch.nn.Module) -> bool:
        """To be called after the optimiser's step: copies the weights if it is time, and says whether it was."""
        if not self.due(step):
            return False
        with torch.no_grad():
            sources = dict(student.named_parameters()) | dict(student.named_buffers())
            for name, target in (dict(teacher.named_parameters()) | dict(teacher.named_buffers())).items():
                target.copy_(sources[name])
        return True


class States(NamedTuple):
    """Final states and the head that makes logits of them, in the place of logits that need not exist.

    ``hidden``: (..., H); ``weight``: (V, H); the rest as in `linear_divergence`.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def opsdc_loss(
    student: torch.Tensor | States,
    teacher: torch.Tensor | States,
    mask: torch.Tensor | None = None,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    estimator: str = "full",
    token_ids: torch.Tensor | None = None,
    filter: float = 0.0,  # noqa: A002 - as in linear_divergence
    valid_vocab: int | None = None,
) -> torch.Tensor:
    """Mean over response tokens of the divergence of the student from its teacher; the gradient goes to the student.

    Args:
        student: logits (..., V), or `States` (..., H), which never become logits: one row for each token of the
            response, the row that predicts it.
        teacher: the same rows behind the teacher's prompt.
        mask: (...,), zero where a row does not count; a mean over no rows is 0. None counts all.
        kind: ``"reverse_kl"`` (published choice), ``"jsd"`` (compresses slightly less) or ``"forward_kl"`` (collapsed
            within 100 steps in the paper's setting).
        beta: of ``"jsd"``.
        estimator: ``"full"`` sums over the vocabulary; ``"sampled"`` looks only at the tokens that were drawn. That has
            the same expected gradient as the reverse KL with more noise, and its value is no divergence.
        token_ids: (...,) the response, for ``"sampled"``.
        filter: of the gradients with `States`, see `linear_divergence`.
        valid_vocab: tokens from here on do not exist.

    Returns:
        A scalar.

    TRL does the same with its own trainer (`trl.experimental.sdft`, TRL 1.16): a dataset with the columns ``prompt``
    and ``privileged_context`` (the instruction to be concise), and::

        SDFTConfig(
            distillation_mode="full_logits",
            distillation_alpha=1.0,  # reverse KL
            distillation_is_clip=None,
            teacher_model_kind="ema",
            teacher_update_rate=1.0,  # a hard copy ...
            teacher_sync_steps=50,  # ... every 50 steps
            teacher_prompt_template=...,  # {privileged_context}, an empty line, {prompt}
            num_generations=1,
            generate_from_teacher=False,
            temperature=1.0,
            learning_rate=1e-6,
        )

    Example:
        >>> import torch, farthing as ft
        >>> logits = torch.zeros(1, 3, 5, requires_grad=True)
        >>> loss = ft.reasoning.opsdc_loss(logits, torch.randn(1, 3, 5), torch.tensor([[1, 1, 0]]))
        >>> loss.backward()
        >>> bool(loss > 0), float(logits.grad[0, 2].abs().sum())
        (True, 0.0)
    """
    rows = _flat(student)
    others = _flat(teacher)
    leading = (student.hidden if isinstance(student, States) else student).shape[:-1]
    count = leading.numel()
    if mask is not None and mask.shape != leading:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(leading)}")
    weights = torch.ones(count, dtype=torch.float64) if mask is None else mask.detach().reshape(-1).double()
    weights = weights / weights.sum().clamp(min=1e-300)
    if estimator == "sampled":
        if token_ids is None or token_ids.shape != leading:
            got = None if token_ids is None else tuple(token_ids.shape)
            raise ValueError(f"token_ids: got {got}, expected shape {tuple(leading)} for the sampled estimator")
        if kind != "reverse_kl":
            raise ValueError(f"kind: got {kind!r}, expected 'reverse_kl' for the sampled estimator")
        return _sampled(rows, others, token_ids.reshape(-1), weights, filter, valid_vocab)
    if estimator != "full":
        raise ValueError(f"estimator: got {estimator!r}, expected 'full' or 'sampled'")
    if isinstance(rows, States) and isinstance(others, States):
        found = linear_divergence(
            rows.hidden,
            rows.weight,
            others.hidden,
            others.weight,
            weights,
            kind=kind,
            beta=beta,
            bias=rows.bias,
            scale=rows.scale,
            softcap=rows.softcap,
            teacher_bias=others.bias,
            teacher_scale=others.scale,
            teacher_softcap=others.softcap if others.softcap is not None else rows.softcap,
            filter=filter,
            valid_vocab=valid_vocab,
        )
        return found.loss
    if isinstance(rows, States) or isinstance(others, States):
        raise ValueError("expected logits on both sides, or States on both")
    cut = slice(valid_vocab)
    return logits_divergence(rows[:, cut], others[:, cut], weights, kind=kind, beta=beta).loss


def _flat(rows: torch.Tensor | States) -> torch.Tensor | States:
    if isinstance(rows, States):
        return rows._replace(hidden=rows.hidden.reshape(-1, rows.hidden.shape[-1]))
    return rows.reshape(-1, rows.shape[-1])


def _sampled(
    rows: torch.Tensor | States,
    others: torch.Tensor | States,
    tokens: torch.Tensor,
    weights: torch.Tensor,
    filter: float,  # noqa: A002
    valid: int | None,
) -> torch.Tensor:
    """``mean [log p(y) - log q(y)] · log p(y)``, the bracket without gradient."""
    if isinstance(rows, States) and isinstance(others, States):
        tokens = torch.where(weights == 0, 0, tokens)
        ones = (weights != 0).double()

        def surprisal(side: States, row_weight: torch.Tensor) -> Divergence:
            hidden, weight, bias, scale, softcap = side
            return linear_divergence(
                hidden,
                weight,
                row_weight=row_weight,
                labels=tokens,
                kind="cross_entropy",
                bias=bias,
                scale=scale,
                softcap=softcap,
                filter=filter,
                valid_vocab=valid,
            )

        with torch.no_grad():
            ratio = surprisal(others, ones).rows - surprisal(rows, ones).rows
        return surprisal(rows, -(weights * ratio)).loss
    if isinstance(rows, States) or isinstance(others, States):
        raise ValueError("expected logits on both sides, or States on both")
    wide = torch.promote_types(rows.dtype, torch.float32)
    gathered = [
        side[:, :valid].to(wide).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        for side in (rows, others.detach())
    ]
    ratio = (gathered[0] - gathered[1]).detach()
    return torch.where(weights == 0, 0.0, ratio * gathered[0] * weights.to(wide)).sum()
