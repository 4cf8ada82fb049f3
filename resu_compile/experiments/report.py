"""Tables and pictures of a results file.

report.md     for each task and length: the test metric, paired differences, costs, settings
runs.csv      one line a run or trial
summary.csv   one line a method and sparsity: mean and 95 % interval
pairs.csv     one line a rival and sparsity: difference, 95 % interval, p
*.png         metric over sparsity, metric over training FLOPs
"""

from __future__ import annotations

import csv
import importlib.util
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from resu_compile.errors import ArgumentError
from resu_compile.experiments.intervals import Interval
from resu_compile.experiments.records import Record, by_key, read_records
from resu_compile.experiments.table import DENSE_AT, Group, group_runs

Rows = list[list[Any]]
OFF_BUDGET = 0.02  # of equal training FLOPs, relative, that the report tells of


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        text: of ``report.md``.
        files: all of them.
    """

    text: str
    files: tuple[Path, ...]


def write_report(
    results: str | Path, folder: str | Path | None = None, *, method: str = "resu"
) -> Report:
    """Make tables and pictures of a results file.

    Args:
        results: the file, or the folder that it is in.
        folder: where they go; by default ``report`` beside the results.
        method: what the others are rivals of; without runs of it there are no differences.

    Raises:
        ArgumentError: no such file, no reported run in it, or scipy is not installed.
    """
    path = Path(results)
    path = path / "results.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ArgumentError(f"results: expected a results file or its folder, got {results}")
    records = read_records(path)
    groups = group_runs(records)
    if not groups:
        raise ArgumentError(f"{path}: expected a reported run that succeeded, found none")
    target = path.parent / "report" if folder is None else Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    pictures: list[Path] = []
    if importlib.util.find_spec("matplotlib") is not None:
        from resu_compile.experiments.report_plots import draw_groups

        pictures = draw_groups(groups, target, highlight=method)
    text = report_text(groups, records, method=method, pictures=[p.name for p in pictures])
    markdown = target / "report.md"
    markdown.write_text(text, encoding="utf-8")
    tables = [
        _write_csv(target / "runs.csv", run_rows(records)),
        _write_csv(target / "summary.csv", summary_rows(groups)),
        _write_csv(target / "pairs.csv", pair_rows(groups, method)),
    ]
    return Report(text, (markdown, *tables, *pictures))


# -- text --------------------------------------------------------------------------------------
def report_text(
    groups: Sequence[Group],
    records: Sequence[Record],
    *,
    method: str = "resu",
    pictures: Sequence[str] = (),
) -> str:
    """The tables of all groups as markdown.

    Args:
        groups: what is shown.
        records: all of the file, for trials, failures and environments.
        method: what the others are rivals of.
        pictures: names of files beside the text.
    """
    parts = ["# Results", "", *notes_on(groups, records)]
    for group in groups:
        arrow = "higher" if group.higher_is_better else "lower"
        parts += [
            "",
            f"## {group.title}",
            "",
            f"Test {group.metric}, {arrow} is better: mean ± 95 % interval (seeds).",
            "",
            markdown_table(metric_rows(group)),
        ]
        if method in group.methods and len(group.methods) > 1:
            parts += [
                "",
                f"{method} against each rival over the same seeds: difference in {group.metric}, "
                f"above 0 where {method} is better, [95 % interval], p of the paired t-test.",
                "",
                markdown_table(difference_rows(group, method)),
            ]
        parts += ["", "Costs, as means over the seeds.", "", markdown_table(cost_rows(group))]
        settings = setting_rows(group)
        if len(settings) > 1:
            parts += ["", "Settings that the trials chose.", "", markdown_table(settings)]
        parts += ["", *(f"![]({name})" for name in pictures if name.startswith(group.slug))]
    return "\n".join(parts).rstrip() + "\n"


def metric_rows(group: Group) -> Rows:
    """Methods by sparsities."""
    rows: Rows = [["method", *[f"{s:.4g}" for s in group.sparsities or [DENSE_AT]]]]
    for name in group.methods:
        found = [group.mean(name, s) for s in group.sparsities or [DENSE_AT]]
        rows.append([name, *[_shown(interval, group.seeds) for interval in found]])
    return rows


def difference_rows(group: Group, method: str) -> Rows:
    """Rivals by sparsities."""
    rows: Rows = [["rival", *[f"{s:.4g}" for s in group.sparsities]]]
    for rival in group.methods:
        if rival != method:
            found = [group.difference(method, rival, s) for s in group.sparsities]
            rows.append([rival, *[_difference(interval) for interval in found]])
    return rows


def cost_rows(group: Group) -> Rows:
    """What each method did and spent at each sparsity, and how well it knows its training data."""
    columns: dict[str, tuple[str, ...]] = {
        "training FLOPs": ("flops", "training"),
        "inference FLOPs": ("flops", "inference"),
        "Rs": ("ever_share",),
        "churn": ("mean_churn",),
        f"{group.metric} in training": ("scores", "training", group.metric),
    }
    values = {
        place: {title: group.values(*place, *path) for title, path in columns.items()}
        for place in sorted(group.runs, key=lambda place: place[1])
    }
    shown = [title for title in columns if any(found[title] for found in values.values())]
    rows: Rows = [["method", "sparsity", "steps", *shown]]
    for (name, sparsity), found in values.items():
        steps = sorted({record["steps"] for record in group.runs[name, sparsity].values()})
        means = [f"{statistics.fmean(found[t]):.3f}" if found[t] else "-" for t in shown]
        rows.append([name, f"{sparsity:.4g}", " ".join(map(str, steps)), *means])
    return rows


def setting_rows(group: Group) -> Rows:
    """The chosen settings, where they are not the method's own."""
    rows: Rows = [["method", "sparsity", "settings"]]
    for (name, sparsity), runs in sorted(group.runs.items(), key=lambda item: item[0][1]):
        found = {json.dumps(r.get("settings", {}), sort_keys=True) for r in runs.values()}
        rows += [[name, f"{sparsity:.4g}", text] for text in sorted(found) if text != "{}"]
    return rows


