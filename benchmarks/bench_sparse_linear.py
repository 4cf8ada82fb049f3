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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.ceilings import Ceilings, ceilings
from benchmarks.harness import CUDA, LINEAR_DTYPE, DenseCopies, Entry, Group, Timing
from benchmarks.results import Result
from benchmarks.shapes import CPU_SHAPES, CUDA_SHAPES, SHAPES
from resu_compile.kernels.packed_linear import format_of, pack_linear
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
    else ("vit-l mlp.fc2", "llama3.2-1b q_proj")
)
MORE_SPARSITY, MORE_ROWS = (0.7 if CUDA else 0.9), (1, 16)

# kernel -> the most rows of x that it is timed at, and the letter that stands for it in a table
KERNELS = {Kernel.ROWS: 8, Kernel.TILES: 64} if CUDA else {Kernel.CSR: 512}
LETTERS = {Kernel.ROWS: "R", Kernel.TILES: "T", Kernel.CSR: "C"}
UNPACKED = Kernel.TILES if CUDA else Kernel.CSR  # the format that "unpack" expands
UNPACK_ROWS = 256  # where it is timed, at ``MORE_SPARSITY``; on CUDA
SEMI_ROWS = (1, 16, 64, 256)

CALL_SIDE, CALLS = 64, 50
CALL_KERNEL = Kernel.ROWS if CUDA else Kernel.CSR


# -- one kernel ------------------------------------------------------------------------------
def packed_bytes(packed: Any) -> int:
    return int(packed.size_bytes)


def copies_of_packed(kernel: Kernel, packed: Any) -> list[Any]:
    """Copies of a packed weight that together are beyond L2."""
    form = format_of(kernel)
    return [
        form.from_tensors(tensors, packed.layout, packed.shape)
        for tensors in harness.rotating(packed.tensors())
    ]


def run_kernel(kernel: Kernel, x: Tensor, packed: Any) -> Tensor:
    return format_of(kernel).linear(x, packed, None, "none")


def run_unpack(x: Tensor, packed: Any) -> Tensor:
    return F.linear(x, format_of(UNPACKED).unpack(packed))


def kernel_entry(kernel: Kernel, x: Tensor, weight: Tensor, copies: Sequence[Any]) -> Entry:
    """The product by one kernel, checked."""
    calls = tuple(functools.partial(run_kernel, kernel, x, packed) for packed in copies)
    harness.check_product(calls[-1](), x, weight, f"{kernel.name} {tuple(weight.shape)}")
    flop = 2.0 * x.shape[0] * int(weight.count_nonzero())
    return Entry(calls, packed_bytes(copies[0]), flop)


# -- groups ----------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def dense_copies(name: str) -> DenseCopies:
    return DenseCopies.of(harness.make_weight(SHAPES[name], 0.0))


@functools.lru_cache(maxsize=1)
def packed_copies(name: str, sparsity: float) -> tuple[Tensor, dict[Kernel, list[Any]]]:
    weight = harness.make_weight(SHAPES[name], sparsity)
    return weight, {k: copies_of_packed(k, format_of(k).pack(weight, None)) for k in KERNELS}


def build_linear(name: str, sparsity: float, rows: int, impls: Sequence[str]) -> dict[str, Entry]:
    weight, packed = packed_copies(name, sparsity)
    x = harness.make_x(rows, weight.shape[1])
    entries = harness.dense_entries(x, dense_copies(name))
    for kernel in KERNELS:
        if kernel.name.lower() in impls:
            entries[kernel.name.lower()] = kernel_entry(kernel, x, weight, packed[kernel])
    if "unpack" in impls:
        calls = tuple(functools.partial(run_unpack, x, own) for own in packed[UNPACKED])
        harness.check_product(calls[-1](), x, weight, "unpack")
        entries["unpack"] = Entry(calls)
    return entries


