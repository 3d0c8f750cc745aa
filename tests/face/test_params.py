"""SamplingParams: every bad value is a ValueError that names the argument, what it got and what it expected."""

import copy
import pickle

import farthing as ft
import numpy as np
import pytest

BAD = [
    ("max_tokens", 0, "an integer ≥ 1"),
    ("max_tokens", -3, "an integer ≥ 1"),
    ("max_tokens", 1.5, "an integer ≥ 1"),
    ("max_tokens", True, "an integer ≥ 1"),
    ("max_tokens", None, "an integer ≥ 1"),
    ("max_tokens", "8", "an integer ≥ 1"),
    ("max_tokens", 2**70, "an integer ≥ 1"),
    ("temperature", -0.1, "a finite number ≥ 0"),
    ("temperature", float("nan"), "a finite number ≥ 0"),
    ("temperature", float("inf"), "a finite number ≥ 0"),
    ("temperature", 1e300, "a finite number ≥ 0"),
    ("temperature", "hot", "a number"),
    ("temperature", None, "a number"),
    ("top_k", 0, "an integer ≥ 1"),
    ("top_k", 2.0, "an integer ≥ 1"),
    ("top_p", 0.0, "a number in (0, 1]"),
    ("top_p", 1.01, "a number in (0, 1]"),
    ("top_p", float("nan"), "a number in (0, 1]"),
    ("min_p", -0.1, "a number in [0, 1)"),
    ("min_p", 1.0, "a number in [0, 1)"),
    ("repetition_penalty", 0.0, "a finite number > 0"),
    ("repetition_penalty", float("inf"), "a finite number > 0"),
    ("presence_penalty", float("nan"), "a finite number"),
    ("frequency_penalty", float("-inf"), "a finite number"),
    ("seed", -1, "an integer from 0 to 18446744073709551615"),
    ("seed", 2**64, "an integer from 0 to 18446744073709551615"),
    ("seed", 1.0, "an integer from 0 to 18446744073709551615"),
    ("stop", [""], "texts of at least one character"),
    ("stop", "", "texts of at least one character"),
    ("stop", ["a", 1], "a text or a list of texts"),
    ("stop", 3, "a text or a list of texts"),
    ("stop", b"x", "a text or a list of texts"),
    ("ignore_eos", 1, "True or False"),
    ("effort", "some", "one of none, minimal, low, medium, high, xhigh, max, or an EffortPlan"),
    ("effort", 1, "one of none"),
    ("logprobs", -1, "an integer ≥ 0"),
    ("logprobs", 21, "at most 20"),
    ("logprobs", True, "an integer ≥ 0"),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD, ids=lambda value: repr(value)[:20])
def test_a_bad_value_is_named(name, value, expected):
    with pytest.raises(ValueError, match="got") as caught:
        ft.SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: got ")
    assert f"expected {expected}" in message


def test_defaults_and_numpy_numbers():
    params = ft.SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5), seed=np.uint64(2**64 - 1))
    assert (params.max_tokens, params.seed) == (3, 2**64 - 1)
    defaults = ft.SamplingParams()
    assert (defaults.max_tokens, defaults.temperature, defaults.seed, defaults.stop) == (64, 0.0, None, ())


def test_one_stop_text_is_a_list_of_one():
    assert ft.SamplingParams(stop="\n").stop == ("\n",)
    assert ft.SamplingParams(stop=["a", "b"]) == ft.SamplingParams(stop=("a", "b"))


def test_parameters_are_values():
    params = ft.SamplingParams(max_tokens=5, stop=["x"], top_k=4)
    assert pickle.loads(pickle.dumps(params)) == params
    assert copy.deepcopy(params) == params
    assert hash(params) == hash(ft.SamplingParams(max_tokens=5, stop=["x"], top_k=4))
    with pytest.raises(AttributeError):
        params.max_tokens = 6
    assert repr(params).startswith("SamplingParams(max_tokens=5, ")
    assert "_core" not in repr(params)


def test_unknown_options_are_errors():
    with pytest.raises(TypeError, match="top_q"):
        ft.SamplingParams(top_q=0.5)
