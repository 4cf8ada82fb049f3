"""Intervals against scipy and by hand; the report of a results file that was written by hand."""

from __future__ import annotations

import csv
import math
import statistics
import sys

import pytest

from resu_compile.errors import ArgumentError
from resu_compile.experiments.intervals import interval_of, paired_difference
from resu_compile.experiments.records import append_record, read_records
from resu_compile.experiments.report import (
    cost_rows,
    difference_rows,
    metric_rows,
    write_report,
)
from resu_compile.experiments.table import group_runs

# bits per byte, so that less is better
SCORES = {
    ("dense", 0.0): [0.80, 0.82, 0.81],
    ("resu", 0.9): [0.88, 0.87, 0.89],
    ("rigl", 0.9): [0.98, 0.99, 0.97],
    ("gmp", 0.9): [0.87, 0.89, 0.88],
    ("resu", 0.7): [0.83, 0.84],
    ("rigl", 0.7): [0.90],
}
pytest.importorskip("scipy")

T_2 = 4.302653  # t(0.975) with 2 degrees of freedom, as printed in tables


def record(method, sparsity, seed, score, **changes):
    return {
        "key": f"{method} {sparsity} {seed} {changes.get('length', 1.0)} {changes.get('kind')}",
        "kind": "run",
        "status": "done",
        "task": "bytes",
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "length": 1.0,
        "dense_steps": 3000,
        "budget": "steps",
        "trial": -1,
        "steps": 3000,
        "settings": {},
        "metric": "bits per byte",
        "higher_is_better": False,
        "scores": {"validation": {"bits per byte": 9.0}, "test": {"bits per byte": score}},
        "flops": {"training": 1.0 - sparsity / 2, "inference": 1.0 - sparsity, "capped": False},
        "ever_share": 0.5,
        "mean_churn": 0.01,
        "elapsed_s": 1.0,
        "environment": {
            "source": "abc",
            "python": "3.11",
            "versions": {"torch": "2.13"},
            "cores": 2,
            "threads": 1,
        },
        **changes,
    }


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.jsonl"
    for (method, sparsity), scores in SCORES.items():
        for seed, score in enumerate(scores):
            append_record(path, record(method, sparsity, seed, score))
    return path


# -- intervals -------------------------------------------------------------------------------
def test_interval_by_hand():
    """1, 2, 3: mean 2, s 1, so that the half width is t / sqrt(3)."""
    found = interval_of([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half_width == pytest.approx(T_2 / math.sqrt(3), rel=1e-6)
    assert (found.low, found.high) == (2.0 - found.half_width, 2.0 + found.half_width)
    # t = 2 sqrt(3), and with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    assert found.p_value == pytest.approx(1.0 - math.sqrt(12.0 / 14.0), rel=1e-12)
    assert found.verdict == "level"


def test_paired_difference_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    first = {0: 0.91, 1: 0.88, 2: 0.93, 3: 0.90, 7: 0.5}
    second = {0: 0.87, 1: 0.86, 2: 0.90, 3: 0.89, 8: 0.1}
    common = [0, 1, 2, 3]
    expected = stats.ttest_rel([first[s] for s in common], [second[s] for s in common])
    ends = expected.confidence_interval(0.95)
    found = paired_difference(first, second, higher_is_better=True)
    assert found.count == 4
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), rel=1e-9)
    assert found.verdict == "better"
    other = paired_difference(first, second, higher_is_better=False)
    assert (other.mean, other.verdict) == (-found.mean, "worse")
    assert other.p_value == found.p_value


def test_pairs_are_narrower_than_seeds():
    """What a seed adds to both is no part of the difference."""
    first = {s: 10.0 * s for s in range(5)}
    second = {s: 10.0 * s - 1.0 - 0.01 * (s % 2) for s in range(5)}
    found = paired_difference(first, second, higher_is_better=True)
    assert found.half_width < 0.02 < interval_of(list(first.values())).half_width
    assert found.mean == pytest.approx(1.004)


@pytest.mark.parametrize(
    ("values", "verdict", "p_value"), [([2.0], "one seed", None), ([0.0, 0.0], "level", 1.0)]
)
def test_little_to_go_by(values, verdict, p_value):
    found = interval_of(values)
    assert (found.verdict, found.p_value) == (verdict, p_value)


