"""Does a verifier give the target's law? Exactly where it decides by a coin, by chi-square where it does not."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..sampling import integer
from ..tables import html_table, text_table

__all__ = ["CaseReport", "CheckReport", "Coin", "check"]

Array = npt.NDArray[Any]
Draft = str | Callable[[Array, np.random.Generator], int]

# A true law is called biased once in a million cases.
_LEVEL = 1e-6
_POOLED = 5.0
_ENUMERATED = ("random", "zeros", "equal", "disjoint", "one-hot q", "one survivor", "mixed")
_DRAWN = ("random", "zeros")
_ARGUMENTS = ("p", "q", "tokens", "parents", "replacement", "seed", "rng", "coin")


class Coin(Protocol):
    """What decides in a verifier that takes a ``coin``: `check` puts one in that takes every side in turn."""

    def flip(self, part: float, whole: float) -> bool:
        """True with probability min(1, part/whole)."""

    def draw(self, weights: npt.NDArray[np.float64]) -> int:
        """An index, each as likely as its weight says."""


@dataclass(frozen=True)
class CaseReport:
    """How a verifier did with one pair of laws.

    Attributes:
        name: what the laws are like.
        total_variation: of the tokens' law from the target's; of draws what was observed, noise included.
        mean_tokens: of a pass, the one behind the accepted ones included.
        worst: the tokens whose probability, or count of draws, is farthest off; the expected one, and what came.
        biased: whether it is not the target's law.
        chi2: of draws; infinite where a token came that the target never gives.
        dof: degrees of freedom of it.
        quantile: the 1 - 10⁻⁶ quantile, above which a verifier is biased.
    """

    name: str
    total_variation: float
    mean_tokens: float
    worst: tuple[tuple[int, ...], float, float]
    biased: bool
    chi2: float | None = None
    dof: int | None = None
    quantile: float | None = None


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    Attributes:
        verifier: its name.
        method: ``enumeration`` (exact) or ``chi-square``.
        draft: how tokens were drafted.
        runs: how often the verifier ran.
        cases: one for each pair of laws.
    """

    verifier: str
    method: str
    draft: str
    runs: int
    cases: tuple[CaseReport, ...]

    @property
    def worst(self) -> CaseReport:
        """The case that is farthest off."""
        return max(self.cases, key=lambda case: (case.biased, case.total_variation))

    @property
    def total_variation(self) -> float:
        """Of the worst case."""
        return self.worst.total_variation

    @property
    def verdict(self) -> str:
        """``lossless``, as far as the cases tell, or ``biased``."""
        return "biased" if any(case.biased for case in self.cases) else "lossless"

    def _rows(self) -> tuple[list[list[str]], list[str]]:
        header = ["laws", "total variation", "tokens per pass", "worst tokens", "expected", "got"]
        if self.method == "chi-square":
            header[2:2] = ["χ²", "dof", "quantile"]
        header.append("verdict")
        rows = []
        for case in self.cases:
            tokens, expected, got = case.worst
            row = [case.name, f"{case.total_variation:.2e}", f"{case.mean_tokens:.3f}"]
            row += [
                " ".join(map(str, tokens)),
                f"{expected:.4g}",
                f"{got:.4g}",
                "biased" if case.biased else "lossless",
            ]
            if self.method == "chi-square":
                row[2:2] = [f"{case.chi2:.1f}", str(case.dof), f"{case.quantile:.1f}"]
            rows.append(row)
        return rows, header

    def _title(self) -> str:
        return f"{self.verifier}, {self.draft} drafts: {self.verdict} ({self.method}, {self.runs} runs)"

    def __repr__(self) -> str:
        return f"{self._title()}\n{text_table(*self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(*self._rows(), caption=self._title())


