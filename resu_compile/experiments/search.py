"""Search spaces of a method's settings, and trials that are the same in every process.

    start: [0.05, 0.1, 0.2]                         one of these
    training.resurrection.lr: {low: 0.1, high: 10, log: true}

Trial 0 has the method's settings as they are, so that no method is reported with worse ones than
its own, as far as the validation split can tell.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

from resu_compile.errors import ArgumentError, ArgumentTypeError, check_known_keys, check_number

GRID_POINTS = 3  # of a range in a grid
TRIES = 50  # draws for a trial that has not been there before


def check_space(space: Mapping[str, Any], *, where: str) -> None:
    """Check a search space; the messages begin with ``where``."""
    for name, values in space.items():
        if isinstance(values, Mapping):
            check_known_keys(values, ("low", "high", "log"), what=f"key of {where}, {name}:")
            for key in ("low", "high"):
                if key not in values:
                    raise ArgumentError(f"{where}, {name}: expected {key}, got {dict(values)}")
                check_number(values[key], name=f"{where}, {name}.{key}")
            if not values["low"] < values["high"] or (values.get("log") and values["low"] <= 0):
                raise ArgumentError(
                    f"{where}, {name}: expected low < high, and low > 0 with log, got "
                    f"{dict(values)}"
                )
        elif not isinstance(values, list) or not values:
            raise ArgumentTypeError(
                f"{where}, {name}: expected a list of values or {{low, high, log}}, got {values!r}"
            )


def values_of(values: Any) -> list[Any]:
    """The values of a setting, or the ends of its range."""
    return [values["low"], values["high"]] if isinstance(values, Mapping) else list(values)


def trial_settings(
    space: Mapping[str, Any],
    *,
    trials: int,
    strategy: str,
    seed: str,
    skip: Callable[[dict[str, Any]], bool] = lambda _: False,
) -> list[dict[str, Any]]:
    """The settings of each trial; the first ones are empty.

    Args:
        space: setting -> list of values, or ``{low, high, log}``.
        trials: how many at most; a small space has fewer.
        strategy: ``"random"`` draws without repetition; ``"grid"`` takes points spread evenly over
            the product of all values, ranges in ``GRID_POINTS`` points.
        seed: names the draw; equal names draw equally in every process.
        skip: settings that are not worth a trial: those that change nothing.
    """
    if trials == 0:
        return []
    found: list[dict[str, Any]] = [{}]
    if not space or trials == 1:
        return found
    if strategy == "grid":
        return found + _grid(space, trials - 1, skip)
    generator = random.Random(seed)
    for _ in range(TRIES * trials):
        drawn = {name: _draw(values, generator) for name, values in sorted(space.items())}
        if drawn not in found and not skip(drawn):
            found.append(drawn)
        if len(found) == trials:
            break
    return found


def _draw(values: Any, generator: random.Random) -> Any:
    if not isinstance(values, Mapping):
        return generator.choice(values)
    return _between(values, generator.random())


def _between(values: Mapping[str, Any], share: float) -> float:
    low, high = float(values["low"]), float(values["high"])
    if values.get("log"):
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return low + share * (high - low)


def _grid(
    space: Mapping[str, Any], count: int, skip: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    names = sorted(space)
    axes = [
        [_between(values, i / (GRID_POINTS - 1)) for i in range(GRID_POINTS)]
        if isinstance(values, Mapping)
        else values
        for values in (space[name] for name in names)
    ]
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*axes)]
    points = [point for point in every if not skip(point)]
    if len(points) <= count:
        return points
    if count == 1:
        return [points[len(points) // 2]]
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]
