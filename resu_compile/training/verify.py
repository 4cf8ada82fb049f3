"""Checks what RESU is for: that pruned weights come back, in the right number, and that it helps.

Dense, one-shot pruned, gradually pruned and RESU models are trained on the demo's tasks for the
same steps, from the same initial weights, on the same batches in the same order. With held-out
scores s, signed so that higher is better, and means over the seeds:

    lost      = mean(s_dense - s_one_shot)
    recovered = mean(s_RESU - s_one_shot) / lost

One-shot trains dense up to the step at which the RESU run first holds the final sparsity, prunes
there, and trains on to the end: both have the same steps left for fine-tuning. Where ``lost`` is at
most twice its standard error over the seeds there is nothing to recover that could be told from
chance, and ``recovered`` is not defined. Gradual is the plan of the RESU run without resurrection;
nothing is judged by it, but RESU is only worth its while where it is better.

The checks fail if a RESU run resurrected nothing, if a weight holds another number of entries than
``keep_count`` says (all weights together, if their scores are ranked together), after a commit or
at the end, or if ``recovered`` is at most one half.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from resu_compile.errors import ArgumentError, check_choice, check_integer, check_share
from resu_compile.phase import Phase
from resu_compile.runtime.commit_report import CommitReport
from resu_compile.runtime.controller import Controller
from resu_compile.sparsity import keep_count
from resu_compile.training.baselines import dense_config, gradual_config, one_shot_config
from resu_compile.training.callbacks import Callback
from resu_compile.training.config import TrainingConfig
from resu_compile.training.cycle import Cycle
from resu_compile.training.ever_pruned import EverPruned
from resu_compile.training.plan import build_plan
from resu_compile.training.presets import preset
from resu_compile.training.sparse_training import SparseTraining
from resu_compile.training.tasks import BUILT_IN, adapt_demo_task
from resu_compile.training.trainer import Trainer
from resu_compile.training.verdict import METHODS, Row, RunNumbers, notes_on, verify_table

if TYPE_CHECKING:
    from resu_compile.demo.tasks import Task

# Small enough for minutes on two CPU cores. The bytes take a smaller GPT than the demo's, which has
# more steps in the time: 300 steps of the demo's leave it so far from trained that RESU loses to
# one-shot pruning at 70 % (3.07 against 2.99 bits per byte, one seed).
STEPS = {"digits": 600, "bytes": 800}
SMALL_GPT = {"width": 64, "layers": 2, "heads": 2, "context": 64}
QUICK_STEPS = {"digits": 60, "bytes": 30}
QUICK_CYCLES = 2
DATA_NOTE = (
    "The plan is preset {preset!r}. That of 'default' was chosen by probes of other sizes of\n"
    "these tasks (docs/training.md), whose validation data are a part of what is held out here.\n"
    "The learning rates are the demo's; they and the size of the small GPT were settled earlier\n"
    "on runs of these tasks, held-out data included."
)


@dataclass(frozen=True)
class VerifyConfig:
    """What is checked.

    Attributes:
        tasks: of ``"digits"`` and ``"bytes"``.
        sparsities: final ones, in (0, 1).
        seeds: how many: 0, 1, ...; recovery is judged from two on.
        size: of the tasks, ``"small"`` or ``"large"``.
        device: ``"cpu"`` or ``"cuda"``.
        quick: few steps, in which nothing is learned: counts and resurrections alone are judged,
            with a quota for these.
        compile: compile the models.
        preset: of RESU's plan, one of ``PRESETS`` whose sparsity rises.
    """

    tasks: tuple[str, ...] = BUILT_IN
    sparsities: tuple[float, ...] = (0.7, 0.9)
    seeds: int = 3
    size: str = "small"
    device: str = "cpu"
    quick: bool = False
    compile: bool = False
    preset: str = "default"

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        if not self.tasks:
            raise ArgumentError(f"tasks: expected one of {', '.join(BUILT_IN)} or more, got none")
        for name in self.tasks:
            check_choice(name, BUILT_IN, name="tasks")
        if not self.sparsities:
            raise ArgumentError("sparsities: expected at least one, got none")
        for value in self.sparsities:
            if check_share(value, name="sparsity") == 0.0:
                raise ArgumentError("sparsity: expected a number in (0, 1), got 0")
        check_integer(self.seeds, name="seeds", minimum=1)
        check_choice(self.size, ("small", "large"), name="size")
        check_choice(self.device, ("cpu", "cuda"), name="device")
        if preset(self.preset).densify is not None:
            raise ArgumentError(
                f"preset: expected one whose sparsity rises, got {self.preset!r}, whose falls"
            )


@dataclass(frozen=True)
class VerifyOutcome:
    """All rows, and what follows from them."""

    config: VerifyConfig
    rows: tuple[Row, ...]
    elapsed_s: float

    @property
    def failures(self) -> list[str]:
        """One sentence for each check that failed."""
        return [failure for row in self.rows for failure in row.failures()]

    @property
    def passed(self) -> bool:
        """True if no check failed."""
        return not self.failures

    def text(self) -> str:
        """The table, what it means and how it ends."""
        ending = [f"FAILED: {failure}" for failure in self.failures] or ["All checks passed."]
        note = DATA_NOTE.format(preset=self.config.preset)
        parts = [verify_table(self.rows), "", *notes_on(self.rows), note]
        return "\n".join([*parts, f"Took {self.elapsed_s:.0f} s.", "", *ending])

    def write(self, folder: str | Path) -> Path:
        """Write all numbers to ``verify.json`` in ``folder``, and return its path."""
        path = Path(folder) / "verify.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    def as_dict(self) -> dict[str, Any]:
        """All numbers, with what is needed to make them again."""
        import resu_compile

        return {
            "torch": torch.__version__,
            "resu_compile": resu_compile.__version__,
            "threads": torch.get_num_threads(),
            "config": asdict(self.config),
            "elapsed_s": self.elapsed_s,
            "failures": self.failures,
            "rows": [
                {
                    "task": row.task,
                    "metric": row.metric,
                    "sparsity": row.sparsity,
                    "lost": asdict(row.lost),
                    "recovered": row.recovered,
                    "over_gradual": asdict(row.gain("resu", over="gradual")),
                    "verdict": row.verdict(),
                    "runs": {name: [asdict(r) for r in runs] for name, runs in row.runs.items()},
                }
                for row in self.rows
            ],
        }


# -- the runs --------------------------------------------------------------------------------


def method_config(
    method: str,
    *,
    steps: int,
    sparsity: float,
    seed: int,
    base: str = "default",
    cycles: int | None = None,
) -> TrainingConfig:
    """The config of a method of ``METHODS``; all have the same steps.

    Args:
        method: what is trained.
        steps: optimizer steps in all.
        sparsity: final, in (0, 1); of no consequence to ``"dense"``.
        seed: of the run.
        base: the preset.
        cycles: None takes the preset's.
    """
    config = preset(
        base,
        steps=steps,
        sparsity=sparsity,
        seed=seed,
        clip_norm=1.0,
        compile=False,
        **({} if cycles is None else {"cycles": cycles}),
    )
    if method == "gradual":
        return gradual_config(config)
    if method == "one_shot":
        full = next(span.start for span in build_plan(config) if span.sparsity == sparsity)
        return one_shot_config(config, prune_at=full)
    return dense_config(config) if method == "dense" else config


def verify(config: VerifyConfig, *, tell: Callable[[str], None] | None = None) -> VerifyOutcome:
    """Train all runs and judge them.

    Args:
        config: what is checked.
        tell: called with one line after each run.
    """
    started = time.perf_counter()
    rows: list[Row] = []
    for name in config.tasks:
        task = verified_task(name, config)
        runs: dict[tuple[str, float], list[RunNumbers]] = {}
        for seed in range(config.seeds):
            for method, sparsity in _plan(config):
                found = run_method(task, method, config, sparsity=sparsity, seed=seed)
                runs.setdefault((method, sparsity), []).append(found)
                if tell is not None:
                    label = method if method == "dense" else f"{method} {sparsity:.0%}"
                    tell(
                        f"{name} seed {seed}: {label}: {found.score:.4f} {task.metric} "
                        f"({found.elapsed_s:.0f} s)"
                    )
        for sparsity in config.sparsities:
            keys = {m: (m, 0.0 if m == "dense" else sparsity) for m in METHODS}
            rows.append(
                Row(
                    task=name,
                    metric=task.metric,
                    higher_is_better=task.metric == "accuracy",
                    sparsity=sparsity,
                    runs={method: tuple(runs[key]) for method, key in keys.items()},
                    judge_recovery=not config.quick,
                )
            )
    return VerifyOutcome(config, tuple(rows), time.perf_counter() - started)


def verified_task(name: str, config: VerifyConfig) -> Task:
    """The demo's task, but for the size of the small GPT."""
    from resu_compile.demo.tasks import make_task

    task = make_task(name, config.size, config.device)
    if (name, config.size) != ("bytes", "small"):
        return task
    smaller: dict[str, Any] = dict(SMALL_GPT)
    return replace(task, **smaller)