def test_nothing_in_common():
    assert paired_difference({0: 1.0}, {1: 1.0}, higher_is_better=True) is None
    with pytest.raises(ArgumentError, match="values: expected one at least"):
        interval_of([])


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ArgumentError, match=r"pip install resu-compile\[experiment\]"):
        interval_of([1.0, 2.0])


# -- tables ----------------------------------------------------------------------------------
def test_tables(results):
    (group,) = group_runs(read_records(results))
    half = T_2 * 0.01 / math.sqrt(3)
    rows = {row[0]: row[1:] for row in metric_rows(group)}
    assert rows["method"] == ["0.7", "0.9"]
    assert list(rows)[1] == "dense"
    assert rows["dense"] == [f"0.8100 ± {half:.4f} (3)"] * 2
    assert rows["rigl"] == ["0.9000 (1 of 3)", f"0.9800 ± {half:.4f} (3)"]
    assert rows["gmp"][0] == "-"

    rows = {row[0]: row[1:] for row in difference_rows(group, "resu")}
    gains = [s - r for s, r in zip(SCORES["rigl", 0.9], SCORES["resu", 0.9], strict=True)]
    half = T_2 * statistics.stdev(gains) / math.sqrt(3)
    assert rows["rigl"][1].startswith(f"+0.1000 [{0.1 - half:+.4f}, {0.1 + half:+.4f}], p 0.0")
    assert rows["rigl"][1].endswith(", better")
    assert rows["rigl"][0] == "+0.0700, one seed"
    assert rows["gmp"][0] == "-"
    assert rows["gmp"][1].endswith("level")
    assert rows["dense"][1].endswith("worse")


def test_scores_on_training_data_where_a_task_gives_them(results):
    (group,) = group_runs(read_records(results))
    assert cost_rows(group)[0][-1] == "churn"
    for seed, fit in enumerate([0.5, 0.6]):
        scores = {"test": {"bits per byte": 0.9}, "training": {"bits per byte": fit}}
        append_record(results, record("new", 0.9, seed, 0.9, scores=scores))
    (group,) = group_runs(read_records(results))
    head, *rows = cost_rows(group)
    assert head[-1] == "bits per byte in training"
    assert {row[0]: row[-1] for row in rows if row[1] == "0.9"}["new"] == "0.550"
    assert {row[0]: row[-1] for row in rows if row[1] == "0.9"}["resu"] == "-"


def test_files(results, tmp_path):
    pytest.importorskip("matplotlib")
    found = write_report(results)
    assert [path.name for path in found.files] == [
        "report.md",
        "runs.csv",
        "summary.csv",
        "pairs.csv",
        "bytes-x1-3000-steps-sparsity.png",
        "bytes-x1-3000-steps-flops.png",
    ]
    assert all(path.parent == tmp_path / "report" for path in found.files)
    assert all(path.stat().st_size > 100 for path in found.files)
    assert found.files[0].read_text() == found.text
    assert "## bytes, 1x (3000 steps), equal steps" in found.text
    assert (
        "Incomplete: bytes, 1x (3000 steps), equal steps, rigl at 0.7: 1 of 3 seeds." in found.text
    )
    assert "2 CPU cores, 1 threads; Python 3.11, torch 2.13; source abc." in found.text

    def rows(index):
        with found.files[index].open() as file:
            return list(csv.DictReader(file))

    assert len(rows(1)) == sum(map(len, SCORES.values()))
    summary = {(r["method"], r["sparsity"]): r for r in rows(2)}
    assert float(summary["gmp", "0.9"]["mean"]) == pytest.approx(0.88)
    assert summary["rigl", "0.7"]["low"] == ""
    pairs = {(r["rival"], r["sparsity"]): r for r in rows(3)}
    assert pairs["rigl", "0.9"]["verdict"] == "better"
    assert float(pairs["rigl", "0.9"]["difference"]) == pytest.approx(0.1)
    assert ("gmp", "0.7") not in pairs


