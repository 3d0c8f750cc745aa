"""The routers of model types, read from their configurations.

Each entry says what the router module of that type in transformers computes, and which configuration keys it reads; the
defaults are those of the type's configuration class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UnsupportedError

__all__ = ["MODEL_TYPES", "arguments"]

# The same number under the names that configuration files give it.
_ALIASES = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "num_experts_per_token"),
    "n_group": ("n_group", "num_expert_group"),
    "norm_topk_prob": ("norm_topk_prob", "moe_renormalize"),
}

Arguments = dict[str, Any]


class _Config:
    """Keys of a configuration object or mapping."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def get(self, name: str, default: Any) -> Any:
        for alias in _ALIASES.get(name, (name,)):
            from_mapping = isinstance(self._config, Mapping)
            value = self._config.get(alias) if from_mapping else getattr(self._config, alias, None)
            if value is not None:
                return value
        return default

    def need(self, name: str) -> Any:
        if (value := self.get(name, None)) is None:
            raise ValueError(f"config: got no {name}, expected a number")
        return value


Reader = Callable[[_Config, int | None], Arguments]


def _sizes(config: _Config, experts: int, top_k: int | None) -> Arguments:
    chosen = config.need("num_experts_per_tok") if top_k is None else config.get("num_experts_per_tok", top_k)
    return {"num_experts": config.get("num_experts", experts), "top_k": chosen}


def _softmax(experts: int, top_k: int, *, norm: bool, always: bool = False) -> Reader:
    """Softmax over all experts; weights normalised by ``norm_topk_prob`` or always."""

    def read(config: _Config, _: int | None) -> Arguments:
        normalised = norm if always else config.get("norm_topk_prob", norm)
        return _sizes(config, experts, top_k) | {"norm_topk_prob": normalised}

    return read


def _logits(experts: int, top_k: int, **others: Any) -> Reader:
    """Logits choose; ``post`` makes weights of them."""
    return lambda config, _: _sizes(config, experts, top_k) | {"score": "identity"} | others


def _deepseek_v2(config: _Config, _: int | None) -> Arguments:
    method = config.get("topk_method", "greedy")
    if method == "group_limited_greedy":
        groups = {"n_group": config.need("n_group"), "topk_group": config.need("topk_group")}
        groups |= {"group_score": "max", "masked_fill": 0.0}
    elif method == "greedy":
        groups = {}
    else:
        raise UnsupportedError(f"topk_method={method!r} is not supported; greedy and group_limited_greedy are")
    return _sizes(config, 64, None) | groups | {"routed_scaling_factor": config.get("routed_scaling_factor", 1.0)}


def _grouped(
    experts: int, top_k: int, groups: tuple[int, int], scale: float, score: str = "sigmoid", **others: Any
) -> Reader:
    """DeepSeek-V3 and what follows it: groups by their two best, normalised with 1e-20, scaled."""

    def read(config: _Config, _: int | None) -> Arguments:
        return (
            _sizes(config, experts, top_k)
            | {
                "score": score,
                "n_group": config.get("n_group", groups[0]),
                "topk_group": config.get("topk_group", groups[1]),
                "norm_topk_prob": config.get("norm_topk_prob", True),
                "norm_eps": 1e-20,
                "routed_scaling_factor": config.get("routed_scaling_factor", scale),
                "selection_bias": score == "sigmoid",
            }
            | others
        )

    return read


def _sigmoid(experts: int, top_k: int, *, eps: float, scale: tuple[str, float] | None = None) -> Reader:
    """Sigmoid with a bias for the choice, always normalised."""

    def read(config: _Config, _: int | None) -> Arguments:
        scaled = {} if scale is None else {"routed_scaling_factor": config.get(*scale)}
        words = {"score": "sigmoid", "selection_bias": True, "norm_topk_prob": True, "norm_eps": eps}
        return _sizes(config, experts, top_k) | words | scaled

    return read


def _lfm2(config: _Config, _: int | None) -> Arguments:
    return _sizes(config, 32, 4) | {
        "score": "sigmoid",
        "selection_bias": config.get("use_expert_bias", True),
        "norm_topk_prob": config.get("norm_topk_prob", True),
        "norm_eps": 1e-6,
        "routed_scaling_factor": config.get("routed_scaling_factor", 1.0),
    }


def _deepseek_v4(config: _Config, layer: int | None) -> Arguments:
    kinds = config.get("mlp_layer_types", None)
    hash_layers = config.get("num_hash_layers", 3)
    if kinds is None:
        kinds = ["hash_moe"] * hash_layers + ["moe"] * (config.get("num_hidden_layers", 43) - hash_layers)
    if layer is None and len(set(kinds)) > 1:
        count = kinds.count("hash_moe")
        raise ValueError(f"layer: got None, expected an index: {count} layers look experts up, others choose by score")
    if layer is not None and not 0 <= layer < len(kinds):
        raise ValueError(f"layer: got {layer}, expected 0 to {len(kinds) - 1}")
    hashed = kinds[layer or 0] == "hash_moe"
    return _sizes(config, 256, 6) | {
        "score": config.get("scoring_func", "sqrtsoftplus"),
        "norm_topk_prob": True,
        "norm_eps": 1e-20,
        "routed_scaling_factor": config.get("routed_scaling_factor", 1.5),
        "selection_bias": not hashed,
        "hashed": hashed,
    }


_GRANITE = _logits(8, 2, post="softmax")
_DEEPSEEK_V3 = _grouped(256, 8, (8, 4), 2.5)

MODEL_TYPES: dict[str, Reader] = {
    "mixtral": _softmax(8, 2, norm=True, always=True),
    "minimax": _softmax(8, 2, norm=True, always=True),
    "qwen2_moe": _softmax(60, 4, norm=False),
    "qwen3_moe": _softmax(128, 8, norm=False),
    "qwen3_next": _softmax(512, 10, norm=True),
    "qwen3_5_moe_text": _softmax(256, 8, norm=True, always=True),
    "qwen4_exp_text": _softmax(512, 10, norm=True),
    "olmoe": _softmax(64, 8, norm=False),
    "gpt_oss": _logits(128, 4, post="softmax", logit_bias=True),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "kimi_linear": _grouped(256, 8, (1, 1), 2.446),
    "glm4_moe": _grouped(128, 8, (1, 1), 1.0),
    "glm_moe_dsa": _grouped(256, 8, (1, 1), 2.5),
    "glm5_next_text": _grouped(288, 8, (1, 1), 2.5),
    "hy_v3": _sigmoid(192, 8, eps=1e-20, scale=("router_scaling_factor", 2.826)),
    "hy_v4": _grouped(256, 8, (1, 1), 2.827),
    "minimax_m2": _sigmoid(256, 8, eps=0.0),
    "lfm2_moe": _lfm2,
    "mistral4": _grouped(128, 4, (1, 1), 1.0, score="softmax", masked_fill=0.0),
    "deepseek_v4": _deepseek_v4,
    "llama4_text": _logits(16, 1, post="sigmoid", apply_to_input=True),
}


def arguments(config: Any, layer: int | None = None) -> Arguments:
    """Arguments of `RouterSpec` for a configuration; those of its text model if it is of several parts."""
    reader = _Config(config)
    kind = reader.get("model_type", None)
    if kind in MODEL_TYPES:
        return MODEL_TYPES[kind](reader, layer)
    if (text := reader.get("text_config", None)) is not None:
        return arguments(text, layer)
    raise UnsupportedError(f"model_type={kind!r} has no known router; known are {', '.join(MODEL_TYPES)}")
