"""The judgement on runs, with numbers made by hand, and one quick run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import resu_compile
from resu_compile.errors import ArgumentError
from resu_compile.runtime.commit_report import CommitReport, WeightCommit
from resu_compile.training import Stage, build_plan
from resu_compile.training.verdict import Estimate, Row, RunNumbers, notes_on, verify_table
from resu_compile.training.verify import (
    VerifyConfig,
    VerifyOutcome,
    count_problems,
    method_config,
    report_problems,
    run_method,
    verified_task,
    verify,
)

DENSE, ONE_SHOT = [0.9, 0.92, 0.94], [0.8, 0.83, 0.83]


def runs(scores, resurrected=0, **more):
    return tuple(RunNumbers(i, s, resurrected, **more) for i, s in enumerate(scores))


def row(resu=(0.86, 0.88, 0.9), dense=DENSE, one_shot=ONE_SHOT, gradual=(0.85, 0.86, 0.87), **more):
    found = {
        "dense": runs(dense),
        "one_shot": runs(one_shot),
        "gradual": runs(gradual),
        "resu": runs(resu, resurrected=5),
    }
    values = {"metric": "accuracy", "higher_is_better": True, "sparsity": 0.9, "runs": found}
    return Row("digits", **{**values, **more})


# -- arithmetic ------------------------------------------------------------------------------


def test_lost_and_recovered():
    made = row()
    assert made.lost.mean == pytest.approx((0.1 + 0.09 + 0.11) / 3)
    assert made.lost.error == pytest.approx(0.01 / math.sqrt(3))
    assert made.recovered == pytest.approx((0.06 + 0.05 + 0.07) / 0.3)
    assert made.failures() == []
    assert made.verdict() == "ok"


def test_lower_is_better_turns_the_signs():
    flipped = row(
        metric="bits per byte",
        higher_is_better=False,
        dense=[1.0, 1.1, 1.2],
        one_shot=[2.0, 2.2, 2.1],
        resu=[1.2, 1.3, 1.4],
        gradual=[1.3, 1.5, 1.4],
    )
    assert flipped.lost.mean == pytest.approx(1.0)
    assert flipped.recovered == pytest.approx(0.8)
    assert flipped.gain("resu", over="gradual").mean == pytest.approx(0.1)


def test_half_is_not_enough():
    half = row(dense=[4.0, 4.0], one_shot=[2.0, 2.0], resu=[3.0, 3.0], gradual=[3.0, 3.0])
    assert half.recovered == 0.5
    assert half.verdict() == "FAILED"
    assert half.failures() == [
        "digits at 90%: expected RESU to recover more than 50% of what one-shot lost, got 50%"
    ]
    more = row(dense=[4.0, 4.0], one_shot=[2.0, 2.0], resu=[3.1, 3.0], gradual=[3.0, 3.0])
    assert more.failures() == []


def test_worse_than_one_shot_fails():
    worse = row(resu=(0.7, 0.7, 0.7))
    assert worse.recovered < 0
    assert "got -120%" in worse.failures()[0]


@pytest.mark.parametrize(
    "one_shot",
    [[0.9, 0.92, 0.94], [0.91, 0.9, 0.94], [0.95, 0.96, 0.97]],
    ids=["equal", "within noise", "better than dense"],
)
def test_no_loss_to_recover(one_shot):
    made = row(one_shot=one_shot, resu=(0.1, 0.1, 0.1))
    assert made.recovered is None
    assert made.failures() == []
    assert made.verdict() == "no loss to recover"
    assert any("digits at 90%: no loss to recover" in note for note in notes_on([made]))


def test_noise_is_two_standard_errors_of_the_pairs():
    # differences 1, 1, 4: mean 2, standard error 1; exactly two of them are no loss
    assert not Estimate.of([1.0, 1.0, 4.0]).is_positive
    assert Estimate.of([1.0, 1.0, 3.9]).is_positive
    # the seeds differ by far more than the methods do, but each pair says the same
    assert row(dense=[0.1, 0.5, 0.9], one_shot=[0.0, 0.4, 0.8]).lost.is_positive


def test_one_seed_judges_counts_alone():
    made = row(dense=[0.9], one_shot=[0.5], resu=[0.1], gradual=[0.4])
    assert made.lost.error is None
    assert made.recovered is None
    assert made.failures() == []
    assert any("One seed says nothing" in note for note in notes_on([made]))


def test_nothing_resurrected_fails():
    made = row()
    made = row(runs={**made.runs, "resu": runs([0.9, 0.9, 0.9])})
    assert len(made.failures()) == 3
    assert "seed 1: expected resurrected weights, got none" in made.failures()[1]


def test_a_wrong_count_fails_in_any_method():
    made = row()
    made = row(runs={**made.runs, "gradual": runs([0.9] * 3, problems=("w: off",))})
    assert made.failures()[0] == "digits at 90%, seed 0, gradual: w: off"
    assert made.verdict() == "FAILED"


def test_quick_rows_do_not_judge_recovery():
    assert row(resu=(0.7, 0.7, 0.7), judge_recovery=False).failures() == []


# -- what is shown ---------------------------------------------------------------------------


def test_table():
    lines = verify_table([row()]).splitlines()
    for text in ("92.00 ± 2.00", "82.00 ± 1.73", "88.00 ± 2.00", "+10.00 ± 0.58", "60%", "ok"):
        assert text in lines[2]
    assert lines[2].split()[:3] == ["digits,", "%", "90%"]


def test_says_where_resu_loses_to_gradual():
    made = row(gradual=(0.89, 0.9, 0.92))
    assert any("RESU is worse than gradual" in note for note in notes_on([made]))
    assert not any("worse than gradual" in note for note in notes_on([row()]))


def test_outcome_says_how_it_ends(tmp_path):
    config = VerifyConfig()
    good, bad = VerifyOutcome(config, (row(),), 3.0), VerifyOutcome(config, (row([0.1] * 3),), 3.0)
    assert good.passed
    assert good.text().endswith("All checks passed.")
    assert "The plan is preset 'default'." in good.text()
    assert not bad.passed
    assert bad.text().splitlines()[-1].startswith("FAILED: digits at 90%: expected RESU")
    data = json.loads(bad.write(tmp_path / "new").read_text())
    assert data["failures"] == bad.failures
    assert data["rows"][0]["runs"]["resu"][2]["score"] == 0.1


# -- counts ----------------------------------------------------------------------------------


def test_counts_of_a_report():
    report = CommitReport(
        "amnesty",
        {"a": WeightCommit(100, 28, 2, 2), "b": WeightCommit(10, 2, 2, 0)},
    )
    assert report_problems(report, 0.7, step=9) == [
        "b: expected 3 active entries of 10 after step 9, got 4"
    ]


def test_counts_of_a_model():
    model = resu_compile.sparsify(nn.Linear(10, 10), sparsity=0.7, compile=False)
    controller = resu_compile.controller(model)
    assert count_problems(controller, 0.7) == []
    assert count_problems(controller, 0.5) == ["weight: expected 50 active entries, got 30"]
    with torch.no_grad():
        model.weight.add_(1.0)
    assert count_problems(controller, 0.7) == [
        "weight: expected zeros where it is pruned, got 70 other values"
    ]


# -- plans -----------------------------------------------------------------------------------


def test_plans_are_fair():
    """Equal steps; one-shot is pruned where RESU first holds the final sparsity."""
    plans = {
        method: build_plan(method_config(method, steps=600, sparsity=0.7, seed=0))
        for method in ("dense", "one_shot", "gradual", "resu")
    }
    assert {plan[-1].stop for plan in plans.values()} == {600}
    assert {span.sparsity for span in plans["dense"]} == {0.0}
    one_shot = plans["one_shot"]
    assert [span.sparsity for span in one_shot] == [0.0, 0.7]
    full = next(span.start for span in plans["resu"] if span.sparsity == 0.7)
    assert one_shot[1].start == full
    published = method_config("resu", steps=600, sparsity=0.7, seed=0, base="published")
    assert published.resurrection.freeze_active
    assert published.warmup == 0.0
    ends = [(s.start, s.sparsity) for s in plans["resu"] if s.stage is Stage.RESU]
    assert [(s.start, s.sparsity) for s in plans["gradual"] if s.stage is Stage.STABILIZE] == ends
    assert not any(span.stage is Stage.RESU for m in ("gradual", "one_shot") for span in plans[m])


# -- the whole -------------------------------------------------------------------------------


def test_quick():
    pytest.importorskip("sklearn")
    lines = []
    config = VerifyConfig(tasks=("digits",), sparsities=(0.7, 0.9), seeds=1, quick=True)
    outcome = verify(config, tell=lines.append)
    assert outcome.passed
    assert len(lines) == 7  # one dense run serves both sparsities
    assert [made.sparsity for made in outcome.rows] == [0.7, 0.9]
    for made in outcome.rows:
        (run,) = made.runs["resu"]
        assert run.resurrected > 0
        assert 0.0 < run.came_back < 0.5
        assert made.runs["gradual"][0].resurrected == made.runs["gradual"][0].came_back == 0
    again = run_method(verified_task("digits", config), "resu", config, sparsity=0.9, seed=0)
    assert [again.score] == outcome.rows[1].scores("resu")


def test_the_small_gpt_gets_more_steps():
    task = verified_task("bytes", VerifyConfig())
    assert (task.width, task.layers, task.context) == (64, 2, 64)
    assert task.build(0).blocks[1].up.weight.shape == (256, 64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ("mnist",)}, "tasks: expected one of bytes, digits"),
        ({"tasks": ()}, "got none"),
        ({"sparsities": (0.0,)}, r"expected a number in \(0, 1\), got 0"),
        ({"sparsities": (1.0,)}, r"sparsity: expected a number in \[0, 1\)"),
        ({"sparsities": ()}, "got none"),
        ({"seeds": 0}, "seeds: expected an integer >= 1"),
        ({"size": "huge"}, "size: expected one of"),
        ({"device": "tpu"}, "device: expected one of"),
        ({"preset": "fast"}, "preset: expected one of"),
        ({"preset": "densification"}, "preset: expected one whose sparsity rises"),
    ],
)
def test_a_wrong_config(wrong, message):
    with pytest.raises(ArgumentError, match=message):
        VerifyConfig(**wrong)
