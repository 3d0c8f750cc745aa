"""A mixture of experts as a torch module: a router that trains, over experts that train or are packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UnsupportedError
from ..moe import PackedExperts, RouterSpec, RoutingStatistics
from ..moe.clusters import balanced_clusters
from .experts import Experts
from .routing import choose, load_balancing_loss, router_z_loss

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FloatExperts", "SparseMoe", "TrainableRouting"]

_ACTIVATIONS = ("silu", "gelu_tanh")
_NAMES = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}


class TrainableRouting(NamedTuple):
    """Where each row of the last call went.

    Attributes:
        logits: (T, E) float32, with their gradient.
        ids: (T, K) int64.
        weights: (T, K) float32, with their gradient.
    """

    logits: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class FloatExperts(nn.Module):
    """Experts whose weights are parameters, laid out as transformers 5 has them.

    Attributes:
        gate_up_proj: (E, 2I, H), gate then up.
        down_proj: (E, H, I).
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, activation: str = "silu") -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(_ACTIVATIONS)}")
        self.activation = activation
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for weight in (self.gate_up_proj, self.down_proj):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``hidden``: (T, H), ``ids`` and ``weights``: (T, K); the result: (T, H), of the type of ``hidden``."""
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for expert in torch.unique(ids).tolist():
            if not 0 <= expert < len(self.down_proj):
                continue
            tokens, slots = torch.where(ids == expert)
            gate, up = F.linear(hidden[tokens], self.gate_up_proj[expert]).chunk(2, -1)
            gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
            y = F.linear(gate * up, self.down_proj[expert]).float()
            out = out.index_add(0, tokens, y * weights[tokens, slots, None].float())
        return out.to(hidden.dtype)

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        experts, hidden, inner = self.down_proj.shape
        return f"{experts} experts, {hidden} → {inner} → {hidden}, {self.activation}"


class SparseMoe(nn.Module):
    """``Σ weight · expert(x)`` over the experts that a trainable router chooses for each token.

    The router has float32 parameters and every form of `farthing.moe.RouterSpec`. Experts are parameters until `pack`
    makes them fixed low-bit weights; the router trains on through those.

    Args:
        hidden_size: H.
        intermediate_size: I, of each expert.
        spec: how experts are chosen.
        activation: ``silu`` or ``gelu_tanh`` of the gate.
        table: (V, K) expert ids by token id, if the spec is hashed.

    Attributes:
        experts: `FloatExperts`, or `Experts` once they are packed.
        routing: `TrainableRouting` of the last call, None before.

    Example:
        >>> import torch, farthing as ft, farthing.nn
        >>> layer = farthing.nn.SparseMoe(64, 48, ft.moe.RouterSpec(8, 2, norm_topk_prob=True))
        >>> y = layer(torch.randn(2, 5, 64))
        >>> (y.square().mean() + layer.auxiliary_loss()).backward()
        >>> y.shape, layer.statistics().tokens
        (torch.Size([2, 5, 64]), 10)
        >>> layer.pack("int4", group=16).experts
        Experts(PackedExperts(8 experts, 64 → 48 → 64, silu, int4 g16 symmetric f16, a16, 48.1 kB))
    """

    experts: FloatExperts | Experts
    routing: TrainableRouting | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        spec: RouterSpec,
        *,
        activation: str = "silu",
        table: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        experts = FloatExperts(spec.num_experts, hidden_size, intermediate_size, activation)
        self._set_up(spec, hidden_size, experts, table)

    def _set_up(
        self, spec: RouterSpec, hidden_size: int, experts: FloatExperts | Experts, table: torch.Tensor | None
    ) -> None:
        if (table is not None) != spec.hashed:
            got, expected = ("None", "a tensor (V, K)") if spec.hashed else ("a tensor", "None")
            raise ValueError(f"table: got {got}, expected {expected} for {spec}")
        if table is not None and (table.ndim != 2 or table.shape[1] != spec.top_k):
            raise ValueError(f"table: got shape {tuple(table.shape)}, expected (V, {spec.top_k})")
        self.spec = spec
        self.weight = nn.Parameter(torch.randn(spec.num_experts, hidden_size) * 0.02)
        self.bias = nn.Parameter(torch.zeros(spec.num_experts)) if spec.logit_bias else None
        self.register_buffer("selection_bias", torch.zeros(spec.num_experts) if spec.selection_bias else None)
        self.register_buffer("table", table)
        self.experts = experts
        self.routing = None

    @classmethod
    def from_packed(cls, packed: PackedExperts, spec: RouterSpec, *, table: torch.Tensor | None = None) -> Self:
        """A layer with a new router over experts that are packed already, and stay as they are."""
        if len(packed) != spec.num_experts:
            raise ValueError(f"packed: got {len(packed)} experts, expected {spec.num_experts} for {spec}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(spec, packed.hidden_size, Experts(packed), table)
        return layer

    @classmethod
    def from_dense(
        cls, mlp: nn.Module, num_experts: int, top_k: int, *, spec: RouterSpec | None = None, seed: int = 0
    ) -> Self:
        """Splits a gated network into experts: each gets neurons whose rows of the gate are alike.

        Rows of the gate are clustered into equal parts by `farthing.moe.balanced_clusters` (MoEfication,
        arXiv:2110.01786). All experts with weight 1 compute what the network did. The router starts as the means of the
        experts' rows, so that an expert is chosen where its neurons are most awake on average.

        Args:
            mlp: has ``gate_proj``, ``up_proj``, ``down_proj`` without biases, and ``act_fn``, as that of Llama.
            num_experts: E, a divisor of the network's neurons.
            top_k: K.
            spec: how experts are chosen; by default softmax over the chosen, whose weights sum to K.
            seed: of the clusters.

        Raises:
            UnsupportedError: ``mlp`` is another network.
            ValueError: sizes that do not fit.
        """
        layers = [getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")]
        activation = _NAMES.get(type(getattr(mlp, "act_fn", None)).__name__)
        plain = all(isinstance(layer, nn.Linear) and layer.bias is None for layer in layers)
        if activation is None or not plain:
            raise UnsupportedError(
                f"{type(mlp).__name__}: expected linear gate_proj, up_proj and down_proj without biases, and SiLU or "
                "tanh GELU as act_fn"
            )
        gate, up, down = (layer.weight.detach() for layer in layers)  # type: ignore[union-attr]
        if spec is None:
            spec = RouterSpec(num_experts, top_k, norm_topk_prob=True, routed_scaling_factor=float(top_k))
        if (spec.num_experts, spec.top_k) != (num_experts, top_k):
            raise ValueError(f"spec: got {spec}, expected {num_experts} experts and top_k {top_k}")
        labels = balanced_clusters(gate.float().numpy(), num_experts, seed=seed)
        neurons = torch.from_numpy(labels).argsort(stable=True).view(num_experts, -1)  # (E, I)
        layer = cls(gate.shape[1], neurons.shape[1], spec, activation=activation).to(gate.dtype)
        with torch.no_grad():
            layer.experts.gate_up_proj.copy_(torch.cat([gate[neurons], up[neurons]], 1))  # type: ignore[operator]
            layer.experts.down_proj.copy_(down[:, neurons].transpose(0, 1))  # type: ignore[operator]
            layer.weight.copy_(gate[neurons].mean(1))
        return layer

    def forward(self, hidden: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """``hidden``: (..., H), ``token_ids``: (...) if the spec is hashed; the result: as ``hidden``."""
        x = hidden.reshape(-1, hidden.shape[-1])
        logits = F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())
        if self.spec.hashed and token_ids is None:
            raise ValueError(f"token_ids: got None, expected integers for {self.spec}")
        looked_up = self.table[token_ids.reshape(-1)] if self.spec.hashed else None  # type: ignore[index, union-attr]
        ids, weights = choose(logits, self.spec, self.selection_bias, looked_up)  # type: ignore[arg-type]
        self.routing = TrainableRouting(logits, ids, weights)
        if self.spec.apply_to_input:
            # One row for each choice, since each reads its own input.
            rows = (x.unsqueeze(1) * weights.unsqueeze(-1)).to(x.dtype).flatten(0, 1)
            y = self.experts(rows, ids.reshape(-1, 1), torch.ones_like(weights).reshape(-1, 1))
            y = y.view(*ids.shape, -1).sum(1)
        else:
            y = self.experts(x, ids, weights)
        return y.view(hidden.shape)  # type: ignore[no-any-return]

    def auxiliary_loss(self, balance: float = 1e-2, z: float = 1e-3) -> torch.Tensor:
        """What to add to the loss so that the last call's tokens spread: `load_balancing_loss` and `router_z_loss`.

        Raises:
            RuntimeError: there was no call yet.
        """
        logits, ids, _ = self._last()
        return balance * load_balancing_loss(logits, ids, self.spec.score) + z * router_z_loss(logits)

    def statistics(self) -> RoutingStatistics:
        """How evenly the last call's rows spread over the experts.

        Raises:
            RuntimeError: there was no call yet.
        """
        return RoutingStatistics(self.spec.num_experts).record(self._last().ids.numpy())

    def _last(self) -> TrainableRouting:
        if self.routing is None:
            raise RuntimeError("SparseMoe: got no call yet, expected one first")
        return self.routing

    def pack(self, weights: str = "int4", **options: Any) -> Self:
        """Packs the experts in place, by `farthing.moe.PackedExperts` with these options; they no longer train.

        Raises:
            ValueError: an option is out of range, or the experts are packed already.
        """
        experts = self.experts
        if not isinstance(experts, FloatExperts):
            raise ValueError("experts: got packed ones, expected parameters")
        gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        packed = PackedExperts.from_arrays(gate_up, down, weights, activation=experts.activation, **options)
        self.experts = Experts(packed).train(self.training)
        return self

    def extra_repr(self) -> str:
        """The router, for `print`."""
        return repr(self.spec)

    def __getstate__(self) -> dict[str, Any]:
        """Without the last call's routing, which may hang in a graph and can't be copied."""
        return {**self.__dict__, "routing": None}
