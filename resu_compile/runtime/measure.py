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
import tempfile
import threading
from pathlib import Path
from typing import Any, Literal

import torch

from resu_compile.errors import ArgumentError, check_number
from resu_compile.kernels import sparse_linear as kernels
from resu_compile.kernels.sparse_linear import (
    ALL_BUCKETS,
    BUCKET_ROWS,
    MAX_ENTRIES,
    batch_bucket,
    has_sparse_path,
)
from resu_compile.runtime.stopwatch import NOT_MEASURED, LinearTimes, measure_linear

logger = logging.getLogger(__name__)

FORMAT = "resu_compile linear times"
VERSION = 1

MIN_SPARSITY = 0.4  # below, the entries with their columns are as many bytes as the dense weight
MIN_NUMEL = 64 * 64  # below, either product is shorter than the call that starts it
DYNAMIC_ROWS = 256  # the largest batch that is measured for where the batch size is not known


# -- the question a caller asks --------------------------------------------------------------
def sparse_buckets(
    device: torch.device,
    out_features: int,
    in_features: int,
    sparsity: float,
    dtype: torch.dtype,
    rows: int | None,
    threshold: float | Literal["auto"],
    *,
    cuda_graphs: bool = False,
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
        cuda_graphs: whether the product will be replayed in a CUDA graph; without one, launching
            the sparse op from Python is part of its time.

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
        forced = least < 1.0 and sparsity >= least
        possible = _can_be_sparse(device, out_features, in_features, dtype)
        return ALL_BUCKETS if forced and possible else 0
    if sparsity < MIN_SPARSITY or out_features * in_features < MIN_NUMEL:
        return 0
    if rows is not None:
        wanted = [batch_bucket(rows)]
    else:
        wanted = [i for i, count in enumerate(BUCKET_ROWS) if count <= DYNAMIC_ROWS]
    faster = 0
    for bucket in wanted:
        times = linear_times(
            device,
            out_features,
            in_features,
            sparsity,
            dtype,
            BUCKET_ROWS[bucket],
            cuda_graphs=cuda_graphs,
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
    *,
    cuda_graphs: bool = False,
) -> LinearTimes:
    """Times of both products for one shape: from memory, else from disk, else measured now.

    Rows count as the row count that stands for their bucket (``BUCKET_ROWS``), sparsity as its
    nearest hundredth, 0.99 at most. Measuring takes about 0.2 s, touches neither the global random
    state nor the modes of a compilation under way, and launches nothing while the current stream
    is being captured.

    Args:
        device: where the product runs.
        out_features: N, at least 1.
        in_features: K, at least 1.
        sparsity: share of the weight that is pruned, in [0, 1].
        dtype: dtype of x, weight and result.
        rows: rows of x.
        cuda_graphs: on CUDA, time on the device alone; else launches from Python included.

    Returns:
        The times; NaN, which counts as dense, where the device has no sparse kernel for ``dtype``,
        the weight is too large for one or empty, memory ran out, or the stream is being captured
        and nothing is known yet.
    """
    if not _can_be_sparse(device, out_features, in_features, dtype):
        return NOT_MEASURED
    bucket = batch_bucket(rows)
    share = min(round(sparsity, 2), 0.99)
    key = _key(device, out_features, in_features, bucket, dtype, share, cuda_graphs)
    with _cache.lock:  # also: two measurements at a time would disturb each other
        known = _cache.get(key)
        if known is not None:
            return known
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return NOT_MEASURED
        try:
            times = measure_linear(
                device,
                out_features,
                in_features,
                share,
                dtype,
                BUCKET_ROWS[bucket],
                cuda_graphs=cuda_graphs,
            )
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning("%s: no memory to measure the sparse kernel, dense it is", key)
            times = NOT_MEASURED
        _cache.put(key, times)
        return times


def _can_be_sparse(
    device: torch.device, out_features: int, in_features: int, dtype: torch.dtype
) -> bool:
    # a weight of 2**31 elements: its entries might not be countable in int32
    return 0 < out_features * in_features < MAX_ENTRIES and has_sparse_path(device, dtype)


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
        return self._path or Path(torch.hub.get_dir()).parent / "resu_compile" / "linear_times.json"

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
    cuda_graphs: bool,
) -> str:
    if device.type == "cuda":
        launch = "graph" if cuda_graphs else "calls"
    else:
        launch = f"{torch.get_num_threads()} threads"
    return "|".join(
        (
            _device_name(device),
            f"torch {torch.__version__}",
            launch,
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


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)  # the CPU allocator raises a plain RuntimeError
    return "not enough memory" in text or "can't allocate memory" in text
