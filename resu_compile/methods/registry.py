"""One dict, one decorator, one lookup whose error lists the names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError


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


_METHODS: dict[str, type[Method]] = {}
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


def get_method(method: str | Method) -> Method:
    """The method registered as ``method``, or ``method`` itself if it already is one."""
    if isinstance(method, str):
        if method in _METHODS:
            return _METHODS[method]()
        raise ArgumentError(
            f"method: unknown method {method!r}; registered: {', '.join(method_names())}"
        )
    if isinstance(method, Method) and not isinstance(method, type):
        return method
    raise ArgumentError(
        f"method: expected a name ({', '.join(method_names())}) or an object with a "
        f"score(weight, generator) method, got {method!r}"
    )
