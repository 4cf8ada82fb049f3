"""One dict, one decorator, one lookup whose error lists the names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError, ArgumentTypeError

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


AnyMethod = Method | CalibratedMethod

_METHODS: dict[str, type[AnyMethod]] = {}
M = TypeVar("M", bound=type)


def register_method(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known under ``name``; a name is given once."""

    def register(cls: M) -> M:
        if name in _METHODS:
            raise ArgumentError(f"method name {name!r} is already registered by {_METHODS[name]}")
        _METHODS[name] = cls
        return cls

    return register


def method_names() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_METHODS)


def get_method(method: str | AnyMethod) -> AnyMethod:
    """The method registered as ``method``, or ``method`` itself if it already is one."""
    if isinstance(method, str):
        if method in _METHODS:
            return _METHODS[method]()
        raise ArgumentError(
            f"method: unknown method {method!r}; registered: {', '.join(method_names())}"
        )
    if isinstance(method, (Method, CalibratedMethod)) and not isinstance(method, type):
        return method
    raise ArgumentError(
        f"method: expected a name ({', '.join(method_names())}) or an object with a "
        f"score(weight, generator) or prune(block) method, got {method!r}"
    )


def is_calibrated(method: str | AnyMethod) -> bool:
    """True if ``method`` needs calibration data."""
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
