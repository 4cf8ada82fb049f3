"""Judges the runs of ``verify``: what one-shot pruning lost, and what RESU recovered of it.

With held-out scores s, signed so that higher is better, and means over the seeds:

    lost      = mean(s_dense - s_one_shot)
    recovered = mean(s_RESU - s_one_shot) / lost

Where ``lost`` is at most twice its standard error over the seeds there is nothing to recover that
could be told from chance, and ``recovered`` is not defined.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tabulate import tabulate

METHODS = ("dense", "one_shot", "gradual", "resu")
ENOUGH = 0.5  # share of what one-shot lost that RESU has to recover, exclusive
ERRORS = 2.0  # standard errors that a loss has to exceed to count as one


@dataclass(frozen=True)
class RunNumbers:
    """What one run came to.

    Attributes:
        seed: of initial weights and batches.
        score: held-out, in the task's own metric.
        resurrected: places that came back, summed over the commits.
        came_back: share of the finally active places that had been pruned before, in [0, 1].
        problems: one sentence for each count that is off.
        elapsed_s: seconds of training, evaluation included.
    """

    seed: int
    score: float
    resurrected: int = 0
    came_back: float = 0.0
    problems: tuple[str, ...] = ()
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and how well it is known.

    Attributes:
        mean: over the seeds.
        error: standard error of the mean; None from a single seed.
    """

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from one value a seed."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)

    @property
    def is_positive(self) -> bool:
        """True if the mean exceeds 0 by more than ``ERRORS`` standard errors."""
        return self.error is not None and self.mean > ERRORS * self.error


@dataclass(frozen=True)
class Row:
    """The runs of one task at one sparsity.

    Attributes:
        task: its name.
        metric: what the scores are.
        higher_is_better: which way is better.
        sparsity: final.
        runs: method of ``METHODS`` -> one run a seed, in the same order of seeds.
        judge_recovery: False leaves it at the counts.
    """

    task: str
    metric: str
    higher_is_better: bool
    sparsity: float
    runs: Mapping[str, tuple[RunNumbers, ...]]
    judge_recovery: bool = True

    def scores(self, method: str) -> list[float]:
        """One score a seed, in the task's metric."""
        return [run.score for run in self.runs[method]]

    def gain(self, method: str, over: str) -> Estimate:
        """How much better ``method`` is than ``over``, by pairs of runs from one seed."""
        sign = 1.0 if self.higher_is_better else -1.0
        pairs = zip(self.scores(method), self.scores(over), strict=True)
        return Estimate.of([sign * (a - b) for a, b in pairs])

    @property
    def lost(self) -> Estimate:
        """What one-shot pruning lost against dense."""
        return self.gain("dense", over="one_shot")

    @property
    def recovered(self) -> float | None:
        """Share of ``lost`` that RESU recovered; None if there is no loss to recover."""
        if not self.lost.is_positive:
            return None
        return self.gain("resu", over="one_shot").mean / self.lost.mean

    def failures(self) -> list[str]:
        """One sentence for each check that fails."""
        where = f"{self.task} at {self.sparsity:.0%}"
        found = [
            f"{where}, seed {run.seed}, {method}: {problem}"
            for method in METHODS
            for run in self.runs[method]
            for problem in run.problems
        ]
        found += [
            f"{where}, seed {run.seed}: expected resurrected weights, got none"
            for run in self.runs["resu"]
            if run.resurrected == 0
        ]
        share = self.recovered
        if self.judge_recovery and share is not None and share <= ENOUGH:
            found.append(
                f"{where}: expected RESU to recover more than {ENOUGH:.0%} of what one-shot lost, "
                f"got {share:.0%}"
            )
        return found

    def verdict(self) -> str:
        """What the table says of the row."""
        if self.failures():
            return "FAILED"
        if not self.judge_recovery:
            return "counts ok"
        if self.lost.error is None:
            return "counts ok; one seed"
        return "ok" if self.recovered is not None else "no loss to recover"


# -- what is shown ---------------------------------------------------------------------------


def verify_table(rows: Sequence[Row]) -> str:
    """One line a task and sparsity; scores as mean and standard deviation over the seeds."""
    lines = []
    for row in rows:
        share = row.recovered
        back = statistics.fmean(run.came_back for run in row.runs["resu"])
        lines.append(
            [
                f"{row.task}, {'%' if row.metric == 'accuracy' else row.metric}",
                f"{row.sparsity:.0%}",
                *[_spread(row, method) for method in METHODS],
                _signed(row, row.lost),
                "-" if share is None else f"{share:.0%}",
                _signed(row, row.gain("resu", over="gradual")),
                f"{back:.1%}",
                row.verdict(),
            ]
        )
    headers = ["task", "pruned", "dense", "one-shot", "gradual", "RESU", "lost", "recovered"]
    headers += ["RESU over gradual", "came back", "verdict"]
    align = ("left", *["right"] * (len(headers) - 2), "left")
    return str(tabulate(lines, headers=headers, colalign=align, disable_numparse=True))


def _spread(row: Row, method: str) -> str:
    scores = row.scores(method)
    mean = _number(row, statistics.fmean(scores))
    return f"{mean} ± {_number(row, statistics.stdev(scores))}" if len(scores) > 1 else mean


def _signed(row: Row, estimate: Estimate) -> str:
    mean = _number(row, estimate.mean, sign="+")
    return mean if estimate.error is None else f"{mean} ± {_number(row, estimate.error)}"


def _number(row: Row, value: float, sign: str = "") -> str:
    """In percent for an accuracy, else as it is."""
    return f"{100.0 * value:{sign}.2f}" if row.metric == "accuracy" else f"{value:{sign}.4f}"


def notes_on(rows: Sequence[Row]) -> list[str]:
    """What the table means, and what it must not hide: rows without a loss, rows RESU lost."""
    seeds = len(rows[0].runs["resu"])
    how = "one seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"
    notes = [
        f"Held-out scores: {how}; equal steps, batches and initial weights.",
        "gradual: RESU's plan without resurrection. lost: by one-shot against dense, ± standard",
        "error; recovered: of it, by RESU. came back: share of the finally active weights that had",
        "been pruned before.",
    ]
    for row in rows:
        where = f"{row.task} at {row.sparsity:.0%}"
        if row.verdict() == "no loss to recover":
            notes.append(
                f"{where}: no loss to recover: what one-shot lost ({_signed(row, row.lost)}) is "
                f"within {ERRORS:g} standard errors of 0."
            )
        ahead = row.gain("gradual", over="resu")
        if row.judge_recovery and ahead.is_positive:
            notes.append(
                f"{where}: RESU is worse than gradual pruning without resurrection, by "
                f"{_signed(row, ahead)}."
            )
    if not rows[0].judge_recovery:
        notes.append("Quick: too few steps to learn; recovery was not judged.")
    elif seeds == 1:
        notes.append("One seed says nothing about chance; recovery was not judged.")
    return notes
