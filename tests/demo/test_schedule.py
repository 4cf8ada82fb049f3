"""Plans cover every step once, never densify, and end in recovery."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resu_compile.demo.schedule import cubic, dense_plan, gradual_plan, one_shot_plan, resu_plan
from resu_compile.errors import ArgumentError
from resu_compile.phase import Phase

PLANS = {
    "dense": lambda steps, sparsity: dense_plan(steps),  # noqa: ARG005
    "one_shot": one_shot_plan,
    "gradual": lambda steps, sparsity: gradual_plan(steps, sparsity, prunings=4),
    "resu": lambda steps, sparsity: resu_plan(steps, sparsity, cycles=4),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@given(steps=st.integers(40, 3000), sparsity=st.floats(0.01, 0.99))
def test_covers_every_step_once(plan, steps, sparsity):
    spans = plan(steps, sparsity)
    assert [step for span in spans for step in range(span.start, span.stop)] == list(range(steps))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@given(steps=st.integers(40, 3000), sparsity=st.floats(0.01, 0.99))
def test_sparsity_never_falls(plan, steps, sparsity):
    spans = plan(steps, sparsity)
    assert all(a.sparsity <= b.sparsity for a, b in itertools.pairwise(spans))
    assert all((span.sparsity == 0.0) == (span.phase is Phase.DENSE) for span in spans)


@given(
    steps=st.integers(260, 3000),
    cycles=st.integers(1, 30),
    resu_share=st.floats(0.0, 1.0),
)
def test_resu_cycles(steps, cycles, resu_share):
    spans = resu_plan(steps, 0.7, cycles=cycles, resu_share=resu_share)
    assert [span.phase for span in spans] == [
        Phase.DENSE,
        *[Phase.SPARSE, Phase.RESU] * cycles,
        Phase.SPARSE,
    ]
    assert all(span.stop > span.start for span in spans)
    assert spans[-1].sparsity == 0.7  # and what was resurrected last is trained on
    assert spans[-1].stop - spans[-1].start >= 0.2 * steps


def test_cubic_ends():
    assert cubic(0.0, 0.7) == 0.0
    assert cubic(1.0, 0.7) == 0.7
    assert cubic(0.5, 0.8) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 20, "sparsity": 0.7, "cycles": 10}, "cycles: expected at most 2 in 20 steps"),
        ({"steps": 20, "sparsity": 0.7, "cycles": 0}, "cycles: expected at least 1"),
        ({"steps": 0, "sparsity": 0.7}, "steps: expected at least 1"),
        ({"steps": 20, "sparsity": 1.0}, "sparsity: expected a number in"),
        ({"steps": 20, "sparsity": 0.7, "begin": 0.9}, "begin < end"),
        ({"steps": 20, "sparsity": 0.7, "resu_share": 2.0}, "resu_share: expected"),
    ],
)
def test_names_what_cannot_be_planned(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        resu_plan(**arguments)
