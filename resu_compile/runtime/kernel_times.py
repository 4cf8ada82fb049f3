"""Times of the dense and the sparse kernels of one linear layer, taken now, on random data.

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
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from resu_compile.kernels import sparse_linear as _operator  # noqa: F401  registers the op
from resu_compile.kernels.csr_linear import CsrWeight, csr_pack
from resu_compile.kernels.packed_linear import PackedLinear, pack_linear
from resu_compile.kernels.plan import BUCKET_ROWS, Kernel
from resu_compile.runtime import stopwatch

logger = logging.getLogger(__name__)

# What bounds one measurement on the CPU to about 0.1 s a batch size on 2 cores (200 GFLOP/s,
# 25 GB/s): a weight with more work or bytes is measured on its first rows, and the time scaled up.
CPU_BUDGET_S = 0.05
CPU_MAX_FLOP = 4e9
CPU_MAX_BYTES = 2**28
CPU_MIN_ROWS = 256
CPU_MAX_REPEATS = 50

CUDA_REPEATS = 9
CUDA_MIN_CALLS = 16  # in a row: a single product is near the resolution of the events
CUDA_MAX_MS = 2.0  # in a row, so that one repeat of what takes long stays short

# Random entries drawn at once, 64 MiB in fp32: a model may fill the device while this runs.
RANDOM_AT_ONCE = 2**24

Call = Callable[[], object]
Times = dict[int, dict[Kernel, float]]  # rows of x -> kernel -> milliseconds


def measure_kernels(
    device: torch.device,
    out_features: int,
    in_features: int,
    sparsity: float,
    dtype: torch.dtype,
    wanted: Mapping[int, Collection[Kernel]],
    *,
    cuda_graphs: bool,
    pattern: tuple[int, int] | None,
    unpacked_from: Kernel,
) -> Times:
    """Measure all wanted kernels at all wanted batch sizes, those of one batch size in turns.

    The weight is made and packed once. Neither the global random state nor the modes of a
    compilation under way are touched. The median of the repeats on CUDA, the fastest on the CPU.

    Args:
        device: where the product runs.
        out_features: N, at least 1.
        in_features: K, at least 1.
        sparsity: share of the weight that is pruned, in [0, 1].
        dtype: dtype of x, weight and result.
        wanted: rows of x -> kernels.
        cuda_graphs: on CUDA, time on the device alone; else launches from Python included.
        pattern: ``(n, m)`` keeps n random entries of each m; None prunes every entry by chance.
        unpacked_from: the format that ``UNPACK`` expands.

    Returns:
        Rows of x -> kernel -> milliseconds of one product.

    Raises:
        RuntimeError, MemoryError: whatever the device raises, out of memory among it.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        # The caller may be a compiler: its fake tensors, tracing modes and autocast are not ours.
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        products = _Products(in_features, sparsity, dtype, device, pattern, unpacked_from)
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            times = _measure_cuda(products, out_features, wanted, cuda_graphs)
        else:
            times = _measure_cpu(products, out_features, wanted)
    logger.debug(
        "%s %dx%d %.0f%% %s, measured in %.2f s: %s",
        device,
        out_features,
        in_features,
        100 * sparsity,
        dtype,
        time.perf_counter() - started,
        {rows: {k.name: round(ms, 4) for k, ms in own.items()} for rows, own in times.items()},
    )
    return times


