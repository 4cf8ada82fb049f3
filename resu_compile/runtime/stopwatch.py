"""Times of the dense and the sparse linear layer, taken now, on random data.

On the CPU the time of a call. On CUDA either the time on the device, in a CUDA graph
(``cuda_graphs=True``), or the time of calls that Python launches one after the other, which is
what a model without CUDA graphs pays. Copies of the weight that together exceed L2 take turns.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from resu_compile.kernels.sparse_linear import ALL_BUCKETS, CsrWeight, csr_pack

logger = logging.getLogger(__name__)

MARGIN = 0.95  # of the dense time: two runs of one measurement differ by less than 5 %

# What bounds one measurement on the CPU to about 0.2 s on 2 cores (200 GFLOP/s, 25 GB/s): a weight
# with more work or bytes is measured on its first rows, and the time scaled up.
CPU_BUDGET_S = 0.1
CPU_MAX_FLOP = 4e9
CPU_MAX_BYTES = 2**28
CPU_MIN_ROWS = 256
MIN_REPEATS, MAX_REPEATS = 3, 50

CUDA_REPEATS = 9
CUDA_MAX_COPIES = 64


@dataclass(frozen=True)
class LinearTimes:
    """Times of one product, both NaN where it could not be measured.

    The median of the repeats on CUDA, the fastest on the CPU.

    Attributes:
        dense_ms: milliseconds of ``F.linear`` on the dense weight.
        sparse_ms: milliseconds of the op ``sparse_linear`` on its sparse path.
    """

    dense_ms: float
    sparse_ms: float

    @property
    def sparse_is_faster(self) -> bool:
        """Whether sparse takes under 95 % of the dense time, a margin for noise; False for NaN."""
        return self.sparse_ms < MARGIN * self.dense_ms


NOT_MEASURED = LinearTimes(math.nan, math.nan)


def measure_linear(
    device: torch.device,
    out_features: int,
    in_features: int,
    sparsity: float,
    dtype: torch.dtype,
    rows: int,
    *,
    cuda_graphs: bool,
) -> LinearTimes:
    """Measure both products once; about 0.2 s.

    Args:
        device: where the product runs.
        out_features: N, at least 1.
        in_features: K, at least 1.
        sparsity: share of the weight that is pruned, in [0, 1].
        dtype: dtype of x, weight and result.
        rows: rows of x.
        cuda_graphs: on CUDA, time on the device alone; else launches from Python included.

    Raises:
        RuntimeError, MemoryError: whatever the device raises, out of memory among it.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        # The caller may be a compiler: its fake tensors, tracing modes and autocast are not ours.
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            times = _measure_cuda(
                device, out_features, in_features, sparsity, dtype, rows, cuda_graphs
            )
        else:
            times = _measure_cpu(device, out_features, in_features, sparsity, dtype, rows)
    logger.debug(
        "%s %dx%d %.0f%% %d rows %s: dense %.4f ms, sparse %.4f ms, measured in %.2f s",
        device,
        out_features,
        in_features,
        100 * sparsity,
        rows,
        dtype,
        times.dense_ms,
        times.sparse_ms,
        time.perf_counter() - started,
    )
    return times


