from __future__ import annotations

import pytest

from resu_compile.experiments import ExperimentConfig

TASK = "tests.experiments.linear_task:make"


@pytest.fixture
def make_config(tmp_path):
    """A config of two methods and two seeds on a task that takes no time."""

    def make(**changes) -> ExperimentConfig:
        task = {"name": TASK, "label": "linear", "steps": 30, **changes.pop("task", {})}
        data = {
            "tasks": [task],
            "methods": ["gmp", "rigl"],
            "sparsities": [0.75],
            "seeds": [0, 1],
            "training": {"compile": False},
            "output": str(tmp_path / "out"),
            **changes,
        }
        return ExperimentConfig.from_dict(data)

    return make
