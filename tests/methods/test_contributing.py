"""The training method that CONTRIBUTING.md adds works."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from resu_compile.methods import register_method
from resu_compile.methods.criteria import Criterion
from resu_compile.methods.drop_and_grow import DropAndGrow
from resu_compile.methods.registry import _METHODS
from tests.methods.runs import assert_sparse, drive, make_run

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_example_trains():
    section = TEXT.split("## Add a training method")[1]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    names = {
        "register_method": register_method,
        "dataclass": dataclass,
        "Criterion": Criterion,
        "DropAndGrow": DropAndGrow,
        "__name__": __name__,
    }
    try:
        exec("from __future__ import annotations\n" + code, names)
        run = make_run("anti_rigl", options={"every": 3})
        optimizer = torch.optim.Adam(run.model.parameters())
        drive(run, optimizer)
        assert [update.step for update in run.updates] == [0, 3, 6, 9, 12]
        assert_sparse(run, optimizer)
    finally:
        _METHODS.pop("anti_rigl", None)
