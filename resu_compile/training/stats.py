"""The stats of a run: JSON lines, one object a line, each with ``event`` and ``step``.

    {"event": "step", "step": 40, "cycle": 0, "stage": "resu", "loss": 0.31, ...}

``step`` counts the optimizer steps that were done. There is no time of day in them, so that two
equal runs write equal files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.runtime.controller import Controller

MASK_BLOCKS = 64
Record = dict[str, Any]


class StatsWriter:
    """Keeps the records of a run, and appends them to a file if it has one.

    Args:
        path: of the JSON lines file; None keeps the records in memory alone.

    Attributes:
        records: those of this run, in order; after a resume, also those from before.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.records: list[Record] = []

    def begin(self) -> None:
        """Start with an empty file."""
        self.records = []
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("", encoding="utf-8")

    def resume(self, lines: int) -> None:
        """Go on after the first ``lines`` records, and drop what a dead run wrote after them.

        A file that is not there any more is begun anew.
        """
        if self.path is None:
            self.records = self.records[:lines]
            return
        if not self._exists():
            self.begin()
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a kill may have left half a line
        kept = whole.splitlines(keepends=True)[:lines]
        os.truncate(self.path, sum(map(len, kept)))  # in one step: a kill loses no line
        self.records = [json.loads(line) for line in kept]

    def _exists(self) -> bool:
        return self.path is not None and self.path.exists()

    def write(self, event: str, step: int, **values: Any) -> None:
        """Add one record; NaN and infinity, which JSON has not, become None."""
        record = finite({"event": event, "step": step, **values})
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """``value`` as JSON can hold it: NaN and infinity become None, and names of fields strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def read_stats(path: str | Path) -> list[Record]:
    """The records of a stats file, in order. A last line that was cut off by a kill is left out.

    Raises:
        ArgumentError: a line is no JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # without its newline: half written
                break
            raise ArgumentError(f"{path}: expected a JSON object in line {number}") from None
        if not isinstance(record, dict):
            raise ArgumentError(f"{path}: expected a JSON object in line {number}")
        records.append(record)
    return records


def mask_picture(controller: Controller) -> Record | None:
    """Densities of the first weight's mask in blocks, at most 64 by 64 of them.

    Returns:
        ``name``, ``shape`` and ``density``, rows of block densities in [0, 1] to four decimals;
        None without weights.
    """
    for name, weight in controller.weights.items():
        mask = weight.mask.flatten(1) if len(weight.shape) > 1 else weight.mask.reshape(1, -1)
        return {
            "name": name,
            "shape": list(weight.shape),
            "density": [[round(share, 4) for share in row] for row in block_density(mask).tolist()],
        }
    return None


def block_density(mask: Tensor, blocks: int = MASK_BLOCKS) -> Tensor:
    """Share of True entries in each block of a matrix.

    Args:
        mask: bool, (rows, columns).
        blocks: most blocks along each side; they differ in size by one row or column at most.

    Returns:
        float64 on the CPU, (min(rows, blocks), min(columns, blocks)), in [0, 1].
    """
    value = mask.to(device="cpu", dtype=torch.float64)
    for dim in (0, 1):
        size = value.shape[dim]
        parts = value.tensor_split(min(size, blocks), dim=dim)
        sizes = torch.tensor([part.shape[dim] for part in parts], dtype=torch.float64)
        sums = torch.stack([part.sum(dim) for part in parts], dim)
        value = sums / (sizes[:, None] if dim == 0 else sizes)
    return value


def layer_sparsities(controller: Controller) -> dict[str, float]:
    """Weight name -> share of pruned entries, in [0, 1]."""
    return {name: weight.sparsity for name, weight in controller.weights.items()}
