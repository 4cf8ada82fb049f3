"""What the benchmarks share: groups of implementations, timed in turns after a check.

A ``Group`` is one question: implementations that compute the same, some of which are references.
Its answer is a ratio for each of the others: time of the fastest reference over its own, so that
more is better. On CUDA a time is that on the device, in a CUDA graph over copies that together are
beyond L2, median of the repeats. On the CPU it is processor time of one thread, of the fastest
repeat: other programs on the same cores only ever add to it.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.runtime.stopwatch import (
    capture_calls,
    copies_beyond_l2,
    device_ms,
    interleaved_ms,
    wall_ms,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LINEAR_DTYPE = torch.bfloat16 if CUDA else torch.float32  # of matrix products

CUDA_REPEATS = 15
CPU_REPEATS, CPU_BUDGET_S = 60, 0.06  # seconds for each implementation of a group
SMALLEST_REPEATS = 3

BLAS_LIBRARIES = ("cublas", "cublaslt")

Call = Callable[[], object]


# -- a question ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """One implementation, ready to run.

    Attributes:
        calls: the same work on different memory, one call for each copy; its time is their mean.
        moved_bytes: bytes that one call has to move through memory; 0 where nobody counted.
        flop: floating-point operations of one call; 0 where nobody counted.
    """

    calls: tuple[Call, ...]
    moved_bytes: float = 0.0
    flop: float = 0.0

    def __post_init__(self) -> None:
        if not self.calls:
            raise ValueError("calls: expected at least one call, got none")


@dataclass(frozen=True)
class Group:
    """Implementations of the same work.

    Attributes:
        name: says the work and its size, unique among all groups: part of every case's name.
        impls: names of the implementations that ``build`` gives.
        references: those among ``impls`` that the others are judged by; the fastest counts.
        build: makes the entries and raises where a result is wrong.
        graph: whether a CUDA graph can hold the calls; else their launches count as well.
    """

    name: str
    impls: tuple[str, ...]
    references: tuple[str, ...]
    build: Callable[[], Mapping[str, Entry]]
    graph: bool = True

    def __post_init__(self) -> None:
        if not self.references or not set(self.references) < set(self.impls):
            raise ValueError(
                f"{self.name}: expected references that are some of {self.impls}, "
                f"got {self.references}"
            )


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, and how far the repeats lie apart.

    Attributes:
        ms: median of the repeats on CUDA, the fastest on the CPU.
        spread: from the lower to the upper quartile, as a share of ``ms``.
        moved_bytes: bytes that the call has to move; 0 where nobody counted.
    """

    ms: float
    spread: float
    moved_bytes: float = 0.0


def measure(group: Group, *, smallest: bool = False, patience: int = 1) -> dict[str, Timing]:
    """Time of each implementation of ``group``, all taken in turns.

    Args:
        group: what to time; its results are checked by its ``build``.
        smallest: 3 repeats, to see that it runs.
        patience: how many times as long as usual.
    """
    entries = group.build()
    if set(entries) != set(group.impls):
        raise ValueError(f"{group.name}: expected {group.impls}, built {tuple(entries)}")
    in_order = [entries[impl] for impl in group.impls]
    runs = tuple(runner(entry, graph=group.graph) for entry in in_order)
    repeats = patience * (CUDA_REPEATS if CUDA else CPU_REPEATS)
    repeats = SMALLEST_REPEATS if smallest else repeats
    budget_s = math.inf if CUDA else patience * CPU_BUDGET_S * len(runs)
    clock = processor_ms
    if CUDA:
        clock = device_ms if group.graph else synchronized_ms
    with collector_off():
        samples = interleaved_ms(runs, clock, budget_s, repeats)
    return {
        impl: timing([ms / len(entry.calls) for ms in own], entry.moved_bytes)
        for impl, entry, own in zip(group.impls, in_order, samples, strict=True)
    }


