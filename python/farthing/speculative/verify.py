"""Which drafted tokens stay: the rules of verification for numpy arrays and torch tensors, of any engine.

A pass over a draft of k tokens gives laws ``p`` at k + 1 rows: row 0 behind the last committed token, row i + 1 behind
drafted token i. A sampled draft comes with its laws ``q``: row r is the law that the children of row r were drawn from,
so a chain brings k rows. ``q=None`` says that the draft is one-hot: each token a function of those before it, as a
look-up or an argmax gives; never hand over the softmax behind an argmax.

Laws are those after all processors (temperature, top-k ...: see `probabilities`); rows are normalised. Each verifier
takes one draft, or a batch: lists of arrays, or arrays with one axis more and -1 behind the tokens of shorter drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..sampling import SamplingParams, integer, number

if TYPE_CHECKING:
    from .check import Coin

__all__ = [
    "Intersection",
    "Verified",
    "draw_gumbel",
    "probabilities",
    "verify_block",
    "verify_ensemble",
    "verify_greedy",
    "verify_gumbel",
    "verify_relaxed",
    "verify_threshold",
    "verify_tokens",
    "verify_traversal",
    "verify_tree",
    "verify_typical",
]

_SEEDS = 2**64 - 1


@dataclass(frozen=True)
class Verified:
    """What a pass has brought: accepted drafted tokens, and one more.

    Attributes:
        tokens: (n,) int64, n = accepted + 1; of a batch (B, m) with -1 behind shorter ones.
        accepted: number of drafted tokens that stay; of a batch (B,).
        parent: the drafted token that the last one stands behind, -1 without any; of a batch (B,).
        logprobs: (n,) float32 of the tokens under p; of a batch (B, m) with NaN behind.
    """

    tokens: npt.NDArray[np.int64]
    accepted: Any
    parent: Any
    logprobs: npt.NDArray[np.float32]


def verify_greedy(logits: Any, tokens: Any, parents: Any = None) -> Verified:
    """Keeps drafted tokens as long as they are the likeliest ones: the greedy text, whatever was drafted.

    Args:
        logits: (k + 1, V) logits; ties go to the lower id.
        tokens: (k,) drafted ids.
        parents: (k,) the token that each stands behind, an earlier one, -1 for the last committed; None is a chain.

    Returns:
        The tokens, their log-probabilities under the softmax of the logits.

    Raises:
        TypeError: an array of another type.
        ValueError: shapes or ids that do not fit.

    Example:
        >>> import numpy as np
        >>> logits = np.log([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]])
        >>> verify_greedy(logits, [1, 1]).tokens.tolist()
        [1, 0]
    """

    def one(logits: Any, _q: Any, tokens: Any, parents: Any, _index: int) -> tuple[Any, Any, Any]:
        emitted, rows = _core.verify_greedy(logits, tokens, parents)
        seen = logits[rows].astype(np.float64)
        greatest = seen.max(-1, keepdims=True)
        total = greatest[:, 0] + np.log(np.exp(seen - greatest).sum(-1))
        return emitted, rows, (seen[np.arange(len(rows)), emitted] - total).astype(np.float32)

    return _each(one, "logits", logits, None, tokens, parents)


def verify_tokens(
    p: Any, q: Any, tokens: Any, *, seed: Any = 0, position: Any = 0, coin: Coin | None = None
) -> Verified:
    """Token-wise rejection sampling of a chain (Leviathan et al., arXiv 2211.17192; Chen et al., 2302.01318).

    Lossless. Each token stays with probability min(1, p/q); the first that does not is drawn from what p has above q. A
    one-hot draft is verified by drawing from p and going on where the drawn token was drafted.

    Args:
        p: (k + 1, V) laws of the target.
        q: (k, V) laws that the tokens were drawn from, None for a one-hot draft.
        tokens: (k,) drafted ids.
        seed: 0 to 2**64 - 1; of a batch one for each, or the same for all.
        position: absolute position of the first token to come, so that no two passes share their chance; likewise.
        coin: decides instead of the seed; see `Coin`.

    Raises:
        TypeError: an array of another type.
        ValueError: shapes, ids or numbers that do not fit.

    Example:
        >>> import numpy as np
        >>> p = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], np.float32)
        >>> q = np.array([[0.2, 0.8, 0.0]], np.float32)
        >>> verified = verify_tokens(p, q, [0], seed=7)
        >>> verified.tokens.tolist(), verified.accepted, verified.parent
        ([0, 2], 1, 0)
    """
    return _rule("tokens", p, q, tokens, None, seed, position, coin)


def verify_block(
    p: Any, q: Any, tokens: Any, *, seed: Any = 0, position: Any = 0, coin: Coin | None = None
) -> Verified:
    """Block verification of a chain (Sun et al., arXiv 2403.10444): never fewer tokens on average than token by token.

    Lossless. For one-hot drafts there is nothing to be gained, and they are verified as by `verify_tokens`.

    Args:
        p: (k + 1, V) laws of the target.
        q: (k, V) laws that the tokens were drawn from, None for a one-hot draft.
        tokens: (k,) drafted ids.
        seed: as for `verify_tokens`, like the others.
        position: likewise.
        coin: likewise.

    Raises:
        TypeError: an array of another type.
        ValueError: shapes, ids or numbers that do not fit.

    Example:
        >>> import numpy as np
        >>> p = np.array([[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]])
        >>> verify_block(p, p[:2], [1, 0], seed=3).accepted
        2
    """
    return _rule("block", p, q, tokens, None, seed, position, coin)


def verify_tree(
    p: Any,
    q: Any,
    tokens: Any,
    parents: Any,
    *,
    replacement: bool = True,
    seed: Any = 0,
    position: Any = 0,
    coin: Coin | None = None,
) -> Verified:
    """Multi-round verification of a tree (SpecInfer, arXiv 2305.09781). Lossless.

    Children of a token are tried in the order in which they were drawn. Top-k children are not drawn: pass them with
    ``q=None``, which draws from p and goes on where the drawn token is a child.

    Args:
        p: (k + 1, V) laws of the target.
        q: (r, V) laws, row r that of the children of p's row r, up to the last with children; None for one-hot trees.
        tokens: (k,) drafted ids, siblings in the order in which they were drawn.
        parents: (k,) the token that each stands behind, an earlier one; -1 for the last committed.
        replacement: whether siblings were drawn with replacement.
        seed: as for `verify_tokens`, like the others.
        position: likewise.
        coin: likewise.

    Raises:
        TypeError: an array of another type.
        ValueError: shapes, ids or numbers that do not fit.

    Example:
        >>> import numpy as np
        >>> p = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
        >>> verified = verify_tree(p, None, [0, 1], [-1, -1])
        >>> verified.tokens.tolist(), verified.parent
        ([1, 0], 1)
    """
    return _rule("tree", p, q, tokens, parents, seed, position, coin, distinct=not replacement)


def verify_traversal(
    p: Any,
    q: Any,
    tokens: Any,
    parents: Any = None,
    *,
    replacement: bool = True,
    seed: Any = 0,
    position: Any = 0,
    coin: Coin | None = None,
) -> Verified:
    """Traversal verification of a tree (Weng et al., arXiv 2505.12398): from the leaves to the root.

    Lossless, and never fewer tokens on average than `verify_tree`; on a chain the same as `verify_block`.

    Args:
        p: (k + 1, V) laws of the target.
        q: as for `verify_tree`.
        tokens: (k,) drafted ids, siblings in the order in which they were drawn.
        parents: as for `verify_tree`; None is a chain.
        replacement: whether siblings were drawn with replacement.
        seed: as for `verify_tokens`, like the others.
        position: likewise.
        coin: likewise.

    Raises:
        TypeError: an array of another type.
        ValueError: shapes, ids or numbers that do not fit.

    Example:
        >>> import numpy as np
        >>> p = np.array([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]])
        >>> verify_traversal(p, p[:1], [1, 1], [-1, -1]).tokens.tolist()
        [1, 0]
    """
    return _rule("traversal", p, q, tokens, parents, seed, position, coin, distinct=not replacement)


def verify_gumbel(p: Any, tokens: Any, parents: Any = None, *, seed: Any = 0, position: Any = 0) -> Verified:
    """Verification by the noise of each position (Daliri, Musco and Suresh, arXiv 2408.07978): the rule of the engine.

    Lossless, and for a seed the text is the same whatever is drafted, and without any draft. Tokens are
    ``argmax(log p + noise)``, noise a function of (seed, position, token) alone; one-hot drafts lose nothing by it, and
    a drafter that draws by `draw_gumbel` at the same positions is right with probability (1 - TV)/(1 + TV) or more.

    Args:
        p: (k + 1, V) laws of the target.
        tokens: (k,) drafted ids, drawn in whatever way.
        parents: as for `verify_greedy`.
        seed: 0 to 2**64 - 1; of a batch one for each, or the same for all.
        position: absolute position of the first token to come; likewise.

    Raises:
        TypeError: an array of another type.
        ValueError: shapes, ids or numbers that do not fit.

    Example:
        >>> import numpy as np
        >>> p = np.full((3, 4), 0.25, np.float32)
        >>> text = draw_gumbel(p, seed=1, position=[10, 11, 12])
        >>> verify_gumbel(p, text[:2], seed=1, position=10).tokens.tolist() == text.tolist()
        True
    """
    return _rule("gumbel", p, None, tokens, parents, seed, position, None)


def draw_gumbel(p: Any, *, seed: Any = 0, position: Any = 0) -> Any:
    """Draws tokens by the noise of a seed and a position: the drafter's side of `verify_gumbel`.

    Args:
        p: (V,) a law, or (n, V) laws.
        seed: 0 to 2**64 - 1, one for each row or the same for all.
        position: absolute position of the token; likewise.

    Returns:
        The token, an int; of n laws (n,) int64.

    Raises:
        TypeError: an array of another type.
        ValueError: numbers that do not fit.

    Example:
        >>> import numpy as np
        >>> draw_gumbel(np.array([0.0, 1.0]), seed=3, position=17)
        1
    """
    law = _floats("p", p).astype(np.float32, copy=False)
    rows = np.ascontiguousarray(np.atleast_2d(law))
    if rows.ndim != 2:
        raise ValueError(f"p: got shape {law.shape}, expected (V,) or (n, V)")
    seeds = [_each_of("seed", seed, row, len(rows)) for row in range(len(rows))]
    positions = [_each_of("position", position, row, len(rows)) for row in range(len(rows))]
    tokens = _core.draw_gumbel(rows, seeds, positions)
    return int(tokens[0]) if law.ndim == 1 else tokens


def verify_typical(p: Any, tokens: Any, parents: Any = None, *, epsilon: float = 0.09, delta: float = 0.3) -> Verified:
    """Medusa's typical acceptance (arXiv 2401.10774). Lossy: the text has another law than the target's.

    A token stays where ``p > min(epsilon, delta · exp(-entropy))``; the longest path of such, of several the likeliest,
    then the likeliest token.

    Args:
        p: (k + 1, V) laws of the target.
        tokens: (k,) drafted ids.
        parents: as for `verify_greedy`.
        epsilon: above it every token stays.
        delta: share of the law's typical probability.

    Raises:
        TypeError: an array of another type.
        ValueError: shapes, ids or numbers that do not fit.

    Example:
        >>> import numpy as np
        >>> verify_typical(np.array([[0.7, 0.3], [0.5, 0.5]]), [1]).tokens.tolist()
        [1, 0]
    """
    options = (number("epsilon", epsilon), number("delta", delta))
    return _rule("typical", p, None, tokens, parents, 0, 0, None, options=options)


def verify_threshold(
    p: Any,
    tokens: Any,
    parents: Any = None,
    *,
    single: float = 1.0,
    accumulated: float = 1.0,
    seed: Any = 0,
    position: Any = 0,
    coin: Coin | None = None,
) -> Verified:
    """SGLang's thresholds (``speculative_accept_threshold_single`` and ``_acc``). Lossy below 1, exact with both 1.

    Args:
        p: (k + 1, V) laws of the target.
        tokens: (k,) drafted ids.
        parents: as for `verify_greedy`.
        single: a token this likely stays.
        accumulated: the first sibling stays at which the sum of theirs so far, divided by it, exceeds a drawn number.
        seed: as for `verify_tokens`, like the others.
        position: likewise.
        coin: likewise.

    Raises:
        TypeError: an array of another type.
        ValueError: shapes, ids or numbers that do not fit.

    Example:
        >>> import numpy as np
        >>> p = np.array([[0.7, 0.3], [1.0, 0.0]])
        >>> verify_threshold(p, [1], single=0.3).tokens.tolist()
        [1, 0]
    """
    options = (number("single", single), number("accumulated", accumulated))
    return _rule("threshold", p, None, tokens, parents, seed, position, coin, options=options)


def verify_relaxed(p: Any, tokens: Any, parents: Any = None, *, top: int = 10, delta: float = 0.01) -> Verified:
    """TensorRT-LLM's relaxed acceptance (``relaxed_topk`` and ``relaxed_delta``). Lossy.

    A token stays where it is among the ``top`` likeliest and at most ``delta`` below the likeliest; then the likeliest.

    Args:
        p: (k + 1, V) laws of the target.
        tokens: (k,) drafted ids.
        parents: as for `verify_greedy`.
        top: 1 or more.
        delta: 0 to 1.

    Raises:
        TypeError: an array of another type.
        ValueError: shapes, ids or numbers that do not fit.

    Example:
        >>> import numpy as np
        >>> verify_relaxed(np.array([[0.4, 0.35, 0.25], [0.0, 0.0, 1.0]]), [1], delta=0.1).tokens.tolist()
        [1, 2]
    """
    options = (float(integer("top", top, 1)), number("delta", delta))
    return _rule("relaxed", p, None, tokens, parents, 0, 0, None, options=options)


def verify_ensemble(
    p: Any, q: Any, tokens: Any, *, weight: float, seed: Any = 0, position: Any = 0, coin: Coin | None = None
) -> Verified:
    """Token-wise verification against ``weight · p + (1 - weight) · q`` (arXiv 2604.07622). Lossy below weight 1.

    As transformers' ``assistant_ensemble_weight``.

    Args:
        p: (k + 1, V) laws of the target.
        q: (k, V) laws that the tokens were drawn from.
        tokens: (k,) drafted ids.
        weight: 0 to 1.
        seed: as for `verify_tokens`, like the others.
        position: likewise.
        coin: likewise.

    Raises:
        TypeError: an array of another type.
        UnsupportedError: without q.
        ValueError: shapes, ids or numbers that do not fit.

    Example:
        >>> import numpy as np
        >>> p, q = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.0]])
        >>> verify_ensemble(p, q, [0], weight=0.0).tokens.tolist()
        [0, 0]
    """
    return _rule("ensemble", p, q, tokens, None, seed, position, coin, options=(number("weight", weight), 0.0))


def probabilities(
    logits: Any,
    params: SamplingParams,
    tokens: Any = (),
    parents: Any = None,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    allowed: Any = None,
) -> npt.NDArray[np.float32]:
    """The laws that plain sampling would have at each row of a pass over a draft.

    Penalties, allowed tokens, temperature, min-p, top-k and top-p in this order, as the engine's own sampler has them;
    each row with its own history: prompt, output and the drafted tokens before it.

    Args:
        logits: (k + 1, V) of the target; not changed.
        params: temperature, top_k, top_p, min_p and penalties are read; at temperature 0 laws are one-hot.
        tokens: (k,) drafted ids.
        parents: as for `verify_greedy`.
        prompt: ids that the repetition penalty counts.
        output: ids that all penalties count.
        allowed: (k + 1, V) or (V,) bool, the tokens that each row may take; None allows all.

    Returns:
        (k + 1, V) float32.

    Raises:
        FarthingError: a row has nothing left to draw, or a logit is not finite.
        TypeError: an array of another type.
        ValueError: shapes or ids that do not fit.

    Example:
        >>> import numpy as np
        >>> import farthing as ft
        >>> params = ft.SamplingParams(temperature=1.0, top_k=1, presence_penalty=3.0)
        >>> probabilities(np.array([[2.0, 1.0], [2.0, 1.0]]), params, [0]).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    rows = np.array(_floats("logits", logits), np.float32, order="C")
    if rows.ndim != 2:
        raise ValueError(f"logits: got shape {rows.shape}, expected (k + 1, V)")
    if allowed is not None:
        allowed = np.asarray(allowed)
        if allowed.dtype != np.bool_:
            raise TypeError(f"allowed: got {allowed.dtype}, expected bool")
        if allowed.ndim == 1:
            allowed = np.broadcast_to(allowed, (len(rows), len(allowed)))
    _core.draft_probabilities(
        rows,
        params._core,
        _ids("tokens", tokens),
        None if parents is None else _ids("parents", parents),
        prompt=[integer("prompt", token, 0, 2**32 - 1) for token in prompt],
        output=[integer("output", token, 0, 2**32 - 1) for token in output],
        allowed=allowed,
    )
    return rows


