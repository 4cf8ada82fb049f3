"""The tables of bench_sparse_linear: every weight, sparsity and batch size, all kernels and dense.

A cell is a record of one product by one kernel; those of sparsity 0 are the fastest dense product.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import harness
from benchmarks.ceilings import Ceilings
from benchmarks.harness import CUDA, LINEAR_DTYPE, DenseCopies, Group
from benchmarks.linear_kernels import KERNELS, LETTERS, impl_of, kernel_entry, packed_copies
from benchmarks.results import Result
from benchmarks.shapes import SHAPES

REGIMES = {"M = 1-4": (1, 2, 4), "M = 8-16": (8, 16), "M = 32-64": (32, 64)}

Cell = dict[str, Any]
Best = dict[tuple[str, float, int], Cell]


# -- measuring -------------------------------------------------------------------------------
def measure_cells(
    name: str, sparsities: Sequence[float], batch: Sequence[int]
) -> tuple[list[Cell], list[str]]:
    """Times of one weight: at each batch size, all kernels and sparsities in turns with dense.

    Args:
        name: of ``SHAPES``.
        sparsities: shares pruned.
        batch: rows of x.

    Returns:
        The cells, and what failed: a kernel that raised or was wrong has no cell there.
    """
    began = time.perf_counter()
    copies = DenseCopies.of(harness.make_weight(SHAPES[name], 0.0))
    weights = {s: harness.make_weight(SHAPES[name], s) for s in sparsities}
    packed = {(s, k): packed_copies(k, weight) for s, weight in weights.items() for k in KERNELS}
    cells: list[Cell] = []
    failed: list[str] = []
    for rows in batch:
        x = harness.make_x(rows, SHAPES[name][1])
        entries = harness.dense_entries(x, copies)
        sparse = {}
        for (s, k), own in packed.items():
            if rows > KERNELS[k]:
                continue
            impl = f"{impl_of(k)} {s:.0%}"
            try:
                entries[impl] = kernel_entry(k, x, weights[s], own)
            except (AssertionError, RuntimeError) as error:
                failed.append(f"{name}, M={rows}, {impl}: {error}")
                harness.say(f"FAILED: {failed[-1]}")
            else:
                sparse[impl] = (s, impl_of(k))
        if not sparse:
            continue
        group = Group(
            f"{name}, M={rows}", tuple(entries), harness.dense_impls(), lambda made=entries: made
        )
        found = harness.measure(group)
        best = min(harness.dense_impls(), key=lambda impl: found[impl].ms)
        dense_bytes = SHAPES[name][0] * SHAPES[name][1] * LINEAR_DTYPE.itemsize
        shown = {best: (0.0, best), **sparse}
        for impl, (s, kernel) in shown.items():
            cells.append(
                {
                    "name": name,
                    "N": SHAPES[name][0],
                    "K": SHAPES[name][1],
                    "M": rows,
                    "sparsity": s,
                    "kernel": kernel,
                    "us": found[impl].ms * 1e3,
                    "bytes": int(entries[impl].moved_bytes) if s else dense_bytes,
                    "speedup": found[best].ms / found[impl].ms,
                }
            )
    harness.say(f"{name}: {time.perf_counter() - began:.1f} s")
    return cells, failed


def add_rates(cells: Iterable[Cell], found: Ceilings) -> None:
    """Bytes and operations a second of each cell, and the share of the byte limit that it takes."""
    for cell in cells:
        seconds, numel = cell["us"] / 1e6, cell["N"] * cell["K"]
        kept = numel * (1 - cell["sparsity"])
        least = limit_bytes(numel, cell["sparsity"]) if cell["sparsity"] else cell["bytes"]
        cell["bytes_per_s"] = cell["bytes"] / seconds
        cell["limit_share"] = least / found.read / seconds
        cell["flop_per_s"] = 2.0 * cell["M"] * kept / seconds


def limit_bytes(numel: int, sparsity: float) -> float:
    """Bytes of a bitmap and the kept values of a weight."""
    return numel * (LINEAR_DTYPE.itemsize * (1 - sparsity) + 1 / 8)


def best_cells(cells: Iterable[Cell]) -> Best:
    """(name, sparsity, M) -> cell of the fastest kernel."""
    best: Best = {}
    for cell in cells:
        key = (cell["name"], cell["sparsity"], cell["M"])
        if key not in best or cell["us"] < best[key]["us"]:
            best[key] = cell
    return best


# -- tables ----------------------------------------------------------------------------------
def tables(cells: Sequence[Cell], found: Ceilings, command: str) -> dict[str, Result]:
    """File name -> table: of the speed-ups, and on CUDA of the bytes and of the regimes."""
    best = best_cells(cells)
    batch = sorted({cell["M"] for cell in cells})
    heads = [f"M={m}" for m in batch]
    lines = [
        (name, s, [best.get((name, s, m)) for m in batch])
        for name in dict.fromkeys(cell["name"] for cell in cells)
        for s in sorted({cell["sparsity"] for cell in cells})
    ]
    dtype = str(LINEAR_DTYPE).removeprefix("torch.")
    legend = ", ".join(f"{LETTERS[impl_of(k)]} = {k.name}" for k in KERNELS)
    speed = Result(
        f"Speed-up of the best sparse kernel over the best dense product, {dtype} ({legend})",
        command,
        ["weight", "pruned", *heads],
        [[*_label(name, s, "dense, us"), *map(_speed, own)] for name, s, own in lines],
        [*cells, {"ceilings": asdict(found)}],
    )
    if not CUDA:
        return {"sparse_linear_cpu.json": speed}
    moved = Result(
        "TB/s of stored weight, and in brackets the share of the limit by bytes "
        f"at {found.read / 1e12:.2f} TB/s",
        command,
        ["weight", "pruned", "bytes a weight", *heads],
        [[*_label(name, s, "dense"), _sizes(own), *map(_rate, own)] for name, s, own in lines],
    )
    return {
        "sparse_linear.json": speed,
        "sparse_linear_bytes.json": moved,
        "sparse_linear_regimes.json": regimes(best, command),
    }


def _label(name: str, sparsity: float, dense: str) -> tuple[str, str]:
    if sparsity:
        return "", f"{sparsity:.0%}"
    return f"{name} {'x'.join(map(str, SHAPES[name]))}", dense


def _speed(cell: Cell | None) -> str:
    if cell is None:
        return "failed"
    if not cell["sparsity"]:
        return f"{cell['us']:.1f}"
    return f"{cell['speedup']:.2f}x {LETTERS[cell['kernel']]}"


def _rate(cell: Cell | None) -> str:
    if cell is None:
        return "failed"
    return f"{cell['bytes_per_s'] / 1e12:.2f} ({cell['limit_share']:.0%})"


def _sizes(own: Iterable[Cell | None]) -> str:
    """Bytes a weight of the kernels that are in a line."""
    found = {}
    for cell in own:
        if cell is not None:
            stored = f"{cell['bytes'] / (cell['N'] * cell['K']):.2f}"
            found[f"{stored} {LETTERS.get(cell['kernel'], '')}".strip()] = None
    return ", ".join(found)


def regimes(best: Best, command: str) -> Result:
    """Smallest, median and largest speed-up over the weights in each range of batch sizes."""
    sparsities = sorted({s for _, s, _ in best if s})
    rows = [
        [label, *(_range(best, s, batch) for s in sparsities)] for label, batch in REGIMES.items()
    ]
    title = "Speed-up over the best dense product: smallest / median / largest of the weights"
    return Result(title, command, ["batch", *(f"{s:.0%}" for s in sparsities)], rows)


def _range(best: Best, sparsity: float, batch: Sequence[int]) -> str:
    found = sorted(c["speedup"] for (_, s, m), c in best.items() if s == sparsity and m in batch)
    if not found:
        return ""
    return f"{found[0]:.2f} / {found[len(found) // 2]:.2f} / {found[-1]:.2f}"
