"""A method's settings, as they stand in configs and results, and the training that they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resu_compile.errors import ArgumentError, ArgumentTypeError, check_choice
from resu_compile.methods import TrainingMethod, training_method_names
from resu_compile.training.config import TrainingConfig
from resu_compile.training.tasks import import_function

DENSE = "dense"
TRAINING = "training."  # what begins the name of a setting that is no field of the method
DENSE_TOO = (  # fields of TrainingConfig that have a meaning without masks
    "targets",
    "exclude",
    "accumulate",
    "clip_norm",
    "autocast",
    "evaluate_every",
    "log_every",
    "compile",
)


def training_config(
    method: str,
    *,
    steps: int,
    sparsity: float,
    seed: int,
    options: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TrainingConfig:
    """The training of one run.

    Args:
        method: a training method, or ``"dense"``, which is a mask of ones from the first step on;
            ``"module:Class"`` is one of your own, registered or not.
        steps: optimizer steps.
        sparsity: final, in [0, 1); of no consequence to ``"dense"``.
        seed: of the controller's random generator.
        options: fields of the method.
        training: fields of ``TrainingConfig``; ``preset`` names the one that they change.
        settings: chosen in a search; they change both. ``training.cycle.resu`` is a field of a
            field.

    Raises:
        ArgumentError: an unknown method or setting, or a value that it does not take.
    """
    own = _own_method(method) if ":" in method else None
    if own is None:
        check_choice(method, [DENSE, *training_method_names()], name="method")
    if method == DENSE:
        plain = {k: v for k, v in (training or {}).items() if k in DENSE_TOO}
        extra = {"method": "static", "sparsity": 0.0, "distribution": "uniform"}
        return TrainingConfig.from_dict({**plain, **extra, "steps": steps, "seed": seed})
    values: dict[str, Any] = _copied(dict(training or {}))
    chosen: dict[str, Any] = dict(options or {})
    for name, value in (settings or {}).items():
        if name.startswith(TRAINING):
            _put(values, name.removeprefix(TRAINING).split("."), value)
        else:
            chosen[name] = value
    try:
        if own is None:
            values |= {"method": method, "method_options": chosen}
        else:
            values["method"] = own(**chosen)
        return TrainingConfig.from_dict(
            {**values, "steps": steps, "sparsity": sparsity, "seed": seed}
        )
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"method {method} at {sparsity:.0%}: {error}") from error


def _own_method(name: str) -> type[TrainingMethod]:
    found: object = import_function(name, what="method")
    if not isinstance(found, type) or not issubclass(found, TrainingMethod):
        raise ArgumentTypeError(
            f"method {name!r}: expected a class that inherits methods.TrainingMethod, got {found!r}"
        )
    return found


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
    values[path[-1]] = value


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value
