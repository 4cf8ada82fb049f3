"""Sparse against dense linear layer at decode batch sizes.

    python -m pytest benchmarks/bench_sparse_linear.py       # one group a shape, batch and sparsity
    python -m benchmarks.bench_sparse_linear --table         # the kernels over the best dense one
    python -m benchmarks.bench_sparse_linear --table --json FOLDER

``--table`` gives three tables on CUDA: speed-up over the best of cuBLAS and cuBLASLt in both
layouts, bytes a second with their share of the limit, and each regime. The limit is a bitmap and
the kept values, ``itemsize * (1 - s) + 1/8`` bytes a weight, at the rate at which this device reads
memory. bf16 on CUDA, fp32 on the CPU; every result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness, linear_table
from benchmarks.ceilings import ceilings
from benchmarks.harness import CUDA, DenseCopies, Entry, Group
from benchmarks.linear_kernels import (
    KERNELS,
    UNPACKED,
    impl_of,
    kernel_entry,
    packed_copies,
    run_unpack,
)
from benchmarks.shapes import CPU_SHAPES, CUDA_SHAPES, SHAPES
from resu_compile.kernels.packed_linear import pack_linear
from resu_compile.kernels.plan import BUCKET_ROWS, Kernel
from resu_compile.kernels.sparse_linear import sparse_linear

COMMAND = "python -m benchmarks.bench_sparse_linear --table"

NAMES = CUDA_SHAPES if CUDA else CPU_SHAPES
TABLE_NAMES = CUDA_SHAPES if CUDA else ("gpt2 mlp.c_fc", "llama3-8b q_proj")
ROWS = (1, 2, 4, 8, 16, 32, 64) if CUDA else (1, 4, 16, 64)
SPARSITIES = (0.5, 0.7, 0.9, 0.95) if CUDA else (0.5, 0.7, 0.9)
GROUP_ROWS = (1, 4, 16, 64) if CUDA else (1, 16)
GROUP_SPARSITIES = (0.5, 0.7, 0.9) if CUDA else (0.7, 0.9)

# further weights, at one sparsity and two batch sizes: merged ones, small ones
MORE_NAMES = (
    (
        "llama3-8b qkv",
        "llama3-8b gate_up",
        "llama3.2-1b qkv",
        "llama3.2-1b gate_up",
        "vit-l mlp.fc1",
    )
    if CUDA
    else ("gpt2 attn.c_attn", "vit-b mlp.fc2")
)
MORE_SPARSITY, MORE_ROWS = (0.7 if CUDA else 0.9), (1, 16)

UNPACK_ROWS = 256  # where it is timed, at ``MORE_SPARSITY``; on CUDA
SEMI_ROWS = (1, 16, 64, 256)

CALL_SIDE, CALLS = 64, 50
CALL_KERNEL = Kernel.ROWS if CUDA else Kernel.CSR


# -- groups ----------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def dense_copies(name: str) -> DenseCopies:
    return DenseCopies.of(harness.make_weight(SHAPES[name], 0.0))


@functools.lru_cache(maxsize=1)
def all_copies(name: str, sparsity: float) -> tuple[Tensor, dict[Kernel, list[Any]]]:
    weight = harness.make_weight(SHAPES[name], sparsity)
    return weight, {kernel: packed_copies(kernel, weight) for kernel in KERNELS}


def build_linear(name: str, sparsity: float, rows: int, impls: Sequence[str]) -> dict[str, Entry]:
    weight, packed = all_copies(name, sparsity)
    x = harness.make_x(rows, weight.shape[1])
    entries = harness.dense_entries(x, dense_copies(name))
    for kernel in KERNELS:
        if impl_of(kernel) in impls:
            entries[impl_of(kernel)] = kernel_entry(kernel, x, weight, packed[kernel])
    if "unpack" in impls:
        calls = tuple(functools.partial(run_unpack, x, own) for own in packed[UNPACKED])
        harness.check_product(calls[-1](), x, weight, "unpack")
        entries["unpack"] = Entry(calls)
    return entries


def linear_group(name: str, sparsity: float, rows: int) -> Group:
    kernels = [impl_of(kernel) for kernel, most in KERNELS.items() if rows <= most]
    unpack = ["unpack"] if CUDA and rows == UNPACK_ROWS else []
    dense = harness.dense_impls()
    impls = (*dense, *kernels, *unpack)
    build = functools.partial(build_linear, name, sparsity, rows, impls)
    return Group(f"sparse linear, {name}, {sparsity:.0%}, M={rows}", impls, dense, build)


def make_semi_weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A weight that keeps the first two of each four, in an order drawn for each."""
    weight = harness.make_weight(shape, 0.0, dtype)
    order = torch.rand(shape, generator=harness.generator(2), device=weight.device)
    ranks = order.view(-1, 4).argsort(dim=1).argsort(dim=1).view(shape)
    return torch.where(ranks < 2, weight, 0.0)


