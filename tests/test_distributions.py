import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.distributions import DISTRIBUTIONS, erk, uniform
from resu_compile.sparsity import keep_count

LENET = {
    "conv1": (6, 1, 5, 5),
    "conv2": (16, 6, 5, 5),
    "fc1": (120, 256),
    "fc2": (84, 120),
    "fc3": (10, 84),
}


def erk_by_the_formula(shapes, sparsity):
    """rigl/sparse_utils.py, as the method notes state it."""
    numel = {k: math.prod(s) for k, s in shapes.items()}
    p = {k: sum(s) / numel[k] for k, s in shapes.items()}
    dense = set()
    while True:
        sparse = [k for k in shapes if k not in dense]
        if not sparse:
            return dict.fromkeys(shapes, 1.0)
        zeros = {k: math.floor(sparsity * numel[k]) for k in shapes}
        ones = {k: numel[k] - zeros[k] for k in shapes}
        eps = (sum(ones[k] for k in sparse) - sum(zeros[k] for k in dense)) / sum(
            p[k] * numel[k] for k in sparse
        )
        highest = max(p[k] for k in sparse)
        if eps * highest <= 1:
            return {k: 1.0 if k in dense else max(eps * p[k], 0.0) for k in shapes}
        dense |= {k for k in sparse if p[k] == highest}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_erk_equals_the_formula(sparsity):
    expected = erk_by_the_formula(LENET, sparsity)
    found = erk(LENET, sparsity)
    assert {k: 1 - s for k, s in found.items()} == pytest.approx(expected)


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=6),
    st.floats(0, 0.999),
)
@settings(max_examples=150, deadline=None)
def test_erk_reaches_the_overall_count(shapes, sparsity):
    named = {f"w{i}": shape for i, shape in enumerate(shapes)}
    found = erk(named, sparsity)
    assert all(0 <= s <= 1 for s in found.values())
    total = sum(math.prod(s) for s in shapes)
    kept = sum((1 - found[k]) * math.prod(s) for k, s in named.items())
    # one entry a weight from the floors of the formula
    assert abs(kept - (1 - sparsity) * total) <= len(shapes) + 1e-6 * total


def test_erk_keeps_small_weights_denser():
    found = erk(LENET, 0.9)
    assert found["conv1"] < found["conv2"] < found["fc1"]


def test_erk_makes_a_weight_dense_and_solves_again():
    shapes = {"small": (2, 2), "large": (100, 100)}
    found = erk(shapes, 0.5)
    assert found["small"] == 0.0
    kept = 4 + keep_count(10000, found["large"])
    assert kept == pytest.approx(5002, abs=1)


def test_uniform():
    assert uniform(LENET, 0.3) == dict.fromkeys(LENET, 0.3)


def test_names():
    assert sorted(DISTRIBUTIONS) == ["er", "erk", "uniform"]
