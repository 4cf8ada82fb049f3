"""The cells of an experiment: the single runs, each with a key that says what determines it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from resu_compile.experiments.config import ExperimentConfig, MethodSpec, TaskSpec
from resu_compile.experiments.search import trial_settings
from resu_compile.experiments.settings import DENSE, training_config


@dataclass(frozen=True)
class Cell:
    """One run of the experiment.

    Attributes:
        kind: ``"trial"`` of the tuning, or ``"run"``, which is reported.
        task: what is learned.
        method: by what.
        sparsity: final; 0 for dense training.
        seed: of initial weights, batches and masks.
        length: of the run, relative to ``task.steps``.
        trial: number of the trial; -1 of a run.
        settings: of the trial; None of a run whose settings trials have to choose first.
        trials: keys of these trials.
        key: of the results; equal for equal runs of equal configs.
    """

    kind: str
    task: TaskSpec
    method: MethodSpec
    sparsity: float
    seed: int
    length: float
    trial: int
    settings: dict[str, Any] | None
    trials: tuple[str, ...]
    key: str

    @property
    def name(self) -> str:
        """For people and folders; the key makes it unique."""
        parts = [self.task.label, self.method.label, f"s{self.sparsity:g}", f"x{self.length:g}"]
        parts.append(f"trial{self.trial}" if self.kind == "trial" else f"seed{self.seed}")
        return "-".join([*parts, self.key[:8]])

    @property
    def dense_steps(self) -> int:
        """Optimizer steps of dense training of the same length."""
        return max(1, round(self.length * self.task.steps))


def build_cells(config: ExperimentConfig) -> list[Cell]:
    """All cells, trials before the runs that wait for them; one dense run serves all sparsities."""
    trials: list[Cell] = []
    runs: list[Cell] = []
    for task in config.tasks:
        for method in config.methods:
            for sparsity in (0.0,) if method.name == DENSE else config.sparsities:
                tried = _trials(config, task, method, sparsity)
                trials += tried
                runs += _runs(config, task, method, sparsity, tuple(t.key for t in tried))
    # seed by seed, so that what is there first compares all methods
    runs.sort(key=lambda cell: (config.lengths.index(cell.length), config.seeds.index(cell.seed)))
    return trials + runs


def _trials(
    config: ExperimentConfig, task: TaskSpec, method: MethodSpec, sparsity: float
) -> list[Cell]:
    tuning = config.tuning
    if tuning.trials < 2 or not method.search:
        return []

    def training(changes: dict[str, Any]) -> dict[str, Any]:
        return training_config(
            method.name,
            steps=max(1, round(tuning.length * task.steps)),
            sparsity=sparsity,
            seed=tuning.seed,
            options=method.options,
            training=config.training_of(method),
            settings=changes,
        ).describe()

    own = training({})
    settings = trial_settings(
        method.search,
        trials=tuning.trials,
        strategy=tuning.strategy,
        seed=f"{tuning.seed} {task.label} {method.label} {sparsity:g}",
        skip=lambda changes: training(changes) == own,
    )
    found = []
    for number, chosen in enumerate(settings):
        key = _key(config, task, method, sparsity, tuning.seed, tuning.length, settings=chosen)
        found.append(
            Cell(
                "trial",
                task,
                method,
                sparsity,
                tuning.seed,
                tuning.length,
                number,
                chosen,
                (),
                key,
            )
        )
    return found


def _runs(
    config: ExperimentConfig,
    task: TaskSpec,
    method: MethodSpec,
    sparsity: float,
    trials: tuple[str, ...],
) -> list[Cell]:
    return [
        Cell(
            "run",
            task,
            method,
            sparsity,
            seed,
            length,
            -1,
            None if trials else {},
            trials,
            _key(config, task, method, sparsity, seed, length, trials=trials),
        )
        for length in config.lengths
        for seed in config.seeds
    ]


def _key(
    config: ExperimentConfig,
    task: TaskSpec,
    method: MethodSpec,
    sparsity: float,
    seed: int,
    length: float,
    **more: Any,
) -> str:
    """A hash of all that the result depends on, as far as the config says; not the device."""
    options = {name: value for name, value in task.options.items() if name != "device"}
    what = {
        "task": [task.label, task.name, options, task.steps],
        "method": [method.label, method.name, dict(method.options), dict(method.training)],
        "training": dict(config.training),
        "budget": [config.budget, config.max_stretch if config.budget == "flops" else None],
        "run": [float(sparsity), seed, float(length)],
        **more,
    }
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