def notes_on(groups: Sequence[Group], records: Sequence[Record]) -> list[str]:
    """What the numbers mean, and what they must not hide."""
    known = list(by_key(records).values())
    notes = [
        "Intervals are Student's t over seeds; p values are not corrected for the number of "
        "comparisons. Training FLOPs are relative to dense training of the same length."
    ]
    trials = [record for record in known if record["kind"] == "trial"]
    if trials:
        seeds = sorted({record["seed"] for record in trials})
        notes.append(
            f"Settings were chosen by {len(trials)} trials on validation data with seed "
            f"{', '.join(map(str, seeds))}, which is not reported; all numbers are of test data."
        )
    failed = [record for record in known if record["status"] != "done"]
    notes += [f"Failed: {_place(record)}: {record.get('error', '')}" for record in failed]
    for group in groups:
        left_out = group.count - sum(map(len, group.runs.values()))
        if left_out:
            notes.append(
                f"Replaced: {group.title}: {left_out} runs of an earlier config, with equal labels "
                "and seeds and other settings; those methods that were not run again are as before."
            )
        for (name, sparsity), runs in group.runs.items():
            if len(runs) < group.seeds:
                notes.append(
                    f"Incomplete: {group.title}, {name} at {sparsity:g}: {len(runs)} of "
                    f"{group.seeds} seeds."
                )
            if len({json.dumps(r.get("settings"), sort_keys=True) for r in runs.values()}) > 1:
                notes.append(
                    f"Mixed: {group.title}, {name} at {sparsity:g}: its seeds have different "
                    "settings; run the experiment again to its end."
                )
            scored = len(group.scores(name, sparsity))
            if scored < len(runs):
                notes.append(
                    f"Not finite: {group.title}, {name} at {sparsity:g}: {len(runs) - scored} of "
                    f"{len(runs)} runs; they are left out of the means."
                )
            if any(record["flops"].get("capped") for record in runs.values()):
                notes.append(
                    f"Capped: {group.title}, {name} at {sparsity:g}: its steps end before its "
                    "training FLOPs do."
                )
            elif group.budget == "flops" and sparsity != DENSE_AT:
                spent = group.values(name, sparsity, "flops", "training")
                if max(abs(value - 1.0) for value in spent) > OFF_BUDGET:
                    notes.append(
                        f"Off budget: {group.title}, {name} at {sparsity:g} spent "
                        f"{min(spent):.3f} to {max(spent):.3f} of the training FLOPs."
                    )
    sources = {record["environment"]["source"] for record in known if "environment" in record}
    if len(sources) > 1:
        notes.append(
            f"Made by {len(sources)} versions of the source ({', '.join(sorted(sources))})."
        )
    for group in groups:
        machines = {_machine(r) for runs in group.runs.values() for r in runs.values()}
        if len(machines) > 1:
            notes.append(
                f"Several machines: {group.title}: differences may be theirs in part "
                f"({'; '.join(sorted(machines))})."
            )
    notes += [f"Environment: {text}." for text in _environments(known)]
    return [f"- {note}" for note in notes]


