"""Runs the cells of an experiment; what is finished stays, whatever happens to the process.

    OUTPUT/
      results.jsonl           one line a finished cell
      claims/KEY.lock         locked by the process that works on the cell
      cells/NAME/             stats, and checkpoints until the cell is finished
      tensorboard/NAME/

Any number of processes may work on one output folder: each takes the next cell that nobody works
on. A lock ends with its process, so that the cell of one that died is taken by another, which goes
on from the cell's last checkpoint.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resu_compile.errors import ArgumentError
from resu_compile.experiments.budget import (
    Budget,
    describe_budget,
    device_of,
    equal_flops,
    task_flops,
)
from resu_compile.experiments.cells import Cell, build_cells
from resu_compile.experiments.config import ExperimentConfig
from resu_compile.experiments.environment import environment
from resu_compile.experiments.records import Record, append_record, by_key, locked, read_records
from resu_compile.experiments.settings import DENSE, training_config
from resu_compile.experiments.tasks.registry import ExperimentTask, make_task
from resu_compile.experiments.tracking import TensorBoard, Tracker, WandB, has_tensorboard
from resu_compile.experiments.tuning import choose_settings
from resu_compile.training.checkpoint import latest_checkpoint
from resu_compile.training.config import CheckpointConfig, TrainingConfig
from resu_compile.training.sparse_training import SparseTraining
from resu_compile.training.trainer import Trainer

log = logging.getLogger(__name__)
Tell = Callable[[str], None]
WAIT_S = 1.0  # between two looks at cells that other processes work on
_BUDGETS: dict[str, Budget] = {}  # what rehearsals of this process found


@dataclass(frozen=True)
class Outcome:
    """What a process has left behind.

    Attributes:
        done: cells that have a result now, whoever made it.
        failed: cells whose training failed.
        made: cells that this process finished.
    """

    done: int
    failed: tuple[str, ...]
    made: int


def run_experiment(
    config: ExperimentConfig,
    *,
    device: str | None = None,
    retry_failed: bool = False,
    tell: Tell | None = None,
) -> Outcome:
    """Work on the cells of ``config`` until all of them are finished.

    Args:
        config: the experiment.
        device: in place of the tasks' own: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        retry_failed: run again what failed in an earlier call.
        tell: called with one line for each cell.
    """
    tell = tell or log.info
    cells = build_cells(config)
    given_up = set() if retry_failed else _failed(config, cells)
    made = 0
    while True:
        found = by_key(read_records(config.results))
        pending = [cell for cell in cells if not _finished(cell, found, given_up)]
        if not pending:
            break
        worked = False
        for cell in pending:
            with locked(config.output / "claims" / f"{cell.key}.lock", wait=False) as claim:
                if claim is None:
                    continue
                found = by_key(read_records(config.results))  # another may just have done it
                if _finished(cell, found, given_up) or not _ready(cell, found):
                    continue
                record = _work(cell, config, found, device)
                append_record(config.results, record)
                shutil.rmtree(_folder(config, cell) / "checkpoints", ignore_errors=True)
            worked = True
            made += 1
            if record["status"] != "done":
                given_up.add(cell.key)
            tell(_line(cell, record))
            break  # trials may have become complete
        if not worked:
            time.sleep(WAIT_S)
    found = by_key(read_records(config.results))
    done = sum(found[cell.key]["status"] == "done" for cell in cells)
    return Outcome(done, tuple(c.name for c in cells if found[c.key]["status"] != "done"), made)


def _failed(config: ExperimentConfig, cells: Sequence[Cell]) -> set[str]:
    found = by_key(read_records(config.results))
    return {c.key for c in cells if c.key in found and found[c.key]["status"] != "done"}


def _finished(cell: Cell, found: Mapping[str, Record], given_up: set[str]) -> bool:
    record = found.get(cell.key)
    return record is not None and (record["status"] == "done" or cell.key in given_up)


def _ready(cell: Cell, found: Mapping[str, Record]) -> bool:
    return all(key in found for key in cell.trials)


def _folder(config: ExperimentConfig, cell: Cell) -> Path:
    return config.output / "cells" / cell.name


def _line(cell: Cell, record: Record) -> str:
    if record["status"] != "done":
        return f"{cell.name}: failed: {record['error']}"
    split = "validation" if cell.kind == "trial" else "test"
    score = record["scores"][split][record["metric"]]
    shown = "none" if score is None else f"{score:.4f}"
    return f"{cell.name}: {split} {record['metric']} {shown} ({record['elapsed_s']:.0f} s)"


# -- one cell ----------------------------------------------------------------------------------
def _work(
    cell: Cell, config: ExperimentConfig, found: Mapping[str, Record], device: str | None
) -> Record:
    """Train one cell. What goes wrong in its training is its result; it stops no other cell."""
    base = {
        "key": cell.key,
        "kind": cell.kind,
        "task": cell.task.label,
        "method": cell.method.label,
        "method_name": cell.method.name,
        "sparsity": cell.sparsity,
        "seed": cell.seed,
        "length": cell.length,
        "budget": config.budget,
        "trial": cell.trial,
    }
    started = time.perf_counter()
    try:
        settings = cell.settings
        if settings is None:
            settings = choose_settings([found[key] for key in cell.trials])
        result = run_cell(cell, config, settings, device=device)
    except Exception as error:
        log.exception("%s failed", cell.name)
        return {**base, "status": "failed", "error": f"{type(error).__name__}: {error}"}
    elapsed_s = time.perf_counter() - started
    return {**base, "status": "done", "settings": settings, **result, "elapsed_s": elapsed_s}


def run_cell(
    cell: Cell, config: ExperimentConfig, settings: Mapping[str, Any], *, device: str | None = None
) -> Record:
    """Train, evaluate and count one cell, from its last checkpoint if there is one.

    Args:
        cell: the run.
        config: the experiment.
        settings: chosen ones, which change the method's own.
        device: in place of the task's own.
    """
    torch.compiler.reset()  # what is compiled belongs to a model that is gone
    budget = _budget(cell, config, settings, device)
    folder = _folder(config, cell)
    task = _task(cell, budget.steps, device)
    training = replace(
        _training(cell, config, settings, budget.steps),
        stats=str(folder / "stats.jsonl"),
        autocast=task.autocast,
    )
    if cell.task.checkpoint_every is not None:
        where = str(folder / "checkpoints")
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
    trainer.callbacks += _trackers(cell, config, training)
    result = trainer.fit(task.batches, resume=training.checkpoint is not None)
    run = trainer.cycle
    assert isinstance(run, SparseTraining)
    stats = run.stats(flops)
    scores = {"validation": _last_evaluation(result.stats)}
    if cell.kind == "run":
        scores["test"] = _test(task, training)
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


def _task(cell: Cell, steps: int, device: str | None) -> ExperimentTask:
    options = dict(cell.task.options) | ({} if device is None else {"device": device})
    task = make_task(cell.task.name, steps=steps, seed=cell.seed, **options)
    if not isinstance(task.metric, str):
        raise ArgumentError(f"task {cell.task.label}: expected the name of a metric")
    return task


def _training(
    cell: Cell, config: ExperimentConfig, settings: Mapping[str, Any], steps: int
) -> TrainingConfig:
    return training_config(
        cell.method.name,
        steps=steps,
        sparsity=cell.sparsity,
        seed=cell.seed,
        options=cell.method.options,
        training={**config.training, **cell.method.training},
        settings=settings,
    )


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
            lambda steps: (_task(first, steps, device), _training(first, config, settings, steps)),
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


def _test(task: ExperimentTask, training: TrainingConfig) -> dict[str, float]:
    """The scores on test data, under the conditions of the trainer's evaluations."""
    model: nn.Module = task.model
    model.eval()
    dtype = None if training.autocast is None else getattr(torch, training.autocast)
    mixed = torch.autocast(device_of(task).type, dtype, enabled=dtype is not None)
    assert task.test is not None
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), mixed:
        found = task.test(model)
    return {name: float(value) for name, value in found.items()}


# -- before it starts --------------------------------------------------------------------------
def describe(config: ExperimentConfig) -> str:
    """How many cells there are, how many of them are left, and what they cost."""
    cells = build_cells(config)
    found = by_key(read_records(config.results))
    left = [c for c in cells if c.key not in found or found[c.key]["status"] != "done"]
    rows = []
    for task in config.tasks:
        own = [cell for cell in cells if cell.task.label == task.label]
        trials = [cell for cell in own if cell.kind == "trial"]
        steps = sum(cell.dense_steps for cell in own)
        rows.append(
            f"{task.label}: {len(own) - len(trials)} runs and {len(trials)} trials, "
            f"{steps:,} optimizer steps"
        )
    steps = sum(cell.dense_steps for cell in left)
    rows.append(f"{len(cells)} cells, {len(cells) - len(left)} finished; {steps:,} steps to go")
    if config.budget == "flops":
        rows.append(
            "budget flops: steps are counted as dense ones; sparse runs take more, cheaper steps, "
            f"up to {config.max_stretch:g} times as many"
        )
    return "\n".join(rows)
