"""Result files: a table and the numbers behind it, with the machine that they are from.

    {"format": "resu_compile benchmark result", "version": 1,
     "title": ..., "command": ..., "environment": {...},
     "headers": [...], "rows": [[cell, ...], ...], "records": [{...}, ...]}

``rows`` are the cells of the table as they are printed, ``records`` the plain numbers, for plots.
The tables of docs/performance.md are made from such files and from nothing else.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.environment import describe, environment

FORMAT = "resu_compile benchmark result"
VERSION = 1

Record = Mapping[str, object]


class ResultError(ValueError):
    """A file that is not a result."""


@dataclass(frozen=True)
class Result:
    """One table of one run.

    Attributes:
        title: what was measured, a sentence without its full stop.
        command: what makes this file.
        headers: heads of the columns.
        rows: cells; numbers are rounded already.
        records: one mapping for each measurement.
        environment: device, driver and versions; of this process where not given.
    """

    title: str
    command: str
    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    records: Sequence[Record] = ()
    environment: Mapping[str, str] = field(default_factory=environment)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ResultError(
                    f"{self.title}: expected {len(self.headers)} cells in a row, got {len(row)}"
                )

    def text(self) -> str:
        """The table for a terminal, under the machine and versions."""
        table = tabulate(self.rows, headers=list(self.headers), disable_numparse=True)
        return f"{self.title}; {describe(self.environment)}\n{table}"

    def markdown(self) -> str:
        """The table for a page, over the machine and the command."""
        lines = [list(self.headers), ["---"] * len(self.headers), *self.rows]
        table = "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)
        made = f"{self.title}. {describe(self.environment)}."
        return f"{made}\n\n`{self.command}`\n\n{table}"

    def save(self, path: Path | str) -> None:
        """Write the file; its folder is made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "title": self.title,
            "command": self.command,
            "environment": dict(self.environment),
            "headers": list(self.headers),
        }
        # one row and one record a line: short files, and diffs that can be read
        head = json.dumps(content, indent=1)[:-2]
        rows = ",\n  ".join(json.dumps(list(row)) for row in self.rows)
        records = ",\n  ".join(json.dumps(dict(record)) for record in self.records)
        text = f'{head},\n "rows": [\n  {rows}\n ],\n "records": [\n  {records}\n ]\n}}\n'
        path.write_text(text, encoding="utf-8")


def command_of(module: str, argv: Sequence[str] | None) -> str:
    """The command line of a benchmark, without where its result goes.

    Args:
        module: its name in this package.
        argv: its arguments; None takes those of this process.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if "--json" in given:
        place = given.index("--json")
        del given[place : place + 2]
    return shlex.join(["python", "-m", f"benchmarks.{module}", *given])


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def load(path: Path | str) -> Result:
    """The result in a file.

    Raises:
        ResultError: it holds something else.
    """
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultError(f"{path}: expected JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ResultError(f"{path}: expected a JSON object of format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise ResultError(f"{path}: expected version {VERSION}, got {content.get('version')!r}")
    return Result(
        content["title"],
        content["command"],
        content["headers"],
        content["rows"],
        content["records"],
        content["environment"],
    )
