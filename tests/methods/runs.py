"""A small model under a training method, and its loop, for the tests of methods."""

from __future__ import annotations

import torch
from torch import nn

from resu_compile.training import SparseTraining, TrainingConfig

WEIGHTS = ("0.weight", "2.weight")


def make_model(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))


def make_batches(count: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(6, 8, generator=generator), torch.randn(6, 4, generator=generator))
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def make_run(method, model=None, *, options=None, **changes) -> SparseTraining:
    values = {"steps": 20, "sparsity": 0.75, "compile": False, **changes}
    config = TrainingConfig(method=method, method_options=options or {}, **values)
    return SparseTraining(model or make_model(), config)


def one_step(run: SparseTraining, optimizer, batches=None) -> None:
    batches = batches or make_batches()
    loss_of(run.model, batches[run.step % len(batches)]).backward()
    run.after_backward()
    optimizer.step()
    optimizer.zero_grad()
    run.after_step()


def drive(run: SparseTraining, optimizer=None, *, until: int | None = None) -> SparseTraining:
    optimizer = optimizer or torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    run.start()
    while run.step < (run.steps if until is None else until):
        one_step(run, optimizer)
    return run


def state_of(optimizer, run) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mask and state tensor of each masked weight."""
    return [
        (weight.mask, value)
        for weight in run.controller.weights.values()
        for value in optimizer.state[weight.parameter].values()
        if isinstance(value, torch.Tensor) and value.shape == weight.shape
    ]


def assert_sparse(run: SparseTraining, optimizer=None) -> None:
    """Pruned places hold 0, and so does the state there."""
    for weight in run.controller.weights.values():
        assert not weight.parameter[~weight.mask].any()
    for mask, value in state_of(optimizer, run) if optimizer is not None else []:
        assert not value[~mask].any()
