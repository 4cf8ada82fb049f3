"""The console script: exit codes and messages."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

import resu_compile
from resu_compile import cli
from resu_compile.demo import tasks
from resu_compile.training import verdict, verify


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert resu_compile.__version__ in printed
    assert torch.__version__ in printed


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prune"],
        ["demo", "--task", "mnist"],
        ["demo", "--seed", "-1"],
        ["demo", "--seed", "x"],
        ["train"],
        ["train", "run.yaml", "--device", "tpu"],
        ["plot"],
        ["verify", "--task", "mnist"],
        ["verify", "--sparsity", "high"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: resu-compile" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "verify"])
def test_names_the_missing_packages(command, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    missing = {"sklearn", "tqdm"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    assert cli.main([command]) == 2
    message = capsys.readouterr().err
    assert "scikit-learn, tqdm" in message
    assert "pip install resu-compile[demo]" in message


@pytest.mark.parametrize("command", [["demo"], ["verify"], ["train", "run.json"]], ids=" ".join)
def test_no_gpu(command, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([*command, "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["demo"], ["verify"], ["plot", "stats.jsonl"]], ids=" ".join)
def test_output_must_be_a_folder(command, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert cli.main([*command, "--output", str(file)]) == 2
    assert f"got the file {file}" in capsys.readouterr().err


def test_choices_are_those_of_the_demo():
    assert cli.TASKS == tasks.TASKS
    assert cli.SIZES == tasks.SIZES


@pytest.mark.parametrize(
    ("name", "message"), [("model.bin", "expected a .pt2 file"), ("none.pt2", "No such file")]
)
def test_report_of_a_wrong_file(name, message, tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_report(tmp_path, capsys):
    model = resu_compile.sparsify(torch.nn.Linear(64, 64), sparsity=0.7, compile=False)
    path = tmp_path / "linear.pt2"
    resu_compile.export(model, (torch.zeros(1, 64),), path)
    assert cli.main(["report", str(path)]) == 0
    assert "weight" in capsys.readouterr().out


# -- train, plot, verify ---------------------------------------------------------------------

TASK = """
import torch
from resu_compile.training.tasks import TrainingTask


def make(device="cpu"):
    model = torch.nn.Linear(8, 8, device=device)
    loss = lambda model, batch: model(batch).square().mean()
    return TrainingTask(model, torch.optim.SGD(model.parameters()), loss, [torch.ones(2, 8)])
"""


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    """A run of ten steps on a task in the current directory, which takes no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "linear_task.py").write_text(TASK)
    training = {"steps": 10, "cycles": 1, "compile": False}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"task": "linear_task:make", "output": "o", "training": training}))
    yield path
    sys.modules.pop("linear_task", None)


def test_train_resume_and_plot(run_file, capsys):
    pytest.importorskip("safetensors")
    pytest.importorskip("matplotlib")
    assert cli.main(["train", "run.json", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[2].split()[:1] == ["0"]
    assert table.splitlines()[3].split()[:3] == ["end", "10", "70.31%"]  # 19 of 64 active

    assert cli.main(["train", "run.json"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main(["train", "run.json", "--resume"]) == 0
    assert capsys.readouterr().out == table

    assert cli.main(["plot", "o/stats.jsonl", "--output", "pictures"]) == 0
    written = capsys.readouterr().out.splitlines()
    assert "pictures/learning_curve.png" in written
    assert all((run_file.parent / name).is_file() for name in written)


@pytest.mark.usefixtures("run_file")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.json"], "No such file"),
        (["train", "run.toml"], "expected a name ending in .yaml, .yml or .json"),
        (["plot", "none.jsonl"], "No such file"),
        (["plot", "linear_task.py"], "expected a JSON object in line"),
        (["verify", "--sparsity", "1.5"], "sparsity: expected a number in [0, 1)"),
        (["verify", "--seeds", "0"], "seeds: expected an integer >= 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_run_exits_with_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("resurrected", "code"), [(5, 0), (0, 1)])
def test_verify_exits_by_what_it_finds(resurrected, code, tmp_path, monkeypatch, capsys):
    seen = []

    def found(config, tell):
        seen.append(config)
        tell("one run")
        runs = {name: (verdict.RunNumbers(0, 0.9, resurrected),) for name in verdict.METHODS}
        row = verdict.Row("digits", "accuracy", True, 0.8, runs)
        return verify.VerifyOutcome(config, (row,), 1.0)

    monkeypatch.setattr(verify, "verify", found)
    options = ["--task", "digits", "--sparsity", "0.8", "--quick", "--output", str(tmp_path / "v")]
    assert cli.main(["verify", *options]) == code
    assert (seen[0].tasks, seen[0].sparsities, seen[0].seeds) == (("digits",), (0.8,), 1)
    printed = capsys.readouterr()
    assert ("expected resurrected weights, got none" in printed.out) == (code == 1)
    assert ("All checks passed." in printed.out) == (code == 0)
    assert "one run" in printed.err
    assert (tmp_path / "v" / "verify.json").is_file()