def build_semi(name: str, rows: int, dtype: torch.dtype) -> dict[str, Entry]:
    weight = make_semi_weight(SHAPES[name], dtype)
    x = harness.make_x(rows, weight.shape[1], dtype)
    copies = packed_copies(Kernel.SEMI, weight, weight != 0)
    entry = kernel_entry(Kernel.SEMI, x, weight, copies)
    return {**harness.dense_entries(x, DenseCopies.of(weight)), "semi": entry}


def semi_group(name: str, rows: int, dtype: torch.dtype) -> Group:
    dense = harness.dense_impls()
    short = str(dtype).removeprefix("torch.")
    build = functools.partial(build_semi, name, rows, dtype)
    return Group(f"2:4 linear, {name}, {short}, M={rows}", (*dense, "semi"), dense, build)


def build_call() -> dict[str, Entry]:
    weight = harness.make_weight((CALL_SIDE, CALL_SIDE), 0.7)
    x = harness.make_x(1, CALL_SIDE)
    kernels = {"op, dense": Kernel.DENSE, "op, sparse": CALL_KERNEL}

    def entry(call: Callable[..., Tensor], *arguments: object) -> Entry:
        harness.check_product(call(*arguments), x, weight, "call")
        return Entry((functools.partial(call, *arguments),) * CALLS)

    entries = {"F.linear": entry(F.linear, x, weight)}
    for impl, kernel in kernels.items():
        packed = pack_linear(weight, None, {kernel})
        plan = [int(kernel)] * len(BUCKET_ROWS)
        tensors, layout = list(packed.tensors()), list(packed.layout)
        shape = [CALL_SIDE, CALL_SIDE]
        entries[impl] = entry(sparse_linear, x, weight, tensors, layout, None, shape, plan, "none")
    return entries


def call_group() -> Group:
    """What a call of the operator costs where the product itself is nothing."""
    impls = ("F.linear", "op, dense", "op, sparse")
    name = f"{CALLS} calls of the operator, {CALL_SIDE}x{CALL_SIDE}"
    return Group(name, impls, ("F.linear",), build_call, graph=False)


def groups(*, smallest: bool = False) -> list[Group]:
    """The groups of the suite; ``smallest``: one small weight."""
    if smallest:
        return [linear_group("gpt2 attn.c_proj", 0.9, 4), call_group()]
    found = [call_group()]
    found += [
        linear_group(name, sparsity, rows)
        for name in NAMES
        for sparsity in GROUP_SPARSITIES
        for rows in GROUP_ROWS
    ]
    found += [linear_group(name, MORE_SPARSITY, rows) for name in MORE_NAMES for rows in MORE_ROWS]
    if CUDA:
        found += [linear_group(name, MORE_SPARSITY, UNPACK_ROWS) for name in NAMES]
        found += [
            semi_group("llama3-8b gate_proj", rows, dtype)
            for dtype in (torch.float16, torch.bfloat16)
            for rows in SEMI_ROWS
        ]
    return found


@pytest.mark.benchmark(max_time=0.1, min_rounds=5, warmup=True, warmup_iterations=3)
@pytest.mark.parametrize(("group", "impl"), harness.each_impl(groups()), ids=harness.show)
def test_sparse_linear(benchmark, group, impl):
    harness.run_benchmark(benchmark, group, impl)


# -- tables ----------------------------------------------------------------------------------
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--json", metavar="FOLDER", help="write the tables there as well")
    parser.add_argument("-k", default="", metavar="TEXT", help="only weights that hold TEXT")
    args = parser.parse_args()
    if not args.table:
        parser.error("expected --table")
    names = [name for name in TABLE_NAMES if args.k in name]
    if not names:
        parser.error(f"-k {args.k!r}: expected part of one of {TABLE_NAMES}")
    began = time.perf_counter()
    cells: list[linear_table.Cell] = []
    failed: list[str] = []
    with harness.one_thread():
        found = ceilings()
        for name in names:
            own, wrong = linear_table.measure_cells(name, SPARSITIES, ROWS)
            cells += own
            failed += wrong
    linear_table.add_rates(cells, found)
    for file, result in linear_table.tables(cells, found, COMMAND).items():
        print(result.text(), end="\n\n")
        if args.json:
            result.save(Path(args.json) / file)
    print(f"took {time.perf_counter() - began:.0f} s")
    for what in failed:
        print(f"FAILED: {what}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
