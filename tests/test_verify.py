"""farthing.speculative: rules of verification, their laws by enumeration, and the tester against planted bugs."""

from __future__ import annotations

import doctest
import math
from importlib import import_module

import farthing as ft
import numpy as np
import pytest
import torch
from farthing.speculative import check, draw_gumbel, verify_block, verify_gumbel, verify_tokens, verify_tree
from farthing.speculative.check import _quantile, _upper_gamma
from scipy import stats
from transformers.generation.utils import _speculative_sampling

speculative = ft.speculative
CHAINS = [verify_tokens, verify_block, speculative.verify_traversal]
TREES = [verify_tree, speculative.verify_traversal]
SHAPES = [[-1, -1, 0, 0, 1, 1], [-1, 0, -1, 2, 2, 4], [-1, -1, -1]]


def laws(rng, *shape):
    weights = rng.exponential(size=shape) ** 2
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("verifier", CHAINS)
@pytest.mark.parametrize("draft", ["sampled", "one-hot"])
def test_chains_have_the_targets_law_exactly(verifier, draft):
    for length, vocabulary in [(1, 4), (3, 3), (6, 2)]:
        report = check(verifier, draft=draft, length=length, vocabulary=vocabulary)
        assert (report.method, report.verdict) == ("enumeration", "lossless"), report
        assert report.total_variation <= 1e-12
        assert {case.name for case in report.cases} >= {"zeros", "equal", "disjoint", "one-hot q", "one survivor"}


@pytest.mark.parametrize("verifier", TREES)
@pytest.mark.parametrize("parents", SHAPES)
@pytest.mark.parametrize("replacement", [True, False])
def test_trees_have_the_targets_law_exactly(verifier, parents, replacement):
    vocabulary = 2 if len(parents) > 3 else 4
    reports = [
        check(verifier, parents=parents, replacement=replacement, draft=draft, vocabulary=max(vocabulary, 3), seed=1)
        if draft == "one-hot"
        else check(verifier, parents=parents, replacement=replacement, draft=draft, vocabulary=vocabulary, seed=1)
        for draft in ("sampled", "one-hot")
    ]
    assert all(report.verdict == "lossless" for report in reports), reports


def test_more_tokens_stay_by_block_and_by_traversal():
    def means(verifier, **options):
        return np.array([case.mean_tokens for case in check(verifier, **options).cases])

    tokens, block = means(verify_tokens, length=4), means(verify_block, length=4)
    assert (block >= tokens - 1e-12).all()
    assert (block - tokens).max() > 0.01
    for replacement in (True, False):
        options = {"parents": SHAPES[0], "replacement": replacement, "vocabulary": 3}
        tree, traversal = means(verify_tree, **options), means(speculative.verify_traversal, **options)
        assert (traversal >= tree - 1e-12).all()
        assert (traversal - tree).max() > 0.001


@pytest.mark.parametrize("verifier", [verify_tokens, verify_block])
def test_seeded_draws_have_the_law(verifier):
    report = check(verifier, method="chi-square", draws=20_000)
    assert report.verdict == "lossless", report
    assert report.runs == 40_000


def test_coupled_draws_have_the_law():
    # Whatever is drafted, by whomever; and both of a tree's branches.
    def by_noise(p, tokens, seed):
        return verify_gumbel(p, tokens, seed=seed)

    for verifier, options in [
        (verify_gumbel, {}),
        (by_noise, {"draft": "argmax"}),
        (verify_gumbel, {"parents": [-1, -1, 0]}),
    ]:
        report = check(verifier, draws=20_000, **options)
        assert (report.method, report.verdict) == ("chi-square", "lossless"), report


def test_coupled_text_is_that_without_drafts():
    rng = np.random.default_rng(0)
    table = laws(rng, 30, 30)
    seed = 2**63 + 5

    def text(drafter, length):
        tokens, passes = [0], 0
        while len(tokens) < 150:
            drafted = [int(token) for token in drafter(tokens, length)]
            p = table[[tokens[-1], *drafted]]
            verified = verify_gumbel(p, drafted, seed=seed, position=len(tokens))
            tokens += verified.tokens.tolist()
            passes += 1
        return tokens[:150], passes

    plain, passes = text(lambda *_: [], 0)
    assert passes == 149
    assert plain[1] == draw_gumbel(table[0], seed=seed, position=1)
    for length in (1, 4, 9):
        assert text(lambda _tokens, length: rng.integers(30, size=length), length)[0] == plain
        oracle, fewer = text(lambda tokens, length: (plain + [0] * 9)[len(tokens) : len(tokens) + length], length)
        assert (oracle, fewer) == (plain, math.ceil(149 / (length + 1)))


