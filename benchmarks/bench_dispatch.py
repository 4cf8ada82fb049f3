"""Does the plan ever lose? Chosen kernels against dense, over random shapes, batches, sparsities.

    python -m benchmarks.bench_dispatch --sweep 200      # random points, auto plan against dense
    python -m benchmarks.bench_dispatch --make-table     # times of named shapes, for the package
    python -m pytest benchmarks/bench_dispatch.py        # what a known plan costs to look up

A sweep counts the points where the plan is slower than dense by more than noise. Noise is the
difference of dense and dense again at the same points, in the same turns. Another random weight is
timed than the plan was chosen on, at the exact row count, and its result is checked by float64.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.harness import check_product, collector_off, copies_of, make_weight, make_x, say
from benchmarks.results import Result
from benchmarks.shapes import CPU_SHAPES, CUDA_SHAPES, SHAPES
from resu_compile.kernels.packed_linear import PackedLinear, pack_linear
from resu_compile.kernels.plan import BUCKET_ROWS, Kernel, batch_bucket
from resu_compile.runtime import kernel_times, plan_cache, stopwatch
from resu_compile.runtime.kernel_choice import candidates_of, formats_of
from resu_compile.runtime.plans import DYNAMIC_ROWS, Plan, choose_plan

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
TABLE_SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_FAMILIES = ("llama3-8b", "llama3.2-1b") if CUDA else ("gpt2", "vit")
TABLE_SHAPES = (  # most wanted first: there may be no time for all
    *(CUDA_SHAPES if CUDA else CPU_SHAPES),
    *(name for family in _FAMILIES for name in SHAPES if name.startswith(family)),
)
SIZES = (64, 16384) if CUDA else (32, 2048)  # of N and K
MOST_ROWS = 512 if CUDA else 256
MOST_NUMEL = 2**27 if CUDA else 2**21
REPEATS = 15 if CUDA else 60
CPU_BUDGET_S = 0.15
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


# -- one point -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Point:
    """A linear layer at one batch size, and the times of the dense product and of its plan.

    Attributes:
        out_features: N.
        in_features: K.
        rows: M.
        sparsity: share of pruned weights.
        kernel: what the plan runs there.
        dense_ms: time of the dense product.
        again_ms: time of the dense product, taken a second time in the same turns.
        plan_ms: time of what the plan runs; of a dense plan, ``again_ms``.
    """

    out_features: int
    in_features: int
    rows: int
    sparsity: float
    kernel: str
    dense_ms: float
    again_ms: float
    plan_ms: float

    @property
    def speedup(self) -> float:
        """Time of dense over that of the plan."""
        return self.dense_ms / self.plan_ms

    @property
    def noise(self) -> float:
        """How far dense is from dense, as a share."""
        return abs(self.again_ms / self.dense_ms - 1.0)


def random_points(count: int, seed: int) -> Iterator[tuple[int, int, int, float]]:
    """(N, K, M, sparsity); sizes are log-uniform, one in four is no multiple of 8."""
    numbers = random.Random(seed)

    def size() -> int:
        value = round(math.exp(numbers.uniform(*map(math.log, SIZES))))
        return value if numbers.random() < 0.25 else max(value // 8, 1) * 8

    for _ in range(count):
        n, k = size(), size()
        while n * k > MOST_NUMEL:
            n, k = size(), size()
        rows = round(math.exp(numbers.uniform(0, math.log(MOST_ROWS))))
        yield n, k, rows, numbers.uniform(0.4, 0.99)


def measure_point(
    n: int, k: int, rows: int, sparsity: float, *, cuda_graphs: bool, dynamic: bool = False
) -> Point:
    """Choose a plan, then time what it runs, on a weight of its own.

    Args:
        n: out_features.
        k: in_features.
        rows: rows of x.
        sparsity: share of pruned weights.
        cuda_graphs: time on the device, for a plan that is chosen for that.
        dynamic: choose the plan as for a batch size that changes.
    """
    plan = choose_plan(
        DEVICE, n, k, sparsity, DTYPE, None if dynamic else rows, "auto", cuda_graphs=cuda_graphs
    )
    kernel = plan.kernels[batch_bucket(rows)]
    weight, x = make_weight((n, k), sparsity, DTYPE), make_x(rows, k, DTYPE)
    dense = [
        functools.partial(F.linear, x, weight.clone()) for _ in range(copies_of(weight.nbytes))
    ]
    groups = [dense, dense]
    if kernel is not Kernel.DENSE:
        groups.append(_planned(plan, x, weight))
        check_product(groups[-1][-1](), x, weight, f"{kernel.name} {n}x{k} M={rows}")
    runs = [_run(calls, cuda_graphs) for calls in groups]
    with collector_off():
        samples = stopwatch.interleaved_ms(
            tuple(run for run, _ in runs),
            stopwatch.device_ms if CUDA else stopwatch.wall_ms,
            math.inf if CUDA else CPU_BUDGET_S * len(runs),
            REPEATS,
        )
    middle = statistics.median if CUDA else min
    times = [middle(own) / count for own, (_, count) in zip(samples, runs, strict=True)]
    return Point(n, k, rows, sparsity, kernel.name, times[0], times[1], times[-1])


def _planned(plan: Plan, x: torch.Tensor, weight: torch.Tensor) -> list[functools.partial]:
    packed = pack_linear(weight, None, plan.needed)
    copies = [packed.tensors()]
    copies += [tuple(t.clone() for t in copies[0]) for _ in range(copies_of(packed.size_bytes) - 1)]
    return [functools.partial(_sparse, x, weight, tensors, packed, plan) for tensors in copies]


def _sparse(x, weight, tensors, packed: PackedLinear, plan: Plan) -> torch.Tensor:
    return torch.ops.resu_compile.sparse_linear(
        x, weight, tensors, packed.layout, None, packed.shape, plan.kernels, "none"
    )


def _run(calls: list, cuda_graphs: bool) -> tuple:
    if not CUDA:
        return calls[0], 1
    calls = kernel_times.enough_calls(calls)
    if cuda_graphs:
        return stopwatch.capture_calls(calls).replay, len(calls)
    return lambda: [call() for call in calls], len(calls)


# -- many points -----------------------------------------------------------------------------
def noise_of(points: Sequence[Point]) -> float:
    """The share by which dense differs from dense at no more than one point in twenty."""
    return quantile([point.noise for point in points], 0.95)


def quantile(values: Sequence[float], share: float) -> float:
    """Value below which a ``share`` of ``values`` lies, linear between two of them."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def slower(points: Sequence[Point], noise: float) -> list[Point]:
    """The points where the plan takes longer than dense by more than ``noise``."""
    return [point for point in points if point.plan_ms > point.dense_ms * (1.0 + noise)]


