"""What docs/methods.md shows runs, and its table is complete."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import torch

from resu_compile.methods import get_training_method, training_method_names
from resu_compile.methods.criteria import CRITERIA
from tests.methods.runs import assert_sparse, loss_of, make_batches, make_model

TEXT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    model = make_model()
    names = {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters()),
        "loss_fn": loss_of,
        "batches": itertools.cycle(make_batches()),
    }
    exec(code.replace("steps=5000", "steps=220, compile=False"), names)
    assert names["run"].updates[-1].step == 100
    assert names["run"].stats().sparsity > 0.85
    assert "training_flops" in capsys.readouterr().out
    assert_sparse(names["run"], names["optimizer"])


def test_the_table_names_every_method():
    rows = re.findall(r'^\| `"(\w+)"` \|', TEXT, re.MULTILINE)
    assert sorted(rows) == training_method_names()


def test_the_axes_are_all_there():
    axes = TEXT.split("## Axes")[1]
    assert all(f'`"{name}"`' in axes for name in CRITERIA)
    row = next(line for line in axes.splitlines() if line.startswith("| pattern |"))
    keep = [name for name in training_method_names() if get_training_method(name).keeps_pattern]
    assert re.findall(r"`(\w+)`", row.split("of ")[1]) == keep
