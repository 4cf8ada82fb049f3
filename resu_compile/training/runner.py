"""A training run from a file: what ``resu-compile train`` does.

task: digits                  # or bytes, or "my_package.my_module:make_task"
task_options: {size: small}   # keyword arguments of the task
output: runs/digits           # stats, checkpoints and pictures; from the current directory
preset: default
training:                     # fields of TrainingConfig; they change the preset
  steps: 600
  sparsity: 0.9
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from resu_compile.errors import ArgumentError, ArgumentTypeError, check_known_keys
from resu_compile.training.checkpoint import list_checkpoints
from resu_compile.training.config import CheckpointConfig, TrainingConfig
from resu_compile.training.cycle import CycleStats
from resu_compile.training.serialization import read_data
from resu_compile.training.stats import Record
from resu_compile.training.tasks import make_training_task
from resu_compile.training.trainer import Trainer, TrainingResult

KEYS = ("task", "task_options", "output", "preset", "training")
OUTPUT = "training_output"


@dataclass(frozen=True)
class RunFile:
    """A run that is described by a file.

    Attributes:
        task: ``"digits"``, ``"bytes"`` or ``"module:function"``.
        output: folder of everything that the run writes.
        training: the run; its stats and checkpoints go into ``output`` unless it says otherwise.
        task_options: keyword arguments of the task.
    """

    task: str
    output: Path
    training: TrainingConfig
    task_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunOutcome:
    """What became of a run.

    Attributes:
        result: of the training.
        table: one line a cycle.
        stats: the stats file.
        pictures: written from it; empty if matplotlib is not installed.
    """

    result: TrainingResult
    table: str
    stats: Path
    pictures: tuple[Path, ...]


def load_run_file(
    path: str | Path, *, output: str | Path | None = None, device: str | None = None
) -> RunFile:
    """The run that a ``.yaml``, ``.yml`` or ``.json`` file describes.

    Args:
        path: the file; the top of this module shows one.
        output: replaces the file's ``output``; a stats path or checkpoint folder that the file
            names stays.
        device: replaces ``device`` in the file's ``task_options``.

    Raises:
        ArgumentError: an unknown key, or a value that cannot be used.
    """
    data = read_data(path)
    if not isinstance(data, Mapping):
        raise ArgumentTypeError(f"{path}: expected a mapping with a task, got {data!r}")
    check_known_keys(data, KEYS, what=f"key of {path}:")
    task = data.get("task")
    if not isinstance(task, str) or not task:
        raise ArgumentError(
            f"{path}: expected a task (digits, bytes or 'module:function'), got {task!r}"
        )
    options = dict(_mapping(data, "task_options"))
    if device is not None:
        options["device"] = device
    folder = data.get("output") or OUTPUT
    if not isinstance(folder, str):
        raise ArgumentTypeError(f"{path}: expected a folder as output, got {folder!r}")
    folder = Path(folder if output is None else output)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"output: expected a folder, got the file {folder}")
    return RunFile(task, folder, _training(data, folder), options)


def _training(data: Mapping[str, Any], folder: Path) -> TrainingConfig:
    values = dict(_mapping(data, "training"))
    if "preset" in data:
        if "preset" in values:
            raise ArgumentError("preset: expected it once, at the top or in training; got it twice")
        values["preset"] = data["preset"]
    where = str(folder / "checkpoints")
    saved = values.get("checkpoint")
    if "checkpoint" not in values:
        values["checkpoint"] = {"folder": where}
    elif isinstance(saved, Mapping):
        values["checkpoint"] = {"folder": where, **saved}
    config = TrainingConfig.from_dict(values)
    return config if config.stats else replace(config, stats=str(folder / "stats.jsonl"))


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = data.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ArgumentTypeError(f"{key}: expected a mapping of names to values, got {found!r}")
    return found


def run(file: RunFile, *, resume: bool = False, progress: bool = False) -> RunOutcome:
    """Train what ``file`` describes, and draw its pictures.

    Args:
        file: the run.
        resume: go on from its newest checkpoint; without one, begin.
        progress: show a progress bar.

    Raises:
        ArgumentError: the task cannot be made, ``resume`` without checkpoints in the config, or a
            fresh run over the checkpoints of an earlier one, which a later ``resume`` would take
            for its own.
    """
    config = file.training
    if config.checkpoint is not None and not resume:
        _check_fresh(config.checkpoint)
    task = make_training_task(file.task, file.task_options, steps=config.steps, seed=config.seed)
    file.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        task.model,
        task.optimizer,
        task.loss_fn,
        config,
        evaluate=task.evaluate,
        scheduler=task.scheduler,
        progress=progress,
    )
    result = trainer.fit(task.batches, resume=resume)
    assert config.stats is not None
    pictures: tuple[Path, ...] = ()
    if importlib.util.find_spec("matplotlib") is not None:
        from resu_compile.training.plots import plot_stats

        pictures = tuple(plot_stats(config.stats, file.output))
    table = cycle_table(result.history, result.stats)
    return RunOutcome(result, table, Path(config.stats), pictures)


def _check_fresh(checkpoint: CheckpointConfig) -> None:
    found = list_checkpoints(checkpoint.folder)
    if found:
        raise ArgumentError(
            f"output: expected no checkpoints of an earlier run, found {len(found)} in "
            f"{checkpoint.folder}; go on with it (--resume), take another output, or remove them"
        )


def cycle_table(history: Sequence[CycleStats], stats: Sequence[Record]) -> str:
    """One line a cycle, and one for the end: what was pruned, what came back, how good it is.

    Args:
        history: of a run.
        stats: its records; a cycle's evaluation is the last one within it, before its commit.
    """
    evaluations = [record for record in stats if record["event"] == "evaluation"]
    metrics = list(dict.fromkeys(name for record in evaluations for name in record["metrics"]))
    rows, before = [], 0
    for cycle in history:
        within = [r for r in evaluations if before < r["step"] <= cycle.step]
        total = cycle.commit["weights"]["total"] if cycle.commit else None
        changes = ["-"] * 3
        if total is not None:
            changes = [
                f"{total['resurrected']:,}",
                f"{total['churn']:.2%}",
                f"{total['jaccard']:.4f}",
            ]
        scores = _scores(within, metrics)
        rows.append([cycle.cycle, cycle.step, f"{cycle.sparsity:.2%}", *changes, *scores])
        before = cycle.step
    for record in stats:
        if record["event"] == "end":
            scores = _scores([r for r in evaluations if r["step"] <= record["step"]], metrics)
            rows.append(["end", record["step"], f"{record['sparsity']:.2%}", *["-"] * 3, *scores])
    headers = ["cycle", "step", "pruned", "resurrected", "churn", "Jaccard", *metrics]
    align = ("right",) * len(headers)
    return str(tabulate(rows, headers=headers, colalign=align, disable_numparse=True))


def _scores(evaluations: Sequence[Record], metrics: Sequence[str]) -> list[str]:
    found = evaluations[-1]["metrics"] if evaluations else {}
    return ["-" if found.get(name) is None else f"{found[name]:.4f}" for name in metrics]