def timing(samples_ms: Sequence[float], moved_bytes: float = 0.0) -> Timing:
    """What the repeats of one implementation say."""
    ms = statistics.median(samples_ms) if CUDA else min(samples_ms)
    lower, _, upper = statistics.quantiles(samples_ms, n=4, method="inclusive")
    return Timing(ms, (upper - lower) / ms if ms > 0 else math.nan, moved_bytes)


def ratios(group: Group, timings: Mapping[str, Timing]) -> dict[str, float]:
    """Time of the fastest reference over that of each implementation that is no reference."""
    best = min(timings[impl].ms for impl in group.references)
    return {impl: best / timings[impl].ms for impl in group.impls if impl not in group.references}


def case_name(group: Group, impl: str) -> str:
    """Name of one ratio in result files and baselines."""
    return f"{group.name}: {impl}"


def times(ratio: float) -> str:
    """A ratio as it is shown: "1.93x"."""
    return f"{ratio:.2f}x" if not ratio < 0.995 else f"{ratio:.2g}x"


def runner(entry: Entry, *, graph: bool) -> Call:
    """What runs all calls of ``entry``: a replay of their CUDA graph, or one after the other."""
    if CUDA and graph:
        return capture_calls(entry.calls).replay
    calls = entry.calls

    def run() -> None:
        for call in calls:
            call()

    return run


def processor_ms(call: Call) -> float:
    """Milliseconds of processor time that ``call`` takes: what a scheduler gives away is not in it.

    Processor time of the whole process, so that work on another thread could not hide.
    """
    started = time.process_time()
    call()
    return (time.process_time() - started) * 1e3


def synchronized_ms(call: Call) -> float:
    """Milliseconds until the device is done with ``call``, its launch included."""

    def finish() -> None:
        call()
        torch.cuda.synchronize()

    return wall_ms(finish)


@contextmanager
def collector_off() -> Iterator[None]:
    """No collection of garbage: one of a compiler's graphs takes longer than a training step."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread on the CPU: waiting for one that another program keeps busy is no measurement."""
    threads = torch.get_num_threads()
    if not CUDA:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# -- pytest-benchmark ------------------------------------------------------------------------
def each_impl(groups: Iterable[Group]) -> list[tuple[Group, str]]:
    """Arguments of a benchmark that is parametrized by ``group`` and ``impl``."""
    return [(group, impl) for group in groups for impl in group.impls]


def show(value: object) -> str:
    """Test id of a parameter."""
    return (value.name if isinstance(value, Group) else str(value)).replace(" ", "_")


def run_benchmark(benchmark, group: Group, impl: str) -> None:
    """One test of a group: ``impl`` under the clock of pytest-benchmark."""
    benchmark.group = group.name
    with one_thread():
        entry = group.build()[impl]
        run = runner(entry, graph=group.graph)

        def finish() -> None:
            run()
            if CUDA:
                torch.cuda.synchronize()

        benchmark(finish)
    benchmark.extra_info["calls"] = len(entry.calls)
    if benchmark.stats is None:  # --benchmark-disable: it ran, and nothing was timed
        return
    seconds = benchmark.stats.stats.median / len(entry.calls)
    benchmark.extra_info["us per call"] = seconds * 1e6
    if entry.moved_bytes:
        benchmark.extra_info["GB/s"] = entry.moved_bytes / seconds / 1e9
    if entry.flop:
        benchmark.extra_info["GFLOP/s"] = entry.flop / seconds / 1e9


# -- data ------------------------------------------------------------------------------------
def copies_of(size_bytes: int) -> int:
    """Copies that together are twice L2; 1 on the CPU, whose caches nothing here fills."""
    if not CUDA:
        return 1
    l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return copies_beyond_l2(size_bytes, l2_bytes)


