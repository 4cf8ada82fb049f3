"""Means over seeds, and differences over the same seeds, each with a 95 % interval.

    mean ± t(0.975, n - 1) s / sqrt(n)

of the n values, or of the n differences of pairs; s is their standard deviation (n - 1).

Source: Student 1908, https://doi.org/10.1093/biomet/6.1.1
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resu_compile.errors import ArgumentError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and how well it is known.

    Attributes:
        mean: of the values.
        half_width: of the interval; None from a single value.
        count: of the values.
        p_value: two-sided, of a mean of 0; None from a single value.
    """

    mean: float
    half_width: float | None
    count: int
    p_value: float | None = None

    @property
    def low(self) -> float | None:
        """Lower end."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end."""
        return None if self.half_width is None else self.mean + self.half_width

    @property
    def verdict(self) -> str:
        """Of a difference: better, worse, level (the interval holds 0), or one seed."""
        if self.low is None or self.high is None:
            return "one seed"
        if self.low > 0.0:
            return "better"
        return "worse" if self.high < 0.0 else "level"


def interval_of(values: Sequence[float]) -> Interval:
    """The mean of ``values`` with its interval, and the t-test against 0.

    Raises:
        ArgumentError: no values, or scipy is not installed.
    """
    if not values:
        raise ArgumentError("values: expected one at least, got none")
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, 1)
    student = _student()
    error = statistics.stdev(values) / math.sqrt(count)
    half = float(student.ppf(0.5 + CONFIDENCE / 2, count - 1)) * error
    if error > 0.0:
        p_value = 2.0 * float(student.sf(abs(mean) / error, count - 1))
    else:
        p_value = 1.0 if mean == 0.0 else 0.0
    return Interval(mean, half, count, p_value)


def paired_difference(
    first: dict[int, float], second: dict[int, float], *, higher_is_better: bool
) -> Interval | None:
    """How much better ``first`` is, over the seeds that both have.

    Args:
        first: seed -> score.
        second: the same of the rival.
        higher_is_better: which way is better.

    Returns:
        The interval of the differences, above 0 where ``first`` is better; None without a common
        seed.
    """
    sign = 1.0 if higher_is_better else -1.0
    common = sorted(set(first) & set(second))
    return interval_of([sign * (first[s] - second[s]) for s in common]) if common else None


def _student() -> Any:
    try:
        return importlib.import_module("scipy.stats").t
    except ImportError as error:
        raise ArgumentError(
            f"experiment report: expected scipy for intervals, got {error}; "
            "pip install resu-compile[experiment]"
        ) from error