def check(
    verifier: Callable[..., Any],
    *,
    draft: Draft = "sampled",
    length: int = 3,
    parents: Sequence[int] | None = None,
    replacement: bool = True,
    vocabulary: int | None = None,
    method: str = "auto",
    draws: int = 20_000,
    seed: int = 0,
    tolerance: float = 1e-12,
) -> CheckReport:
    """Tests whether drafting and verifying leaves the target's law of the text, for any verifier.

    Laws of target and drafter are tables that depend on position and last token: random ones, with zeros, equal,
    disjoint, certain. Drafts are made, the verifier runs, the target goes on behind what it gave, and the law of the
    text is compared with the target's own. Exactly, if the verifier has an argument ``coin`` (see `Coin`): every draft
    and every outcome is enumerated, of the code itself. Else ``draws`` seeded runs for each case give a chi-square of
    the first two tokens; cells with fewer than 5 expected are pooled.

    Args:
        verifier: called with those of these arguments that it names: p (k + 1, V), q (k, V) or None, tokens (k,),
            parents (k,), replacement, seed, rng (a numpy generator), coin; if it needs others, with p, q, tokens,
            parents of a tree, and seed in this order. Arrays are numpy's, float64 under enumeration, else float32. It
            returns the tokens of the pass: an array, a list, or something that has ``tokens``; -1 ends them.
        draft: ``sampled`` from q; ``one-hot``, the drafter's likeliest tokens with ``q=None``; ``argmax``, these with
            q handed over as if they had been drawn, as some pipelines do; or a function of a row of q and a generator
            that returns the token.
        length: tokens of a drafted chain, 1 to 6.
        parents: tokens of a drafted tree instead: what each stands behind, an earlier one or -1.
        replacement: whether siblings are drawn with replacement.
        vocabulary: V, 2 to 64; 3 under enumeration by default, else 16.
        method: ``enumeration``, ``chi-square`` or ``auto``.
        draws: for each case.
        seed: of laws, drafts and runs.
        tolerance: total variation that enumeration forgives.

    Returns:
        A report that prints as a table; its ``verdict`` is ``lossless`` or ``biased``.

    Raises:
        ValueError: arguments that do not fit, or a verifier that returns something else than a pass's tokens.

    Example:
        >>> from farthing import speculative
        >>> print(check(speculative.verify_tokens, length=2).verdict)
        lossless
        >>> def careless(p, q, tokens, rng):  # draws from p where it should from what p has above q
        ...     for row, token in enumerate(tokens):
        ...         if rng.random() * q[row, token] >= p[row, token]:
        ...             return [*tokens[:row], rng.choice(len(p[row]), p=p[row] / p[row].sum())]
        ...     return [*tokens, rng.choice(len(p[-1]), p=p[-1] / p[-1].sum())]
        >>> print(check(careless, length=1, vocabulary=3, draws=4000).verdict)
        biased
    """
    tree = list(range(-1, integer("length", length, 1, 6) - 1)) if parents is None else [int(p) for p in parents]
    if not tree or any(not -1 <= parent < node for node, parent in enumerate(tree)):
        raise ValueError(f"parents: got {parents!r}, expected an earlier token, or -1, for each")
    if isinstance(draft, str) and draft not in ("sampled", "one-hot", "argmax"):
        raise ValueError(f"draft: got {draft!r}, expected sampled, one-hot, argmax or a function")
    run = _Runner(verifier, tree if parents is not None else None, replacement)
    if method == "auto":
        method = "enumeration" if run.takes_coin and isinstance(draft, str) else "chi-square"
    if method not in ("enumeration", "chi-square"):
        raise ValueError(f"method: got {method!r}, expected auto, enumeration or chi-square")
    exact = method == "enumeration"
    if exact and not (run.takes_coin and isinstance(draft, str)):
        raise ValueError("method: got enumeration, expected chi-square for a verifier or a draft that takes no coin")
    size = (3 if exact else 16) if vocabulary is None else integer("vocabulary", vocabulary, 2, 64)
    if size < max(tree.count(parent) for parent in tree):
        raise ValueError(f"vocabulary: got {size}, expected one for each sibling at least")
    shape = _Shape(tree, replacement, draft)
    cases = []
    for index, name in enumerate(_ENUMERATED if exact else _DRAWN):
        rng = np.random.default_rng([integer("seed", seed, 0), index])
        world = _World(name, size, shape.depth + 1, rng)
        if exact:
            cases.append(_enumerate(run, world, shape, tolerance))
        else:
            cases.append(_draw(run, world, shape, integer("draws", draws, 100), rng))
    title = draft if isinstance(draft, str) else getattr(draft, "__name__", "custom")
    return CheckReport(getattr(verifier, "__name__", repr(verifier)), method, title, run.runs, tuple(cases))


