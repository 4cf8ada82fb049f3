"""Packing a weight for its kernels, and expanding it again.

    python -m pytest benchmarks/bench_pack.py                # a group for each weight
    python -m benchmarks.bench_pack --table

70 % pruned, bf16 on CUDA and fp32 on the CPU. The reference is a copy of the dense weight, the
least that any of them could cost. Packing waits for the device (it has to know how much it keeps),
so its launches count. Every round trip is checked bit by bit before it is timed.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.group_table import table_main
from benchmarks.harness import CUDA, Entry, Group
from benchmarks.shapes import CPU_SHAPES, SHAPES
from resu_compile.kernels.packed_linear import format_of
from resu_compile.kernels.packed_weight import pack_weight, unpack_weight
from resu_compile.kernels.plan import Kernel

NAMES = ("llama3-8b q_proj", "llama3-8b gate_proj") if CUDA else CPU_SHAPES
SPARSITY = 0.7
KERNELS = (Kernel.ROWS, Kernel.TILES) if CUDA else (Kernel.CSR,)
IMPLS = ("copy", "file format", *(kernel.name.lower() for kernel in KERNELS))


def check_round_trip(unpacked: torch.Tensor, weight: torch.Tensor, what: str) -> None:
    if not torch.equal(unpacked, weight):
        raise AssertionError(f"{what}: expected the weight that was packed, got another")


def build_pack(name: str) -> dict[str, Entry]:
    weight = harness.make_weight(SHAPES[name], SPARSITY)
    mask = weight != 0
    entries = {
        "copy": Entry((weight.clone,), 2 * weight.nbytes),
        "file format": Entry((functools.partial(pack_weight, weight, mask),)),
    }
    for kernel in KERNELS:
        pack = functools.partial(format_of(kernel).pack, weight, mask)
        check_round_trip(format_of(kernel).unpack(pack()), weight, kernel.name)
        entries[kernel.name.lower()] = Entry((pack,))
    return entries


def build_unpack(name: str) -> dict[str, Entry]:
    weight = harness.make_weight(SHAPES[name], SPARSITY)
    mask = weight != 0
    values, bits = pack_weight(weight, mask)
    unpack = functools.partial(unpack_weight, values, bits, weight.shape)
    check_round_trip(unpack(), weight, "file format")
    stored = values.nbytes + bits.nbytes
    entries = {
        "copy": Entry((weight.clone,), 2 * weight.nbytes),
        "file format": Entry((unpack,), stored + weight.nbytes),
    }
    for kernel in KERNELS:
        packed: Any = format_of(kernel).pack(weight, mask)
        moved = packed.size_bytes + weight.nbytes
        call = functools.partial(format_of(kernel).unpack, packed)
        check_round_trip(call(), weight, kernel.name)
        entries[kernel.name.lower()] = Entry((call,), moved)
    return entries


def groups(*, smallest: bool = False) -> list[Group]:
    """The groups of the suite; ``smallest``: one small weight."""
    found = []
    for name in ("gpt2 attn.c_proj",) if smallest else NAMES:
        for what, build in (("pack", build_pack), ("unpack", build_unpack)):
            make = functools.partial(build, name)
            title = f"{what}, {name}, {SPARSITY:.0%}"
            found.append(Group(title, IMPLS, ("copy",), make, graph=False))
    return found


@pytest.mark.parametrize(("group", "impl"), harness.each_impl(groups()), ids=harness.show)
def test_pack(benchmark, group, impl):
    harness.run_benchmark(benchmark, group, impl)


def main() -> None:
    title = "Packing and expanding a weight, 70 % pruned"
    table_main(__doc__.splitlines()[0], title, groups, "python -m benchmarks.bench_pack --table")


if __name__ == "__main__":
    main()