class Intersection:
    """The tokens that a drafter's vocabulary shares with the target's (token-level intersection, arXiv 2502.05202).

    The drafter draws from its law restricted to these; a verifier then gets that law and the tokens in the target's
    ids. Texts are compared after the marks for a space, ``Ġ`` and ``▁``, have become spaces. Two tokens of the drafter
    that are one of the target's add up in its law.

    Args:
        drafter: texts by id, or a tokenizer's ``get_vocab()``.
        target: likewise.

    Raises:
        TypeError: something that is no text.

    Example:
        >>> import numpy as np
        >>> common = Intersection({"▁a": 1, "b": 0, "x": 2}, ["Ġa", "b", "c"])
        >>> common.tokens.tolist()
        [1, 0, -1]
        >>> q = common.restrict([0.25, 0.25, 0.5])
        >>> q.tolist(), common.scatter(q).tolist()
        ([0.5, 0.5, 0.0], [0.5, 0.5, 0.0])
    """

    def __init__(self, drafter: Any, target: Any) -> None:
        texts = _texts("target", target)
        self._target = len(texts)
        self._core = _core.Intersection(_texts("drafter", drafter), texts)
        #: (drafter's vocabulary,) int64, the target's id of each token, -1 for none.
        self.tokens = self._core.tokens

    def __len__(self) -> int:
        return int((self.tokens >= 0).sum())

    def __repr__(self) -> str:
        return f"Intersection({len(self)} of {len(self.tokens)} in {self._target} tokens)"

    def restrict(self, q: Any) -> npt.NDArray[np.float32]:
        """The laws to draw from: those of the drafter, ``(V,)`` or ``(n, V)``, without the other tokens, normalised."""
        rows = np.array(_floats("q", q), np.float32, order="C")
        self._core.restrict(np.atleast_2d(rows))
        return rows

    def scatter(self, q: Any) -> npt.NDArray[np.float32]:
        """Restricted laws, ``(V,)`` or ``(n, V)``, in the target's ids."""
        rows = np.array(_floats("q", q), np.float32, order="C")
        scattered = self._core.scatter(np.atleast_2d(rows), self._target)
        return scattered[0] if rows.ndim == 1 else scattered