def linear_group(name: str, sparsity: float, rows: int) -> Group:
    kernels = [kernel.name.lower() for kernel, most in KERNELS.items() if rows <= most]
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
    packed = format_of(Kernel.SEMI).pack(weight, weight != 0)
    entry = kernel_entry(Kernel.SEMI, x, weight, copies_of_packed(Kernel.SEMI, packed))
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
def limit_bytes(shape: tuple[int, int], sparsity: float) -> float:
    """Bytes of a bitmap and the kept values of a weight."""
    return shape[0] * shape[1] * (LINEAR_DTYPE.itemsize * (1 - sparsity) + 1 / 8)


def cell_records(
    name: str, sparsity: float, rows: int, timings: dict[str, Timing], sizes: dict[str, int]
) -> Iterator[dict[str, object]]:
    """One record for the best dense product (sparsity 0) or for each kernel."""
    dense = {impl: timings[impl].ms for impl in harness.dense_impls()}
    best = min(dense, key=dense.__getitem__)
    shape = SHAPES[name]
    common = {"name": name, "N": shape[0], "K": shape[1], "M": rows}
    if sparsity == 0:
        moved = shape[0] * shape[1] * LINEAR_DTYPE.itemsize
        yield {
            **common,
            "sparsity": 0.0,
            "kernel": best,
            "us": dense[best] * 1e3,
            "bytes": moved,
            "speedup": 1.0,
        }
        return
    for impl, own in timings.items():
        if impl not in dense:
            yield {
                **common,
                "sparsity": sparsity,
                "kernel": impl,
                "us": own.ms * 1e3,
                "bytes": sizes[impl],
                "speedup": dense[best] / own.ms,
            }


def measure_cells(names: Sequence[str], sparsities: Sequence[float]) -> list[dict[str, object]]:
    """Times of every cell: at each shape and M, all kernels and sparsities in turns with dense."""
    records: list[dict[str, object]] = []
    for name in names:
        began = time.perf_counter()
        copies = DenseCopies.of(harness.make_weight(SHAPES[name], 0.0))
        weights = {s: harness.make_weight(SHAPES[name], s) for s in sparsities}
        packed = {
            (s, k): copies_of_packed(k, format_of(k).pack(weight, None))
            for s, weight in weights.items()
            for k in KERNELS
        }
        for rows in ROWS:
            x = harness.make_x(rows, SHAPES[name][1])
            entries = harness.dense_entries(x, copies)
            for (s, k), own in packed.items():
                if rows <= KERNELS[k]:
                    entries[f"{k.name.lower()} {s}"] = kernel_entry(k, x, weights[s], own)
            timings = harness.measure(
                Group("cells", tuple(entries), harness.dense_impls(), lambda e=entries: e)
            )
            for s in (0.0, *sparsities):
                kernels = {k.name.lower(): f"{k.name.lower()} {s}" for k in KERNELS}
                kernels = {short: full for short, full in kernels.items() if full in timings}
                here = {impl: timings[impl] for impl in harness.dense_impls()}
                here |= {short: timings[full] for short, full in kernels.items()}
                sizes = {short: int(entries[full].moved_bytes) for short, full in kernels.items()}
                records += cell_records(name, s, rows, here, sizes)
        harness.say(f"{name}: {time.perf_counter() - began:.1f} s")
    return records


def add_shares(records: Sequence[dict[str, object]], found: Ceilings) -> None:
    """Bytes a second, and the share of the limit that the time is, in each record."""
    for record in records:
        seconds = float(record["us"]) / 1e6
        shape, sparsity = (record["N"], record["K"]), float(record["sparsity"])
        least = limit_bytes(shape, sparsity) if sparsity else float(record["bytes"])
        record["bytes_per_s"] = record["bytes"] / seconds
        record["limit_share"] = least / found.read / seconds
        kept = shape[0] * shape[1] * (1 - sparsity)
        record["flop_per_s"] = 2.0 * record["M"] * kept / seconds


