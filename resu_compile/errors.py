"""Exception classes, and the ``check_*`` helpers that word them.

Every message names the argument or the weight, what was expected, what came and what to do next.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Real


class ResuCompileError(Exception):
    """Base of every error that this package raises on purpose."""


class ArgumentError(ResuCompileError, ValueError):
    """An argument has a value that cannot be used."""


class ArgumentTypeError(ResuCompileError, TypeError):
    """An argument has a type that cannot be used."""


class WeightError(ResuCompileError, ValueError):
    """A parameter of the model cannot be pruned or used as it is."""


class PhaseError(ResuCompileError, RuntimeError):
    """The call does not fit the phase that the model is in."""


class MaskChangedError(ResuCompileError, RuntimeError):
    """A mask or the phase changed between a forward pass and its backward pass."""


class NotSparsifiedError(ResuCompileError, LookupError):
    """The model has no controller."""


class ArtifactError(ResuCompileError, RuntimeError):
    """A file is not one that ``resu_compile.export`` wrote, or it is damaged."""


class MachineError(ResuCompileError, RuntimeError):
    """Memory, the disk or the GPU failed in work that would have gone on elsewhere."""


class KernelUnavailableError(ResuCompileError, RuntimeError):
    """A kernel was called where it cannot run."""


def check_sparsity(value: object) -> float:
    """``value`` as a float in [0, 1), or an error that names ``sparsity``."""
    return check_share(value, name="sparsity")


def check_share(value: object, *, name: str) -> float:
    """``value`` as a float in [0, 1), or an error that names the argument ``name``."""
    number = check_number(value, name=name, expected="a number in [0, 1)")
    if not 0.0 <= number < 1.0:
        raise ArgumentError(f"{name}: expected a number in [0, 1), got {value!r}")
    return number


def check_number(
    value: object,
    *,
    name: str,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    expected: str | None = None,
) -> float:
    """``value`` as a finite float in [minimum, maximum], or an error naming ``name``."""
    wanted = expected or f"a number in [{minimum:g}, {maximum:g}]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(
            f"{name}: expected {wanted}, got {value!r} of type {type(value).__name__}"
        )
    number = float(value)
    if not math.isfinite(number) or not minimum <= number <= maximum:
        raise ArgumentError(f"{name}: expected {wanted}, got {value!r}")
    return number


def check_choice(value: object, choices: Iterable[str], *, name: str) -> str:
    """``value`` if it is one of ``choices``, or an error that lists them."""
    known = sorted(choices)
    if isinstance(value, str) and value in known:
        return value
    raise ArgumentError(f"{name}: expected one of {', '.join(known)}; got {value!r}")


def check_known_keys(keys: Iterable[str], known: Iterable[str], *, what: str) -> None:
    """Raise an error that lists ``known`` if any of ``keys`` is not among them."""
    names = sorted(known)
    for key in keys:
        if key not in names:
            close = get_close_matches(str(key), names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ArgumentError(f"unknown {what} {key!r}{hint}; known: {', '.join(names)}")


def check_path(value: object, *, name: str) -> str:
    """``value`` as the text of a path, or an error that names the argument ``name``."""
    if not isinstance(value, str | os.PathLike):
        raise ArgumentTypeError(
            f"{name}: expected a str or an os.PathLike, got {type(value).__name__}"
        )
    return os.fsdecode(value)


def check_flag(value: object, *, name: str) -> bool:
    """``value`` if it is a bool, or an error that names the argument ``name``."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name}: expected a bool, got {value!r}")
    return value


def check_integer(value: object, *, name: str, minimum: int = 0) -> int:
    """``value`` as an int of at least ``minimum``, or an error naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(
            f"{name}: expected an integer >= {minimum}, got {value!r} of type "
            f"{type(value).__name__}"
        )
    if value < minimum:
        raise ArgumentError(f"{name}: expected an integer >= {minimum}, got {value!r}")
    return value
