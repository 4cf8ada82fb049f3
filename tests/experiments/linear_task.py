"""A task that takes no time, and what the tests of processes need of it: to die, and to wait."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from resu_compile.experiments import ExperimentTask


def make_data(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 16, generator=generator)
    truth = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    return inputs, (inputs @ truth).relu()


def make(
    *,
    steps: int,  # noqa: ARG001  (its learning rate is constant)
    seed: int,
    die_at: int = 0,
    die_seed: int = 0,
    meet: str = "",
    broken: bool = False,
    lr: float = 0.01,
    device: str = "cpu",
) -> ExperimentTask:
    """Regression on rectified linear data; kills its own process at step ``die_at``, if told."""
    if meet:
        wait_for_two(Path(meet))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).to(device)
    train, validation, test = make_data(seed + 1, 64), make_data(101, 40), make_data(102, 40)
    state = {"step": 0}

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        state["step"] += 1
        if die_at and seed == die_seed and state["step"] == die_at and "DIE" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = (model(batch[0]) - batch[1]).square().mean()
        return loss * float("nan") if broken else loss

    def score(data: tuple[torch.Tensor, torch.Tensor]):
        return lambda model: {"loss": (model(data[0]) - data[1]).square().mean().item()}

    return ExperimentTask(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=lr),
        loss_fn=loss_fn,
        batches=[tuple(part[i : i + 16] for part in train) for i in range(0, 64, 16)],
        evaluate=score(validation),
        test=score(test),
        on_training=score(train),
        example=(train[0][:1],),
    )


def wait_for_two(folder: Path) -> None:
    """Return when two processes have come here."""
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    end = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.01)
