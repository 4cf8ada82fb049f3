"""Plans: every step once, stages in order, sparsities and budgets as the formulas say."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.training import (
    CycleShares,
    Densification,
    Pause,
    Stage,
    TrainingConfig,
    build_plan,
    preset,
)
from resu_compile.training.plan import (
    cycle_budgets,
    cycle_margins,
    cycle_sparsities,
    default_warmup,
)
from resu_compile.training.schedules import AUTO, SHAPES, auto_shape
from tests.training.models import config

SHARE = st.floats(0.0, 10.0)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 3000),
    warmup=st.floats(0.0, 0.5),
    recovery=st.floats(0.0, 0.4),
    cycles=st.integers(1, 12),
    shares=st.tuples(SHARE, SHARE, SHARE).filter(lambda s: s[1] + s[2] > 0),
    schedule=st.sampled_from([AUTO, *sorted(SHAPES)]),
)
def test_spans_cover_every_step_once_in_order(steps, warmup, recovery, cycles, shares, schedule):
    edges = sum(max(round(steps * s), 1) if s else 0 for s in (warmup, recovery))
    settings = {
        "steps": steps,
        "warmup": warmup,
        "recovery": recovery,
        "cycles": cycles,
        "cycle": CycleShares(*shares),
        "method": "magnitude",  # which prunes without a warm-up as well
        "schedule": schedule,
    }
    if steps - edges < cycles * sum(share > 0 for share in shares):
        with pytest.raises(ArgumentError, match="steps: expected at least"):
            TrainingConfig(**settings)
        return
    plan = build_plan(TrainingConfig(**settings))
    assert [step for span in plan for step in range(span.start, span.stop)] == list(range(steps))
    assert all(span.steps > 0 for span in plan)
    order = [Stage.TRAIN, Stage.STABILIZE, Stage.RESU]
    order = [stage for stage, share in zip(order, shares, strict=True) if share > 0]
    expected = [Stage.WARMUP] * (warmup > 0) + order * cycles + [Stage.RECOVER] * (recovery > 0)
    assert [span.stage for span in plan] == expected
    sparsities = [span.sparsity for span in plan]
    assert sparsities == sorted(sparsities)
    assert plan[-1].sparsity == 0.7


def test_a_small_plan_to_the_letter():
    spans = [
        (span.start, span.stop, str(span.stage), span.cycle, span.sparsity)
        for span in build_plan(config())
    ]
    assert spans == [
        (0, 4, "warmup", -1, 0.0),
        (4, 9, "train", 0, 0.0),
        (9, 11, "stabilize", 0, 0.25),
        (11, 13, "resu", 0, 0.25),
        (13, 18, "train", 1, 0.25),
        (18, 20, "stabilize", 1, 0.5),
        (20, 22, "resu", 1, 0.5),
        (22, 27, "train", 2, 0.5),
        (27, 29, "stabilize", 2, 0.75),
        (29, 31, "resu", 2, 0.75),
        (31, 40, "recover", -1, 0.75),
    ]


def test_shares_of_a_thousand_steps_are_those_of_the_paper():
    plan = build_plan(preset("published"))
    assert [span.steps for span in plan] == [600, 100, 300] * 5


def test_shares_count_in_proportion_and_no_stage_is_empty():
    plan = build_plan(
        config(steps=30, warmup=0, recovery=0, cycles=2, cycle=CycleShares(100, 1, 1))
    )
    assert [span.steps for span in plan] == [13, 1, 1] * 2


def test_too_few_steps_are_refused_with_the_number_that_is_needed():
    with pytest.raises(ArgumentError, match=r"steps: expected at least 17 for 5 cycles of 3 stage"):
        TrainingConfig(steps=16, warmup=0.05, recovery=0.05, cycles=5, cycle=CycleShares())
    TrainingConfig(steps=17, warmup=0.05, recovery=0.05, cycles=5, cycle=CycleShares())


@given(
    warmup=st.floats(0.01, 0.6), recovery=st.floats(0.0, 0.39), cycles=st.integers(1, 60)
)  # whatever the shares, which grow along with the steps
def test_the_number_that_is_needed_is_enough(warmup, recovery, cycles):
    def make(steps):
        return TrainingConfig(steps=steps, warmup=warmup, recovery=recovery, cycles=cycles)

    with pytest.raises(ArgumentError) as caught:
        make(cycles)
    least = int(re.search(r"expected at least (\d+) ", str(caught.value))[1])
    make(least)
    with pytest.raises(ArgumentError, match=f"expected at least {least} "):
        make(least - 1)


def test_shares_that_leave_no_cycles_are_refused():
    with pytest.raises(ArgumentError, match="warmup, recovery: expected shares that leave steps"):
        TrainingConfig(warmup=0.6, recovery=0.4)


@pytest.mark.parametrize(
    ("sparsity", "share"),
    [(0.0, 0.4), (0.5, 0.4), (0.7, 0.4), (0.85, 0.2), (0.9, 0.4 / 3), (0.95, 0.1), (0.99, 0.1)],
)
def test_the_sparser_the_goal_the_shorter_the_default_warm_up(sparsity, share):
    assert default_warmup(sparsity) == pytest.approx(share)
    plan = build_plan(TrainingConfig(steps=3000, sparsity=sparsity))
    assert plan[0].stage is Stage.WARMUP
    assert plan[0].stop == round(3000 * share)
    given = TrainingConfig(steps=3000, sparsity=sparsity, warmup=0.25)
    assert build_plan(given)[0].stop == 750


# -- schedules ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", (1, 1, 1, 1)),
        ("linear", (0.25, 0.5, 0.75, 1)),
        ("exponential", (1 - 0.75**2, 1 - 0.5**2, 1 - 0.25**2, 1)),
        ("cosine", (0.5 - math.sqrt(0.5) / 2, 0.5, 0.5 + math.sqrt(0.5) / 2, 1)),
        ("cubic", (1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1)),
    ],
)
def test_sparsity_after_each_cycle(name, values):
    found = cycle_sparsities(config(cycles=4, schedule=name, initial_sparsity=0.1, sparsity=0.9))
    assert found == pytest.approx([0.1 + 0.8 * value for value in values])
    assert found[-1] == 0.9


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_rise_from_0_to_1(name):
    shape = SHAPES[name]
    values = [shape(t / 20) for t in range(1, 21)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1.0)
    assert name == "constant" or shape(0.0) == pytest.approx(0.0)


@given(sparsity=st.floats(0.8, 0.9999))
def test_the_auto_shape_has_twice_the_final_density_at_half_the_time(sparsity):
    density = 1.0 - sparsity * auto_shape(sparsity)(0.5)
    assert density == pytest.approx(2.0 * (1.0 - sparsity))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.8])
def test_the_auto_shape_is_flat_up_to_80_percent(sparsity):
    for t in (0.0, 0.3, 0.5, 1.0):
        assert auto_shape(sparsity)(t) == pytest.approx(SHAPES["exponential"](t))


def test_auto_goes_by_the_sparsity_of_the_last_cycle():
    found = cycle_sparsities(config(cycles=2, sparsity=0.95, initial_sparsity=0.2, schedule=AUTO))
    assert found == pytest.approx((0.2 + 0.75 * 0.9 / 0.95, 0.95))  # 0.9: twice the density of 0.95


def test_given_sparsities_and_a_function():
    assert cycle_sparsities(config(schedule=(0.1, 0.7, 0.75))) == (0.1, 0.7, 0.75)
    assert cycle_sparsities(config(schedule=lambda t: t * t)) == pytest.approx(
        (0.75 / 9, 0.75 * 4 / 9, 0.75)
    )


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("cubc", "schedule: expected one of auto, constant"),
        ((0.1, 0.75), "one sparsity for each of 3 cycles, got 2"),
        ((0.1, 0.2, 0.3), r"last sparsity to be sparsity=0\.75, got 0\.3"),
        ((0.1, 1.5, 0.75), r"schedule: expected a number in \[0, 1\)"),
        (lambda t: t / 2, r"1 at t = 1, got 0\.5"),
        (lambda t: 1 - 3 * t * (1 - t) * 4, "schedule at cycle 0"),
    ],
)
def test_bad_schedules_are_refused(schedule, message):
    with pytest.raises(ArgumentError, match=message):
        config(schedule=schedule)


def test_a_schedule_of_another_type_is_refused():
    with pytest.raises(ArgumentTypeError, match="schedule: expected a name"):
        config(schedule=3)


# -- budgets -----------------------------------------------------------------------------------
def test_budgets_are_linear_and_the_last_cycle_reaches_the_end():
    assert cycle_budgets(config(cycles=5, budget_start=0.10, budget_end=0.02)) == pytest.approx(
        (0.10, 0.08, 0.06, 0.04, 0.02)
    )
    assert cycle_budgets(config(cycles=1, budget_start=0.5, budget_end=0.2)) == (0.2,)


def test_margins_are_those_of_the_resurrection_or_go_to_the_end():
    ceiling = ResurrectionConfig(kind="ceiling", margin=0.4)
    assert cycle_margins(config(resurrection=ceiling)) == (0.4, 0.4, 0.4)
    assert cycle_margins(config(resurrection=ceiling, margin_end=0.1)) == pytest.approx(
        (0.4, 0.25, 0.1)
    )
    with pytest.raises(ArgumentError, match="margin_end: expected None unless"):
        config(margin_end=0.1)
    with pytest.raises(ArgumentError, match="margin_end: expected None or a number >= 0"):
        config(resurrection=ceiling, margin_end=-0.1)


# -- densification -----------------------------------------------------------------------------
def test_stepped_levels_are_one_a_cycle_and_spread_over_more():
    levels = Densification(mode="stepped")
    assert levels.sparsities(cycles=5, final=0.0) == (0.7, 0.5, 0.3, 0.1, 0.0)
    assert levels.sparsities(cycles=3, final=0.0) == (0.7, 0.3, 0.0)
    assert levels.sparsities(cycles=9, final=0.0)[0] == 0.7
    assert levels.sparsities(cycles=9, final=0.0)[-1] == 0.0
    assert Densification(mode="stepped", levels=(0.9, 0.2)).start == 0.9


def test_a_linear_fall_ends_at_the_final_sparsity():
    found = Densification(start=0.8).sparsities(cycles=5, final=0.0)
    assert found == pytest.approx((0.8, 0.6, 0.4, 0.2, 0.0))


def test_a_falling_plan_keeps_its_places_until_the_commit():
    plan = build_plan(config(sparsity=0.0, densify=Densification(start=0.6)))
    found = [(str(s.stage), s.cycle, round(s.sparsity, 9)) for s in plan]
    assert found == [
        ("warmup", -1, 0.0),
        *[("train", 0, 0.0), ("stabilize", 0, 0.6), ("resu", 0, 0.6)],
        *[("train", 1, 0.6), ("stabilize", 1, 0.6), ("resu", 1, 0.6)],
        *[("train", 2, 0.3), ("stabilize", 2, 0.3), ("resu", 2, 0.3)],
        ("recover", -1, 0.0),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(densify=Densification()), r"sparsity: expected less than densify\.start"),
        (lambda: config(sparsity=0.1, densify=Densification(mode="stepped")), "last of densify"),
        (lambda: config(sparsity=0.0, cycles=1, densify=Densification()), "cycles: expected at le"),
        (
            lambda: config(sparsity=0.0, densify=Densification(), cycle=CycleShares(1, 1, 0)),
            r"cycle\.resu: expected more than 0",
        ),
        (
            lambda: config(sparsity=0.0, densify=Densification(pauses=(Pause(3),))),
            "after_cycle below cycles=3, got 3",
        ),
        (
            lambda: config(sparsity=0.0, densify=Densification(), overrides={"0.weight": 0.5}),
            "overrides: expected none with a sparsity that falls",
        ),
        (lambda: Densification(pauses=(Pause(1), Pause(1))), "at most one after each cycle"),
        (lambda: Densification(levels=(0.1, 0.5)), "from high to low"),
        (lambda: Densification(levels=(0.1,)), "two sparsities or more"),
        (lambda: Densification(start=0.0), r"start: expected a number in \(0, 1\)"),
        (lambda: Pause(-1), "after_cycle: expected an integer >= 0"),
    ],
)
def test_bad_densifications_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