class _Products:
    """Products of one random weight by each kernel, over copies of what the kernel reads."""

    def __init__(
        self,
        in_features: int,
        sparsity: float,
        dtype: torch.dtype,
        device: torch.device,
        pattern: tuple[int, int] | None,
        unpacked_from: Kernel,
    ) -> None:
        self.in_features = in_features
        self.sparsity = sparsity
        self.dtype = dtype
        self.device = device
        self.pattern = pattern
        self.unpacked_from = unpacked_from
        self.generator = torch.Generator(device).manual_seed(0)
        self._copies: dict[tuple[int, Kernel], list[_Linear]] = {}

    def x(self, rows: int) -> Tensor:
        """A random input (rows, K)."""
        return self._random(rows)

    def calls(self, kernel: Kernel, x: Tensor, out_features: int, *, copies: bool) -> list[Call]:
        """One call of the product with each copy of the weight; one copy without ``copies``."""
        source = self.unpacked_from if kernel is Kernel.UNPACK else kernel
        linears = self._copies.get((out_features, source))
        if linears is None:
            linears = self._copies[out_features, source] = self._make(source, out_features, copies)
        return [functools.partial(linear, x, kernel) for linear in linears]

    def _make(self, source: Kernel, out_features: int, copies: bool) -> list[_Linear]:
        block = out_features
        if self.device.type == "cpu":  # quick to make, and as irregular as a whole weight
            block = min(out_features, max(16, 2**20 // self.in_features))
        self.generator.manual_seed(0)  # the same weight for every kernel
        mask = self._mask(block)
        weight = self._random(block).mul_(mask)  # (block, K)
        if source is Kernel.DENSE:
            first = _Linear.dense(_repeated(weight, out_features))
        elif source is Kernel.CSR:
            csr = _repeated_csr(csr_pack(weight, mask), out_features)
            first = _Linear.packed(PackedLinear(csr.shape, {source: csr}))
        else:
            first = _Linear.packed(pack_linear(weight, mask, (source,)))
        del weight, mask
        if not copies:
            return [first]
        l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        count = stopwatch.copies_beyond_l2(first.size_bytes, l2_bytes)
        return [first] + [first.clone() for _ in range(count - 1)]

    def _mask(self, rows: int) -> Tensor:
        """Bool, (rows, K), True = kept."""
        mask = torch.empty((rows, self.in_features), dtype=torch.bool, device=self.device)
        for part in mask.split(self._rows_at_once):
            part.copy_(self._kept(self._uniform(len(part))))
        return mask

    def _kept(self, score: Tensor) -> Tensor:
        if self.pattern is None:
            return score >= self.sparsity
        n, m = self.pattern
        groups = score.view(-1, m)
        return (groups.argsort(1).argsort(1) < n).view(score.shape)

    def _random(self, rows: int) -> Tensor:
        """(rows, K) in [-0.5, 0.5)."""
        values = torch.empty((rows, self.in_features), dtype=self.dtype, device=self.device)
        for part in values.split(self._rows_at_once):
            part.copy_(self._uniform(len(part)).sub_(0.5))
        return values

    def _uniform(self, rows: int) -> Tensor:
        shape = (rows, self.in_features)
        return torch.rand(shape, generator=self.generator, device=self.device)

    @property
    def _rows_at_once(self) -> int:
        """Rows that random numbers are drawn for."""
        return max(1, RANDOM_AT_ONCE // self.in_features)


def _repeated(block: Tensor, rows: int) -> Tensor:
    """``rows`` rows of a matrix, which start over where they end."""
    return block if len(block) == rows else block.repeat(-(-rows // len(block)), 1)[:rows]


def _repeated_csr(block: CsrWeight, rows: int) -> CsrWeight:
    """The same of a matrix that is stored by rows."""
    repeats = -(-rows // block.shape[0])
    entries = block.val.numel()
    starts = torch.arange(repeats, dtype=torch.int32, device=block.ptr.device) * entries
    ptr = (starts[:, None] + block.ptr[:-1]).flatten()  # (repeats * rows of the block,)
    ptr = F.pad(ptr, (0, 1), value=repeats * entries)[: rows + 1]
    total = int(ptr[-1])
    col, val = block.col.repeat(repeats)[:total], block.val.repeat(repeats)[:total]
    return CsrWeight(ptr, col, val, (rows, block.shape[1]))


@dataclass(frozen=True)
class _Linear:
    """One copy of a weight in the form that one kernel reads; a call is the product with it.

    Attributes:
        tensors: the dense weight alone, or what a ``PackedLinear`` consists of.
        layout: of the ``PackedLinear``; empty for the dense weight.
        shape: (N, K).
    """

    tensors: list[Tensor]
    layout: list[int]
    shape: list[int]

    @classmethod
    def dense(cls, weight: Tensor) -> _Linear:
        return cls([weight], [], list(weight.shape))

    @classmethod
    def packed(cls, packed: PackedLinear) -> _Linear:
        return cls(list(packed.tensors()), list(packed.layout), list(packed.shape))

    @property
    def size_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def clone(self) -> _Linear:
        return _Linear([t.clone() for t in self.tensors], self.layout, self.shape)

    def __call__(self, x: Tensor, kernel: Kernel) -> Tensor:
        if kernel is Kernel.DENSE:
            return F.linear(x, self.tensors[0])
        plan = [int(kernel)] * len(BUCKET_ROWS)
        result: Tensor = torch.ops.resu_compile.sparse_linear.default(
            x, None, self.tensors, self.layout, None, self.shape, plan, "none"
        )
        return result


def _measure_cpu(
    products: _Products, out_features: int, wanted: Mapping[int, Collection[Kernel]]
) -> Times:
    times: Times = {}
    for rows, kernels in wanted.items():
        in_features = products.in_features
        most = min(
            CPU_MAX_FLOP / (2 * rows * in_features),
            CPU_MAX_BYTES / (products.dtype.itemsize * in_features),
        )
        measured = min(out_features, max(int(most), CPU_MIN_ROWS))
        x = products.x(rows)
        ordered = sorted(kernels)
        calls = tuple(products.calls(k, x, measured, copies=False)[0] for k in ordered)
        samples = stopwatch.interleaved_ms(calls, stopwatch.wall_ms, CPU_BUDGET_S, CPU_MAX_REPEATS)
        # The fastest, not the median: other programs on the same cores only ever add time. With
        # both of 2 cores taken, fp32 4096x4096 at 90 % and 1 row: median 5.2 ms, fastest 0.6,
        # idle 0.3.
        times[rows] = {
            kernel: min(own) * out_features / measured
            for kernel, own in zip(ordered, samples, strict=True)
        }
    return times


def _measure_cuda(
    products: _Products,
    out_features: int,
    wanted: Mapping[int, Collection[Kernel]],
    cuda_graphs: bool,
) -> Times:
    times: Times = {}
    for rows, kernels in wanted.items():
        x = products.x(rows)
        ordered = sorted(kernels)
        runs, counts = [], []
        for kernel in ordered:
            calls = enough_calls(products.calls(kernel, x, out_features, copies=True))
            runs.append(
                stopwatch.capture_calls(calls).replay
                if cuda_graphs
                else functools.partial(_call_all, calls)
            )
            counts.append(len(calls))
        samples = stopwatch.interleaved_ms(tuple(runs), stopwatch.device_ms, math.inf, CUDA_REPEATS)
        times[rows] = {
            kernel: statistics.median(own) / count
            for kernel, own, count in zip(ordered, samples, counts, strict=True)
        }
    return times


def enough_calls(calls: list[Call]) -> list[Call]:
    """``calls`` in turns: 16 at least, but no more of them than run for 2 ms."""
    calls[0]()  # what compiles or loads at its first call
    longest = max(1, math.ceil(CUDA_MAX_MS / stopwatch.device_ms(calls[0])))
    return (calls * -(-CUDA_MIN_CALLS // len(calls)))[:longest]


def _call_all(calls: list[Call]) -> None:
    for call in calls:
        call()