def _sample(
    out_features: int, in_features: int, sparsity: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, CsrWeight]:
    """A random weight (N, K) of that sparsity and its row storage.

    One block of rows is made and packed, then repeated: quick, and as irregular as a whole one.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (min(out_features, max(16, 2**20 // in_features)), in_features)
    kept = torch.rand(shape, generator=generator, device=device) >= sparsity
    block = torch.rand(shape, generator=generator, device=device).sub_(0.5).mul_(kept).to(dtype)
    csr = csr_pack(block, kept)
    repeats = -(-out_features // shape[0])
    entries = csr.val.numel()
    starts = torch.arange(repeats, dtype=torch.int32, device=device) * entries
    ptr = (starts[:, None] + csr.ptr[:-1]).flatten()  # (repeats * rows of the block,), int32
    ptr = F.pad(ptr, (0, 1), value=repeats * entries)[: out_features + 1]
    total = int(ptr[-1])
    col, val = csr.col.repeat(repeats)[:total], csr.val.repeat(repeats)[:total]
    weight = block.repeat(repeats, 1)[:out_features]  # (N, K)
    return weight, CsrWeight(ptr, col, val)


def _sparse(x: Tensor, weight: Tensor, csr: CsrWeight) -> Tensor:
    result: Tensor = torch.ops.resu_compile.sparse_linear.default(
        x, weight, csr.ptr, csr.col, csr.val, None, ALL_BUCKETS
    )
    return result


def _measure_cpu(
    device: torch.device,
    out_features: int,
    in_features: int,
    sparsity: float,
    dtype: torch.dtype,
    rows: int,
) -> LinearTimes:
    most = min(
        CPU_MAX_FLOP / (2 * rows * in_features), CPU_MAX_BYTES / (dtype.itemsize * in_features)
    )
    measured = min(out_features, max(int(most), CPU_MIN_ROWS))
    weight, csr = _sample(measured, in_features, sparsity, dtype, device)
    x = torch.full((rows, in_features), 0.5, dtype=dtype, device=device)
    calls = (lambda: F.linear(x, weight), lambda: _sparse(x, weight, csr))
    samples = interleaved_ms(calls, wall_ms, CPU_BUDGET_S, MAX_REPEATS)
    # The fastest, not the median: other programs on the same cores only ever add time. With both
    # of 2 cores taken, fp32 4096x4096 at 90 % and 1 row: median 5.2 ms, fastest 0.6, idle 0.3.
    dense_ms, sparse_ms = (min(own) * out_features / measured for own in samples)
    return LinearTimes(dense_ms, sparse_ms)


def wall_ms(call: Callable[[], object]) -> float:
    """Milliseconds until ``call`` returns."""
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def _measure_cuda(
    device: torch.device,
    out_features: int,
    in_features: int,
    sparsity: float,
    dtype: torch.dtype,
    rows: int,
    cuda_graphs: bool,
) -> LinearTimes:
    weight, csr = _sample(out_features, in_features, sparsity, dtype, device)
    x = torch.full((rows, in_features), 0.5, dtype=dtype, device=device)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    weights = [weight.clone() for _ in range(copies_beyond_l2(weight.nbytes, l2_bytes))]
    csrs = [
        CsrWeight(csr.ptr.clone(), csr.col.clone(), csr.val.clone())
        for _ in range(copies_beyond_l2(csr.size_bytes, l2_bytes))
    ]
    dense = [functools.partial(F.linear, x, w) for w in weights]
    sparse = [functools.partial(_sparse, x, weight, c) for c in csrs]
    runs: tuple[Callable[[], object], ...]
    if cuda_graphs:
        runs = (capture_calls(dense).replay, capture_calls(sparse).replay)
    else:
        runs = (functools.partial(_call_all, dense), functools.partial(_call_all, sparse))
    samples = interleaved_ms(runs, device_ms, math.inf, CUDA_REPEATS)
    dense_ms, sparse_ms = map(statistics.median, samples)
    return LinearTimes(dense_ms / len(dense), sparse_ms / len(sparse))


def _call_all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def copies_beyond_l2(size_bytes: int, l2_bytes: int) -> int:
    """Copies that together are twice L2, so that none is still there at its next turn."""
    return min(2 * l2_bytes // max(size_bytes, 1) + 2, CUDA_MAX_COPIES)


def capture_calls(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of ``calls`` in a row: their time on the device, without launching them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernel and sets up cuBLAS before the capture
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # thread_local: another thread (a data loader pinning memory) may go on calling CUDA
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for call in calls:
            call()
    return graph


def device_ms(call: Callable[[], object]) -> float:
    """Milliseconds that the current stream spends on what ``call`` launches."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def interleaved_ms(
    calls: tuple[Callable[[], object], ...],
    clock: Callable[[Callable[[], object]], float],
    budget_s: float,
    most: int,
) -> list[list[float]]:
    """Times of each call, taken in turns so that a drift of the clocks meets all alike.

    Args:
        calls: what to time; each runs once more before, untimed.
        clock: ``wall_ms`` or ``device_ms``.
        budget_s: seconds after which no further repeat starts; 3 are made in any case.
        most: repeats at most.

    Returns:
        Milliseconds of every repeat, one list for each call.
    """
    for call in calls:
        call()  # warm-up
    samples: list[list[float]] = [[] for _ in calls]
    deadline = time.perf_counter() + budget_s
    for repeat in range(most):
        if repeat >= MIN_REPEATS and time.perf_counter() > deadline:
            break
        for call, own in zip(calls, samples, strict=True):
            own.append(clock(call))
    return samples
