"""What docs/experiments.md shows runs, and its tables are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from resu_compile.experiments import ExperimentConfig, run_experiment, task_names
from resu_compile.experiments.tasks import registry

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")


def block(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return found


def test_config(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "x.yaml").write_text(block("yaml"))
    config = ExperimentConfig.load(tmp_path / "x.yaml")
    assert [method.label for method in config.methods] == [
        "dense",
        "rigl",
        "resu",
        "resu_published",
    ]
    assert config.tasks[0].checkpoint_every == 200
    assert config.lengths == (1, 3)


def test_own_task(tmp_path, monkeypatch):
    def load_splits():
        inputs = torch.randn(30, 8)
        parts = inputs.split(10)
        return [(part, part.sum(1, keepdim=True)) for part in parts]

    names = {"torch": torch, "load_splits": load_splits}
    exec(block("python"), names)
    monkeypatch.setitem(registry._TASKS, "own", names["make_task"])
    config = ExperimentConfig.from_dict(
        {
            "tasks": [{"name": "own", "steps": 40, "options": {"width": 16}}],
            "methods": ["set"],
            "sparsities": [0.5],
            "training": {"compile": False},
            "output": str(tmp_path),
        }
    )
    assert run_experiment(config).done == 1


def test_tables():
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    files = {name for name in names if "/" in name}
    assert names - files == set(task_names())
    assert all((ROOT / name).is_file() for name in files)
    for name in re.findall(r"examples/\w+\.\w+", TEXT):
        assert (ROOT / name).is_file()
