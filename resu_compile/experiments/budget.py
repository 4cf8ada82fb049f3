"""How many steps a method may take, if all are to spend the same training FLOPs.

    steps = FLOPs of dense training / FLOPs of a mean step of the method

A mean step costs what its schedule makes of it: dense phases, ramps, steps with a dense gradient.
It is found by a rehearsal: the method runs its whole schedule on the model's own shapes, without
forward and backward passes. Where a method spreads its density over layers by weights or gradients,
those of the initial model stand for all; the record of a run says what it really spent.

Source: comparison at equal training FLOPs as in Evci et al. 2020, https://arxiv.org/abs/1911.11134
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from resu_compile.experiments.tasks.registry import ExperimentTask
from resu_compile.training.batches import BatchStream
from resu_compile.training.config import TrainingConfig
from resu_compile.training.flops import ModelFlops, count_flops
from resu_compile.training.sparse_training import SparseTraining

TOLERANCE = 0.005  # of the budget that is met, relative
ROUNDS = 4  # of rehearsals: the share of a dense step hardly depends on the number of steps


@dataclass(frozen=True)
class Budget:
    """Steps of a run.

    Attributes:
        steps: optimizer steps.
        capped: whether the budget would have given more.
    """

    steps: int
    capped: bool = False


def task_flops(task: ExperimentTask) -> ModelFlops | None:
    """FLOPs of a forward pass; None without an example. The model has a controller."""
    return None if task.example is None else count_flops(task.model, *task.example)


def rehearse(task: ExperimentTask, config: TrainingConfig) -> float:
    """Training FLOPs of ``config`` relative to dense training of as many steps.

    Args:
        task: a fresh one; its model is not to be used afterwards.
        config: the run.
    """
    config = replace(config, compile=False, checkpoint=None, stats=None)
    task.model.train()
    task.loss_fn(task.model, BatchStream(task.batches).next()).backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in task.model.named_parameters()
        if parameter.grad is not None
    }
    task.optimizer.zero_grad()
    run = SparseTraining(task.model, config).start()
    flops = task_flops(task)
    parameters = dict(task.model.named_parameters())
    if run.controller.moments is not None:
        known = [(name, gradients[name]) for name in run.controller.weights if name in gradients]
        run.controller.moments.observe(known)
    while not run.done:
        running = run.controller.resurrection
        choosing = running is not None and running.is_choosing
        if run.controller.dense_gradients or choosing:
            for name, gradient in gradients.items():
                parameters[name].grad = gradient.clone()
        run.after_backward()
        task.optimizer.zero_grad()
        run.after_step()
    return run.costs.training_share(flops)


def equal_flops(
    make: Callable[[int], tuple[ExperimentTask, TrainingConfig]],
    *,
    dense_steps: int,
    max_stretch: float,
) -> Budget:
    """Steps of a method that spend what ``dense_steps`` steps of dense training spend.

    Args:
        make: a fresh task and the config of a run of so many steps.
        dense_steps: the budget.
        max_stretch: most steps, relative to it.
    """
    limit = round(max_stretch * dense_steps)
    steps, spent = dense_steps, {}
    for _ in range(ROUNDS):
        if steps in spent:
            break
        share = rehearse(*make(steps))
        spent[steps] = share * steps / dense_steps
        if abs(spent[steps] - 1.0) <= TOLERANCE:
            break
        steps = min(max(1, round(dense_steps / share)), limit)
    # settings in whole steps (every 50) may jump, and the search with them
    best = min(spent, key=lambda found: abs(spent[found] - 1.0))
    return Budget(best, capped=best == limit and spent[best] < 1.0 - TOLERANCE)


def describe_budget(budget: Budget, share: float, dense_steps: int) -> dict[str, Any]:
    """What a record says of the FLOPs of a run.

    Args:
        budget: of the run.
        share: its training FLOPs relative to dense training of as many steps, as counted in it.
        dense_steps: optimizer steps of dense training of the same length.
    """
    spent = share * budget.steps / dense_steps
    return {"share_of_dense_step": share, "training": spent, "capped": budget.capped}


def device_of(task: ExperimentTask) -> torch.device:
    """Where the model is."""
    return next(task.model.parameters()).device
