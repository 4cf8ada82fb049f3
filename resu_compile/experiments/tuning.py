"""The settings that a method is reported with: those of its best trial on validation data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resu_compile.errors import ArgumentError
from resu_compile.experiments.records import Record


def validation_score(record: Record) -> float | None:
    """The validation metric of a record, signed so that more is better; None if there is none."""
    if record["status"] != "done":
        return None
    value = record["scores"]["validation"].get(record["metric"])
    if value is None:  # it was not finite
        return None
    return float(value) if record["higher_is_better"] else -float(value)


def choose_settings(trials: Sequence[Record]) -> dict[str, Any]:
    """The settings of the best trial; of equal ones the first.

    Args:
        trials: their records; those that failed have no score, and lose.

    Raises:
        ArgumentError: all of them failed.
    """
    scores = [(validation_score(record), -record["trial"], record) for record in trials]
    known = [(score, order, record) for score, order, record in scores if score is not None]
    if not known:
        raise ArgumentError(
            f"tuning: expected one trial at least that trains, all {len(trials)} failed; the first "
            f"one: {trials[0].get('error', 'its validation metric is not finite')}"
        )
    best = max(known, key=lambda item: item[:2])
    chosen: dict[str, Any] = best[2]["settings"]
    return chosen
