"""Routers in torch, differentiable, and the losses that train them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..moe import RouterSpec

__all__ = ["choose", "load_balancing_loss", "router_z_loss", "scores_of"]


def scores_of(logits: torch.Tensor, score: str) -> torch.Tensor:
    """The function of that name, as in `farthing.moe.RouterSpec`."""
    if score == "softmax":
        return logits.softmax(-1)
    if score == "sigmoid":
        return logits.sigmoid()
    return F.softplus(logits).sqrt() if score == "sqrtsoftplus" else logits


def choose(
    logits: torch.Tensor,
    spec: RouterSpec,
    selection_bias: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights as `farthing.moe.route` gives them, with gradients from the weights to the logits.

    Args:
        logits: (T, E) float32, biases of the router in them.
        spec: how to choose.
        selection_bias: (E,) if the spec says so.
        ids: (T, K) that were looked up, if the spec is hashed.

    Returns:
        Ids (T, K) and weights (T, K).
    """
    scores = scores_of(logits, spec.score)
    if ids is None:
        ids = _best(scores.detach() if selection_bias is None else scores.detach() + selection_bias, spec)
    weights = scores_of(scores.gather(-1, ids), spec.post)
    if spec.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + spec.norm_eps)
    return ids, weights * spec.routed_scaling_factor


def _best(scores: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """The greatest of each row, lower ids among equals."""
    if spec.n_group > 1 and spec.topk_group < spec.n_group:
        groups = scores.view(len(scores), spec.n_group, -1)
        order = groups.sort(-1, descending=True).values
        best = order[..., :2].sum(-1) if spec.group_score == "top2" else order[..., 0]
        kept = best.sort(dim=-1, descending=True, stable=True).indices[..., : spec.topk_group]
        keep = torch.zeros_like(best, dtype=torch.bool).scatter(-1, kept, True)
        scores = groups.masked_fill(~keep.unsqueeze(-1), spec.masked_fill).flatten(-2)
    ids: torch.Tensor = scores.sort(dim=-1, descending=True, stable=True).indices[..., : spec.top_k]
    return ids


def load_balancing_loss(logits: torch.Tensor, ids: torch.Tensor, score: str = "softmax") -> torch.Tensor:
    """``E · Σ_e f_e · p_e``: ``f_e`` the share of tokens that chose expert e, ``p_e`` its mean share of the scores.

    The loss of GShard (arXiv:2006.16668) and Switch (arXiv:2101.03961) for K choices, as transformers computes it: K
    where both are uniform, more where the experts that are chosen are those that are preferred.

    Args:
        logits: (T, E), through which gradients flow.
        ids: (T, K) that were chosen.
        score: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``: what makes shares of logits, divided by their sum
            (DeepSeek-V3); ``identity`` counts as softmax.

    Example:
        >>> import torch, farthing.nn
        >>> ids = torch.tensor([[0, 1], [2, 3]])
        >>> farthing.nn.load_balancing_loss(torch.zeros(2, 4), ids).item()
        2.0
    """
    scores = scores_of(logits.float(), "softmax" if score == "identity" else score)
    shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
    experts = logits.shape[-1]
    loads = torch.zeros(experts, device=logits.device).scatter_add(
        0, ids.reshape(-1), torch.ones(ids.numel(), device=logits.device)
    )
    return experts * (loads / max(len(ids), 1) * shares).sum()


def router_z_loss(logits: torch.Tensor) -> torch.Tensor:
    """The mean of ``log(Σ_e exp logit_e)²``, which keeps logits small (ST-MoE, arXiv:2202.08906).

    Args:
        logits: (T, E).
    """
    return logits.float().logsumexp(-1).square().mean()
