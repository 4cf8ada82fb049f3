"""What counts as fallen, and the files that ratios are stored in."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.baseline import (
    Baseline,
    BaselineError,
    best_of,
    compare,
    load,
    median_of,
    path_of,
    save,
)

MACHINE = {"device": "NVIDIA H200", "torch": "2.11.0", "driver": "580.1", "triton": "3.6.0"}


# -- comparison ------------------------------------------------------------------------------
def test_a_ratio_may_lose_the_tolerance_and_no_more():
    stored = {"a": 2.0, "b": 2.0, "c": 2.0}
    found = compare(stored, {"a": 1.8, "b": 1.79, "c": 2.5})
    assert [change.case for change in found.fell] == ["b"]
    assert [change.case for change in found.kept] == ["a", "c"]
    assert not found.passed


def test_the_worst_comes_first():
    stored = dict.fromkeys("abcd", 1.0)
    found = compare(stored, {"a": 0.5, "b": math.nan, "c": 0.2, "d": 0.85})
    assert [change.case for change in found.fell] == ["b", "c", "a", "d"]


@pytest.mark.parametrize("ratio", [math.nan, -1.0, 0.0])
def test_what_is_no_ratio_fell(ratio):
    assert not compare({"a": 0.01}, {"a": ratio}).passed


def test_a_stored_case_that_was_not_measured_fails():
    found = compare({"a": 1.0, "b": 1.0}, {"a": 1.0})
    assert found.missing == ("b",)
    assert not found.passed


def test_only_what_was_asked_for_can_be_missing_or_fall():
    found = compare({"a": 1.0, "b": 1.0}, {"a": 1.0}, asked=["a"])
    assert found.passed
    assert found.missing == ()


def test_a_new_case_is_named_and_passes():
    found = compare({"a": 1.0}, {"a": 1.0, "z": 0.1})
    assert found.new == ("z",)
    assert found.passed


@pytest.mark.parametrize("tolerance", [-0.1, 1.0])
def test_a_tolerance_is_a_share(tolerance):
    with pytest.raises(ValueError, match="tolerance: expected a share"):
        compare({}, {}, tolerance=tolerance)


ratio_maps = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 100), max_size=6)


@given(ratio_maps, ratio_maps)
def test_every_case_is_in_exactly_one_list(stored, measured):
    found = compare(stored, measured)
    listed = [c.case for c in (*found.fell, *found.kept)] + list(found.missing) + list(found.new)
    assert sorted(listed) == sorted(set(stored) | set(measured))


@given(ratio_maps)
def test_a_run_passes_against_itself(ratios):
    assert compare(ratios, ratios).passed


def test_a_baseline_is_the_middle_of_several_runs():
    runs = [
        {"a": 1.0, "b": 2.0, "c": 1.0},
        {"a": 9.0, "b": math.nan},
        {"a": 3.0, "b": 2.0, "c": 1.0},
    ]
    found = median_of(runs)
    assert found["a"] == 3.0
    assert math.isnan(found["b"])
    assert "c" not in found


def test_a_second_run_can_only_raise_a_ratio():
    first = {"a": 1.0, "b": 2.0, "c": math.nan, "d": math.nan}
    best = best_of(first, {"a": 1.5, "b": 1.0, "c": 3.0, "d": math.nan, "e": 4.0})
    assert {k: best[k] for k in "abce"} == {"a": 1.5, "b": 2.0, "c": 3.0, "e": 4.0}
    assert math.isnan(best["d"])


# -- files -----------------------------------------------------------------------------------
def test_a_baseline_comes_back(tmp_path):
    ratios = {"linear: rows": 1.9312345, "update: fused": 0.0212345}
    path = save(Baseline(MACHINE, ratios), tmp_path)
    assert path == tmp_path / "nvidia-h200.json"
    back = load("NVIDIA H200", tmp_path)
    assert back.environment == MACHINE
    # four digits, whatever the size: rounding must not look like a change
    assert back.ratios == {"linear: rows": 1.931, "update: fused": 0.02123}


def test_a_device_without_a_baseline_is_told_what_to_do(tmp_path):
    save(Baseline(MACHINE, {"a": 1.0}), tmp_path)
    with pytest.raises(BaselineError, match=r"no baseline of 'Abacus'.*nvidia-h200.*bench-save"):
        load("Abacus", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object of format"),
        ('{"format": "other"}', "expected a JSON object of format"),
        ('{"format": "resu_compile benchmark baseline", "version": 0}', "expected version 1"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path_of("NVIDIA H200", tmp_path).write_text(text)
    with pytest.raises(BaselineError, match=message):
        load("NVIDIA H200", tmp_path)


def test_a_file_of_another_device_is_refused(tmp_path):
    path = save(Baseline(MACHINE, {"a": 1.0}), tmp_path)
    content = json.loads(path.read_text())
    content["environment"]["device"] = "NVIDIA H100"
    path.write_text(json.dumps(content))
    with pytest.raises(BaselineError, match="expected a baseline of 'NVIDIA H200'"):
        load("NVIDIA H200", tmp_path)


@pytest.mark.parametrize("ratio", [math.nan, math.inf, 0.0, -1.0])
def test_only_ratios_can_be_stored(ratio):
    with pytest.raises(BaselineError, match="expected a ratio above 0"):
        Baseline(MACHINE, {"a": ratio})
