"""Sparse against dense linear layer at decode batch sizes.

    python -m pytest benchmarks/bench_sparse_linear.py       # one group a shape, batch and sparsity
    python -m benchmarks.bench_sparse_linear --table         # speed-up over the best dense product
    python -m benchmarks.bench_sparse_linear --tune          # Triton tile sizes (CUDA)

On CUDA: bf16, the time on the device in a CUDA graph over copies of the weight that together are
twice L2. On the CPU: fp32, the time of a call. Every result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from benchmarks.shapes import CPU_SHAPES, CUDA_SHAPES, SHAPES
from resu_compile.kernels.sparse_linear import (
    ALL_BUCKETS,
    CsrWeight,
    LaunchConfig,
    csr_pack,
    launch_config,
    next_power_of_2,
    sparse_linear,
    sparse_linear_triton,
)
from resu_compile.runtime.stopwatch import (
    capture_calls,
    copies_beyond_l2,
    device_ms,
    interleaved_ms,
    wall_ms,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
NAMES = CUDA_SHAPES if CUDA else CPU_SHAPES
ROWS = (1, 2, 4, 8, 16, 32, 64) if CUDA else (1, 4, 16, 64)
SPARSITIES = (0.5, 0.7, 0.9, 0.95) if CUDA else (0.5, 0.7, 0.9)
IMPLS = ("dense", "sparse")
# relative error of the whole result in the 2-norm: half a unit in the last place, and a little for
# the order of the sum (bf16 2**-9 + ..., fp32 K terms in another order)
MAX_ERROR = 2**-8 if CUDA else 1e-5

Call = Callable[[], Tensor]
Group = tuple[Callable[[], object], int]


def make_weight(name: str, sparsity: float) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(SHAPES[name], generator=generator, device=DEVICE)
    kept = torch.rand(SHAPES[name], generator=generator, device=DEVICE) >= sparsity
    return weight.mul_(kept).to(DTYPE)


def make_x(name: str, rows: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(rows, SHAPES[name][1], generator=generator, device=DEVICE)
    return x.to(DTYPE)


def run_sparse(x: Tensor, weight: Tensor, csr: CsrWeight) -> Tensor:
    return sparse_linear(x, weight, csr.ptr, csr.col, csr.val, None, ALL_BUCKETS)


def check(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Raise unless ``y`` is the product, by float64."""
    expected = x.double() @ weight.double().t()
    error = ((y.double() - expected).norm() / expected.norm()).item()
    assert error < MAX_ERROR, f"relative error {error:.1e}"


