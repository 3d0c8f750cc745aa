"""`linear_divergence` beside autograd on whole logits, in every kind, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from farthing.errors import UnsupportedError
from farthing.reasoning import linear_divergence, logits_divergence
from torch.nn import functional as F

KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.2), ("cross_entropy", 0.5)]


def numbers(*shape, seed=0, dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def number(x):
    return x.detach().item()


def naive(logits, teacher, kind, beta):
    """The divergence of each row, from whole logits."""
    p, q = logits.log_softmax(-1), teacher.log_softmax(-1)

    def kl(a, b):
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if kind == "reverse_kl":
        return kl(p, q)
    if kind == "forward_kl":
        return kl(q, p)
    if kind == "cross_entropy":
        return -(q.exp() * p).sum(-1)
    m = torch.logaddexp(p + math.log(1 - beta), q + math.log(beta))
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def transformed(hidden, weight, bias=None, scale=1.0, softcap=None, temperature=1.0):
    logits = scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("block", [None, 3])
def test_gradients_are_those_of_autograd_in_double_precision(kind, beta, block):
    options = {"scale": 0.8, "softcap": 5.0, "temperature": 1.4}
    leaves = [numbers(7, 6), numbers(41, 6, seed=1), numbers(41, seed=2)]
    teacher, head, bias = numbers(7, 9, seed=3), numbers(41, 9, seed=4), numbers(41, seed=5)
    row_weight = torch.tensor([0.5, 0.0, 1.0, -2.0, 0.0, 0.1, 1.0], dtype=torch.float64)
    for plain in (True, False):
        mine = [leaf.clone().requires_grad_() for leaf in leaves]
        theirs = [leaf.clone().requires_grad_() for leaf in leaves]
        other = {} if plain else options
        biases = {"bias": mine[2], "teacher_bias": bias}
        found = linear_divergence(
            mine[0], mine[1], teacher, head, row_weight, kind=kind, beta=beta, row_block=block, **biases, **other
        )
        rows = naive(
            transformed(theirs[0], theirs[1], theirs[2], **other), transformed(teacher, head, bias, **other), kind, beta
        )
        wanted = (rows * row_weight).sum()
        (3.0 * found.loss).backward()
        (3.0 * wanted).backward()
        assert abs(number(found.loss - wanted)) < 1e-12
        assert torch.allclose(found.rows[row_weight != 0], rows.detach()[row_weight != 0], atol=1e-12)
        for a, b in zip(mine, theirs, strict=True):
            assert number((a.grad - b.grad).abs().max()) < 1e-10
        assert found.clamped == 0
        assert found.columns == 1.0


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_gradcheck(kind, beta):
    hidden, head = numbers(3, 4).requires_grad_(), numbers(50, 4, seed=1).requires_grad_()
    teacher, teacher_head = numbers(3, 4, seed=2), numbers(50, 4, seed=3)

    def loss(hidden, head):
        return linear_divergence(hidden, head, teacher, teacher_head, kind=kind, beta=beta).loss

    assert torch.autograd.gradcheck(loss, (hidden, head))


def test_labels_are_cross_entropy():
    hidden, head = numbers(5, 6).requires_grad_(), numbers(30, 6, seed=1).requires_grad_()
    labels = torch.tensor([0, 29, 3, 3, 7])
    found = linear_divergence(hidden, head, labels=labels, kind="cross_entropy")
    mine = torch.autograd.grad(found.loss, (hidden, head))
    wanted = F.cross_entropy(hidden @ head.t(), labels)
    assert abs(number(found.loss - wanted)) < 1e-12
    for a, b in zip(mine, torch.autograd.grad(wanted, (hidden, head)), strict=True):
        assert number((a - b).abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("block", [None, 16])
def test_single_and_half_precision_are_near_double(dtype, kind, beta, block):
    hidden, head = numbers(40, 32, dtype=dtype, spread=0.5), numbers(300, 32, seed=1, dtype=dtype, spread=0.5)
    teacher, teacher_head = numbers(40, 16, seed=2, dtype=dtype, spread=0.5), numbers(300, 16, seed=3, dtype=dtype)
    leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    exact = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    found = linear_divergence(*leaves, teacher, teacher_head, kind=kind, beta=beta, row_block=block)
    wanted = naive(exact[0] @ exact[1].t(), teacher.double() @ teacher_head.double().t(), kind, beta)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found.rows.double(), wanted, rtol=bound, atol=bound)
    found.loss.backward()
    wanted.mean().backward()
    for a, b in zip(leaves, exact, strict=True):
        assert a.grad.dtype == dtype
        assert number((a.grad.double() - b.grad).norm() / b.grad.norm()) < bound


def test_rows_sum_to_zero_and_equal_sides_have_no_divergence():
    logits = numbers(6, 500, dtype=torch.float32, spread=6).requires_grad_()
    teacher = numbers(6, 500, seed=1, dtype=torch.float32, spread=6)
    for kind, beta in KINDS:
        found = logits_divergence(logits, teacher, kind=kind, beta=beta)
        (slopes,) = torch.autograd.grad(found.loss, logits)
        assert number(slopes.sum(-1).abs().max()) < 1e-6
        assert bool((found.rows >= 0).all())
        same = logits_divergence(logits, logits, kind=kind, beta=beta)
        if kind == "cross_entropy":
            assert torch.allclose(same.rows, same.entropy, atol=1e-5)
        else:
            assert number(same.rows.max()) < 1e-6
        assert number(torch.autograd.grad(same.loss, logits)[0].abs().max()) < 1e-6


def peaked(rows=96, tokens=4000, width=64, dtype=torch.float32):
    """States and heads whose rows give the likeliest token about 0.78, and a teacher near them."""
    head = numbers(tokens, width, seed=1, spread=width**-0.5)
    favourites = torch.randint(tokens, (rows,), generator=torch.Generator().manual_seed(2))
    directions = head[favourites] / head[favourites].norm(dim=1, keepdim=True) ** 2
    hidden = directions * 9.6 + numbers(rows, width, seed=3, spread=0.3)
    return [x.to(dtype) for x in (hidden, head, hidden + numbers(rows, width, seed=4, spread=0.3), head)]


def test_filtered_gradients_stay_within_the_bound():
    hidden, head, teacher, teacher_head = peaked()
    top = number((hidden @ head.t()).softmax(-1).amax(-1).mean())
    assert 0.6 < top < 0.9
    results = {}
    for threshold in (0.0, 1e-3, 1e-2):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        found = linear_divergence(*leaves, teacher, teacher_head, filter=threshold, row_block=16)
        found.loss.backward()
        results[threshold] = (found, *(leaf.grad for leaf in leaves))
    exact, of_hidden, of_head = results[0.0]
    assert exact.columns == 1.0
    assert number(exact.bound.max()) == 0.0
    for threshold in (1e-3, 1e-2):
        found, rows, columns = results[threshold]
        assert number(found.loss) == number(exact.loss)
        assert 0.0 < found.columns < 0.25
        distance = (rows - of_hidden).norm(dim=1)
        assert number(distance.max()) > 0.0
        assert bool((distance <= found.bound + 1e-7).all())
        assert number((columns - of_head).norm() / of_head.norm()) < 0.3


def test_a_filter_that_would_keep_much_is_exact():
    leaves = [numbers(4, 8).requires_grad_(), numbers(60, 8, seed=1, spread=0.1).requires_grad_()]
    sides = (numbers(4, 8, seed=2), numbers(60, 8, seed=3))
    found = linear_divergence(*leaves, *sides, filter=1e-9)
    mine = torch.autograd.grad(found.loss, leaves)
    exact = torch.autograd.grad(linear_divergence(*leaves, *sides).loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(mine, exact, strict=True))
    assert found.columns == 1.0
    assert number(found.dropped.max()) == 0.0


def test_frozen_sides_get_no_gradient():
    hidden, head = numbers(4, 8), numbers(60, 8, seed=1)
    sides = (numbers(4, 8, seed=2), numbers(60, 8, seed=3))
    state = hidden.clone().requires_grad_()
    linear_divergence(state, head, *sides).loss.backward()
    weight = head.clone().requires_grad_()
    linear_divergence(hidden, weight, *sides).loss.backward()
    both = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    linear_divergence(*both, *sides).loss.backward()
    assert torch.equal(state.grad, both[0].grad)
    assert torch.equal(weight.grad, both[1].grad)
    assert not linear_divergence(hidden, head, *sides).loss.requires_grad


def test_the_gradient_of_the_weight_is_not_copied():
    hidden, weight = numbers(4, 8).requires_grad_(), numbers(60, 8, seed=1).requires_grad_()
    found = linear_divergence(hidden, weight, numbers(4, 8, seed=2), numbers(60, 8, seed=3))
    made = found.loss.grad_fn.saved_tensors[1].data_ptr()
    found.loss.backward()
    assert weight.grad.data_ptr() == made


def test_nothing_to_do_is_zero():
    head, teacher_head = numbers(20, 4, seed=1), numbers(20, 4, seed=2)
    empty = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    found = linear_divergence(empty, head, torch.zeros(0, 4, dtype=torch.float64), teacher_head)
    found.loss.backward()
    assert number(found.loss) == 0.0
    assert empty.grad.shape == (0, 4)
    hidden, weight = numbers(3, 4).requires_grad_(), head.clone().requires_grad_()
    found = linear_divergence(hidden, weight, numbers(3, 4, seed=3), teacher_head, torch.zeros(3))
    found.loss.backward()
    assert number(found.loss) == 0.0
    assert number(hidden.grad.abs().max()) == number(weight.grad.abs().max()) == 0.0


def test_rows_of_no_weight_may_hold_anything():
    hidden = numbers(3, 4)
    sides = (numbers(20, 4, seed=1), numbers(3, 4, seed=2), numbers(20, 4, seed=3))
    spoilt = hidden.clone()
    spoilt[1] = math.nan
    weights = torch.tensor([1.0, 0.0, 1.0])
    spoilt.requires_grad_()
    found = linear_divergence(spoilt, *sides, weights)
    found.loss.backward()
    assert number(found.loss) == pytest.approx(number(linear_divergence(hidden, *sides, weights).loss), abs=1e-12)
    assert bool(spoilt.grad.isfinite().all())
    assert math.isnan(number(linear_divergence(spoilt, *sides).loss))


def test_padded_vocabularies_are_cut():
    hidden, head = numbers(3, 4).requires_grad_(), numbers(24, 4, seed=1).requires_grad_()
    teacher, teacher_head = numbers(3, 4, seed=2), numbers(32, 4, seed=3)
    cut = linear_divergence(hidden, head, teacher, teacher_head, valid_vocab=20)
    of_hidden, of_head = torch.autograd.grad(cut.loss, (hidden, head))
    wanted = naive(hidden @ head[:20].t(), teacher @ teacher_head[:20].t(), "reverse_kl", 0).mean()
    for mine, theirs in zip((of_hidden, of_head), torch.autograd.grad(wanted, (hidden, head)), strict=True):
        assert number((mine - theirs).abs().max()) < 1e-12
    with pytest.raises(ValueError, match="valid_vocab"):
        linear_divergence(hidden, head, teacher, teacher_head)


def test_minus_infinity_and_large_logits():
    logits = torch.tensor([[0.0, -math.inf, 0.0], [1e4, -1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -math.inf, -math.inf], [-1e4, 1e4, 0.0]])
    found = logits_divergence(logits, teacher)
    assert found.clamped == 1
    assert number(found.rows[0]) == pytest.approx(5000, abs=1)
    assert number(found.rows[1]) == pytest.approx(20000, abs=1)
    found.loss.backward()
    assert bool(logits.grad.isfinite().all())


def test_autocast_multiplies_in_its_type_and_gives_gradients_in_the_weights():
    hidden, head = numbers(20, 32, dtype=torch.float32), numbers(200, 32, seed=1, dtype=torch.float32)
    teacher, teacher_head = (
        numbers(20, 32, seed=2, dtype=torch.bfloat16),
        numbers(200, 32, seed=3, dtype=torch.bfloat16),
    )
    leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    for block in (None, 16):
        with torch.autocast("cpu", torch.bfloat16):
            found = linear_divergence(*leaves, teacher, teacher_head, row_block=block)
        mine = torch.autograd.grad(found.loss, leaves)
        exact = linear_divergence(*leaves, teacher.float(), teacher_head.float())
        for a, b in zip(mine, torch.autograd.grad(exact.loss, leaves), strict=True):
            assert a.dtype == torch.float32
            assert number((a - b).norm() / b.norm()) < 5e-2


def test_errors_name_the_argument():
    hidden, head, teacher = numbers(3, 4), numbers(20, 4, seed=1), numbers(3, 4, seed=2)
    with pytest.raises(ValueError, match="weight: got shape"):
        linear_divergence(hidden, numbers(20, 5), teacher, head)
    with pytest.raises(ValueError, match='kind: got "kl"'):
        linear_divergence(hidden, head, teacher, head, kind="kl")
    with pytest.raises(ValueError, match="beta"):
        linear_divergence(hidden, head, teacher, head, kind="jsd", beta=1.0)
    with pytest.raises(ValueError, match="temperature"):
        linear_divergence(hidden, head, teacher, head, temperature=0.0)
    with pytest.raises(ValueError, match="row_weight: got shape"):
        linear_divergence(hidden, head, teacher, head, torch.ones(4))
    with pytest.raises(ValueError, match="labels: got 20"):
        linear_divergence(hidden, head, labels=torch.tensor([1, 2, 20]), kind="cross_entropy")
    with pytest.raises(ValueError, match="labels"):
        linear_divergence(hidden, head)
    with pytest.raises(UnsupportedError, match="float16"):
        linear_divergence(hidden.half(), head.half(), teacher, head)


def test_trl_agrees():
    divergence = pytest.importorskip("trl.kernels.chunked_divergence", reason="needs trl")
    sides = [numbers(9, 16, seed=i, dtype=torch.float32) for i in (0, 1)]
    heads = [numbers(120, 16, seed=i, dtype=torch.float32) for i in (2, 3)]
    for beta, kind in ((0.0, "forward_kl"), (0.5, "jsd"), (1.0, "reverse_kl")):
        leaves = [sides[0].clone().requires_grad_(), heads[0].clone().requires_grad_()]
        theirs, entropy = divergence.ChunkedDivergenceFunction.apply(
            leaves[0], leaves[1], None, sides[1], heads[1], None, beta
        )
        wanted = torch.autograd.grad(theirs.mean(), leaves)
        found = linear_divergence(*leaves, sides[1], heads[1], kind=kind, beta=beta)
        assert torch.allclose(found.rows, theirs, atol=1e-5)
        assert torch.allclose(found.entropy, entropy, atol=1e-5)
        for a, b in zip(torch.autograd.grad(found.loss, leaves), wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
