"""When each method of the demo prunes, resurrects and recovers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resu_compile.demo.runner import DemoConfig, methods
from resu_compile.demo.tasks import Training, make_task
from resu_compile.errors import ArgumentError
from resu_compile.training import Stage, preset

CONFIG = DemoConfig(Path("unused"))


def ramp(prunings):
    """The documented form at 70 %, 0.7 (1 - (1 - t)^2)."""
    return [0.7 * (1.0 - (1.0 - (c + 1) / prunings) ** 2) for c in range(prunings)]


# what a task comes to: the steps of the prunings, and the sparsities; RESU prunes 40 times from 0.4
# to 0.8 of the steps
EXPECTED = {
    "digits": {
        "one_shot": ([420], [0.7]),
        "gradual": (
            [300, 315, 330, 345, 360, 375, 390, 405, 420, 435],
            [0.1897, 0.3416, 0.4599, 0.5488, 0.6125, 0.6552, 0.6811, 0.6944, 0.6993, 0.7],
        ),
        "resu": (list(range(240, 480, 6)), ramp(40)),
    },
    "bytes": {
        "one_shot": ([350], [0.7]),
        "gradual": (
            [300, 320, 341, 362, 383, 404],
            [0.2949, 0.4926, 0.6125, 0.6741, 0.6968, 0.7],
        ),
        "resu": (list(range(200, 400, 5)), ramp(40)),
    },
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
    phases = [span for span in plans["resu"] if span.stage is Stage.RESU]
    assert [span.start for span in phases] == EXPECTED[name]["resu"][0]  # all from its pruning on


@given(
    steps=st.integers(260, 3000),
    count=st.integers(1, 30),
    sparsity=st.floats(0.01, 0.99),
)
def test_every_plan(steps, count, sparsity):
    training = Training(steps, batch_size=1, lr=1.0, weight_decay=0.0, prunings=count)
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
        *[Stage.RESU] * 40,
        Stage.RECOVER,
    ]
    assert resurrected[-1].steps == round(0.2 * steps)  # what was resurrected last is trained on
    assert len(prunings(plans["one_shot"])) == 1
    assert plans["one_shot"][0].steps == round(0.7 * steps)
    stages = [span.stage for span in plans["gradual"]]
    assert stages == [Stage.WARMUP, *[Stage.STABILIZE] * count, Stage.RECOVER]


def test_resu_is_the_default_and_the_others_prune_by_magnitude():
    training = make_task("digits", "small", "cpu").training
    compared = {m.key: m.config for m in methods(training, replace(CONFIG, sparsity=0.6))}
    assert compared["resu"] == preset("default", steps=600, sparsity=0.6)
    for key in ("one_shot", "gradual"):
        config = compared[key]
        assert (config.method, config.scope, config.cycle.resu) == ("magnitude", "layer", 0.0)
        assert (config.sparsity, config.steps) == (0.6, 600)


@pytest.mark.parametrize(
    ("changes", "sparsity", "message"),
    [
        ({"steps": 20}, 0.7, "steps: expected at least .* for 40 cycles"),
        ({"steps": 120, "prunings": 31}, 0.7, "steps: expected at least .* for 31 cycles"),
        ({"steps": 120, "prunings": 0}, 0.7, "cycles: expected an integer >= 1"),
        ({"steps": 0}, 0.7, "steps: expected an integer >= 1"),
        ({"steps": 120}, 1.0, "sparsity: expected a number in"),
        ({"steps": 120, "ramp": (0.9, 0.75)}, 0.7, "warmup, recovery: expected shares"),
    ],
)
def test_names_what_cannot_be_planned(changes, sparsity, message):
    training = Training(**{"batch_size": 1, "lr": 1.0, "weight_decay": 0.0, **changes})
    with pytest.raises(ArgumentError, match=message):
        methods(training, DemoConfig(Path("unused"), sparsity=sparsity))