def summary(points: Sequence[Point]) -> str:
    """Noise, lost points and quantiles of the speed-up, in three lines."""
    noise = noise_of(points)
    taken = [point for point in points if point.kernel != Kernel.DENSE.name]
    # dense against dense differs by more than the noise at one point in twenty, by definition
    lost = slower(taken, noise)
    lines = [
        f"{len(points)} points, noise {noise:.1%} (95 % of dense against dense)",
        f"a sparse kernel at {len(taken)}, slower than dense by more than noise at {len(lost)}",
    ]
    for what, own in (("where sparse", taken), ("everywhere", points)):
        if own:
            speedups = [p.speedup if p.kernel != Kernel.DENSE.name else 1.0 for p in own]
            found = ", ".join(f"{q:.0%} {quantile(speedups, q):.2f}x" for q in QUANTILES)
            lines.append(f"speed-up {what}: {found}")
    return "\n".join(lines)


def sweep(
    count: int,
    seed: int,
    *,
    cuda_graphs: bool,
    dynamic: bool = False,
    budget_s: float = math.inf,
    worst: int = 12,
) -> Result:
    """The result of ``count`` random points; the table shows the worst of the sparse ones.

    Args:
        count: points to draw.
        seed: of the points.
        cuda_graphs: plans and times on the device alone.
        dynamic: plans for a batch size that changes.
        budget_s: seconds after which no further point is begun.
        worst: rows of the table.
    """
    points = []
    started = time.perf_counter()
    for i, (n, k, rows, sparsity) in enumerate(random_points(count, seed)):
        if points and time.perf_counter() - started > budget_s:
            say(f"no time left after {i} points")
            break
        points.append(measure_point(n, k, rows, sparsity, cuda_graphs=cuda_graphs, dynamic=dynamic))
        if i % 20 == 19:
            say(f"{i + 1} points")
    taken = sorted((p for p in points if p.kernel != Kernel.DENSE.name), key=lambda p: p.speedup)
    body = [
        [f"{p.out_features}x{p.in_features}", p.rows, f"{p.sparsity:.0%}", p.kernel.lower(),
         f"{p.dense_ms * 1e3:.1f}", f"{p.plan_ms * 1e3:.1f}", f"{p.speedup:.2f}x",
         f"{p.noise:.1%}"]
        for p in taken[:worst]
    ]  # fmt: skip
    launch = "CUDA graphs" if CUDA and cuda_graphs else "calls"
    batch = "a batch size that may change" if dynamic else "a known batch size"
    options = " --calls" * (CUDA and not cuda_graphs) + " --dynamic" * dynamic
    return Result(
        f"The {len(body)} worst of {len(points)} random points in {launch}, plans for {batch}; "
        + summary(points).replace("\n", "; "),
        f"python -m benchmarks.bench_dispatch --sweep {count} --seed {seed}{options}",
        ["weight", "M", "pruned", "plan", "dense, us", "plan, us", "speed-up", "noise"],
        body,
        [asdict(point) for point in points],
    )


