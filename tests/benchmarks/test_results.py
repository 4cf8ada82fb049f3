"""Result files, and what is made of them."""

from __future__ import annotations

import json

import pytest

from benchmarks.environment import describe, slug
from benchmarks.results import Result, ResultError, load

MACHINE = {
    "device": "NVIDIA H200",
    "driver": "580.1",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "resu_compile": "unknown",
}
RESULT = Result(
    "Speed of light",
    "python -m benchmarks.bench_light",
    ["medium", "m/s"],
    [["vacuum", "299792458"], ["glass", None]],
    [{"medium": "vacuum", "speed": 299792458}],
    MACHINE,
)


def test_a_result_comes_back(tmp_path):
    RESULT.save(tmp_path / "deep" / "light.json")
    assert load(tmp_path / "deep" / "light.json") == RESULT


def test_an_empty_result_is_json(tmp_path):
    Result("t", "c", ["a"], [], [], MACHINE).save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == []


def test_markdown_names_the_machine_and_the_command():
    assert RESULT.markdown() == (
        "Speed of light. NVIDIA H200, driver 580.1, CUDA 13.0, torch 2.11.0, Triton 3.6.0.\n\n"
        "`python -m benchmarks.bench_light`\n\n"
        "| medium | m/s |\n| --- | --- |\n| vacuum | 299792458 |\n| glass |  |"
    )


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ResultError, match="expected 2 cells in a row, got 1"):
        Result("t", "c", ["a", "b"], [["x"]], [], MACHINE)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "x"}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ResultError, match="expected"):
        load(tmp_path / "r.json")


def test_a_device_makes_a_file_name():
    assert slug("AMD EPYC 9B14 @ 2.6 GHz, 1 thread") == "amd-epyc-9b14-2-6-ghz-1-thread"
    assert describe({"device": "x", "torch": "2"}) == "x, torch 2"
