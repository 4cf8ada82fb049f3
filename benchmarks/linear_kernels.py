"""The kernels of a sparse linear layer as entries of a group, over copies beyond L2."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import CUDA, Entry
from resu_compile.kernels.packed_linear import format_of
from resu_compile.kernels.plan import Kernel

# kernel -> the most rows of x that it is timed at, and the letter that stands for it in a table
KERNELS = {Kernel.ROWS: 8, Kernel.TILES: 64} if CUDA else {Kernel.CSR: 512}
LETTERS = {"rows": "R", "tiles": "T", "csr": "C"}
UNPACKED = Kernel.TILES if CUDA else Kernel.CSR  # the format that "unpack" expands


def impl_of(kernel: Kernel) -> str:
    """Name of a kernel in groups and records."""
    return kernel.name.lower()


def packed_copies(kernel: Kernel, weight: Tensor, mask: Tensor | None = None) -> list[Any]:
    """The weight in the format of ``kernel``, as copies that together are beyond L2."""
    form = format_of(kernel)
    packed = form.pack(weight, mask)
    return [
        form.from_tensors(tensors, packed.layout, packed.shape)
        for tensors in harness.rotating(packed.tensors())
    ]


def run_kernel(kernel: Kernel, x: Tensor, packed: Any) -> Tensor:
    return format_of(kernel).linear(x, packed, None, "none")


def run_unpack(x: Tensor, packed: Any) -> Tensor:
    return F.linear(x, format_of(UNPACKED).unpack(packed))


def kernel_entry(kernel: Kernel, x: Tensor, weight: Tensor, copies: Sequence[Any]) -> Entry:
    """The product by one kernel.

    Raises:
        AssertionError: it is not the product, by float64.
    """
    calls = tuple(functools.partial(run_kernel, kernel, x, packed) for packed in copies)
    harness.check_product(calls[-1](), x, weight, f"{kernel.name} {tuple(weight.shape)}")
    flop = 2.0 * x.shape[0] * int(weight.count_nonzero())
    return Entry(calls, int(copies[0].size_bytes), flop)