# Planted bugs, one of each kind.


def softmax_of_an_argmax(p, q, tokens, coin):
    """Correct for drawn tokens; the bug is who drafts."""
    return verify_tokens(p, q, tokens, coin=coin)


def permuted_q(p, q, tokens, coin):
    return verify_tokens(p, np.roll(q, 1, -1), tokens, coin=coin)


def shortened_by_the_token(p, q, tokens, coin):
    kept = 0
    while kept < len(tokens) and q[kept, tokens[kept]] >= 0.45:
        kept += 1
    return verify_tokens(p[: kept + 1], q[:kept], tokens[:kept], coin=coin)


def shortened_by_the_law(p, q, tokens, coin):
    kept = 0
    while kept < len(tokens) and q[kept].max() >= 0.45:
        kept += 1
    return verify_tokens(p[: kept + 1], q[:kept], tokens[:kept], coin=coin)


def _by_hand(residual):
    def verifier(p, q, tokens, coin):
        for row, token in enumerate(tokens):
            if not coin.flip(p[row, token], q[row, token]):
                weights = residual(p[row], q[row], token)
                return [*tokens[:row], coin.draw(weights if weights.any() else p[row])]
        return [*tokens, coin.draw(p[-1])]

    return verifier


def test_a_planted_bug_is_flagged():
    assert check(softmax_of_an_argmax).verdict == "lossless"
    assert check(softmax_of_an_argmax, draft="argmax").verdict == "biased"
    assert check(shortened_by_the_law).verdict == "lossless"
    for biased in (permuted_q, shortened_by_the_token):
        assert check(biased).verdict == "biased"
    good = _by_hand(lambda p, q, _token: np.maximum(p - q, 0))
    assert check(good).verdict == "lossless"
    for residual in [
        lambda p, _q, _token: p,
        lambda p, q, _token: np.abs(p - q),
        lambda p, _q, token: np.where(np.arange(len(p)) == token, 0, p),
    ]:
        assert check(_by_hand(residual)).verdict == "biased"
    # The order of siblings, and the law of those drawn without replacement.
    turned = check(
        lambda p, q, tokens, parents, coin: verify_tree(p, q, tokens, parents, coin=coin),
        parents=[-1, -1],
        replacement=False,
    )
    assert turned.verdict == "biased"
    for lossy in (speculative.verify_typical, speculative.verify_relaxed):
        assert check(lossy, draws=500).verdict == "biased"
    assert check(speculative.verify_threshold).verdict == "lossless"
    assert (
        check(lambda p, tokens, coin: speculative.verify_threshold(p, tokens, accumulated=0.7, coin=coin)).verdict
        == "biased"
    )
    for weight, verdict in [(1.0, "lossless"), (0.8, "biased")]:
        report = check(
            lambda p, q, tokens, coin, w=weight: speculative.verify_ensemble(p, q, tokens, weight=w, coin=coin)
        )
        assert report.verdict == verdict


def test_a_planted_bug_is_flagged_by_chi_square():
    for biased in (permuted_q, shortened_by_the_token):
        report = check(
            lambda p, q, tokens, rng, biased=biased: biased(p, q, tokens, Chance(rng)), vocabulary=8, draws=4000
        )
        assert (report.method, report.verdict) == ("chi-square", "biased")
    argmax = check(verify_tokens, method="chi-square", draft="argmax", draws=4000)
    function = check(verify_tokens, draft=lambda q, _rng: int(q.argmax()), draws=2000)
    assert argmax.verdict == function.verdict == "biased"
    right = check(verify_tokens, draft=lambda q, rng: rng.choice(len(q), p=q / q.sum(dtype=float)), draws=2000)
    assert right.verdict == "lossless"


class Chance:
    """A coin of numpy's."""

    def __init__(self, rng):
        self.rng = rng

    def flip(self, part, whole):
        return self.rng.random() * whole < part

    def draw(self, weights):
        return self.rng.choice(len(weights), p=weights / weights.sum())


def transformers_rule(p, q, tokens, seed):
    torch.manual_seed(seed)
    p, q, ids = (torch.from_numpy(x)[None] for x in (p, q, tokens))
    emitted, _ = _speculative_sampling(ids, q.log(), len(tokens), p.log())
    return emitted


