"""The demo from one end to the other: train, prune, resurrect, compare, plot, export, reload."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import resu_compile as resu
from resu_compile.demo.deploy import ExportCheck, export_and_check, inference_ms
from resu_compile.demo.plot import format_metric, plot_runs
from resu_compile.demo.tasks import Task, Training
from resu_compile.demo.training import Method, Run, train
from resu_compile.training.baselines import PRUNE_ONLY, one_shot_config
from resu_compile.training.config import TrainingConfig
from resu_compile.training.presets import preset


@dataclass(frozen=True)
class DemoConfig:
    """What the demo compares.

    Attributes:
        output: folder for results, picture and exported models; made if it is missing.
        seed: of initial weights and batches.
        sparsity: of every sparse method, in [0, 1).
        compiled: compile the models; False runs them eagerly.
    """

    output: Path
    seed: int = 0
    sparsity: float = 0.7
    compiled: bool = True


@dataclass(frozen=True)
class TaskResult:
    """The runs of one task, and what became of its RESU model."""

    task: Task
    runs: tuple[Run, ...]
    time_ms: dict[str, float]
    exported: ExportCheck


def methods(training: Training, config: DemoConfig) -> tuple[Method, ...]:
    """What is compared, at an equal number of steps; RESU is the default preset as it comes."""
    resurrected = preset("default", steps=training.steps, sparsity=config.sparsity)
    begin, end = training.ramp
    gradual = TrainingConfig(
        steps=training.steps,
        warmup=begin,
        recovery=1.0 - end,
        cycles=training.prunings,
        cycle=PRUNE_ONLY,
        schedule="cubic",
        sparsity=config.sparsity,
        method="magnitude",
    )
    one_shot = one_shot_config(gradual, prune_at=round(training.steps * training.one_shot_at))
    share = f"{config.sparsity:.0%}"
    return (
        Method("dense", "dense"),
        Method("one_shot", f"one-shot {share}", one_shot),
        Method("gradual", f"gradual {share}", gradual),
        Method("resu", f"RESU {share}", resurrected),
    )


def run_demo(tasks: Sequence[Task], config: DemoConfig) -> list[TaskResult]:
    """Run every method on every task, print the comparison and write it to ``config.output``.

    Writes ``results.json``, ``learning_curves.png`` and one ``.pt2`` file a task.

    Returns:
        The results, a task each.
    """
    started = time.perf_counter()
    config.output.mkdir(parents=True, exist_ok=True)
    results = []
    for task in tasks:
        runs = tuple(
            train(task, method, seed=config.seed, compiled=config.compiled)
            for method in methods(task.training, config)
        )
        times = inference_ms(task, [run.model for run in runs])
        time_ms = {run.method.key: ms for run, ms in zip(runs, times, strict=True)}
        resurrected = next(run for run in runs if run.method.key == "resu")
        exported = export_and_check(task, resurrected.model, config.output / f"{task.name}.pt2")
        results.append(TaskResult(task, runs, time_ms, exported))

    print()
    print(comparison_table(results))
    print(NOTES)
    print()
    for result in results:
        print(_export_line(result))
    picture = config.output / "learning_curves.png"
    plot_runs([(result.task, result.runs) for result in results], picture)
    elapsed_s = time.perf_counter() - started
    numbers = config.output / "results.json"
    numbers.write_text(json.dumps(as_dict(results, config, elapsed_s), indent=2) + "\n")
    print(f"\nlearning curves: {picture}\nnumbers:         {numbers}\ntook {elapsed_s:.0f} s")
    return results


# -- what is shown ---------------------------------------------------------------------------

NOTES = """\
held-out: not trained on, but settings of all methods were chosen by such data, RESU's from the most
trials: no fair ranking of methods. One seed; one digit is 0.17 %.
one-shot and gradual rank by magnitude in each layer; RESU is the default preset.
came back: share of the finally active weights that had been pruned before; in brackets all
resurrections, summed over the commits.  stored: parameters, the pruned ones packed as values and
bits.  time: one input through the model, against dense; under 1 is faster.\
"""


def comparison_table(results: Sequence[TaskResult]) -> str:
    """One row a method and task; what loses is shown as losing."""
    rows = []
    for result in results:
        for run in result.runs:
            stored = resu.report(run.model).bytes_packed
            ratio = result.time_ms[run.method.key] / result.time_ms["dense"]
            back = f"{run.resurrected_share:.1%} ({run.resurrections})"
            rows.append(
                [
                    result.task.name,
                    run.method.label,
                    format_metric(result.task, run.score.metric),
                    f"{run.sparsity:.1%}",
                    back if run.method.key == "resu" else "-",
                    f"{stored / 1000:.0f} kB",
                    f"{ratio:.2f}x",
                ]
            )
    headers = ["task", "method", "held-out", "pruned", "came back", "stored", "time"]
    align = ("left", "left", "right", "right", "right", "right", "right")
    return str(tabulate(rows, headers=headers, colalign=align, disable_numparse=True))


def _export_line(result: TaskResult) -> str:
    check = result.exported
    verdict = "outputs agree" if check.agrees else "OUTPUTS DIFFER"
    return (
        f"{result.task.name}: exported to {check.path} ({check.size_bytes / 1000:.0f} kB), loaded "
        f"in a new process: {verdict} (largest difference {check.max_difference:.1e})"
    )


def as_dict(results: Sequence[TaskResult], config: DemoConfig, elapsed_s: float) -> dict[str, Any]:
    """All numbers, with what is needed to make them again."""
    device = str(results[0].task.example().device)
    return {
        "torch": torch.__version__,
        "resu_compile": resu.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "sparsity": config.sparsity,
        "elapsed_s": elapsed_s,
        "tasks": {result.task.name: _task_dict(result) for result in results},
    }


def _task_dict(result: TaskResult) -> dict[str, Any]:
    task, check = result.task, result.exported
    return {
        "metric": task.metric,
        "training": asdict(task.training),
        "methods": {
            run.method.key: {
                "label": run.method.label,
                "held_out": run.score.metric,
                "held_out_loss": run.score.loss,
                "sparsity": run.sparsity,
                "resurrections": run.resurrections,
                "resurrected_share": run.resurrected_share,
                "bytes_dense": resu.report(run.model).bytes_dense,
                "bytes_packed": resu.report(run.model).bytes_packed,
                "inference_ms": result.time_ms[run.method.key],
                "train_s": run.train_s,
                "curve": [[step, score.metric, score.loss] for step, score in run.curve],
            }
            for run in result.runs
        },
        "export": {
            "file": check.path.name,
            "size_bytes": check.size_bytes,
            "max_difference": check.max_difference,
            "agrees": check.agrees,
        },
    }
