"""Densification: sparsity falls over the cycles, with pauses in which something else may happen.

The first cycle prunes to the start; each later one lets theta grow at the sparsity it found, and
its commit keeps as many more places as the next level asks for. At a final sparsity of 0 the
controller is released and the model is a plain dense one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from resu_compile.errors import (
    ArgumentError,
    ArgumentTypeError,
    check_choice,
    check_integer,
    check_share,
)
from resu_compile.training.serialization import from_plain


@dataclass(frozen=True)
class Pause:
    """Training halts after the commit of one cycle, until the callbacks return.

    Attributes:
        after_cycle: the cycle, from 0 on.
        reason: what the pause is for; goes to the callbacks and to the stats file.
        suggested_steps: how many steps of its own kind (say, of an RL environment) the callback
            may take; advice only, None gives none.
    """

    after_cycle: int
    reason: str = "evaluate"
    suggested_steps: int | None = None

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        check_integer(self.after_cycle, name="after_cycle")
        if not isinstance(self.reason, str):
            raise ArgumentTypeError(f"reason: expected a string, got {self.reason!r}")
        if self.suggested_steps is not None:
            check_integer(self.suggested_steps, name="suggested_steps")


@dataclass(frozen=True)
class Densification:
    """How sparsity falls over the cycles.

    Attributes:
        start: sparsity of the first cycle, in (0, 1); with ``mode="stepped"`` the first level.
        mode: ``"linear"`` from ``start`` to the final sparsity, or ``"stepped"`` through
            ``levels``.
        levels: sparsities from high to low, spread evenly over the cycles; the last is the final
            sparsity.
        pauses: after which cycles training halts; mappings of their fields do as well.

    Source: RESU's densification (huy209vn/RESU, resu/training/config.py).
    """

    start: float = 0.7
    mode: Literal["linear", "stepped"] = "linear"
    levels: tuple[float, ...] = (0.7, 0.5, 0.3, 0.1, 0.0)
    pauses: tuple[Pause, ...] = ()

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        check_choice(self.mode, ("linear", "stepped"), name="mode")
        if not isinstance(self.levels, (tuple, list)) or len(self.levels) < 2:
            raise ArgumentError(
                f"levels: expected two sparsities or more, from high to low, got {self.levels!r}"
            )
        levels = tuple(check_share(level, name="levels") for level in self.levels)
        if list(levels) != sorted(levels, reverse=True) or levels[0] == levels[-1]:
            raise ArgumentError(f"levels: expected sparsities from high to low, got {levels}")
        object.__setattr__(self, "levels", levels)
        if self.mode == "stepped":
            object.__setattr__(self, "start", levels[0])
        if check_share(self.start, name="start") == 0.0:
            raise ArgumentError("start: expected a number in (0, 1), got 0")
        if not isinstance(self.pauses, (tuple, list)):
            raise ArgumentTypeError(f"pauses: expected Pause objects, got {self.pauses!r}")
        pauses = tuple(
            from_plain(Pause, pause, "pauses") if isinstance(pause, Mapping) else pause
            for pause in self.pauses
        )
        for pause in pauses:
            if not isinstance(pause, Pause):
                raise ArgumentTypeError(f"pauses: expected Pause objects, got {pause!r}")
        if len({pause.after_cycle for pause in pauses}) != len(pauses):
            raise ArgumentError("pauses: expected at most one after each cycle")
        object.__setattr__(self, "pauses", pauses)

    def check(self, *, cycles: int, final: float) -> None:
        """Raise an error unless this fits ``cycles`` cycles that end at sparsity ``final``."""
        if cycles < 2:
            raise ArgumentError(f"cycles: expected at least 2 with densify, got {cycles}")
        if self.mode == "stepped" and final != self.levels[-1]:
            raise ArgumentError(
                f"sparsity: expected the last of densify.levels, {self.levels[-1]:g}, got {final:g}"
            )
        if final >= self.start:
            raise ArgumentError(
                f"sparsity: expected less than densify.start={self.start:g}, because it falls; "
                f"got {final:g}"
            )
        for pause in self.pauses:
            if pause.after_cycle >= cycles:
                raise ArgumentError(
                    f"pauses: expected after_cycle below cycles={cycles}, got {pause.after_cycle}"
                )

    def sparsities(self, *, cycles: int, final: float) -> tuple[float, ...]:
        """The sparsity that each cycle ends with: first ``start``, last ``final``."""
        if self.mode == "stepped":
            last = len(self.levels) - 1
            return tuple(self.levels[round(c * last / (cycles - 1))] for c in range(cycles))
        fall = [self.start + (final - self.start) * c / (cycles - 1) for c in range(cycles)]
        fall[-1] = final
        return tuple(fall)

    def pause_after(self, cycle: int) -> Pause | None:
        """The pause after ``cycle``, or None."""
        return next((pause for pause in self.pauses if pause.after_cycle == cycle), None)
