"""The regression suite around its benchmarks: exit codes, second chances, names."""

from __future__ import annotations

import math

import pytest

from benchmarks import baseline, suite
from benchmarks.environment import environment
from benchmarks.group_table import ratios_of, run, to_result
from benchmarks.harness import Entry, Group, Timing, case_name, measure, ratios


def make_group(name="g", build=None):
    return Group(name, ("plain", "ours"), ("plain",), build or dict)


def clock(*speedups):
    """A stand-in for ``measure`` that gives these ratios, one after the other."""
    left = iter(speedups)

    def take(_group):
        return {"plain": Timing(1.0, 0.0), "ours": Timing(1.0 / next(left), 0.0)}

    return take


@pytest.fixture
def stored(tmp_path):
    """A folder whose baseline of this machine says 2.0 for group g."""
    baseline.save(baseline.Baseline(environment(), {"g: ours": 2.0}), tmp_path)
    return tmp_path


# -- exit codes ------------------------------------------------------------------------------
def test_a_ratio_that_kept_passes(stored, capsys):
    assert suite.compare([make_group()], whole=True, measure=clock(1.9), folder=stored) == 0
    assert "passed: 1 ratios" in capsys.readouterr().out


def test_a_ratio_that_fell_twice_fails_and_is_named(stored, capsys):
    found = suite.compare([make_group()], whole=True, measure=clock(1.5, 1.6), folder=stored)
    assert found == suite.FELL == 1
    assert "g: ours: 2.00x -> 1.60x" in capsys.readouterr().out


def test_a_ratio_that_fell_once_passes(stored):
    found = suite.compare([make_group()], whole=True, measure=clock(1.0, 2.1), folder=stored)
    assert found == suite.PASSED


def test_a_second_measurement_may_take_longer(stored):
    found = suite.compare(
        [make_group()], whole=True, measure=clock(1.0), again=clock(2.0), folder=stored
    )
    assert found == suite.PASSED


def test_only_groups_that_fell_run_again(stored):
    baseline.save(baseline.Baseline(environment(), {"g: ours": 2.0, "h: ours": 1.0}), stored)
    seen = []

    def take(group):
        seen.append(group.name)
        return {"plain": Timing(1.0, 0.0), "ours": Timing(1.0, 0.0)}

    groups = [make_group("g"), make_group("h")]
    assert suite.compare(groups, whole=True, measure=take, folder=stored) == suite.FELL
    assert seen == ["g", "h", "g"]


def test_without_a_baseline_nothing_runs(tmp_path, capsys):
    def never(_group):
        raise AssertionError("ran")

    assert suite.compare([make_group()], whole=True, measure=never, folder=tmp_path) == 2
    assert "no baseline of" in capsys.readouterr().out


def test_a_case_that_is_gone_fails_only_a_whole_run(stored):
    groups = [make_group("other")]
    whole = suite.compare(groups, whole=True, measure=clock(1.0), folder=stored)
    part = suite.compare(groups, whole=False, measure=clock(1.0), folder=stored)
    assert (whole, part) == (suite.FELL, suite.PASSED)


def test_a_part_is_stored_beside_the_rest(stored):
    suite.save({"h: ours": 3.0, "i: ours": math.nan}, replace=False, folder=stored)
    assert baseline.load(environment()["device"], stored).ratios == {"g: ours": 2.0, "h: ours": 3.0}
    suite.save({"h: ours": 3.0}, replace=True, folder=stored)
    assert baseline.load(environment()["device"], stored).ratios == {"h: ours": 3.0}


# -- groups ----------------------------------------------------------------------------------
def test_a_group_that_raises_falls_and_the_others_run():
    def build():
        raise AssertionError("wrong result")

    records = run([make_group("bad", build), make_group("good", lambda: ENTRIES)])
    found = ratios_of(records)
    assert math.isnan(found["bad: ours"])
    assert found["good: ours"] > 0


def work():
    return sum(range(50))


ENTRIES = {"plain": Entry((work,)), "ours": Entry((work, work, work), moved_bytes=100.0)}


def test_a_time_is_that_of_one_call():
    timings = measure(make_group(build=lambda: ENTRIES))
    # the same work a call, so three calls in a row are no three times slower
    assert 0.3 < ratios(make_group(), timings)["ours"] < 3


def test_the_fastest_reference_counts():
    group = Group("g", ("a", "b", "ours"), ("a", "b"), dict)
    times = {"a": Timing(4.0, 0.0), "b": Timing(3.0, 0.0), "ours": Timing(2.0, 0.0)}
    assert ratios(group, times) == {"ours": 1.5}


@pytest.mark.parametrize("references", [(), ("other",), ("plain", "ours")])
def test_a_group_needs_references_and_something_to_judge(references):
    with pytest.raises(ValueError, match="expected references"):
        Group("g", ("plain", "ours"), references, dict)


def test_an_implementation_that_was_not_built_is_an_error():
    with pytest.raises(ValueError, match="built"):
        measure(make_group(build=lambda: {"plain": ENTRIES["plain"]}))


def test_all_groups_have_names_of_their_own():
    groups = suite.all_groups()
    cases = suite.ratio_cases(groups)
    assert len(cases) == len(set(cases)) > 10
    assert {case_name(g, i) for g in groups for i in g.impls} > set(cases)


def test_a_record_becomes_a_row():
    records = run([make_group(build=lambda: ENTRIES)])
    result = to_result(records, "title", "command")
    assert [row[1] for row in result.rows] == ["plain", "ours"]
    assert result.rows[0][-1] == "reference"
    assert result.rows[1][-1].endswith("x")


# -- the smallest forms ----------------------------------------------------------------------
def test_every_benchmark_has_a_smallest_form():
    for name in suite.module_names():
        known = name in suite.SMALLEST_ARGUMENTS
        assert known != hasattr(suite.load_module(name), "groups"), name


QUICK = ["bench_sparse_linear", "bench_pack", "bench_masks", "bench_fused_update"]


@pytest.mark.parametrize("name", [*QUICK, "bench_selective_step"])
def test_quick_benchmarks_run(name, capsys):
    assert suite.smoke([name]) == suite.PASSED, capsys.readouterr().out


def test_a_smallest_form_that_fails_is_told(monkeypatch, capsys):
    def fail(_name):
        raise RuntimeError("boom")

    monkeypatch.setattr(suite, "load_module", fail)
    assert suite.smoke(["bench_x"]) == suite.FELL
    assert "bench_x" in capsys.readouterr().out
