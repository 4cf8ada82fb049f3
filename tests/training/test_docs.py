"""What docs/training.md shows runs, and its tables are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from resu_compile.phase import Phase
from resu_compile.training import PRESETS, TrainingConfig
from tests.training.models import adamw, loss_fn, make_batches, make_model

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


# those for several processes run in test_distributed.py
EXAMPLES = [code for code in blocks("python") if "init_process_group" not in code]


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_examples_run(index):
    model = make_model()
    optimizer = adamw(model)
    names = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "loss_fn": loss_fn,
        "evaluate": lambda _: {"loss": 0.0},
        "loader": make_batches(),
    }
    code = EXAMPLES[index].replace("steps=5000", "steps=100, compile=False")
    exec(code, names)
    if "Densification" in code:
        assert names["config"].densify.pauses[0].after_cycle == 1
        return
    cycle = names["trainer"].cycle if "trainer" in names else names["cycle"]
    assert cycle.step_index == 100
    assert cycle.controller.phase is Phase.SPARSE
    assert cycle.controller.config.sparsity == 0.9


def test_the_file_loads(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(blocks("yaml")[0])
    found = TrainingConfig.load(path)
    assert (found.steps, found.resurrection.margin, found.checkpoint.every) == (20000, 0.1, 1000)


def test_the_table_names_every_setting_and_preset():
    named = set(re.findall(r"`(\w+)`", TEXT.split("## Config")[1].split("## Densification")[0]))
    assert set(TrainingConfig.__dataclass_fields__) <= named
    assert all(f'`"{name}"`' in TEXT for name in PRESETS)