def _texts(name: str, vocabulary: Any) -> list[bytes]:
    if hasattr(vocabulary, "items"):
        by_id = {integer(name, token, 0, 2**31): text for text, token in vocabulary.items()}
        vocabulary = [by_id.get(token, "") for token in range(max(by_id, default=-1) + 1)]
    texts = []
    for text in vocabulary:
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"{name}: got {type(text).__name__}, expected texts")
        texts.append(text if isinstance(text, bytes) else text.replace("Ġ", " ").replace("▁", " ").encode())
    return texts


def _floats(name: str, x: Any) -> npt.NDArray[np.floating[Any]]:
    """As a C-contiguous float32 or float64 array; narrower floats become float32."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.numpy() if str(x.dtype) in ("torch.float32", "torch.float64") else x.float().numpy()
    x = np.asarray(x)
    if x.dtype.kind != "f":
        raise TypeError(f"{name}: got {x.dtype}, expected floats")
    return np.ascontiguousarray(x, np.float64 if x.dtype.itemsize >= 8 else np.float32)


def _ids(name: str, x: Any) -> npt.NDArray[np.int64]:
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    ids = np.asarray(x)
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"{name}: got {ids.dtype}, expected integers")
    if ids.ndim != 1:
        raise ValueError(f"{name}: got shape {ids.shape}, expected (k,)")
    return np.ascontiguousarray(ids, np.int64)


def _each_of(name: str, value: Any, index: int, count: int) -> int:
    """The value of one request: the same for all, or one for each."""
    if isinstance(value, (Sequence, np.ndarray)):
        if len(value) != count:
            raise ValueError(f"{name}: got {len(value)}, expected one or {count}")
        value = value[index]
    return integer(name, value, 0, _SEEDS)


def _rule(
    rule: str,
    p: Any,
    q: Any,
    tokens: Any,
    parents: Any,
    seed: Any,
    position: Any,
    coin: Any,
    *,
    distinct: bool = False,
    options: tuple[float, float] = (0.0, 0.0),
) -> Verified:
    def one(p: Any, q: Any, tokens: Any, parents: Any, index: int) -> tuple[Any, Any, Any]:
        if q is not None and q.dtype != p.dtype:
            p, q = p.astype(np.float64, copy=False), q.astype(np.float64, copy=False)
        return _core.verify_draft(
            rule,
            p,
            q,
            tokens,
            parents,
            distinct=distinct,
            seed=_each_of("seed", seed, index, count),
            position=_each_of("position", position, index, count),
            coin=coin,
            options=options,
        )

    count = len(p) if _is_batch(p) else 1
    return _each(one, "p", p, q, tokens, parents)


def _is_batch(p: Any) -> bool:
    return isinstance(p, (list, tuple)) or np.ndim(p) == 3


def _each(one: Any, name: str, p: Any, q: Any, tokens: Any, parents: Any) -> Verified:
    """One draft, or each of a batch."""
    if not _is_batch(p):
        emitted, rows, logprobs = _single(one, name, p, q, tokens, parents, 0)
        return Verified(emitted, len(emitted) - 1, int(rows[-1]) - 1, logprobs)
    for other, value in [("tokens", tokens), ("q", q), ("parents", parents)]:
        if value is not None and len(value) != len(p):
            raise ValueError(f"{other}: got {len(value)}, expected {len(p)}, one for each of {name}")
    nothing = [None] * len(p)
    parts = zip(p, nothing if q is None else q, tokens, nothing if parents is None else parents, strict=True)
    results = [_single(one, name, *part, index) for index, part in enumerate(parts)]
    longest = max((len(emitted) for emitted, _, _ in results), default=0)
    padded = np.full((len(results), longest), -1, np.int64)
    logprobs = np.full((len(results), longest), np.nan, np.float32)
    for index, (emitted, _, logprob) in enumerate(results):
        padded[index, : len(emitted)] = emitted
        logprobs[index, : len(emitted)] = logprob
    accepted = np.array([len(emitted) - 1 for emitted, _, _ in results], np.int64)
    return Verified(padded, accepted, np.array([rows[-1] - 1 for _, rows, _ in results], np.int64), logprobs)


def _single(one: Any, name: str, p: Any, q: Any, tokens: Any, parents: Any, index: int) -> tuple[Any, Any, Any]:
    p = _floats(name, p)
    if p.ndim != 2:
        raise ValueError(f"{name}: got shape {p.shape}, expected (k + 1, V), of a batch (B, k + 1, V) or a list")
    tokens = _ids("tokens", tokens)
    padding = len(tokens)
    while padding and tokens[padding - 1] == -1:
        padding -= 1
    if padding < len(tokens):
        p, tokens = p[: padding + 1], tokens[:padding]
    if parents is not None:
        parents = _ids("parents", parents)[:padding]
    if q is not None:
        q = _floats("q", q)
        if q.ndim != 2:
            raise ValueError(f"q: got shape {q.shape}, expected (r, V)")
        q = q[:padding]
    return one(p, q, tokens, parents, index)  # type: ignore[no-any-return]
