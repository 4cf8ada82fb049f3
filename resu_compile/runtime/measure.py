"""Times of the dense and the sparse linear layer on this machine, measured once and kept on disk.

``sparse_threshold="auto"`` asks ``sparse_buckets``, which sets a bit for each range of batch sizes
in which ``resu_compile::sparse_linear`` ran faster than ``F.linear``.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from resu_compile.errors import ArgumentError, check_number
from resu_compile.kernels import sparse_linear as kernels
from resu_compile.kernels.sparse_linear import (
    ALL_BUCKETS,
    BUCKET_ROWS,
    CsrWeight,
    batch_bucket,
    csr_pack,
    has_sparse_path,
)

logger = logging.getLogger(__name__)

FORMAT = "resu_compile linear times"
VERSION = 1

MARGIN = 0.95  # of the dense time: two runs of one measurement differ by less than 5 %
MIN_SPARSITY = 0.4  # below, the entries with their columns are as many bytes as the dense weight
MIN_NUMEL = 64 * 64  # below, either product is shorter than the call that starts it
DYNAMIC_ROWS = 256  # the largest batch that is measured for where the batch size is not known

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


# -- the question a caller asks --------------------------------------------------------------
def sparse_buckets(
    device: torch.device,
    out_features: int,
    in_features: int,
    sparsity: float,
    dtype: torch.dtype,
    rows: int | None,
    threshold: float | Literal["auto"],
) -> int:
    """Bit mask of the batch buckets that should take the sparse kernel; 0 means always dense.

    Args:
        device: where the product runs.
        out_features: N, rows of the weight.
        in_features: K, columns of the weight.
        sparsity: share of the weight that is pruned, in [0, 1].
        dtype: dtype of the computation (under autocast: the autocast dtype).
        rows: rows of x, or None where they change from call to call; then the buckets up to 256
            rows are measured.
        threshold: a number takes the sparse kernel at every batch size from that sparsity on, and
            1.0 turns it off; ``"auto"`` takes it where it measured faster, and never for weights
            under 40 % sparsity or with fewer than 64 * 64 elements, which are not measured.

    Raises:
        ArgumentError: if ``threshold`` is neither ``"auto"`` nor a number in [0, 1].
    """
    expected = "'auto' or a number in [0, 1]"
    if isinstance(threshold, str) and threshold != "auto":
        raise ArgumentError(f"sparse_threshold: expected {expected}, got {threshold!r}")
    if threshold != "auto":
        least = check_number(
            threshold, name="sparse_threshold", minimum=0.0, maximum=1.0, expected=expected
        )
        forced = least < 1.0 and sparsity >= least and has_sparse_path(device, dtype)
        return ALL_BUCKETS if forced else 0
    if sparsity < MIN_SPARSITY or out_features * in_features < MIN_NUMEL:
        return 0
    if rows is not None:
        wanted = [batch_bucket(rows)]
    else:
        wanted = [i for i, count in enumerate(BUCKET_ROWS) if count <= DYNAMIC_ROWS]
    faster = 0
    for bucket in wanted:
        times = linear_times(
            device, out_features, in_features, sparsity, dtype, BUCKET_ROWS[bucket]
        )
        faster |= times.sparse_is_faster << bucket
    return faster


def linear_times(
    device: torch.device,
    out_features: int,
    in_features: int,
    sparsity: float,
    dtype: torch.dtype,
    rows: int,
) -> LinearTimes:
    """Times of both products for one shape: from memory, else from disk, else measured now.

    Rows count as the row count that stands for their bucket (``BUCKET_ROWS``), sparsity as its
    nearest hundredth, 0.99 at most. On the CPU the time of a call, with its overhead, caches as
    warm as alternating calls leave them; on CUDA the time on the device, in a CUDA graph over
    copies of the weight that together exceed L2. Measuring takes about 0.2 s, touches neither
    the global random state nor the modes of a compilation under way, and launches nothing while the
    current stream is being captured.

    Args:
        device: where the product runs.
        out_features: N, at least 1.
        in_features: K, at least 1.
        sparsity: share of the weight that is pruned, in [0, 1].
        dtype: dtype of x, weight and result.
        rows: rows of x.

    Returns:
        The times; NaN, which counts as dense, where the device has no sparse kernel for ``dtype``,
        memory ran out, or the stream is being captured and nothing is known yet.
    """
    if out_features < 1 or in_features < 1 or not has_sparse_path(device, dtype):
        return NOT_MEASURED
    bucket = batch_bucket(rows)
    share = min(round(sparsity, 2), 0.99)
    key = _key(device, out_features, in_features, bucket, dtype, share)
    with _cache.lock:  # also: two measurements at a time would disturb each other
        known = _cache.get(key)
        if known is not None:
            return known
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return NOT_MEASURED
        try:
            times = _measure(device, out_features, in_features, share, dtype, BUCKET_ROWS[bucket])
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning("%s: no memory to measure the sparse kernel, dense it is", key)
            times = NOT_MEASURED
        _cache.put(key, times)
        return times


def set_cache_path(path: str | os.PathLike[str] | None) -> None:
    """Keep times in the file ``path`` from now on; None goes back to the user's cache folder."""
    _cache.move(Path(path) if path is not None else None)


def clear_cache() -> None:
    """Forget every time, in memory and on disk."""
    _cache.clear()