def _plan(config: VerifyConfig) -> list[tuple[str, float]]:
    """The runs of one seed; one dense run serves every sparsity."""
    sparse = [(m, s) for s in dict.fromkeys(config.sparsities) for m in METHODS if m != "dense"]
    return [("dense", 0.0), *sparse]


def _steps(task: Task, config: VerifyConfig) -> int:
    if config.quick:
        return QUICK_STEPS[task.name]
    return STEPS[task.name] if config.size == "small" else task.training.steps


def run_method(
    task: Task, method: str, config: VerifyConfig, *, sparsity: float, seed: int
) -> RunNumbers:
    """Train one model of ``task`` by ``method``, and count what it holds."""
    started = time.perf_counter()
    steps = _steps(task, config)
    training = replace(
        method_config(
            method,
            steps=steps,
            sparsity=sparsity,
            seed=seed,
            base=config.preset,
            cycles=QUICK_CYCLES if config.quick else None,
        ),
        compile=config.compile,
        autocast="bfloat16" if task.training.autocast else None,
    )
    if config.quick:  # who has trained for a few steps seldom beats a ceiling
        theta = replace(training.resurrection, strategy="amnesty", kind="quota")
        training = replace(training, resurrection=theta)
    made = adapt_demo_task(task, steps=steps, seed=seed)
    witness = Witness()
    trainer = Trainer(
        made.model,
        made.optimizer,
        made.loss_fn,
        training,
        callbacks=[witness],
        evaluate=made.evaluate,
        scheduler=made.scheduler,
    )
    result = trainer.fit(made.batches)
    final = [record for record in result.stats if record["event"] == "evaluation"][-1]
    controller = trainer.cycle.controller
    assert controller is not None
    problems = [*witness.problems]
    if method != "dense":
        problems += count_problems(controller, sparsity)
    return RunNumbers(
        seed=seed,
        score=final["metrics"][task.metric],
        resurrected=witness.resurrected,
        came_back=witness.ever_pruned.came_back(controller),
        problems=tuple(problems),
        elapsed_s=time.perf_counter() - started,
    )


