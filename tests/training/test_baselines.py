"""The configs that a RESU run is compared with: the same steps, and no resurrection."""

from __future__ import annotations

from dataclasses import fields

import pytest

from resu_compile.errors import ArgumentError
from resu_compile.training import CycleShares, TrainingConfig, build_plan
from resu_compile.training.baselines import dense_config, gradual_config, one_shot_config
from tests.training.models import config


def letters(plan):
    return [(span.start, span.stop, str(span.stage), span.sparsity) for span in plan]


def changed(made: TrainingConfig, base: TrainingConfig) -> set[str]:
    return {f.name for f in fields(base) if getattr(made, f.name) != getattr(base, f.name)}


def test_gradual_prunes_where_resu_does():
    base = config()
    assert letters(build_plan(gradual_config(base))) == [
        (0, 4, "warmup", 0.0),
        (4, 9, "train", 0.0),
        (9, 13, "stabilize", 0.25),
        (13, 18, "train", 0.25),
        (18, 22, "stabilize", 0.5),
        (22, 27, "train", 0.5),
        (27, 31, "stabilize", 0.75),
        (31, 40, "recover", 0.75),
    ]
    assert changed(gradual_config(base), base) == {"cycle"}


@pytest.mark.parametrize("schedule", ["cubic", (0.1, 0.7, 0.75)])
@pytest.mark.parametrize("prune_at", [1, 13, 39])
def test_one_shot_prunes_once(prune_at, schedule):
    base = config(schedule=schedule)
    made = one_shot_config(base, prune_at=prune_at)
    assert letters(build_plan(made)) == [
        (0, prune_at, "warmup", 0.0),
        (prune_at, 40, "stabilize", 0.75),
    ]
    assert changed(made, base) <= {
        "warmup", "recovery", "cycles", "cycle", "schedule",
    }  # fmt: skip


def test_one_shot_before_the_first_step():
    assert letters(build_plan(one_shot_config(config(), prune_at=0))) == [
        (0, 40, "stabilize", 0.75)
    ]


@pytest.mark.parametrize("prune_at", [-1, 40])
def test_one_shot_has_a_step_to_prune_at(prune_at):
    with pytest.raises(ArgumentError, match="prune_at: expected an integer"):
        one_shot_config(config(), prune_at=prune_at)


@pytest.mark.parametrize("steps", [7, 97, 600, 1999])
def test_one_shot_prunes_at_every_step_that_is_asked_for(steps):
    base = config(steps=steps, cycles=1, cycle=CycleShares(0.0, 1.0, 1.0))
    for prune_at in range(steps):
        first = build_plan(one_shot_config(base, prune_at=prune_at))[-1].start
        assert first == prune_at


def test_dense_never_prunes():
    for schedule in ("cubic", (0.1, 0.7, 0.75)):
        plan = build_plan(dense_config(config(schedule=schedule)))
        assert {span.sparsity for span in plan} == {0.0}
        assert plan[-1].stop == 40
