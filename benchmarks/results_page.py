"""Tables and pictures of docs/results.md, made from the records of experiments.

    resu-compile experiment examples/evidence_bytes.yaml
    python -m benchmarks.results_page --take runs/evidence_bytes/results.jsonl evidence_bytes
    python -m benchmarks.results_page                 # write the tables anew
    python -m benchmarks.results_page --check         # 1 where the page is not up to date

``--take`` keeps the records in ``benchmarks/results/NAME.jsonl``, without what the config file and
the settings say already. A table stands between ``<!-- begin NAME:PART -->`` and its end;
``PARTS`` names the parts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.performance_page import RESULTS, ROOT, PageError, fill_regions, names_of
from resu_compile.experiments.records import by_key, read_records
from resu_compile.experiments.report import (
    cost_rows,
    difference_rows,
    markdown_table,
    metric_rows,
    notes_on,
    setting_rows,
)
from resu_compile.experiments.report_plots import draw_groups
from resu_compile.experiments.table import Group, group_runs

PAGE = ROOT / "docs" / "results.md"
PLOTS = ROOT / "docs" / "plots"
METHOD = "resu"
LEFT_OUT = ("training", "densities")
LEFT_OUT_OF_ENVIRONMENT = ("platform",)


# -- parts of the page -------------------------------------------------------------------------
def _each(groups: Sequence[Group], table: Callable[[Group], str]) -> str:
    shown = [(group, table(group)) for group in groups]
    if len(shown) == 1:
        return shown[0][1]
    return "\n\n".join(f"**{group.title}**\n\n{text}" for group, text in shown)


def scores(name: str) -> str:
    """Mean and interval of each method."""
    return _each(_groups(name), lambda group: markdown_table(metric_rows(group)))


def pairs(name: str) -> str:
    """RESU against each rival over the same seeds."""
    return _each(_groups(name), lambda group: markdown_table(difference_rows(group, METHOD)))


def costs(name: str) -> str:
    """Steps, FLOPs and churn."""
    return _each(_groups(name), lambda group: markdown_table(cost_rows(group)))


def settings(name: str) -> str:
    """What the trials chose."""
    return _each(_groups(name), lambda group: markdown_table(setting_rows(group)))


def notes(name: str) -> str:
    """Trials, failures, machines and versions."""
    return "\n".join(notes_on(_groups(name), _records(name)))


def pictures(name: str) -> str:
    """The metric over sparsity and over training FLOPs, as ``draw`` has made them."""
    found = [path for group in _drawn(name) for path in sorted(PLOTS.glob(f"{group.slug}-*.png"))]
    return "\n\n".join(f"![{path.stem}](plots/{path.name})" for path in found)


def draw(text: str) -> None:
    """Make the pictures that ``text`` has a region for."""
    for region in names_of(text):
        name, _, part = region.partition(":")
        if part == "pictures":
            draw_groups(_drawn(name), PLOTS, highlight=METHOD)


PARTS: dict[str, Callable[[str], str]] = {
    "scores": scores,
    "pairs": pairs,
    "costs": costs,
    "settings": settings,
    "notes": notes,
    "pictures": pictures,
}


# -- records -----------------------------------------------------------------------------------
def _records(name: str) -> list[dict[str, Any]]:
    return read_records(RESULTS / f"{name}.jsonl")


def _groups(name: str) -> list[Group]:
    return group_runs(_records(name))


def _drawn(name: str) -> list[Group]:
    """A single sparsity makes no curve."""
    return [group for group in _groups(name) if len(group.sparsities) > 1]


def take(path: Path, name: str) -> Path:
    """Keep the records of ``path`` under ``name``, the newest of each cell."""
    target = RESULTS / f"{name}.jsonl"
    kept = [_trimmed(record) for record in by_key(read_records(path)).values()]
    target.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return target


def _trimmed(record: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key not in LEFT_OUT}
    if "environment" in kept:
        own = kept["environment"].items()
        kept["environment"] = {k: v for k, v in own if k not in LEFT_OUT_OF_ENVIRONMENT}
    return kept


def render(name: str) -> str:
    """What stands in the region ``name``, which is ``FILE:PART``."""
    file, _, part = name.partition(":")
    if part not in PARTS or not (RESULTS / f"{file}.jsonl").is_file():
        raise PageError(
            f"{name}: expected FILE:PART, with a part of {[*PARTS]} and a file of "
            f"{sorted(found.stem for found in RESULTS.glob('*.jsonl'))}"
        )
    return PARTS[part](file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--take", nargs=2, metavar=("RESULTS", "NAME"))
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would change")
    args = parser.parse_args(arguments)
    if args.take:
        print(take(Path(args.take[0]), args.take[1]))
    before = PAGE.read_text(encoding="utf-8")
    if args.check:
        return int(before != fill_regions(before, render))
    draw(before)
    after = fill_regions(before, render)
    PAGE.write_text(after, encoding="utf-8")
    print(f"{PAGE}: {len(names_of(after))} regions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