def best_records(records: Sequence[dict[str, object]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """(name, sparsity, M) -> record of the fastest kernel."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        key = (record["name"], record["sparsity"], record["M"])
        if key not in best or record["us"] < best[key]["us"]:
            best[key] = record
    return best


def tables(records: Sequence[dict[str, object]], found: Ceilings, command: str) -> list[Result]:
    """The tables of the speed-ups, of the bytes, and of the regimes."""
    best = best_records(records)
    batch = list(dict.fromkeys(record["M"] for record in records))
    speed_rows, byte_rows = [], []
    for name in dict.fromkeys(record["name"] for record in records):
        shape = "x".join(map(str, SHAPES[name]))
        for s in sorted({record["sparsity"] for record in records}):
            cells = [best[name, s, m] for m in batch]
            numel = cells[0]["N"] * cells[0]["K"]
            label = f"{name} {shape}" if not s else ""
            if not s:
                speed_rows.append([label, "dense, us", *(f"{c['us']:.1f}" for c in cells)])
            else:
                speed = [f"{c['speedup']:.2f}x {letter(c)}" for c in cells]
                speed_rows.append(["", f"{s:.0%}", *speed])
            sizes = dict.fromkeys(f"{c['bytes'] / numel:.2f} {letter(c)}".strip() for c in cells)
            rate = [f"{c['bytes_per_s'] / 1e12:.2f} ({c['limit_share']:.0%})" for c in cells]
            byte_rows.append([label, f"{s:.0%}" if s else "dense", ", ".join(sizes), *rate])
    heads = [f"M={m}" for m in batch]
    dtype = str(LINEAR_DTYPE).removeprefix("torch.")
    legend = ", ".join(f"{LETTERS[k]} = {k.name}" for k in KERNELS)
    read = f"{found.read / 1e12:.2f} TB/s"
    speed = Result(
        f"Speed-up of the best sparse kernel over the best dense product, {dtype} ({legend})",
        command,
        ["weight", "pruned", *heads],
        speed_rows,
        [*records, {"ceilings": asdict(found)}],
    )
    moved = Result(
        f"TB/s of stored weight, and in brackets the share of the limit by bytes at {read}",
        command,
        ["weight", "pruned", "bytes a weight", *heads],
        byte_rows,
    )
    return [speed, moved, regimes(best, command)] if CUDA else [speed]


REGIMES = {"M = 1-4": (1, 2, 4), "M = 8-16": (8, 16), "M = 32-64": (32, 64)}


def regimes(best: dict[tuple[Any, ...], dict[str, Any]], command: str) -> Result:
    """Smallest, median and largest speed-up over shapes in each range of batch sizes."""
    sparsities = sorted({s for _, s, _ in best if s})
    rows = []
    for label, batch in REGIMES.items():
        row: list[object] = [label]
        for s in sparsities:
            speed = sorted(
                c["speedup"] for (_, own, m), c in best.items() if own == s and m in batch
            )
            if speed:
                row.append(f"{speed[0]:.2f} / {speed[len(speed) // 2]:.2f} / {speed[-1]:.2f}")
            else:
                row.append("")
        rows.append(row)
    title = "Speed-up over the best dense product: smallest / median / largest of the shapes"
    return Result(title, command, ["batch", *(f"{s:.0%}" for s in sparsities)], rows)


def letter(cell: dict[str, Any]) -> str:
    return {k.name.lower(): v for k, v in LETTERS.items()}.get(cell["kernel"], "")


FILES = ("sparse_linear.json", "sparse_linear_bytes.json", "sparse_linear_regimes.json")


def main() -> None:
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
    with harness.one_thread():
        found = ceilings()
        records = measure_cells(names, SPARSITIES)
    add_shares(records, found)
    results = tables(records, found, COMMAND)
    for result in results:
        print(result.text(), end="\n\n")
    if args.json:
        for file, result in zip(FILES, results, strict=False):
            result.save(Path(args.json) / file)
    print(f"took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
