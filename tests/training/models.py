"""A small model and its batches, for the tests of training."""

from __future__ import annotations

import torch
from torch import nn

from resu_compile.config import ResurrectionConfig
from resu_compile.training import CycleShares, Trainer, TrainingConfig


def make_model(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4, bias=False)
    )


def make_batches(count: int = 7) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(6, 8, generator=generator), torch.randn(6, 4, generator=generator))
        for _ in range(count)
    ]


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, target = batch
    return (model(inputs) - target).square().mean()


def config(**changes: object) -> TrainingConfig:
    """40 steps: 4 of warm-up, three cycles of 9 (5 train, 2 stabilize, 2 resu), 9 of recovery.

    By magnitude, with theta in every pruned place and a quota for it.
    """
    values: dict[str, object] = {
        "steps": 40,
        "warmup": 0.1,
        "recovery": 0.225,
        "cycles": 3,
        "cycle": CycleShares(5, 2, 2),
        "sparsity": 0.75,
        "method": "magnitude",
        "resurrection": ResurrectionConfig(),
        "schedule": "linear",
        "budget_start": 0.3,
        "budget_end": 0.1,
        "compile": False,
        "log_every": 5,
    }
    return TrainingConfig(**{**values, **changes})


def drive(model: nn.Module, cycle, batches, optimizer=None, stop: int | None = None) -> None:
    """A user's own loop, from where ``cycle`` stands to the end of its plan, or to ``stop``."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    cycle.start()
    while not cycle.done and cycle.step_index != stop:
        loss_fn(model, batches[cycle.step_index % len(batches)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def make_trainer(model=None, optimizer=None, **options):
    changes = options.pop("changes", {})
    model = model or make_model()
    optimizer = optimizer or adamw(model)
    return Trainer(model, optimizer, loss_fn, config(**changes), **options)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
