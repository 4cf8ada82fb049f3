"""docs/results.md stands on the records that are kept, and is made of them alone."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import performance_page, results_page
from resu_compile.experiments.records import read_records


def test_the_page_is_up_to_date():
    assert results_page.main(["--check"]) == 0


def test_every_region_names_a_part_and_a_file():
    text = results_page.PAGE.read_text(encoding="utf-8")
    names = [name.partition(":") for name in performance_page.names_of(text)]
    assert names
    for name, _, part in names:
        assert part in results_page.PARTS
        assert (results_page.RESULTS / f"{name}.jsonl").is_file()


def test_a_changed_number_is_found(monkeypatch, tmp_path):
    text = results_page.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "results.md"
    begin = text.index(":scores -->")
    number = re.compile(r"\d\.\d+").search(text, begin)
    changed = text[: number.start()] + "7" + text[number.start() + 1 :]
    page.write_text(changed, encoding="utf-8")
    monkeypatch.setattr(results_page, "PAGE", page)
    assert results_page.main(["--check"]) == 1


@pytest.mark.parametrize("name", ["evidence_bytes", "evidence_digits"])
def test_taking_keeps_the_newest_record_of_each_cell(monkeypatch, tmp_path, name):
    records = read_records(results_page.RESULTS / f"{name}.jsonl")
    older = {**records[0], "scores": {}, "training": {"steps": 1}}
    whole = [{**r, "environment": {**r["environment"], "platform": "Linux"}} for r in records]
    source = tmp_path / "runs.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in [older, *whole]), encoding="utf-8")
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    assert read_records(results_page.take(source, name)) == records


@pytest.mark.parametrize("name", ["evidence_bytes:nothing", "nothing:scores"])
def test_a_region_that_cannot_be_made_is_named(name):
    with pytest.raises(performance_page.PageError, match=f"^{name}: expected FILE:PART"):
        results_page.render(name)