def test_transformers_is_right_for_drawn_tokens_and_flagged_for_an_argmax():
    drawn = check(transformers_rule, vocabulary=6, length=2, draws=2000)
    assert drawn.verdict == "lossless", drawn
    argmax = check(transformers_rule, vocabulary=6, length=2, draws=800, draft="argmax")
    assert argmax.verdict == "biased"
    assert argmax.total_variation > 0.1


def test_the_report_reads_well():
    report = check(permuted_q, length=2)
    text = repr(report)
    assert text.startswith("permuted_q, sampled drafts: biased (enumeration, ")
    assert len(text.splitlines()) == 3 + 6 + 1
    assert "one-hot q" in report._repr_html_()
    assert report.worst.biased
    drawn = check(verify_gumbel, draws=200)
    assert "χ²" in repr(drawn)
    assert drawn.cases[0].dof >= 1
    impossible = check(lambda p, *_: [p[0].argmin()], draws=200)
    assert math.isinf(impossible.cases[1].chi2)


def test_quantiles_are_scipys():
    for dof in (1, 2, 5, 30, 255, 4095):
        assert _quantile(dof) == pytest.approx(stats.chi2.ppf(1 - 1e-6, dof), rel=1e-6)
    for a, x in [(0.5, 0.1), (3, 2.9), (3, 9), (200, 180), (200, 260)]:
        assert _upper_gamma(a, x) == pytest.approx(stats.gamma.sf(x, a), rel=1e-9)


def test_batches_are_their_drafts_alone():
    rng = np.random.default_rng(2)
    lengths = [3, 0, 2, 1]
    p, q = laws(rng, 4, 4, 9), laws(rng, 4, 3, 9)
    tokens = rng.integers(9, size=(4, 3))
    for request, length in enumerate(lengths):
        tokens[request, length:] = -1
        # What stands behind a shorter draft is not looked at.
        p[request, length + 1 :] = np.nan
        q[request, length:] = np.nan
    seeds, positions = [1, 2, 3, 4], [10, 20, 30, 40]
    for verifier in (*CHAINS, speculative.verify_ensemble):
        options = {"weight": 0.5} if verifier is speculative.verify_ensemble else {}
        batch = verifier(p, q, tokens, seed=seeds, position=positions, **options)
        lists = verifier(
            [torch.from_numpy(p[i, : n + 1]) for i, n in enumerate(lengths)],
            [torch.from_numpy(q[i, :n]) for i, n in enumerate(lengths)],
            [torch.from_numpy(tokens[i, :n]) for i, n in enumerate(lengths)],
            seed=seeds,
            position=positions,
            **options,
        )
        assert batch.tokens.shape[0] == 4
        for i, n in enumerate(lengths):
            alone = verifier(p[i, : n + 1], q[i, :n], tokens[i, :n], seed=seeds[i], position=positions[i], **options)
            for other in (batch, lists):
                count = alone.accepted + 1
                assert other.tokens[i, :count].tolist() == alone.tokens.tolist()
                assert (other.tokens[i, count:] == -1).all()
                assert (other.accepted[i], other.parent[i]) == (alone.accepted, alone.parent)
                np.testing.assert_array_equal(other.logprobs[i, :count], alone.logprobs)
                assert np.isnan(other.logprobs[i, count:]).all()
    assert verify_gumbel(p, tokens, seed=7).tokens[1, 0] == verify_gumbel(p[1, :1], [], seed=7).tokens[0]
    assert verify_tokens([], None, []).tokens.shape == (0, 0)


def test_types_of_arrays():
    rng = np.random.default_rng(3)
    p, q = laws(rng, 3, 5), laws(rng, 2, 5)
    wide = verify_tokens(p.astype(np.float64), q, [1, 2], seed=4)
    assert wide.tokens.tolist() == verify_tokens(p, q.astype(np.float64), [1, 2], seed=4).tokens.tolist()
    half = torch.from_numpy(p).bfloat16()
    narrow = verify_tokens(half, torch.from_numpy(q).half(), torch.tensor([1, 2]), seed=4)
    assert (
        narrow.tokens.tolist()
        == verify_tokens(half.float().numpy(), q.astype(np.float16), [1, 2], seed=4).tokens.tolist()
    )
    verified = verify_tokens(p[:, ::-1], q[:, ::-1], np.array([1, 2], np.int32), seed=4)
    rows = [0, 1, 2][: verified.accepted + 1]
    exact = p[:, ::-1].astype(np.float64)
    exact /= exact.sum(-1, keepdims=True)
    np.testing.assert_allclose(verified.logprobs, np.log(exact[rows, verified.tokens]), atol=1e-6)