def _environments(records: Sequence[Record]) -> list[str]:
    found = set()
    for record in records:
        made = record.get("environment")
        if made is not None:
            versions = ", ".join(f"{k} {v}" for k, v in sorted(made["versions"].items()))
            where = made.get("gpu") or f"{made['cores']} CPU cores, {made['threads']} threads"
            found.add(f"{where}; Python {made['python']}, {versions}; source {made['source']}")
    return sorted(found)


def _machine(record: Record) -> str:
    """What numbers may depend on, beside what the config says."""
    made = record["environment"]
    return f"{made.get('gpu', 'CPU')}, torch {made['versions'].get('torch')}"


def _place(record: Record) -> str:
    who = f"trial {record['trial']}" if record["kind"] == "trial" else f"seed {record['seed']}"
    where = f"{record['task']}, {record['length']:g}x"
    return f"{where}, {record['method']} at {record['sparsity']:g}, {who}"


def _shown(interval: Interval | None, seeds: int) -> str:
    if interval is None:
        return "-"
    spread = "" if interval.half_width is None else f" ± {interval.half_width:.4f}"
    missing = f" of {seeds}" if interval.count < seeds else ""  # one that failed, say
    return f"{interval.mean:.4f}{spread} ({interval.count}{missing})"


def _difference(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    if interval.low is None or interval.p_value is None:
        return f"{interval.mean:+.4f}, {interval.verdict}"
    ends = f"[{interval.low:+.4f}, {interval.high:+.4f}]"
    return f"{interval.mean:+.4f} {ends}, p {interval.p_value:.2g}, {interval.verdict}"


def markdown_table(rows: Rows) -> str:
    """Rows, the first of which are headers, as a markdown table."""
    return str(tabulate(rows[1:], headers=rows[0], tablefmt="pipe", disable_numparse=True))


# -- CSV ---------------------------------------------------------------------------------------
def run_rows(records: Sequence[Record]) -> Rows:
    """One row a run or trial."""
    plain = ("kind", "task", "method", "sparsity", "seed", "length", "budget", "trial", "status")
    rows: Rows = [
        [*plain, "steps", "metric", "validation", "test", "training_flops", "inference_flops"]
        + ["ever_share", "mean_churn", "elapsed_s", "settings", "error"]
    ]
    for record in by_key(records).values():
        metric = record.get("metric")
        scores: Mapping[str, Any] = record.get("scores", {})
        flops: Mapping[str, Any] = record.get("flops", {})
        rows.append(
            [
                *(record[name] for name in plain),
                record.get("steps"),
                metric,
                scores.get("validation", {}).get(metric),
                scores.get("test", {}).get(metric),
                flops.get("training"),
                flops.get("inference"),
                *(record.get(name) for name in ("ever_share", "mean_churn", "elapsed_s")),
                json.dumps(record.get("settings", {}), sort_keys=True),
                record.get("error", ""),
            ]
        )
    return rows


def summary_rows(groups: Sequence[Group]) -> Rows:
    """One row a method and sparsity."""
    rows: Rows = [
        ["task", "length", "budget", "metric", "method", "sparsity", "seeds", "mean", "low", "high"]
    ]
    for group in groups:
        for name, sparsity in group.runs:
            found = group.mean(name, sparsity)
            if found is not None:
                where = [group.task, group.length, group.budget, group.metric, name, sparsity]
                rows.append([*where, found.count, found.mean, found.low, found.high])
    return rows


def pair_rows(groups: Sequence[Group], method: str) -> Rows:
    """One row a rival and sparsity; differences above 0 where ``method`` is better."""
    rows: Rows = [
        ["task", "length", "budget", "metric", "method", "rival", "sparsity", "seeds"]
        + ["difference", "low", "high", "p", "verdict"]
    ]
    for group in groups:
        for rival in group.methods if method in group.methods else []:
            for sparsity in group.sparsities:
                found = None if rival == method else group.difference(method, rival, sparsity)
                if found is not None:
                    where = [group.task, group.length, group.budget, group.metric, method, rival]
                    numbers = [found.count, found.mean, found.low, found.high, found.p_value]
                    rows.append([*where, sparsity, *numbers, found.verdict])
    return rows


def _write_csv(path: Path, rows: Rows) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path
