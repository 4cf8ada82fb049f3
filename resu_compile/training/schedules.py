"""Sparsity over the cycles: how much of the way to the final sparsity is gone at time t.

    sparsity after cycle c of C = initial + (final - initial) f((c + 1) / C),  f: [0, 1] -> [0, 1]

All shapes reach 1 at t = 1. Those that rise fast and flatten out prune most while the network can
still adapt, and little once it is nearly as sparse as it will be.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from resu_compile.errors import ArgumentError, ArgumentTypeError, check_number, check_share

Shape = Callable[[float], float]
Schedule = str | tuple[float, ...] | Shape
AUTO = "auto"


def constant(t: float) -> float:  # noqa: ARG001 - every shape takes the time
    """1 at every time: the final sparsity at once, as in pruning in one shot."""
    return 1.0


def linear(t: float) -> float:
    """``t``: the same step every cycle."""
    return t


def exponential(t: float) -> float:
    """``1 - (1 - t)^2``: fast at first.

    Source: the schedule that huy209vn/RESU calls exponential (resu/training/config.py).
    """
    return 1.0 - (1.0 - t) ** 2


def cosine(t: float) -> float:
    """``(1 - cos(pi t)) / 2``: slow at both ends.

    Source: Loshchilov and Hutter 2017, eq. 5, turned upside down,
    https://arxiv.org/abs/1608.03983
    """
    return 0.5 * (1.0 - math.cos(math.pi * t))


def cubic(t: float) -> float:
    """``1 - (1 - t)^3``: fastest at first.

    Source: Zhu and Gupta 2017, eq. 1, https://arxiv.org/abs/1710.01878
    """
    return 1.0 - (1.0 - t) ** 3


SHAPES: dict[str, Shape] = {
    "constant": constant,
    "linear": linear,
    "exponential": exponential,
    "cosine": cosine,
    "cubic": cubic,
}


def auto_shape(final: float) -> Shape:
    """``1 - (1 - t)^n``, n = max(2, log2(s / (1 - s))): at half the time, twice the final density.

    Density goes as ``1 - s + s (1 - t)^n`` from a dense start, so that a sparser goal is neared
    earlier and leaves as much of the time to the network that is about as sparse as it will be.
    n is 3.2 at s = 0.9, 4.2 at 0.95 and 5.6 at 0.98; it is 2 up to 0.8, below which the density at
    half the time is less than twice the final one.

    Args:
        final: s, the sparsity after the last cycle, in [0, 1).
    """
    power = math.log2(final / (1.0 - final)) if final > 0.8 else 2.0
    return lambda t: 1.0 - (1.0 - t) ** power


def check_schedule(schedule: object, *, cycles: int, final: float) -> Schedule:
    """``schedule`` in its checked form, or an error that says what one is.

    Args:
        schedule: ``"auto"``, a name of ``SHAPES``, one sparsity per cycle, or a function of t in
            [0, 1].
        cycles: how many cycles there are.
        final: the sparsity that the last of given sparsities has to be, in [0, 1).
    """
    if isinstance(schedule, str):
        if schedule not in (AUTO, *SHAPES):
            raise ArgumentError(
                f"schedule: expected one of {', '.join((AUTO, *sorted(SHAPES)))}, one sparsity per "
                f"cycle, or a function of t in [0, 1]; got {schedule!r}"
            )
        return schedule
    if isinstance(schedule, (tuple, list)):
        values = tuple(check_share(value, name="schedule") for value in schedule)
        if len(values) != cycles:
            raise ArgumentError(
                f"schedule: expected one sparsity for each of {cycles} cycles, got {len(values)}"
            )
        if values[-1] != final:
            raise ArgumentError(
                f"schedule: expected its last sparsity to be sparsity={final:g}, got {values[-1]:g}"
            )
        return values
    if callable(schedule):
        end = check_number(schedule(1.0), name="schedule(1.0)")
        if not math.isclose(end, 1.0, abs_tol=1e-9):
            raise ArgumentError(
                f"schedule: expected a function of t in [0, 1] that is 1 at t = 1, got {end:g}"
            )
        return schedule
    raise ArgumentTypeError(
        f"schedule: expected a name, one sparsity per cycle, or a function of t in [0, 1]; "
        f"got {schedule!r}"
    )


def scheduled_sparsities(
    schedule: Schedule, *, cycles: int, initial: float, final: float
) -> tuple[float, ...]:
    """The sparsity that each cycle ends with; the last one is ``final``.

    Args:
        schedule: as in ``check_schedule``.
        cycles: how many, at least 1.
        initial: sparsity before the first cycle, in [0, 1).
        final: sparsity after the last cycle, in [0, 1).
    """
    if isinstance(schedule, tuple):
        return schedule
    if schedule == AUTO:
        shape = auto_shape(final)
    else:
        shape = SHAPES[schedule] if isinstance(schedule, str) else schedule
    way = [initial + (final - initial) * shape((c + 1) / cycles) for c in range(cycles)]
    way[-1] = final  # free of rounding
    return tuple(check_share(value, name=f"schedule at cycle {c}") for c, value in enumerate(way))
