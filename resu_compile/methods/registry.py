"""One dict, one decorator, one lookup whose error lists the names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError, ArgumentTypeError, check_known_keys
from resu_compile.methods.training_method import TrainingMethod

if TYPE_CHECKING:
    from resu_compile.calibration.block import Block


@runtime_checkable
class Method(Protocol):
    """A rule that scores weights; the highest scores are kept."""

    def score(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Score of each entry of ``weight``: same shape, floating point, free of NaN.

        Args:
            weight: floating point, any shape.
            generator: CPU generator, the only source of randomness a method may use.
        """
        ...


@runtime_checkable
class GradientMethod(Protocol):
    """A rule that scores weights by the gradients that they were trained with."""

    def score_with(self, weight: Tensor, mean_square: Tensor) -> Tensor:
        """Score of each entry of ``weight``: same shape, floating point, free of NaN.

        Args:
            weight: floating point, any shape.
            mean_square: of its gradients, float32, the same shape.
        """
        ...


@runtime_checkable
class CalibratedMethod(Protocol):
    """A rule that prunes block by block, from the inputs that data give the weights."""

    @property
    def blocks(self) -> str | Sequence[str] | None:
        """Name of the module that holds the blocks, or names of blocks; None finds them."""
        ...

    def prune(self, block: Block) -> dict[str, Tensor]:
        """Mask of each of ``block.weights``: bool, the weight's shape, True = kept.

        The weights still hold all their values. ``block.request`` says how much to prune;
        ``block.statistics()`` and ``block.calls()`` run the calibration data.
        """
        ...


AnyMethod = Method | GradientMethod | CalibratedMethod

_METHODS: dict[str, type[AnyMethod | TrainingMethod]] = {}
M = TypeVar("M", bound=type)


def register_method(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known under ``name``; a name is given once."""

    def register(cls: M) -> M:
        if name in _METHODS:
            raise ArgumentError(f"method name {name!r} is already registered by {_METHODS[name]}")
        _METHODS[name] = cls
        return cls

    return register


def _trains(cls: type) -> bool:
    return issubclass(cls, TrainingMethod)


def method_names() -> list[str]:
    """Names of the methods that choose masks once, for ``sparsify`` and ``prune``; sorted."""
    return sorted(name for name, cls in _METHODS.items() if not _trains(cls))


def training_method_names() -> list[str]:
    """Names of the methods that change masks while the model trains; sorted."""
    return sorted(name for name, cls in _METHODS.items() if _trains(cls))


def get_method(method: str | AnyMethod) -> AnyMethod:
    """The method registered as ``method``, or ``method`` itself if it already is one."""
    if isinstance(method, str) and method in method_names():
        found: AnyMethod = _METHODS[method]()  # type: ignore[assignment]
        return found
    if is_training_method(method):
        raise ArgumentError(
            f"method: expected one of {', '.join(method_names())}, which choose masks once, got "
            f"{method!r}, which changes them in training; give it to TrainingConfig(method=...)"
        )
    if isinstance(method, str):
        raise ArgumentError(
            f"method: unknown method {method!r}; registered: {', '.join(method_names())}"
        )
    known = (Method, GradientMethod, CalibratedMethod)
    if isinstance(method, known) and not isinstance(method, type):
        return method
    raise ArgumentError(
        f"method: expected a name ({', '.join(method_names())}) or an object with a "
        f"score(weight, generator), score_with(weight, mean_square) or prune(block) method, got "
        f"{method!r}"
    )


def is_training_method(method: object) -> bool:
    """True if ``method`` is, or names, a method that changes masks while the model trains."""
    if isinstance(method, str):
        return method in _METHODS and _trains(_METHODS[method])
    return isinstance(method, TrainingMethod)


def get_training_method(method: str | TrainingMethod, **options: Any) -> TrainingMethod:
    """The training method registered as ``method``, or ``method`` itself if it already is one.

    Args:
        method: a name of ``training_method_names()``, or an object.
        **options: fields of the method's dataclass, for a name.

    Raises:
        ArgumentError: unknown name or option, or options for an object.
    """
    if isinstance(method, TrainingMethod):
        if options:
            raise ArgumentError(
                f"method_options: expected none with a method that is built already, got {options}"
            )
        return method
    if not isinstance(method, str) or not is_training_method(method):
        raise ArgumentError(
            f"method: expected a training method ({', '.join(training_method_names())}) or an "
            f"object of one, got {method!r}"
        )
    cls = _METHODS[method]
    check_known_keys(options, [field.name for field in fields(cls)], what=f"option of {method}")  # type: ignore[arg-type]
    found: TrainingMethod = cls(**options)  # type: ignore[assignment]
    return found


def name_of(method: TrainingMethod) -> str | None:
    """The name that the class of ``method`` is registered under; None if it is not."""
    return next((name for name, cls in _METHODS.items() if cls is type(method)), None)


def is_gradient_method(method: str | AnyMethod | TrainingMethod) -> bool:
    """True if ``method`` is one that has to see the gradients of training."""
    if isinstance(method, TrainingMethod) or is_training_method(method):
        return False
    return isinstance(get_method(method), GradientMethod)


def is_calibrated(method: str | AnyMethod | TrainingMethod) -> bool:
    """True if ``method`` is one that measures calibration data at each pruning."""
    if isinstance(method, TrainingMethod) or is_training_method(method):
        return False
    return isinstance(get_method(method), CalibratedMethod)


def check_blocks(blocks: object) -> str | tuple[str, ...] | None:
    """``blocks`` of a calibrated method: None, a name, or names as a tuple."""
    if blocks is None or isinstance(blocks, str):
        return blocks
    if isinstance(blocks, (list, tuple)) and blocks and all(isinstance(b, str) for b in blocks):
        return tuple(blocks)
    raise ArgumentTypeError(
        f"blocks: expected None, the name of the module that holds the blocks, or names of "
        f"blocks; got {blocks!r}"
    )
