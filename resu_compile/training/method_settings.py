"""What a config makes of its ``method``: name and options, its own axes, nothing of the cycles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, Literal

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods import (
    AnyMethod,
    Resu,
    TrainingMethod,
    is_gradient_method,
    is_training_method,
    method_names,
    training_method_names,
)
from resu_compile.methods.registry import name_of

if TYPE_CHECKING:
    from resu_compile.training.config import TrainingConfig

OF_CYCLES = (
    "warmup",
    "recovery",
    "cycles",
    "cycle",
    "initial_sparsity",
    "schedule",
    "resurrection",
    "budget_start",
    "budget_end",
    "margin_end",
    "densify",
)


def settle_method(config: TrainingConfig) -> None:
    """Give ``config``, which is being built, its method as data and the axes that it left open.

    A registered training method that came as an object becomes its name and the options that differ
    from its defaults. ``scope`` and ``distribution`` become those of the method, if they are None.

    Raises:
        ArgumentError: an unknown method, options without a training method, or settings of cycles
            with another one than RESU.
        ArgumentTypeError: ``method_options`` is no mapping from names.
    """
    options = config.method_options
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ArgumentTypeError(
            f"method_options: expected a mapping from names to settings, got {options!r}"
        )
    _check_method(config.method)
    scope, distribution = _scope_of(config.method), "uniform"
    if is_training_method(config.method):
        method = config.training_method()
        distribution = method.distribution
        scope = _scope_of(method.criterion) if isinstance(method, Resu) else method.scope
        name = name_of(method)
        if name is not None:
            _set(config, "method", name)
            _set(config, "method_options", _changed(method))
        if not config.has_cycles:
            _check_no_cycles(config)
    elif config.method_options:
        raise ArgumentError(
            f"method_options: expected none with method={config.method!r}, which is no training "
            f"method ({', '.join(training_method_names())}), got {dict(config.method_options)}"
        )
    if config.scope is None:
        spread = config.pattern is None and config.distribution in (None, "uniform")
        _set(config, "scope", scope if spread else "layer")
    if config.distribution is None:
        alone = config.scope == "layer" and config.pattern is None
        _set(config, "distribution", distribution if alone else "uniform")


def _scope_of(method: str | AnyMethod | TrainingMethod) -> Literal["layer", "global"]:
    """Where a pruning method ranks best: scores in units of the loss compare over all layers."""
    return "global" if is_gradient_method(method) else "layer"


def _check_method(method: object) -> None:
    """A name is known, of either kind, and a class is not taken for its objects."""
    known = sorted([*method_names(), *training_method_names()])
    if isinstance(method, str) and method not in known:
        raise ArgumentError(f"method: unknown method {method!r}; registered: {', '.join(known)}")
    if isinstance(method, type):
        raise ArgumentError(
            f"method: expected a name ({', '.join(known)}) or an object, got the class "
            f"{method.__name__}; {method.__name__}() makes an object"
        )


def _set(config: TrainingConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)


def _changed(method: TrainingMethod) -> dict[str, Any]:
    """The settings of ``method`` that differ from its defaults."""
    values = {f.name: (f.default, getattr(method, f.name)) for f in fields(method)}  # type: ignore[arg-type]
    return {name: value for name, (default, value) in values.items() if value != default}


def _check_no_cycles(config: TrainingConfig) -> None:
    """What only the cycles of RESU use has its default."""
    for f in fields(config):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if f.name in OF_CYCLES and getattr(config, f.name) != default:
            raise ArgumentError(
                f"{f.name}: expected no value with method={config.method!r}, which has no cycles "
                f"and settings of its own in method_options, got {getattr(config, f.name)!r}"
            )