def rotating(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Copies of the tensors that together are beyond L2; one on the CPU."""
    if not CUDA:
        return [tensors]
    l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    size_bytes = sum(t.nbytes for t in tensors)
    return [
        tuple(t.clone() for t in tensors) for _ in range(copies_beyond_l2(size_bytes, l2_bytes))
    ]


def times_ms(groups: list[Group]) -> list[float]:
    """Milliseconds of one call of each group, all groups in turns.

    The median on CUDA, the fastest on the CPU (see ``resu_compile.runtime.measure``).
    """
    calls = tuple(run for run, _ in groups)
    if CUDA:
        samples = interleaved_ms(calls, device_ms, math.inf, 9)
        times = [statistics.median(own) for own in samples]
    else:
        times = [min(own) for own in interleaved_ms(calls, wall_ms, 0.1 * len(calls), 100)]
    return [elapsed_ms / count for elapsed_ms, (_, count) in zip(times, groups, strict=True)]


def group_of(calls: list[Call]) -> Group:
    """What runs ``calls``, and how many they are: a CUDA graph of all, or the one call."""
    return (capture_calls(calls).replay, len(calls)) if CUDA else (calls[0], 1)


# -- pytest-benchmark ------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def packed(name: str, sparsity: float) -> tuple[Tensor, CsrWeight]:
    weight = make_weight(name, sparsity)
    return weight, csr_pack(weight)


@pytest.mark.benchmark(max_time=0.1, min_rounds=5, warmup=True, warmup_iterations=3)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", ROWS, ids=lambda m: f"M{m}")
@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: f"s{s:.0%}")
@pytest.mark.parametrize("name", NAMES)
def test_sparse_linear(benchmark, name, sparsity, rows, impl):
    benchmark.group = f"sparse_linear {name} M{rows} s{sparsity:.0%}"
    weight, csr = packed(name, sparsity)
    x = make_x(name, rows)
    calls: list[Call]
    if impl == "dense":
        calls = [functools.partial(F.linear, x, *w) for w in rotating((weight,))]
        moved_bytes = weight.nbytes
    else:
        copies = rotating((csr.ptr, csr.col, csr.val))
        calls = [functools.partial(run_sparse, x, weight, CsrWeight(*c)) for c in copies]
        moved_bytes = csr.size_bytes
    check(calls[-1](), x, weight)
    if CUDA:
        graph = capture_calls(calls)

        def run() -> None:
            graph.replay()
            torch.cuda.synchronize()
    else:
        run = calls[0]
    benchmark(run)
    seconds = benchmark.stats.stats.median / len(calls)
    benchmark.extra_info["us per product"] = seconds * 1e6
    benchmark.extra_info["weight GB/s"] = moved_bytes / seconds / 1e9


# -- one table -------------------------------------------------------------------------------
def dense_groups(x: Tensor, copies: list[list[Tensor]]) -> list[Group]:
    """The dense product by cuBLAS and by cuBLASLt, for each way the weight is stored."""
    calls = [[functools.partial(F.linear, x, w) for w in weights] for weights in copies]
    if not CUDA:
        return [group_of(own) for own in calls]
    preferred = torch.backends.cuda.preferred_blas_library()
    groups = []
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        groups += [group_of(own) for own in calls]
    torch.backends.cuda.preferred_blas_library(preferred)
    return groups


def table_rows(name: str) -> Iterator[list[object]]:
    dense = make_weight(name, 0.0)
    dense_copies = [[w for (w,) in rotating((dense,))]]  # (N, K) in memory
    if CUDA:  # and (K, N); on the CPU it makes no difference
        dense_copies.append([w.t() for (w,) in rotating((dense.t().contiguous(),))])
    pruned = [make_weight(name, sparsity) for sparsity in SPARSITIES]
    packs = [csr_pack(weight) for weight in pruned]
    copies = [[CsrWeight(*c) for c in rotating((csr.ptr, csr.col, csr.val))] for csr in packs]
    dense_us, speedups = [], []
    for rows in ROWS:
        x = make_x(name, rows)
        groups = dense_groups(x, dense_copies)
        candidates = len(groups)
        for weight, csrs in zip(pruned, copies, strict=True):
            check(run_sparse(x, weight, csrs[-1]), x, weight)
            groups.append(group_of([functools.partial(run_sparse, x, weight, c) for c in csrs]))
        times = times_ms(groups)
        best = min(times[:candidates])
        dense_us.append(f"{best * 1e3:.1f}")
        speedups.append([f"{best / elapsed_ms:.2f}x" for elapsed_ms in times[candidates:]])
    out_features, in_features = SHAPES[name]
    yield [f"{name} {out_features}x{in_features}", "dense, us", DTYPE.itemsize, *dense_us]
    for i, (sparsity, csr) in enumerate(zip(SPARSITIES, packs, strict=True)):
        bytes_per_weight = f"{csr.size_bytes / dense.numel():.2f}"
        yield ["", f"{sparsity:.0%}", bytes_per_weight, *(column[i] for column in speedups)]


def print_table() -> None:
    started = time.perf_counter()
    rows = [row for name in NAMES for row in table_rows(name)]
    print(f"speed-up of sparse_linear over the best dense product, {describe_device()}")
    print(tabulate(rows, headers=["weight", "sparsity", "B/weight", *(f"M={m}" for m in ROWS)]))
    print(f"took {time.perf_counter() - started:.0f} s")


def describe_device() -> str:
    if CUDA:
        where = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{where}, {str(DTYPE).removeprefix('torch.')}, torch {torch.__version__}"


# -- tile sizes ------------------------------------------------------------------------------
def candidates(rows: int) -> Iterator[LaunchConfig]:
    block_m = min(next_power_of_2(rows), 32)
    vector_choices = (True, False) if rows > 1 else (True,)
    for block_e, num_warps, vector_loads in itertools.product(
        (32, 64, 128, 256, 512, 1024), (1, 2, 4), vector_choices
    ):
        if 8 <= block_e * block_m // (32 * num_warps) <= 32:
            yield LaunchConfig(block_e, block_m, num_warps, vector_loads)


def print_tuning() -> None:
    """Time of ``launch_config``'s choice and of the three best tile sizes, at 70 %."""
    if not CUDA:
        raise SystemExit("--tune: expected an NVIDIA GPU, found none")
    table = []
    for name, rows in itertools.product(NAMES[:3], (1, 4, 8, 16)):
        weight, x = make_weight(name, 0.7), make_x(name, rows)
        csr = csr_pack(weight)
        copies = rotating((csr.ptr, csr.col, csr.val))
        default = launch_config(rows, csr.val.numel(), weight.shape[0])
        configs = list({default, *candidates(rows)})
        groups = []
        for config in configs:
            calls = [
                functools.partial(sparse_linear_triton, x, *c, None, config=config) for c in copies
            ]
            check(calls[0](), x, weight)
            groups.append(group_of(calls))
        us = dict(zip(configs, (t * 1e3 for t in times_ms(groups)), strict=True))
        best = sorted(us, key=us.__getitem__)[:3]
        table.append([name, rows, *(f"{us[c]:.1f} us {short(c)}" for c in (default, *best))])
    print(tabulate(table, headers=["weight", "M", "default", "best", "second", "third"]))


def short(config: LaunchConfig) -> str:
    vector = "v" if config.vector_loads else ""
    return f"e{config.block_e} m{config.block_m} w{config.num_warps}{vector}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print one table of speed-ups")
    parser.add_argument("--tune", action="store_true", help="print times of Triton tile sizes")
    arguments = parser.parse_args()
    if not (arguments.table or arguments.tune):
        parser.error("expected --table or --tune")
    if arguments.table:
        print_table()
    if arguments.tune:
        print_tuning()


if __name__ == "__main__":
    main()
