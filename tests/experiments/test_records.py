from __future__ import annotations

import json
import multiprocessing

import pytest

from resu_compile.experiments.records import append_record, by_key, locked, read_records


def write(path, name):
    for i in range(100):
        append_record(path, {"key": f"{name}-{i}", "filler": "x" * 5000})


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    assert read_records(path) == []
    append_record(path, {"key": "a", "value": float("nan"), "list": [float("inf"), 1.5]})
    append_record(path, {"key": "b"})
    found = read_records(path)
    assert [record["key"] for record in found] == ["a", "b"]
    assert (found[0]["value"], found[0]["list"]) == (None, [None, 1.5])


@pytest.mark.parametrize("left", [1, 20, 60])
def test_a_line_that_a_kill_cut_short(tmp_path, left):
    path = tmp_path / "results.jsonl"
    append_record(path, {"key": "a"})
    append_record(path, {"key": "b"})
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    path.write_bytes(whole[: min(second + left, len(whole) - 1)])
    assert [record["key"] for record in read_records(path)] == ["a"]
    append_record(path, {"key": "c"})
    assert [record["key"] for record in read_records(path)] == ["a", "c"]


def test_several_processes_append(tmp_path):
    path = tmp_path / "results.jsonl"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    found = read_records(path)
    assert {r["key"] for r in found} == {f"{n}-{i}" for n in "ab" for i in range(100)}
    assert len(found) == 200


def test_a_lock_is_seen(tmp_path):
    path = tmp_path / "claims" / "x.lock"
    with locked(path) as first:
        assert first is not None
        with locked(path, wait=False) as second:
            assert second is None
    with locked(path, wait=False) as third:
        assert third is not None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "expected a record of an experiment in line 1"),
        ("x", "expected a record of an experiment in line 1"),
        (json.dumps({"format": "resu_compile.experiment", "format_version": 9}), "version 1"),
    ],
)
def test_another_file(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_a_success_replaces_a_failure():
    rows = [("a", "failed", 1), ("a", "done", 2), ("a", "failed", 3), ("b", "failed", 4)]
    found = by_key([{"key": k, "status": s, "n": n} for k, s, n in rows])
    assert {key: record["n"] for key, record in found.items()} == {"a": 2, "b": 4}