# -- the shipped table -----------------------------------------------------------------------
def table_entries(
    names: Sequence[str], budget_s: float, *, unpack: bool
) -> dict[str, plan_cache.Stored]:
    """Times of the named shapes by every kernel, as ``plan_cache`` reads them.

    On CUDA in graphs alone: what a launch costs is a matter of the host, whatever the GPU.

    Args:
        names: of ``SHAPES``.
        budget_s: seconds after which no further shape is begun.
        unpack: time ``UNPACK`` too, which weights ask for whose dense storage is released.
    """
    entries: dict[str, plan_cache.Stored] = {}
    started = time.perf_counter()
    shapes = dict.fromkeys(SHAPES[name] for name in names)  # some are named twice
    for (n, k), sparsity in ((s, p) for s in shapes for p in TABLE_SPARSITIES):
        if time.perf_counter() - started > budget_s:
            say(f"{n}x{k} {sparsity:.0%} and what follows: no time left")
            break
        formats = formats_of(DEVICE, n, k, DTYPE)
        wanted = {
            rows: candidates_of(formats, rows, DTYPE) | ({Kernel.UNPACK} if unpack else frozenset())
            for rows in BUCKET_ROWS
            if rows <= DYNAMIC_ROWS or not CUDA
        }
        wanted = {rows: kernels for rows, kernels in wanted.items() if len(kernels) > 1}
        key = plan_cache.TimesKey.of(DEVICE, n, k, sparsity, DTYPE, cuda_graphs=True)
        times = kernel_times.measure_kernels(
            DEVICE, n, k, sparsity, DTYPE, wanted, cuda_graphs=True, pattern=None,
            unpacked_from=key.unpacked_from,
        )  # fmt: skip
        entries[f"{key.device}|{key.text}"] = plan_cache.to_stored(key, times)
        say(f"{n}x{k} {sparsity:.0%}: {time.perf_counter() - started:.1f} s")
    return entries


def make_table(path: Path, names: Sequence[str], budget_s: float, *, unpack: bool) -> None:
    """Write the table of ``names`` to ``path``, entries of other devices there left alone."""
    entries = table_entries(names, budget_s, unpack=unpack)
    kept = plan_cache.parse(path.read_text(encoding="utf-8")) if path.exists() else {}
    plan_cache.replace_file(path, plan_cache.to_text(kept | entries))
    say(f"{path}: {len(entries)} entries, {path.stat().st_size / 1024:.0f} KiB")


# -- pytest-benchmark ------------------------------------------------------------------------
def test_known_plan(benchmark, tmp_path):
    """What a compilation pays for each weight whose times are known."""
    plan_cache.set_cache_path(tmp_path / "times.json")
    try:
        arguments = (DEVICE, 256, 512, 0.9, DTYPE, None, "auto")
        first = choose_plan(*arguments)
        assert benchmark(choose_plan, *arguments).kernels == first.kernels
    finally:
        plan_cache.set_cache_path(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", type=int, metavar="POINTS", help="random points to compare")
    parser.add_argument("--seed", type=int, default=0, help="of the random points")
    parser.add_argument("--calls", action="store_true", help="calls from Python, no CUDA graphs")
    parser.add_argument("--dynamic", action="store_true", help="plans for all batch sizes at once")
    parser.add_argument("--json", type=Path, help="where to write the sweep's result")
    parser.add_argument("--make-table", action="store_true", help="times of the named shapes")
    parser.add_argument("--out", type=Path, help="file of the table; the package's own if missing")
    parser.add_argument("--unpack", action="store_true", help="in the table: unpacking too")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for each part")
    arguments = parser.parse_args()
    if not (arguments.sweep or arguments.make_table):
        parser.error("expected --sweep POINTS or --make-table")
    if arguments.make_table:
        shipped = plan_cache.DATA_FOLDER / plan_cache.SHIPPED[0 if CUDA else 1]
        make_table(
            arguments.out or shipped, TABLE_SHAPES, arguments.budget, unpack=arguments.unpack
        )
    if arguments.sweep:
        with tempfile.TemporaryDirectory() as folder:  # chosen afresh, not by an older cache
            plan_cache.set_cache_path(Path(folder) / "times.json")
            result = sweep(
                arguments.sweep,
                arguments.seed,
                cuda_graphs=not arguments.calls,
                dynamic=arguments.dynamic,
                budget_s=arguments.budget,
            )
            plan_cache.set_cache_path(None)
        sys.stdout.write(result.text() + "\n")
        if arguments.json:
            result.save(arguments.json)


if __name__ == "__main__":
    main()
