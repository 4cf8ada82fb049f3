"""Stored ratios of a device, and what fell against them.

    benchmarks/baselines/<device>.json
    {"format": "resu_compile benchmark baseline", "version": 1,
     "environment": {"device": ..., "driver": ..., "torch": ..., ...},
     "ratios": {"<group>: <implementation>": 1.93, ...}}

A ratio is the time of the fastest reference over that of the implementation: a faster machine
moves both, so ratios of one device can be compared over weeks where seconds cannot.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import slug

FORMAT = "resu_compile benchmark baseline"
VERSION = 1
FOLDER = Path(__file__).parent / "baselines"
TOLERANCE = 0.1  # share of a stored ratio that a new one may lose


class BaselineError(ValueError):
    """A baseline file that is not there or not one."""


@dataclass(frozen=True)
class Baseline:
    """Ratios of one device, each with the machine and versions that they were measured with."""

    environment: Mapping[str, str]
    ratios: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.environment.get("device"):
            raise BaselineError("environment: expected an entry 'device', got none")
        for case, ratio in self.ratios.items():
            if not (math.isfinite(ratio) and ratio > 0):
                raise BaselineError(f"{case}: expected a ratio above 0, got {ratio}")


def path_of(device: str, folder: Path = FOLDER) -> Path:
    """File of the baseline of ``device``."""
    return folder / f"{slug(device)}.json"


def save(baseline: Baseline, folder: Path = FOLDER) -> Path:
    """Write ``baseline`` to the file of its device; returns the file."""
    path = path_of(baseline.environment["device"], folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "environment": dict(baseline.environment),
        "ratios": {case: float(f"{ratio:.4g}") for case, ratio in sorted(baseline.ratios.items())},
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def load(device: str, folder: Path = FOLDER) -> Baseline:
    """The stored baseline of ``device``.

    Raises:
        BaselineError: there is none, or its file is not a baseline of this device.
    """
    path = path_of(device, folder)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        stored = sorted(file.stem for file in folder.glob("*.json"))
        raise BaselineError(
            f"no baseline of {device!r} ({path} is not there; stored: {', '.join(stored) or 'none'}"
            "); `make bench-save` measures and stores one"
        ) from None
    except ValueError as error:
        raise BaselineError(f"{path}: expected JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BaselineError(f"{path}: expected a JSON object of format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise BaselineError(
            f"{path}: expected version {VERSION}, got {content.get('version')!r}; "
            "`make bench-save` writes it anew"
        )
    baseline = Baseline(content["environment"], content["ratios"])
    if baseline.environment["device"] != device:
        raise BaselineError(
            f"{path}: expected a baseline of {device!r}, got {baseline.environment['device']!r}"
        )
    return baseline


# -- comparison ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Change:
    """One case, before and now."""

    case: str
    before: float
    now: float

    @property
    def share(self) -> float:
        """The ratio now, of the one before."""
        return self.now / self.before


@dataclass(frozen=True)
class Comparison:
    """What a new run says against the baseline.

    Attributes:
        fell: lost more than the tolerance, or are not a finite number now; worst first.
        kept: the others that both have, worst first.
        missing: in the baseline and asked for, but not measured.
        new: measured, but not in the baseline.
    """

    fell: tuple[Change, ...]
    kept: tuple[Change, ...]
    missing: tuple[str, ...]
    new: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing fell and nothing that was asked for is missing."""
        return not self.fell and not self.missing


def compare(
    stored: Mapping[str, float],
    measured: Mapping[str, float],
    *,
    tolerance: float = TOLERANCE,
    asked: Iterable[str] | None = None,
) -> Comparison:
    """Ratios now against those stored.

    Args:
        stored: case -> ratio of the baseline.
        measured: case -> ratio of the new run; NaN counts as fallen.
        tolerance: share of the stored ratio that may be lost, in [0, 1).
        asked: cases of the baseline that the run was to measure; None for all.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a share in [0, 1), got {tolerance}")
    wanted = set(stored) if asked is None else set(stored) & set(asked)
    changes = [Change(case, stored[case], measured[case]) for case in wanted & set(measured)]
    # NaN compares false with everything, so it has to be asked for what is good
    good = {c.case for c in changes if c.share >= 1 - tolerance}

    def badness(change: Change) -> tuple[float, str]:
        return (change.share if math.isfinite(change.share) else -1.0, change.case)

    changes.sort(key=badness)
    return Comparison(
        fell=tuple(c for c in changes if c.case not in good),
        kept=tuple(c for c in changes if c.case in good),
        missing=tuple(sorted(wanted - set(measured))),
        new=tuple(sorted(set(measured) - set(stored))),
    )


def median_of(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The middle ratio of several runs for each case that all of them have; NaN where one is."""
    common = [case for case in runs[0] if all(case in run for run in runs)]
    found = {case: [run[case] for run in runs] for case in common}
    return {
        case: math.nan if any(map(math.isnan, ratios)) else statistics.median(ratios)
        for case, ratios in found.items()
    }


def best_of(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The larger ratio of two runs for each case, whichever run has it; NaN loses to a number."""
    best = {}
    for case in (*first, *second):
        ratios = [run[case] for run in (first, second) if case in run]
        best[case] = max((r for r in ratios if not math.isnan(r)), default=math.nan)
    return best
