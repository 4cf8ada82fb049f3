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
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from resu_compile.errors import ArgumentError, MachineError
from resu_compile.experiments.cells import Cell, build_cells
from resu_compile.experiments.config import ExperimentConfig
from resu_compile.experiments.records import (
    Record,
    ResultsFile,
    append_record,
    by_key,
    locked,
    read_records,
)
from resu_compile.experiments.run_cell import (
    build_task,
    cell_folder,
    cell_training,
    run_cell,
    scores_of,
)
from resu_compile.experiments.tuning import choose_settings

log = logging.getLogger(__name__)
Tell = Callable[[str], None]
WAIT_S = 1.0  # between two looks at cells that other processes work on
# Said of the machine, not of the training; after an error of the GPU no later cell would succeed.
MACHINE = (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


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

    Raises:
        ArgumentError: a task cannot be built, or the results file holds something else.
        MachineError: memory, the disk or the GPU failed; nothing that is finished is lost.
    """
    tell = tell or log.info
    cells = _checked_cells(config)
    results = ResultsFile(config.results)
    found = by_key(results.read())
    given_up = set() if retry_failed else _failed(found, cells)
    _check_tasks([cell for cell in cells if not _finished(cell, found, given_up)], device)
    made = 0
    while True:
        found = by_key(results.read())
        pending = [cell for cell in cells if not _finished(cell, found, given_up)]
        if not pending:
            break
        worked = False
        for cell in pending:
            if not _ready(cell, found):
                continue
            with locked(config.output / "claims" / f"{cell.key}.lock", wait=False) as claim:
                if claim is None:
                    continue
                found = by_key(results.read())
                if _finished(cell, found, given_up):  # another has just done it
                    continue
                record = _work(cell, config, found, device)
                append_record(config.results, record)
                shutil.rmtree(cell_folder(config, cell) / "checkpoints", ignore_errors=True)
            worked = True
            made += 1
            if record["status"] != "done":
                given_up.add(cell.key)
            tell(_line(cell, record))
            break  # trials may have become complete
        if not worked:
            time.sleep(WAIT_S)
    done = sum(found[cell.key]["status"] == "done" for cell in cells)
    return Outcome(done, tuple(c.name for c in cells if found[c.key]["status"] != "done"), made)


def _failed(found: Mapping[str, Record], cells: Sequence[Cell]) -> set[str]:
    return {c.key for c in cells if c.key in found and found[c.key]["status"] != "done"}


def _finished(cell: Cell, found: Mapping[str, Record], given_up: set[str]) -> bool:
    record = found.get(cell.key)
    if record is None:
        return False
    if record["status"] != "done":
        return cell.key in given_up
    # a trial that failed before and was run again may have changed the choice
    trials = [found[key] for key in cell.trials if key in found]
    return not trials or record["settings"] == choose_settings(trials)


def _ready(cell: Cell, found: Mapping[str, Record]) -> bool:
    return all(key in found for key in cell.trials)


def _line(cell: Cell, record: Record) -> str:
    if record["status"] != "done":
        return f"{cell.name}: failed: {record['error']}"
    split = "validation" if cell.kind == "trial" else "test"
    score = record["scores"][split][record["metric"]]
    shown = "none" if score is None else f"{score:.4f}"
    return f"{cell.name}: {split} {record['metric']} {shown} ({record['elapsed_s']:.0f} s)"


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
        "dense_steps": cell.dense_steps,
        "budget": config.budget,
        "trial": cell.trial,
    }
    started = time.perf_counter()
    try:
        settings = cell.settings
        if settings is None:
            settings = choose_settings([found[key] for key in cell.trials])
        result = run_cell(cell, config, settings, device=device)
    except MACHINE as error:
        raise MachineError(
            f"{cell.name}: stopped by {type(error).__name__}: {error}; nothing is recorded of this "
            "cell: mend the cause (memory of the GPU, space on the disk, a missing file) and start "
            "again"
        ) from error
    except Exception as error:
        log.exception("%s failed", cell.name)
        return {**base, "status": "failed", "error": f"{type(error).__name__}: {error}"}
    elapsed_s = time.perf_counter() - started
    return {**base, "status": "done", "settings": settings, **result, "elapsed_s": elapsed_s}


# -- before it starts --------------------------------------------------------------------------
def describe(config: ExperimentConfig) -> str:
    """How many cells there are, how many of them are left, and what they cost."""
    cells = _checked_cells(config)
    found = by_key(read_records(config.results))
    left = [cell for cell in cells if not _finished(cell, found, set())]
    failed = sum(found[c.key]["status"] != "done" for c in left if c.key in found)
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
    finished = f"{len(cells) - len(left)} finished" + (f", {failed} failed" if failed else "")
    rows.append(f"{len(cells)} cells, {finished}; {steps:,} steps to go")
    if config.budget == "flops":
        rows.append(
            "budget flops: steps are counted as dense ones; sparse runs take more, cheaper steps, "
            f"up to {config.max_stretch:g} times as many"
        )
    return "\n".join(rows)


def _check_tasks(cells: Sequence[Cell], device: str | None) -> None:
    """Build and evaluate each task once, so that its mistakes do not show after its training.

    Raises:
        ArgumentError: a task cannot be built, or does not give its own metric; or checkpoints are
            asked for and safetensors is not installed.
    """
    checked = []
    for cell in cells:
        if cell.task in checked:
            continue
        checked.append(cell.task)
        if cell.task.checkpoint_every is not None and not find_spec("safetensors"):
            raise ArgumentError(
                f"checkpoint_every of task {cell.task.label}: expected safetensors to be "
                "installed, it is not; pip install resu-compile[train], or leave it out"
            )
        task = build_task(cell, cell.dense_steps, device)
        found = scores_of(task, task.evaluate, task.autocast)
        if task.metric not in found:
            raise ArgumentError(
                f"task {cell.task.label}: expected its metric {task.metric!r} in what evaluate "
                f"gives, got {', '.join(found) or 'nothing'}"
            )


def _checked_cells(config: ExperimentConfig) -> list[Cell]:
    """All cells; settings of a trial that do not go together are an error before hours of work."""
    cells = build_cells(config)
    for cell in cells:
        if cell.settings:
            cell_training(cell, config, cell.settings, cell.dense_steps)
    return cells