# -- the cache -------------------------------------------------------------------------------
class _Cache:
    """Key -> times, in memory and in one JSON file that processes share.

    The file is replaced as a whole, so a reader never sees half of it. Two writers at the same
    moment may lose one entry, which is then measured again.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._path: Path | None = None
        self._times: dict[str, LinearTimes] = {}
        self._is_read = False

    @property
    def path(self) -> Path:
        """The file; its folder is made by the first write."""
        return self._path or platformdirs.user_cache_path("resu_compile") / "linear_times.json"

    def get(self, key: str) -> LinearTimes | None:
        if not self._is_read:
            self._times = self._read() | self._times
            self._is_read = True
        return self._times.get(key)

    def put(self, key: str, times: LinearTimes) -> None:
        self._times[key] = times
        if math.isnan(times.dense_ms):
            return  # memory may be there next time
        merged = self._read() | self._times
        entries = {k: (t.dense_ms, t.sparse_ms) for k, t in sorted(merged.items())}
        entries = {k: pair for k, pair in entries.items() if not math.isnan(pair[0])}
        content = {"format": FORMAT, "version": VERSION, "times_ms": entries}
        try:
            _replace_file(self.path, json.dumps(content, indent=0))
        except OSError as error:
            logger.warning("%s: cannot keep measured times there: %s", self.path, error)

    def move(self, path: Path | None) -> None:
        with self.lock:
            self._path, self._times, self._is_read = path, {}, False

    def clear(self) -> None:
        with self.lock:
            self._times, self._is_read = {}, True
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s: cannot remove it: %s", self.path, error)

    def _read(self) -> dict[str, LinearTimes]:
        try:
            return _parse(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:  # ValueError: no UTF-8, no JSON, not ours
            logger.warning("%s: not usable, will be rebuilt: %s", self.path, error)
            return {}


def _parse(text: str) -> dict[str, LinearTimes]:
    content: Any = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected a JSON object of format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise ValueError(f"expected version {VERSION}, got {content.get('version')!r}")
    entries = content.get("times_ms")
    if not isinstance(entries, dict):
        raise ValueError(f"expected an object times_ms, got {type(entries).__name__}")
    times = {}
    for key, pair in entries.items():
        match pair:
            case [int() | float() as dense_ms, int() | float() as sparse_ms] if math.isfinite(
                dense_ms
            ) and math.isfinite(sparse_ms):
                times[key] = LinearTimes(float(dense_ms), float(sparse_ms))
            case _:
                raise ValueError(f"expected two numbers at {key!r}, got {pair!r}")
    return times


def _replace_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


_cache = _Cache()


def _key(
    device: torch.device,
    out_features: int,
    in_features: int,
    bucket: int,
    dtype: torch.dtype,
    sparsity: float,
) -> str:
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return "|".join(
        (
            _device_name(device),
            f"torch {torch.__version__}",
            f"{threads} threads",
            f"{out_features}x{in_features}",
            f"{BUCKET_ROWS[bucket]} rows",
            str(dtype).removeprefix("torch."),
            f"{sparsity:.2f}",
            _kernel_hash(),
        )
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


@functools.cache
def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def _kernel_hash() -> str:
    """Eight hex digits of the kernel's source: times of another kernel say nothing of this one."""
    try:
        source = inspect.getsource(kernels)
    except OSError:  # installed without sources
        source = ""
    return hashlib.sha256(source.encode()).hexdigest()[:8]


# -- the stopwatch ---------------------------------------------------------------------------
def _measure(
    device: torch.device,
    out_features: int,
    in_features: int,
    sparsity: float,
    dtype: torch.dtype,
    rows: int,
) -> LinearTimes:
    started = time.perf_counter()
    with ExitStack() as stack:
        # The caller may be a compiler: its fake tensors, tracing modes and autocast are not ours.
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            times = _measure_cuda(device, out_features, in_features, sparsity, dtype, rows)
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
    ptr = (starts[:, None] + csr.ptr[:-1]).flatten()  # (repeats * rows of the block,)
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
    samples = _interleaved_ms(calls, _wall_ms, CPU_BUDGET_S, MAX_REPEATS)
    # The fastest, not the median: other programs on the same cores only ever add time. With both
    # of 2 cores taken, fp32 4096x4096 at 90 % and 1 row: median 5.2 ms, fastest 0.6, idle 0.3.
    dense_ms, sparse_ms = (min(own) * out_features / measured for own in samples)
    return LinearTimes(dense_ms, sparse_ms)


def _wall_ms(call: Callable[[], object]) -> float:
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
) -> LinearTimes:
    weight, csr = _sample(out_features, in_features, sparsity, dtype, device)
    x = torch.full((rows, in_features), 0.5, dtype=dtype, device=device)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    weights = [weight.clone() for _ in range(_copies(weight.nbytes, l2_bytes))]
    csrs = [
        CsrWeight(csr.ptr.clone(), csr.col.clone(), csr.val.clone())
        for _ in range(_copies(csr.size_bytes, l2_bytes))
    ]
    dense = _captured([functools.partial(F.linear, x, w) for w in weights])
    sparse = _captured([functools.partial(_sparse, x, weight, c) for c in csrs])
    replays = (dense.replay, sparse.replay)
    dense_ms, sparse_ms = map(
        statistics.median, _interleaved_ms(replays, _device_ms, math.inf, CUDA_REPEATS)
    )
    return LinearTimes(dense_ms / len(weights), sparse_ms / len(csrs))


def _copies(size_bytes: int, l2_bytes: int) -> int:
    """Copies that together are twice L2, so that none is still there at its next turn."""
    return min(2 * l2_bytes // max(size_bytes, 1) + 2, CUDA_MAX_COPIES)


def _captured(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
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


def _device_ms(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _interleaved_ms(
    calls: tuple[Callable[[], object], ...],
    clock: Callable[[Callable[[], object]], float],
    budget_s: float,
    most: int,
) -> list[list[float]]:
    """Times of each call, taken in turns so that a drift of the clocks meets all alike."""
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


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)  # the CPU allocator raises a plain RuntimeError
    return "not enough memory" in text or "can't allocate memory" in text