def test_greedy_is_the_argmax():
    rng = np.random.default_rng(4)
    logits = rng.integers(0, 3, size=(5, 7)).astype(np.float32)
    best = logits.argmax(-1)
    for accepted in range(5):
        drafted = best[:4].copy()
        if accepted < 4:
            drafted[accepted] = (drafted[accepted] + 1) % 7
        verified = speculative.verify_greedy(logits, drafted)
        assert verified.tokens.tolist() == best[: accepted + 1].tolist()
        assert (verified.accepted, verified.parent) == (accepted, accepted - 1)
        exact = torch.from_numpy(logits).double().log_softmax(-1).numpy()
        np.testing.assert_allclose(verified.logprobs, exact[range(accepted + 1), verified.tokens], atol=1e-6)
    tree = speculative.verify_greedy(logits[:4], [best[0] + 1 if best[0] < 6 else 0, best[0], best[2]], [-1, -1, 1])
    assert tree.tokens.tolist() == [best[0], best[2], best[3]]
    assert tree.parent == 2


def test_probabilities_follow_each_rows_history():
    rng = np.random.default_rng(5)
    logits = (3 * rng.standard_normal((4, 11))).astype(np.float32)
    params = ft.SamplingParams(
        temperature=0.7,
        top_k=6,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
    )
    tokens, parents, prompt, output = [3, 5, 3], [-1, -1, 1], [1, 2, 3], [5, 5]
    allowed = rng.random((4, 11)) < 0.8
    before = logits.copy()
    got = speculative.probabilities(logits, params, tokens, parents, prompt=prompt, output=output, allowed=allowed)
    np.testing.assert_array_equal(logits, before)
    for row, path in enumerate([[], [3], [5], [5, 3]]):
        x = logits[row].astype(np.float64)
        counts = np.bincount(output + path, minlength=11)
        seen = (counts > 0) | np.isin(np.arange(11), prompt)
        x = np.where(seen, np.where(x > 0, x / 1.3, x * 1.3), x) - 0.2 * counts - 0.4 * (counts > 0)
        x = np.where(allowed[row], x / 0.7, -np.inf)
        p = np.exp(x - x.max())
        p[p < 0.02] = 0
        order = np.argsort(-p, kind="stable")
        p[order[6:]] = 0
        reached = np.cumsum(p[order]) - p[order]
        p[order[reached >= 0.9 * p.sum()]] = 0
        np.testing.assert_allclose(got[row], p / p.sum(), rtol=1e-5)
    one = speculative.probabilities(logits, ft.SamplingParams(temperature=0.0), [1, 2, 3])
    np.testing.assert_array_equal(one, np.eye(11)[logits.argmax(-1)])


def test_intersections_carry_laws_and_tokens():
    rng = np.random.default_rng(6)
    words = [f"word{i}" for i in range(60)]
    drafter = {("Ġ" + word): token for token, word in zip(rng.permutation(50).tolist(), words[:50], strict=True)}
    target = ["▁" + words[i] for i in 10 + rng.permutation(50)]
    common = speculative.Intersection(drafter, target)
    assert (len(common), repr(common)) == (40, "Intersection(40 of 50 in 50 tokens)")
    q = common.restrict(laws(rng, 3, 50))
    scattered = common.scatter(q)
    np.testing.assert_allclose(scattered.sum(-1), 1, rtol=1e-6)
    for text, token in drafter.items():
        to = common.tokens[token]
        assert to == (target.index(text.replace("Ġ", "▁")) if text.replace("Ġ", "▁") in target else -1)
        if to >= 0:
            np.testing.assert_array_equal(scattered[:, to], q[:, token])
        else:
            assert (q[:, token] == 0).all()