class _World:
    """Laws (depth, V, V) of the next token by position and last token; at position 0 the last token is 0."""

    def __init__(self, name: str, size: int, depth: int, rng: np.random.Generator) -> None:
        self.name, self.size = name, size
        kinds = _ENUMERATED[:-1]
        self.p = np.zeros((depth, size, size))
        self.q = np.zeros((depth, size, size))
        for at in np.ndindex(depth, size):
            kind = kinds[rng.integers(len(kinds))] if name == "mixed" else name
            p, q = rng.exponential(size=(2, size)) ** 2 + 1e-3
            if kind == "zeros":
                p *= (rng.random(size) < 0.5) | (np.arange(size) == rng.integers(size))
            elif kind == "equal":
                q = p
            elif kind == "disjoint":
                p, q = p * (np.arange(size) % 2 == 0), q * (np.arange(size) % 2 == 1)
            elif kind == "one-hot q":
                q = np.eye(size)[rng.integers(size)]
            elif kind == "one survivor":
                p = np.eye(size)[rng.integers(size)]
            self.p[at], self.q[at] = p / p.sum(), q / q.sum()


class _Shape:
    """Where drafted tokens hang, and how they are drafted."""

    def __init__(self, parents: list[int], replacement: bool, draft: Draft) -> None:
        self.parents, self.draft = parents, draft
        self.depths: list[int] = []
        for parent in parents:
            self.depths.append(1 if parent < 0 else self.depths[parent] + 1)
        self.depth = max(self.depths)
        #: For each node its elder siblings, if they are out of the law that it is drawn from.
        likeliest = draft in ("one-hot", "argmax")
        self.elders = [
            [other for other in range(node) if parents[other] == parent] if likeliest or not replacement else []
            for node, parent in enumerate(parents)
        ]
        self.with_q = draft != "one-hot"

    def laws(self, world: _World, tokens: Sequence[int], nodes: Sequence[int]) -> tuple[Array, Array]:
        """Laws (k + 1, V) at all rows of a draft of some of the nodes, p and q."""
        at = [(0, 0), *((self.depths[node], token) for node, token in zip(nodes, tokens, strict=True))]
        places = tuple(np.array(at).T)
        return world.p[places], world.q[places]


class _Runner:
    """Calls a verifier with what it asks for."""

    def __init__(self, verifier: Callable[..., Any], tree: list[int] | None, replacement: bool) -> None:
        self.verifier, self.runs = verifier, 0
        self.with_parents = tree is not None
        try:
            parameters = inspect.signature(verifier).parameters
        except (TypeError, ValueError):
            parameters = {}  # type: ignore[assignment]
        required = [name for name, value in parameters.items() if value.default is value.empty]
        self.names = [name for name in parameters if name in _ARGUMENTS] if set(required) <= set(_ARGUMENTS) else []
        self.takes_coin = "coin" in self.names
        self.replacement = replacement

    def __call__(
        self, p: Array, q: Array | None, tokens: Array, parents: Array, seed: int, rng: Any, coin: Any
    ) -> list[int]:
        self.runs += 1
        if self.names:
            known = {"p": p, "q": q, "tokens": tokens, "parents": parents, "seed": seed, "rng": rng, "coin": coin}
            known["replacement"] = self.replacement
            left_out = "seed" if coin is not None else "coin"
            result = self.verifier(**{name: known[name] for name in self.names if name != left_out})
        elif self.with_parents:
            result = self.verifier(p, q, tokens, parents, seed)
        else:
            result = self.verifier(p, q, tokens, seed)
        emitted: list[int] = np.asarray(getattr(result, "tokens", result)).reshape(-1).tolist()
        if -1 in emitted:
            emitted = emitted[: emitted.index(-1)]
        if not 1 <= len(emitted) <= len(tokens) + 1 or not all(0 <= token < p.shape[1] for token in emitted):
            expected = f"1 to {len(tokens) + 1} ids below {p.shape[1]}"
            raise ValueError(f"verifier: got the tokens {emitted!r}, expected {expected}")
        return emitted