def rotating(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Copies of the tensors that together are beyond L2; themselves on the CPU."""
    if not CUDA:
        return [tuple(tensors)]
    size_bytes = sum(t.numel() * t.element_size() for t in tensors)
    return [tuple(t.clone() for t in tensors) for _ in range(copies_of(size_bytes))]


def generator(seed: int) -> torch.Generator:
    """Random numbers of this device that are the same in every run."""
    return torch.Generator(DEVICE).manual_seed(seed)


def make_weight(
    shape: tuple[int, int], sparsity: float, dtype: torch.dtype = LINEAR_DTYPE
) -> Tensor:
    """Normal (N, K) weight of which each entry is 0 with probability ``sparsity``."""
    numbers = generator(0)
    weight = torch.randn(shape, generator=numbers, device=DEVICE)
    kept = torch.rand(shape, generator=numbers, device=DEVICE) >= sparsity
    return weight.mul_(kept).to(dtype)


def make_x(rows: int, in_features: int, dtype: torch.dtype = LINEAR_DTYPE) -> Tensor:
    """Normal (M, K) input."""
    return torch.randn(rows, in_features, generator=generator(1), device=DEVICE).to(dtype)


def max_error(dtype: torch.dtype) -> float:
    """Relative error of a product in the 2-norm: rounding the result, and the order of the sum.

    Half a unit in the last place is 2**-9 in bf16 and 2**-12 in fp16.
    """
    return {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 1e-5)


def check_product(y: Tensor, x: Tensor, weight: Tensor, what: str) -> None:
    """Raise unless ``y`` is ``x @ weight.T``, by float64."""
    expected = x.double() @ weight.double().t()
    error = ((y.double() - expected).norm() / expected.norm()).item()
    limit = max_error(x.dtype)
    if not error < limit:  # a NaN is wrong too
        raise AssertionError(f"{what}: relative error {error:.1e}, expected below {limit:.1e}")


# -- the dense product -----------------------------------------------------------------------
def _linear_by(library: str, x: Tensor, weight: Tensor) -> Tensor:
    preferred = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        return F.linear(x, weight)
    finally:
        torch.backends.cuda.preferred_blas_library(preferred)


def dense_impls() -> tuple[str, ...]:
    """Names of the entries of ``dense_entries``."""
    if not CUDA:
        return ("dense",)
    return tuple(f"dense {library}{t}" for t in ("", " (K, N)") for library in BLAS_LIBRARIES)


@dataclass(frozen=True)
class DenseCopies:
    """A dense weight in every layout that its product is timed in, beyond L2 each.

    Attributes:
        rows: (N, K), contiguous.
        columns: (N, K) with K the faster to change from row to row, (K, N) in memory; empty on
            the CPU, where it makes no difference.
    """

    rows: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]

    @classmethod
    def of(cls, weight: Tensor) -> DenseCopies:
        rows = tuple(w for (w,) in rotating((weight,)))
        transposed = rotating((weight.t().contiguous(),)) if CUDA else []
        return cls(rows, tuple(w.t() for (w,) in transposed))


def dense_entries(x: Tensor, copies: DenseCopies) -> dict[str, Entry]:
    """The product of x and the copies: by cuBLAS and cuBLASLt in both layouts, or on the CPU."""
    weight = copies.rows[0]
    moved = weight.numel() * weight.element_size()
    flop = 2.0 * x.shape[0] * weight.numel()

    def entry(call: Callable[[Tensor, Tensor], Tensor], weights: tuple[Tensor, ...]) -> Entry:
        return Entry(tuple(_bound(call, x, w) for w in weights), moved, flop)

    if not CUDA:
        return {"dense": entry(F.linear, copies.rows)}
    entries = {}
    for suffix, weights in (("", copies.rows), (" (K, N)", copies.columns)):
        for library in BLAS_LIBRARIES:
            call = _library_call(library)
            entries[f"dense {library}{suffix}"] = entry(call, weights)
    return entries


def _library_call(library: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: _linear_by(library, x, weight)


def _bound(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Call:
    return lambda: call(x, weight)


def say(text: str) -> None:
    """Print a line of progress to stderr: results on stdout stay clean."""
    print(text, file=sys.stderr, flush=True)
