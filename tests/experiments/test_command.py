from __future__ import annotations

import json

import pytest

from resu_compile import cli
from tests.experiments.conftest import TASK


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {
        "tasks": [{"name": TASK, "label": "linear", "steps": 20}],
        "methods": ["dense", "gmp", "rigl"],
        "sparsities": [0.5],
        "training": {"compile": False},
        "output": "out",
    }
    (tmp_path / "experiment.json").write_text(json.dumps(data))
    return tmp_path / "experiment.json"


def test_run_and_report(config_file, capsys):
    pytest.importorskip("scipy")
    folder = config_file.parent
    assert cli.main(["experiment", "experiment.json", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "linear: 3 runs and 0 trials, 60 optimizer steps" in printed
    assert "3 cells, 0 finished; 60 steps to go" in printed
    assert not (folder / "out").exists()

    assert cli.main(["experiment", "experiment.json", "--output", "other"]) == 0
    said = capsys.readouterr()
    assert "3 cells done, 0 failed; results: other/results.jsonl" in said.out
    assert said.err.count("test loss") == 3

    assert cli.main(["experiment", "report", "other", "--method", "gmp"]) == 0
    printed = capsys.readouterr().out
    assert "gmp against each rival" in printed
    assert "one seed" in printed
    assert (folder / "other" / "report" / "report.md").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report"], "expected CONFIG or report RESULTS"),
        (["a.json", "b.json"], "expected CONFIG or report RESULTS"),
        (["report", "nowhere"], "expected a results file or its folder, got nowhere"),
        (["none.json"], "No such file"),
        (["experiment.json", "--device", "cuda:77"], "expected a GPU that torch can use"),
        (["experiment.json", "--output", "experiment.json"], "got the file experiment.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("config_file")
def test_a_wrong_call_exits_with_2(words, message, capsys):
    assert cli.main(["experiment", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_failure_exits_with_1(config_file, capsys):
    data = json.loads(config_file.read_text())
    data["tasks"][0]["options"] = {"broken": True}
    data["methods"] = ["dense"]
    config_file.write_text(json.dumps(data))
    assert cli.main(["experiment", "experiment.json"]) == 1
    assert "0 cells done, 1 failed" in capsys.readouterr().out
