"""Times of calls: on the wall clock of the CPU, or on the device, taken in turns.

Copies of a weight that together exceed L2 let repeated products read memory, not the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

MIN_REPEATS = 3
CUDA_MAX_COPIES = 64


def wall_ms(call: Callable[[], object]) -> float:
    """Milliseconds until ``call`` returns."""
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


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
