"""The only import of Triton: absent, the decorators are harmless and a launch raises.

A kernel file does ``from resu_compile.kernels._triton import HAS_TRITON, jit, tl``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from resu_compile.errors import KernelUnavailableError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None

HAS_TRITON = triton is not None

__all__ = ["HAS_TRITON", "cdiv", "jit", "tl"]


class _Unavailable:
    """Stands where a Triton kernel would; indexing it with a grid raises."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        raise KernelUnavailableError(
            f"kernel {self.fn.__name__}: expected Triton to be installed, found none; "
            "install triton or keep the tensors on the CPU"
        )


def jit(fn: Callable[..., Any]) -> Any:
    """``triton.jit``, or a stand-in that raises at launch."""
    return triton.jit(fn) if HAS_TRITON else _Unavailable(fn)


def cdiv(a: int, b: int) -> int:
    """Ceiling of ``a / b`` for positive integers."""
    return -(-a // b)