class Witness(Callback):
    """Counts what comes back, and checks the counts of every commit."""

    def __init__(self) -> None:
        self.resurrected = 0
        self.problems: list[str] = []
        self.ever_pruned = EverPruned()

    def on_prune(self, trainer: Trainer, report: CommitReport) -> None:
        """Note who is pruned."""
        self._see(trainer.cycle, report)

    def on_commit(self, trainer: Trainer, report: CommitReport) -> None:
        """Note who came back."""
        self.resurrected += report.resurrected
        self._see(trainer.cycle, report)

    def _see(self, cycle: Cycle | SparseTraining, report: CommitReport) -> None:
        assert isinstance(cycle, Cycle)  # every config of the comparison has cycles
        controller = cycle.controller
        assert controller is not None
        self.ever_pruned.record(controller)
        # a pruning is told in the span that it begins, a commit in the one that it ends; where the
        # resurrection goes on, it has pruned for the next
        goes_on = controller.phase is Phase.RESU
        target = cycle.sparsities[cycle.span.cycle + goes_on]
        scope = cycle.config.scope
        self.problems += report_problems(report, target, step=cycle.step_index, scope=scope)


def report_problems(
    report: CommitReport, sparsity: float, *, step: int, scope: str = "layer"
) -> list[str]:
    """One sentence for each wrong number of entries that a commit or pruning left.

    Args:
        report: what the commit or the pruning left.
        sparsity: that it was to leave.
        step: optimizer steps done.
        scope: ``"layer"``, where each weight has its number, or ``"global"``: all have one.
    """
    counts = {name: (found.total, found.active) for name, found in report.weights.items()}
    return [
        f"{name}: expected {expected} active entries of {total} after step {step}, got {active}"
        for name, total, active, expected in _wrong_counts(counts, sparsity, scope)
    ]


def _wrong_counts(
    counts: Mapping[str, tuple[int, int]], sparsity: float, scope: str
) -> Iterator[tuple[str, int, int, int]]:
    """Name, entries, active entries and how many there should be, where that is another number."""
    if scope == "global":
        counts = {"all weights": (_total(counts, 0), _total(counts, 1))}
    for name, (total, active) in counts.items():
        expected = keep_count(total, sparsity)
        if active != expected:
            yield name, total, active, expected


def _total(counts: Mapping[str, tuple[int, int]], which: int) -> int:
    return sum(pair[which] for pair in counts.values())


def count_problems(controller: Controller, sparsity: float) -> list[str]:
    """One sentence for each weight whose mask or values are off at the end."""
    masks, scope = controller.masks, controller.config.scope
    counts = {name: (mask.numel(), int(mask.sum())) for name, mask in masks.items()}
    found = [
        f"{name}: expected {expected} active entries, got {active}"
        for name, _, active, expected in _wrong_counts(counts, sparsity, scope)
    ]
    parameters = dict(controller.model.named_parameters())
    for name, mask in masks.items():
        weight = parameters[name].detach()
        stray = int(((weight != 0) & ~mask.to(weight.device)).sum())
        if stray:
            found.append(f"{name}: expected zeros where it is pruned, got {stray} other values")
    return found