def test_pictures_show_the_means(results, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", drawn.append)
        write_report(results)
    for figure in drawn:
        pyplot.close(figure)  # it can still be looked at
    over_sparsity, over_flops = (figure.axes[0] for figure in drawn)
    lines = {line.get_label(): line for line in over_flops.get_lines()}
    assert set(lines) == {"dense", "resu", "rigl", "gmp"}
    assert list(lines["resu"].get_xdata()) == pytest.approx([0.65, 0.55])
    assert list(lines["resu"].get_ydata()) == pytest.approx([0.835, 0.88])
    low, high = over_sparsity.get_ylim()
    assert low < 0.81 < 0.98 < high
    assert [text.get_text() for text in over_sparsity.get_legend().get_texts()][0] == "dense"


def test_what_must_not_be_hidden(results):
    trial = {"kind": "trial", "trial": 1, "scores": {"validation": {"bits per byte": 1.0}}}
    append_record(results, record("resu", 0.9, 1000, None, **trial))
    failed = {"kind": "run", "length": 3.0, "status": "failed", "error": "ArgumentError: NaN"}
    append_record(results, record("set", 0.9, 0, None, **failed))
    append_record(results, record("rigl", 0.7, 1, float("nan")))
    other = record("resu", 0.7, 2, 0.85, settings={"every": 7})
    other["environment"] = {**other["environment"], "source": "def", "gpu": "NVIDIA H200"}
    other["flops"]["capped"] = True
    append_record(results, other)
    text = write_report(results).text
    assert "chosen by 1 trials on validation data with seed 1000, which is not reported" in text
    assert "Failed: bytes, 3x, set at 0.9, seed 0: ArgumentError: NaN" in text
    assert "Not finite: bytes, 1x (3000 steps), equal steps, rigl at 0.7: 1 of 2 runs" in text
    assert "Capped: bytes, 1x (3000 steps), equal steps, resu at 0.7" in text
    assert "Made by 2 versions of the source (abc, def)." in text
    assert "Mixed: bytes, 1x (3000 steps), equal steps, resu at 0.7" in text
    assert "in part (CPU, torch 2.13; NVIDIA H200, torch 2.13)." in text
    assert '{"every": 7}' in text


def test_other_lengths_and_budgets_are_groups(results):
    append_record(results, record("resu", 0.9, 0, 0.8, length=3.0, dense_steps=9000))
    append_record(results, record("resu", 0.9, 0, 0.8, dense_steps=100, key="short"))
    append_record(results, record("resu", 0.9, 0, 0.7, budget="flops", kind="run"))
    titles = [group.title for group in group_runs(read_records(results))]
    assert titles == [
        "bytes, 1x (3000 steps), equal steps",
        "bytes, 3x (9000 steps), equal steps",
        "bytes, 1x (100 steps), equal steps",
        "bytes, 1x (3000 steps), equal training FLOPs",
    ]


@pytest.mark.parametrize(("spent", "told"), [(1.015, False), (1.08, True), (0.9, True)])
def test_a_missed_budget_is_told_of(results, spent, told):
    flops = {"training": spent, "inference": 0.1, "capped": False}
    append_record(results, record("gmp", 0.9, 0, 0.9, budget="flops", key="f", flops=flops))
    text = write_report(results).text
    line = f"gmp at 0.9 spent {spent:.3f} to {spent:.3f} of the training FLOPs."
    assert (f"Off budget: bytes, 1x (3000 steps), equal training FLOPs, {line}" in text) is told


def test_runs_of_an_earlier_config_are_told_of(results):
    append_record(results, record("resu", 0.9, 0, 0.5, key="another"))
    (group,) = group_runs(read_records(results))
    assert group.scores("resu", 0.9)[0] == 0.5
    assert "Replaced: bytes, 1x (3000 steps), equal steps: 1 runs of an earlier config" in (
        write_report(results).text
    )


def test_another_method_stands_out(results):
    assert "gmp against each rival" in write_report(results.parent, method="gmp").text
    assert "against each rival" not in write_report(results, method="none").text


def test_no_results(tmp_path):
    with pytest.raises(ArgumentError, match="expected a results file or its folder"):
        write_report(tmp_path)
    append_record(tmp_path / "results.jsonl", record("resu", 0.9, 0, 0.1, kind="trial"))
    with pytest.raises(ArgumentError, match="expected a reported run that succeeded"):
        write_report(tmp_path)


def test_metrics_of_one_task_agree(results):
    append_record(results, record("resu", 0.9, 5, 0.1, metric="loss"))
    with pytest.raises(ArgumentError, match="task bytes: expected one metric"):
        write_report(results)
