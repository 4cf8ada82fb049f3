"""The reported runs of a results file, by task, length, method and sparsity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resu_compile.errors import ArgumentError
from resu_compile.experiments.intervals import Interval, interval_of, paired_difference
from resu_compile.experiments.records import Record, by_key

DENSE_AT = 0.0  # sparsity of the dense runs


@dataclass(frozen=True)
class Group:
    """The runs of one task at one length and budget.

    Attributes:
        task: its label.
        length: of the runs.
        dense_steps: optimizer steps of dense training of this length.
        budget: ``"steps"`` or ``"flops"``.
        metric: what is compared.
        higher_is_better: which way is better.
        runs: (method, sparsity) -> seed -> record; of several with other settings the last one.
        count: of all records, those included that are not in ``runs`` for this reason.
    """

    task: str
    length: float
    dense_steps: int
    budget: str
    metric: str
    higher_is_better: bool
    runs: Mapping[tuple[str, float], Mapping[int, Record]]
    count: int

    @property
    def title(self) -> str:
        """For headings."""
        equal = "equal steps" if self.budget == "steps" else "equal training FLOPs"
        return f"{self.task}, {self.length:g}x ({self.dense_steps} steps), {equal}"

    @property
    def slug(self) -> str:
        """For names of files."""
        return f"{self.task}-x{self.length:g}-{self.dense_steps}-{self.budget}"

    @property
    def methods(self) -> list[str]:
        """In the order of the file; dense ones first."""
        names = list(dict.fromkeys(method for method, _ in self.runs))
        return sorted(names, key=lambda name: (name, DENSE_AT) not in self.runs)

    @property
    def sparsities(self) -> list[float]:
        """Of the sparse runs, ascending."""
        return sorted({sparsity for _, sparsity in self.runs if sparsity != DENSE_AT})

    @property
    def seeds(self) -> int:
        """How many seeds the method with the most of them has."""
        return max(len(runs) for runs in self.runs.values())

    def of(self, method: str, sparsity: float) -> Mapping[int, Record]:
        """Seed -> record; a dense method has the same runs at all sparsities."""
        return self.runs.get((method, sparsity)) or self.runs.get((method, DENSE_AT), {})

    def scores(self, method: str, sparsity: float) -> dict[int, float]:
        """Seed -> test metric, of the runs that have a finite one."""
        found = {
            seed: record["scores"]["test"].get(self.metric)
            for seed, record in self.of(method, sparsity).items()
        }
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, method: str, sparsity: float) -> Interval | None:
        """The test metric; None without runs."""
        scores = self.scores(method, sparsity)
        return interval_of([scores[seed] for seed in sorted(scores)]) if scores else None

    def difference(self, method: str, rival: str, sparsity: float) -> Interval | None:
        """How much better ``method`` is than ``rival``; None without a common seed."""
        return paired_difference(
            self.scores(method, sparsity),
            self.scores(rival, sparsity),
            higher_is_better=self.higher_is_better,
        )

    def values(self, method: str, sparsity: float, *path: str) -> list[float]:
        """A number of each record, such as ``"flops", "training"``; those that are there."""
        found = []
        for record in self.of(method, sparsity).values():
            value: Any = record
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                found.append(float(value))
        return found


def group_runs(records: Iterable[Record]) -> list[Group]:
    """The groups of all reported runs that succeeded, in the order of the file.

    Raises:
        ArgumentError: the runs of one task differ in their metric.
    """
    runs: dict[tuple[str, float, int, str], list[Record]] = {}
    for record in by_key(records).values():
        if record["kind"] == "run" and record["status"] == "done":
            steps, length = record["dense_steps"], float(record["length"])
            where = (record["task"], length, steps, record["budget"])
            runs.setdefault(where, []).append(record)
    return [_group(*where, found) for where, found in runs.items()]


def _group(task: str, length: float, steps: int, budget: str, records: Sequence[Record]) -> Group:
    kinds = {(record["metric"], record["higher_is_better"]) for record in records}
    if len(kinds) > 1:
        raise ArgumentError(
            f"task {task}: expected one metric in all records, got {sorted(map(str, kinds))}; "
            "keep one results file for each experiment"
        )
    found: dict[tuple[str, float], dict[int, Record]] = {}
    for record in records:
        place = found.setdefault((record["method"], float(record["sparsity"])), {})
        place[record["seed"]] = record
    metric, higher = kinds.pop()
    return Group(task, length, steps, budget, metric, higher, found, len(records))