def test_what_does_not_fit_says_so():
    p = np.full((3, 4), 0.25, np.float32)
    for message, call in [
        (r"p: got 3 rows, expected 2, one more than drafted", lambda: verify_tokens(p, p[:1], [1])),
        (r"q: got no law at row 1, expected one wherever", lambda: verify_tokens(p, p[:1], [1, 2])),
        (r"q: got rows of 3, expected 4, as p has", lambda: verify_tokens(p, p[:2, :3], [1, 2])),
        (r"tokens: got 4, expected ids below 4", lambda: verify_tokens(p, p[:2], [1, 4])),
        (r"tokens: got -3, expected ids of 0 or above", lambda: verify_tokens(p, p[:2], [1, -3])),
        (r"p: got shape \(4,\), expected \(k \+ 1, V\)", lambda: verify_tokens(p[0], None, [])),
        (r"tokens: got shape \(2, 1\), expected \(k,\)", lambda: verify_tokens(p, p[:2], [[1], [2]])),
        (r"p: got NaN for token 0 in row 0", lambda: verify_tokens(p * np.nan, p[:2], [1, 2])),
        (r"p: got row 0 with sum 0", lambda: verify_tokens(p * 0, p[:2], [1, 2])),
        (r"parents: got 1 for node 1, expected an earlier", lambda: verify_tree(p, p, [1, 2], [-1, 1])),
        (r"parents: got -2, expected -1 or an earlier node", lambda: verify_tree(p, p, [1, 2], [-1, -2])),
        (r"parents: got 1, expected 2, one for each token", lambda: verify_tree(p, p, [1, 2], [-1])),
        (r"seed: got -1", lambda: verify_tokens(p, p[:2], [1, 2], seed=-1)),
        (r"seed: got 2, expected one or 1", lambda: verify_tokens(p, p[:2], [1, 2], seed=[1, 2])),
        (r"tokens: got 1, expected 2, one for each of p", lambda: verify_tokens([p, p], None, [[1, 2]])),
        (r"epsilon: got 2, expected a number from 0 to 1", lambda: speculative.verify_typical(p, [1, 2], epsilon=2)),
        (r"accumulated: got 0", lambda: speculative.verify_threshold(p, [1, 2], accumulated=0)),
        (r"top: got 0", lambda: speculative.verify_relaxed(p, [1, 2], top=0)),
        (r"logits: got shape \(4,\)", lambda: speculative.probabilities(p[0], ft.SamplingParams())),
        (
            r"allowed: got shape \(3, 3\)",
            lambda: speculative.probabilities(p, ft.SamplingParams(), [0, 1], allowed=np.ones(3, bool)),
        ),
        (r"q: got 2, expected 3, the drafter's", lambda: speculative.Intersection("abc", "bcd").restrict([0.5, 0.5])),
        (r"q: got probability 0 of the common", lambda: speculative.Intersection("ab", "bc").restrict([1.0, 0.0])),
        (r"verifier: got the tokens \[99\], expected 1 to 4 ids below 16", lambda: check(lambda *_: [99])),
        (r"draft: got 'x', expected sampled", lambda: check(verify_tokens, draft="x")),
        (r"method: got 'x', expected auto", lambda: check(verify_tokens, method="x")),
        (r"method: got enumeration, expected chi-square", lambda: check(verify_gumbel, method="enumeration")),
        (
            r"vocabulary: got 2, expected one for each sibling",
            lambda: check(verify_tree, parents=[-1] * 3, vocabulary=2),
        ),
        (r"parents: got \[0\], expected an earlier", lambda: check(verify_tree, parents=[0])),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="p: got int64, expected floats"):
        verify_tokens(np.ones((2, 2), np.int64), None, [0])
    with pytest.raises(TypeError, match="tokens: got float64, expected integers"):
        verify_tokens(p, None, [0.5, 1.0])
    with pytest.raises(TypeError, match="target: got int, expected texts"):
        speculative.Intersection("ab", [1])
    with pytest.raises(ft.UnsupportedError, match="one-hot draft under ensemble"):
        speculative.verify_ensemble(p, None, [1, 2], weight=0.5)
    with pytest.raises(ft.FarthingError, match="no token can be drawn at position 2"):
        speculative.probabilities(p * np.nan, ft.SamplingParams(), [1, 2], prompt=[1], output=[1])


def test_a_coin_that_fails_is_heard():
    p = np.full((2, 4), 0.25, np.float32)

    class Broken:
        def flip(self, *_):
            raise KeyError("lost")

        def draw(self, _weights):
            return 99

    with pytest.raises(KeyError, match="lost"):
        verify_tokens(p, p[:1], [0], coin=Broken())
    with pytest.raises(ValueError, match=r"coin\.draw: got 99, expected an index below 4"):
        verify_tokens(p, None, [0], coin=Broken())


@pytest.mark.parametrize("module", ["verify", "check"])
def test_examples_run(module):
    # By name: `farthing.speculative.check` is the function.
    assert doctest.testmod(import_module(f"farthing.speculative.{module}")).failed == 0