class _Branching:
    """Replays the decisions made so far, then takes the first side of each new one."""

    def __init__(self) -> None:
        self._decisions: list[tuple[int, list[tuple[int, float]]]] = []
        self._at = 0
        self.probability = 1.0

    def flip(self, part: float, whole: float) -> bool:
        if part <= 0 or part >= whole:
            return part > 0
        return self._decide([(1, part / whole), (0, 1 - part / whole)]) == 1

    def draw(self, weights: Array) -> int:
        weights = np.asarray(weights, np.float64)
        total = weights.sum()
        return self._decide([(int(index), float(weights[index] / total)) for index in np.flatnonzero(weights > 0)])

    def _decide(self, sides: list[tuple[int, float]]) -> int:
        if self._at == len(self._decisions):
            self._decisions.append((0, sides))
        side, known = self._decisions[self._at]
        if known != sides:
            raise ValueError("verifier: got other decisions on the same coin, expected none but the coin's chance")
        self._at += 1
        self.probability *= sides[side][1]
        return sides[side][0]

    def runs(self) -> Iterator[None]:
        """Once for every way in which chance can decide."""
        while True:
            self._at, self.probability = 0, 1.0
            yield
            while self._decisions:
                side, sides = self._decisions.pop()
                if side + 1 < len(sides):
                    self._decisions.append((side + 1, sides))
                    break
            else:
                return


def _enumerate(run: _Runner, world: _World, shape: _Shape, tolerance: float) -> CaseReport:
    coin = _Branching()
    longest = shape.depth + 1
    # By length: the probability that a pass gives just these tokens.
    ended = [np.zeros((world.size,) * length) for length in range(1, longest + 1)]
    mean = 0.0
    for _ in coin.runs():
        tokens: list[int] = []
        nodes: list[int] = []
        places = {-1: -1}
        for node, parent in enumerate(shape.parents):
            if parent not in places:
                continue
            last = tokens[places[parent]] if parent >= 0 else 0
            law = world.q[shape.depths[node] - 1, last].copy()
            law[[tokens[places[other]] for other in shape.elders[node] if other in places]] = 0
            if not law.any():
                continue
            token = coin.draw(law) if shape.draft == "sampled" else int(law.argmax())
            places[node] = len(tokens)
            tokens.append(token)
            nodes.append(node)
        p, q = shape.laws(world, tokens, nodes)
        hang = np.array([places[shape.parents[node]] for node in nodes], np.int64)
        q_or_none = q[: len(tokens)] if shape.with_q else None
        emitted = run(p, q_or_none, np.array(tokens, np.int64), hang, 0, None, coin)
        ended[len(emitted) - 1][tuple(emitted)] += coin.probability
        mean += coin.probability * len(emitted)
    given, exact = ended[0], world.p[0, 0]
    for position in range(1, longest):
        given = given[..., None] * world.p[position] + ended[position]
        exact = exact[..., None] * world.p[position]
    off = np.abs(given - exact)
    worst = np.unravel_index(int(off.argmax()), off.shape)
    variation = float(off.sum()) / 2
    cell = (tuple(int(token) for token in worst), float(exact[worst]), float(given[worst]))
    return CaseReport(world.name, variation, mean, cell, not variation <= tolerance)


