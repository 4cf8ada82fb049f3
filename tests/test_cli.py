"""The console script: exit codes and messages."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import resu_compile
from resu_compile import cli
from resu_compile.demo import tasks


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert resu_compile.__version__ in printed
    assert torch.__version__ in printed


@pytest.mark.parametrize(
    "arguments",
    [[], ["prune"], ["demo", "--task", "mnist"], ["demo", "--seed", "-1"], ["demo", "--seed", "x"]],
    ids=" ".join,
)
def test_a_wrong_call_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: resu-compile" in capsys.readouterr().err


def test_names_the_missing_packages(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    missing = {"sklearn", "tqdm"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    assert cli.main(["demo"]) == 2
    message = capsys.readouterr().err
    assert "scikit-learn, tqdm" in message
    assert "pip install resu-compile[demo]" in message


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_output_must_be_a_folder(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert cli.main(["demo", "--output", str(file)]) == 2
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
