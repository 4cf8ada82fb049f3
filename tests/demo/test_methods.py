"""When each method of the demo prunes, resurrects and recovers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resu_compile.demo.runner import DemoConfig, methods
from resu_compile.demo.tasks import Training, make_task
from resu_compile.errors import ArgumentError
from resu_compile.training import Stage

CONFIG = DemoConfig(Path("unused"))
# what the ramp of a task comes to: the steps of the prunings, and the sparsities (all three in the
# documented form 0.7 (1 - (1 - t)^3))
EXPECTED = {
    "digits": {
        "one_shot": ([420], [0.7]),
        "gradual": (
            [300, 315, 330, 345, 360, 375, 390, 405, 420, 435],
            [0.1897, 0.3416, 0.4599, 0.5488, 0.6125, 0.6552, 0.6811, 0.6944, 0.6993, 0.7],
        ),
        "resu": ([300, 330, 360, 390, 420], [0.3416, 0.5488, 0.6552, 0.6944, 0.7]),
    },
    "bytes": {
        "one_shot": ([350], [0.7]),
        "gradual": (
            [300, 320, 341, 362, 383, 404],
            [0.2949, 0.4926, 0.6125, 0.6741, 0.6968, 0.7],
        ),
        "resu": ([300, 341, 383], [0.4926, 0.6741, 0.7]),
    },
}
RESU_PHASES = {
    "digits": [(321, 330), (351, 360), (381, 390), (411, 420), (441, 450)],
    "bytes": [(329, 341), (370, 383), (412, 425)],
}


def plans_of(training: Training, config: DemoConfig = CONFIG):
    return {m.key: m.plan for m in methods(training, config) if m.config is not None}


def prunings(plan):
    """(step, sparsity) of each change of the sparsity; a plan begins dense."""
    return [
        (span.start, span.sparsity)
        for before, span in itertools.pairwise(plan)
        if span.sparsity != before.sparsity
    ]


@pytest.mark.parametrize("name", EXPECTED)
def test_schedules_of_the_tasks(name):
    plans = plans_of(make_task(name, "small", "cpu").training)
    for key, (steps, sparsities) in EXPECTED[name].items():
        assert [step for step, _ in prunings(plans[key])] == steps
        assert [sparsity for _, sparsity in prunings(plans[key])] == pytest.approx(
            sparsities, abs=5e-5
        )
    phases = [(span.start, span.stop) for span in plans["resu"] if span.stage is Stage.RESU]
    assert phases == RESU_PHASES[name]


@given(
    steps=st.integers(260, 3000),
    cycles=st.integers(1, 30),
    sparsity=st.floats(0.01, 0.99),
)
def test_every_plan(steps, cycles, sparsity):
    training = Training(steps, batch_size=1, lr=1.0, weight_decay=0.0, cycles=cycles)
    plans = plans_of(training, DemoConfig(Path("unused"), sparsity=sparsity))
    for plan in plans.values():
        covered = [step for span in plan for step in range(span.start, span.stop)]
        assert covered == list(range(steps))
        assert all(a.sparsity <= b.sparsity for a, b in itertools.pairwise(plan))
        assert all((span.sparsity == 0.0) == (span.stage is Stage.WARMUP) for span in plan)
        assert plan[-1].sparsity == sparsity
        assert all(span.stop > span.start for span in plan)
    resurrected = plans["resu"]
    assert [span.stage for span in resurrected] == [
        Stage.WARMUP,
        *[Stage.STABILIZE, Stage.RESU] * cycles,
        Stage.RECOVER,
    ]
    assert resurrected[-1].steps >= 0.2 * steps  # what was resurrected last is trained on
    assert len(prunings(plans["one_shot"])) == 1
    assert plans["one_shot"][0].steps == round(0.7 * steps)
    stages = [span.stage for span in plans["gradual"]]
    assert stages == [Stage.WARMUP, *[Stage.STABILIZE] * 2 * cycles, Stage.RECOVER]


def test_all_have_the_budget_and_settings_of_the_demo():
    config = DemoConfig(Path("unused"), sparsity=0.6, budget=0.3)
    resurrected = {
        m.key: m.config for m in methods(make_task("digits", "small", "cpu").training, config)
    }["resu"]
    assert (resurrected.budget_start, resurrected.budget_end) == (0.3, 0.3)
    assert resurrected.resurrection.rule == "optimizer"
    assert resurrected.resurrection.init == "zero"


@pytest.mark.parametrize(
    ("changes", "sparsity", "message"),
    [
        ({"steps": 20, "cycles": 10}, 0.7, "steps: expected at least .* for 10 cycles"),
        ({"steps": 20, "cycles": 0}, 0.7, "cycles: expected an integer >= 1"),
        ({"steps": 0}, 0.7, "steps: expected an integer >= 1"),
        ({"steps": 20}, 1.0, "sparsity: expected a number in"),
        ({"steps": 20, "ramp": (0.9, 0.75)}, 0.7, "steps: expected at least"),
    ],
)
def test_names_what_cannot_be_planned(changes, sparsity, message):
    training = Training(**{"batch_size": 1, "lr": 1.0, "weight_decay": 0.0, **changes})
    with pytest.raises(ArgumentError, match=message):
        methods(training, DemoConfig(Path("unused"), sparsity=sparsity))