def _draw(run: _Runner, world: _World, shape: _Shape, draws: int, rng: np.random.Generator) -> CaseReport:
    # float32 is what verifiers get; the law that they are held to is just that, normalised.
    p = world.p.astype(np.float32)
    world.p = p / p.sum(-1, keepdims=True, dtype=np.float64)
    q = world.q.astype(np.float32)
    drafts = _drafts(q.astype(np.float64), shape, draws, rng)
    parents = np.array(shape.parents, np.int64)
    places = np.array([0, *shape.depths])
    seeds = rng.integers(2**62, size=draws).tolist()
    pairs = np.zeros((world.size, world.size))
    lengths = 0
    continued = np.cumsum(world.p[1], -1)
    for tokens, seed in zip(drafts, seeds, strict=True):
        last = np.concatenate([[0], tokens])
        rows = p[places, last]
        emitted = run(rows, q[places[:-1], last[:-1]] if shape.with_q else None, tokens, parents, seed, rng, None)
        lengths += len(emitted)
        if len(emitted) == 1:
            law = continued[emitted[0]]
            emitted.append(int(np.searchsorted(law, rng.random() * law[-1], side="right")))
        pairs[emitted[0], emitted[1]] += 1
    expected = world.p[0, 0][:, None] * world.p[1] * draws
    return _chi_square(world.name, expected, pairs, lengths / draws)


def _drafts(q: Array, shape: _Shape, draws: int, rng: np.random.Generator) -> Array:
    """(draws, k) tokens."""
    tokens = np.zeros((draws, len(shape.parents)), np.int64)
    everyone = np.arange(draws)
    for node, parent in enumerate(shape.parents):
        last = tokens[:, parent] if parent >= 0 else np.zeros(draws, np.int64)
        laws = q[shape.depths[node] - 1, last]
        for elder in shape.elders[node]:
            laws[everyone, tokens[:, elder]] = 0
        if shape.draft == "sampled":
            reached = np.cumsum(laws, -1)
            tokens[:, node] = (reached <= rng.random((draws, 1)) * reached[:, -1:]).sum(-1)
        elif isinstance(shape.draft, str):
            tokens[:, node] = laws.argmax(-1)
        else:
            laws /= laws.sum(-1, keepdims=True)
            tokens[:, node] = [shape.draft(law, rng) for law in laws.astype(np.float32)]
    return tokens


def _chi_square(name: str, expected: Array, observed: Array, mean: float) -> CaseReport:
    draws = observed.sum()
    variation = float(np.abs(observed - expected).sum() / 2 / draws)
    impossible = (expected == 0) & (observed > 0)
    pooled = (expected < _POOLED) & ~impossible
    cells = [*zip(expected[~pooled & (expected > 0)], observed[~pooled & (expected > 0)], strict=True)]
    if expected[pooled].sum() > 0:
        cells.append((expected[pooled].sum(), observed[pooled].sum()))
    chi2 = math.inf if impossible.any() else float(sum((got - wanted) ** 2 / wanted for wanted, got in cells))
    dof = max(len(cells) - 1, 1)
    quantile = _quantile(dof)
    off = np.where(impossible, np.inf, (observed - expected) ** 2 / np.maximum(expected, _POOLED))
    worst = np.unravel_index(int(off.argmax()), off.shape)
    cell = (tuple(int(token) for token in worst), float(expected[worst]), float(observed[worst]))
    return CaseReport(name, variation, mean, cell, chi2 > quantile, chi2, dof, quantile)


def _quantile(dof: int) -> float:
    """The 1 - 10⁻⁶ quantile of chi-square."""
    low, high = 0.0, dof + 20 * math.sqrt(2 * dof) + 40
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _upper_gamma(dof / 2, middle / 2) > _LEVEL else (low, middle)
    return high


def _upper_gamma(a: float, x: float) -> float:
    """The regularised upper incomplete gamma function: by its series below a + 1, by its continued fraction above."""
    if x <= 0:
        return 1.0
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        n = a
        while term > total * 1e-16:
            n += 1
            term *= x / n
            total += term
        return 1 - front * total
    b = x + 1 - a
    c, d = 1e300, 1 / b
    value = d
    for i in range(1, 10_000):
        an = -i * (i - a)
        b += 2
        d = 1 / (an * d + b)
        c = b + an / c
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value
