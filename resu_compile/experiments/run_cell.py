"""Trains, evaluates and counts one cell of an experiment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resu_compile.experiments.budget import (
    Budget,
    describe_budget,
    device_of,
    equal_flops,
    task_flops,
)
from resu_compile.experiments.cells import Cell
from resu_compile.experiments.compiled_code import CompiledCode
from resu_compile.experiments.config import ExperimentConfig
from resu_compile.experiments.environment import environment
from resu_compile.experiments.records import Record
from resu_compile.experiments.settings import DENSE, training_config
from resu_compile.experiments.tasks.registry import ExperimentTask, make_task
from resu_compile.experiments.tracking import TensorBoard, Tracker, WandB, has_tensorboard
from resu_compile.training.checkpoint import latest_checkpoint
from resu_compile.training.config import CheckpointConfig, TrainingConfig
from resu_compile.training.sparse_training import SparseTraining
from resu_compile.training.trainer import Evaluate, Trainer

_BUDGETS: dict[str, Budget] = {}  # what rehearsals of this process found
_COMPILED = CompiledCode()


def cell_folder(config: ExperimentConfig, cell: Cell) -> Path:
    """Where the cell keeps its stats and checkpoints."""
    return config.output / "cells" / cell.name


def settings_hash(settings: Mapping[str, Any]) -> str:
    """For the name of a folder: what other settings left is not gone on from."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def cell_training(
    cell: Cell, config: ExperimentConfig, settings: Mapping[str, Any], steps: int
) -> TrainingConfig:
    """The training of a cell with ``settings``, in ``steps`` steps."""
    return training_config(
        cell.method.name,
        steps=steps,
        sparsity=cell.sparsity,
        seed=cell.seed,
        options=cell.method.options,
        training=config.training_of(cell.method),
        settings=settings,
    )


def run_cell(
    cell: Cell, config: ExperimentConfig, settings: Mapping[str, Any], *, device: str | None = None
) -> Record:
    """Train, evaluate and count one cell, from its last checkpoint if there is one.

    Args:
        cell: the run.
        config: the experiment.
        settings: chosen ones, which change the method's own.
        device: in place of the task's own.

    Raises:
        ArgumentError: the training fails, or the task does not give what it is compared by.
    """
    where = device or str(cell.task.options.get("device", "cpu"))
    index = torch.device(where).index if where.startswith("cuda:") else None
    on_device = nullcontext() if index is None else torch.cuda.device(index)
    training = config.training_of(cell.method)
    masked = [training.get(name) for name in ("targets", "exclude")]
    with on_device, _COMPILED.of(repr([cell.task, masked, where])):
        return _run_cell(cell, config, settings, device)


def _run_cell(
    cell: Cell, config: ExperimentConfig, settings: Mapping[str, Any], device: str | None
) -> Record:
    budget = _budget(cell, config, settings, device)
    folder = cell_folder(config, cell)
    training = replace(
        cell_training(cell, config, settings, budget.steps),
        stats=str(folder / "stats.jsonl"),
    )
    task = build_task(cell, training.training_method().level_steps(training), device)
    if training.autocast is None:
        training = replace(training, autocast=task.autocast)
    if cell.task.checkpoint_every is not None:
        where = str(folder / "checkpoints" / settings_hash(settings))
        training = replace(training, checkpoint=CheckpointConfig(where, cell.task.checkpoint_every))
    trainer = Trainer(
        task.model,
        task.optimizer,
        task.loss_fn,
        training,
        evaluate=task.evaluate,
        scheduler=task.scheduler,
    )
    flops = task_flops(task)  # of the model as it is: dense
    resumed = training.checkpoint is not None and latest_checkpoint(training.checkpoint.folder)
    trackers = _trackers(cell, config, training)
    trainer.callbacks += trackers
    try:
        result = trainer.fit(task.batches, resume=training.checkpoint is not None)
    finally:
        for tracker in trackers:
            tracker.close()
    run = trainer.cycle
    assert isinstance(run, SparseTraining)
    stats = run.stats(flops)
    scores = {"validation": _last_evaluation(result.stats)}
    if cell.kind == "run":
        scores["test"] = scores_of(task, task.test, training.autocast)
        if task.on_training is not None:
            scores["training"] = scores_of(task, task.on_training, training.autocast)
    return {
        "steps": budget.steps,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "scores": scores,
        "flops": {
            **describe_budget(budget, stats.training_flops, cell.dense_steps),
            "inference": stats.inference_flops,
        },
        "reached_sparsity": stats.sparsity,
        "ever_share": stats.ever_share,
        "updates": stats.updates,
        "mean_churn": stats.mean_churn,
        "densities": stats.densities,
        "training": training.describe(),
        "resumed": bool(resumed),
        "environment": environment(device_of(task)),
    }


def build_task(cell: Cell, steps: int, device: str | None) -> ExperimentTask:
    """The task of a cell, fresh.

    Args:
        cell: the run.
        steps: over which its learning rate falls.
        device: in place of the task's own.
    """
    options = dict(cell.task.options) | ({} if device is None else {"device": device})
    return make_task(cell.task.name, steps=steps, seed=cell.seed, **options)


def _budget(
    cell: Cell, config: ExperimentConfig, settings: Mapping[str, Any], device: str | None
) -> Budget:
    """Steps of the cell: the same for all seeds, and in all processes."""
    if config.budget == "steps" or cell.method.name == DENSE:
        return Budget(cell.dense_steps)
    first = replace(cell, seed=config.seeds[0])
    parts = [cell.task, cell.method, cell.sparsity, cell.dense_steps, settings, config.training]
    key = repr([*parts, config.max_stretch])
    if key not in _BUDGETS:
        _BUDGETS[key] = equal_flops(
            lambda steps: (
                build_task(first, steps, device),
                cell_training(first, config, settings, steps),
            ),
            dense_steps=cell.dense_steps,
            max_stretch=config.max_stretch,
        )
    return _BUDGETS[key]


def _trackers(cell: Cell, config: ExperimentConfig, training: TrainingConfig) -> list[Tracker]:
    start = 0
    if training.checkpoint is not None:
        newest = latest_checkpoint(training.checkpoint.folder)
        start = 0 if newest is None else int(newest.name.split("-")[1])
    trackers: list[Tracker] = []
    if has_tensorboard():
        trackers.append(TensorBoard(config.output / "tensorboard" / cell.name, start=start))
    if config.wandb is not None:
        trackers.append(
            WandB(
                config.wandb,
                name=cell.name,
                key=cell.key,
                config=training.describe(),
                folder=config.output / "wandb",
            )
        )
    return trackers


def _last_evaluation(stats: Sequence[Record]) -> dict[str, float]:
    found: dict[str, float] = [r["metrics"] for r in stats if r["event"] == "evaluation"][-1]
    return found


def scores_of(
    task: ExperimentTask, look: Evaluate | None, autocast: str | None
) -> dict[str, float]:
    """What ``look`` says of the model, under the conditions of the trainer's evaluations.

    Args:
        task: with the model.
        look: its ``evaluate``, ``test`` or ``on_training``.
        autocast: dtype of mixed precision.
    """
    assert look is not None
    model: nn.Module = task.model
    model.eval()
    dtype = None if autocast is None else getattr(torch, autocast)
    mixed = torch.autocast(device_of(task).type, dtype, enabled=dtype is not None)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), mixed:
        found = look(model)
    return {name: float(value) for name, value in found.items()}
