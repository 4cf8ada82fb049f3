"""Which kernel runs a sparse linear layer at which batch size, chosen by measured times.

    plan.kernels[batch_bucket(rows of x)] is the kernel that runs

``sparse_threshold="auto"`` takes what measured fastest on this device for this shape, sparsity and
dtype; a number forces the sparse kernels from that sparsity on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from resu_compile.errors import ArgumentError, check_number
from resu_compile.kernels.packed_linear import default_format
from resu_compile.kernels.plan import BUCKET_ROWS, Kernel, batch_bucket
from resu_compile.runtime import kernel_times, plan_cache
from resu_compile.runtime.kernel_choice import (
    MARGINS,
    TILES_MOST,
    WITHOUT_FORMAT,
    candidates_of,
    fastest,
    formats_of,
    smallest_batch,
    uncertain,
    worthwhile,
)

logger = logging.getLogger(__name__)

MIN_SPARSITY = 0.4  # below, the entries with their places are about as many bytes as the weight
MIN_NUMEL = 64 * 64  # below, either product is shorter than the call that starts it
DYNAMIC_ROWS = 256  # the largest batch that is measured for where the batch size is not known

FORCED_ROWS_MOST, FORCED_ROWS_SPARSITY = 4, 0.8

PACKING_OVERHEAD = 1.14  # bitmap tiles at K = 1024: padding to the longest stream of a tile


@dataclass(frozen=True)
class Plan:
    """The kernel of every batch bucket, and what the choice rests on.

    Attributes:
        kernels: one kernel for each of ``BUCKET_ROWS``.
        times_ms: bucket -> kernel -> measured milliseconds of one product; empty if the choice
            rests on no measurement.
        source: where the times come from (``"measured"``, ``"cache"``, ``"shipped"`` or several of
            them), else why there are none.
        unpacked_from: the format that ``UNPACK`` expands where the plan needs no other.
    """

    kernels: tuple[Kernel, ...]
    times_ms: Mapping[int, Mapping[Kernel, float]] = field(default_factory=dict)
    source: str = ""
    unpacked_from: Kernel = Kernel.TILES

    def __post_init__(self) -> None:
        if len(self.kernels) != len(BUCKET_ROWS):
            raise ArgumentError(
                f"kernels: expected one for each of the {len(BUCKET_ROWS)} batch buckets, "
                f"got {len(self.kernels)}"
            )
        if self.unpacked_from in WITHOUT_FORMAT:
            raise ArgumentError(
                f"unpacked_from: expected a kernel with a packed format, got "
                f"{self.unpacked_from.name}"
            )
        object.__setattr__(self, "kernels", tuple(Kernel(kernel) for kernel in self.kernels))
        object.__setattr__(self, "times_ms", {b: dict(t) for b, t in sorted(self.times_ms.items())})

    @property
    def is_dense(self) -> bool:
        """Whether the dense product runs at every batch size, so that nothing is packed."""
        return all(kernel is Kernel.DENSE for kernel in self.kernels)

    @property
    def needed(self) -> frozenset[Kernel]:
        """The kernels whose packed formats the plan reads."""
        formats = frozenset(self.kernels) - WITHOUT_FORMAT
        if not formats and Kernel.UNPACK in self.kernels:
            return frozenset({self.unpacked_from})
        return formats


def choose_plan(
    device: torch.device,
    out_features: int,
    in_features: int,
    sparsity: float,
    dtype: torch.dtype,
    rows: int | None,
    threshold: float | Literal["auto"],
    *,
    cuda_graphs: bool = False,
    release_dense: bool = False,
    pattern: tuple[int, int] | None = None,
) -> Plan:
    """The plan of one weight.

    The rule of ``"auto"``: at each batch size the fastest of the kernels whose formats are packed,
    where one beats the dense product by more than the margin (3 % on CUDA, 5 % on the CPU). Where
    the batch size changes, each bucket is measured at its largest one, and at its smallest too if a
    kernel wins at the one and might lose at the other.
    A format is packed only if without it some batch size would take longer by more than the
    margin. Weights under 40 % sparsity or with fewer than 64 * 64 elements stay dense unmeasured.

    Args:
        device: where the product runs.
        out_features: N, rows of the weight.
        in_features: K, columns of the weight.
        sparsity: share of the weight that is pruned, in [0, 1].
        dtype: dtype of the computation (under autocast: the autocast dtype).
        rows: rows of x, at which all kernels are measured; or None where they change from call to
            call: then the buckets up to 256 rows are measured, on the CPU and for 2:4 all of them.
        threshold: ``"auto"``, or a number that forces the sparse kernels from that sparsity on:
            on CUDA ``ROWS`` up to 4 rows from 80 % on, else ``TILES`` up to 64 rows, on the CPU
            ``CSR`` at any; 1.0 turns them off.
        cuda_graphs: whether the product will be replayed in a CUDA graph; without one, launching
            the op from Python is part of its time.
        release_dense: whether the dense weight will be freed: ``UNPACK`` stands for ``DENSE``
            wherever packing saves memory.
        pattern: ``(n, m)`` if at most n of each m entries along K are kept; ``(2, 4)`` and all
            that imply it, ``(1, 4)`` say, allow ``SEMI``.

    Raises:
        ArgumentError: if ``threshold`` is neither ``"auto"`` nor a number in [0, 1].
    """
    least = _least_sparsity(threshold)
    formats = formats_of(device, out_features, in_features, dtype, pattern)
    case = _Case(
        device, out_features, in_features, sparsity, dtype, rows, cuda_graphs, release_dense,
        pattern if Kernel.SEMI in formats else None,
    )  # fmt: skip
    if not formats:
        return case.constant("not measured: no sparse kernel for this device, dtype and size")
    if least is not None:
        if least == 1.0:
            return case.constant("sparse_threshold=1.0 turns the sparse kernels off")
        if sparsity < least:
            return case.constant(f"sparsity {sparsity:.2%} is under sparse_threshold={threshold}")
        return case.forced(formats, f"forced by sparse_threshold={threshold}")
    if out_features * in_features < MIN_NUMEL:
        return case.constant("not measured: fewer than 64 * 64 elements")
    if sparsity < MIN_SPARSITY:
        return case.constant(f"not measured: less than {MIN_SPARSITY:.0%} pruned")
    return case.measured()


def _least_sparsity(threshold: float | Literal["auto"]) -> float | None:
    expected = "'auto' or a number in [0, 1]"
    if isinstance(threshold, str):
        if threshold != "auto":
            raise ArgumentError(f"sparse_threshold: expected {expected}, got {threshold!r}")
        return None
    return check_number(
        threshold, name="sparse_threshold", minimum=0.0, maximum=1.0, expected=expected
    )


@dataclass(frozen=True)
class _Case:
    """One call of ``choose_plan``."""

    device: torch.device
    out_features: int
    in_features: int
    sparsity: float
    dtype: torch.dtype
    rows: int | None
    cuda_graphs: bool
    release_dense: bool
    pattern: tuple[int, int] | None

    @property
    def base(self) -> Kernel:
        """What runs where no sparse kernel does."""
        return Kernel.UNPACK if self.can_release else Kernel.DENSE

    @property
    def packed_for_unpack(self) -> Kernel:
        """The format that ``UNPACK`` expands."""
        return default_format(self.device)

    @property
    def can_release(self) -> bool:
        """Whether the packed form replaces the dense weight, being smaller."""
        large = self.out_features * self.in_features >= MIN_NUMEL
        return self.release_dense and large and bool(self.formats()) and self._saves_memory()

    def _saves_memory(self) -> bool:
        size, kept = self.dtype.itemsize, 1.0 - self.sparsity
        if self.packed_for_unpack is Kernel.CSR:
            return kept * (size + 4) < size
        return kept * size * PACKING_OVERHEAD + 1 / 8 < size

    def formats(self) -> tuple[Kernel, ...]:
        """The sparse kernels that this device has for the dtype and size."""
        return formats_of(
            self.device, self.out_features, self.in_features, self.dtype, self.pattern
        )

    def batches(self) -> tuple[int, ...]:
        """The rows of x that a choice is made for."""
        if self.rows is not None:
            return (max(self.rows, 1),)
        # where a kernel gains at 256 rows it does at any more: the CPU's, and that of 2:4
        few = self.device.type == "cuda" and self.pattern is None
        return tuple(rows for rows in BUCKET_ROWS if rows <= DYNAMIC_ROWS or not few)

    def plan(
        self,
        chosen: Mapping[int, Kernel],
        source: str,
        times: Mapping[int, Mapping[Kernel, float]] | None = None,
    ) -> Plan:
        """``chosen`` by bucket, the base kernel in every other."""
        kernels = tuple(chosen.get(i, self.base) for i in range(len(BUCKET_ROWS)))
        return Plan(kernels, times or {}, source, self.packed_for_unpack)

    def constant(self, why: str) -> Plan:
        """The base kernel in every bucket."""
        return self.plan({}, why)

    def forced(self, formats: tuple[Kernel, ...], why: str) -> Plan:
        """The kernel that a rule of thumb gives, in every bucket in question."""
        buckets = range(len(BUCKET_ROWS)) if self.rows is None else (batch_bucket(self.rows),)
        chosen = {}
        for bucket in buckets:
            rows = BUCKET_ROWS[bucket]
            if formats == (Kernel.CSR,):
                chosen[bucket] = Kernel.CSR
            elif rows <= FORCED_ROWS_MOST and self.sparsity >= FORCED_ROWS_SPARSITY:
                chosen[bucket] = Kernel.ROWS
            elif rows <= TILES_MOST:
                chosen[bucket] = Kernel.TILES
        return self.plan(chosen, why)

    def measured(self) -> Plan:
        """The fastest kernels, by times that are known or taken now."""
        formats = self.formats()
        wanted = {
            rows: candidates_of(formats, rows, self.dtype) | {self.base} for rows in self.batches()
        }
        wanted = {rows: own for rows, own in wanted.items() if len(own) > 1}
        if not wanted:
            return self.constant(f"not measured: no sparse kernel for {self.rows} rows of x")
        by_rows, sources = self._times(wanted)
        times = {
            batch_bucket(rows): {kernel: own[kernel] for kernel in own if kernel in wanted[rows]}
            for rows, own in by_rows.items()
        }
        excluded = Kernel.DENSE if self.can_release else Kernel.UNPACK
        choices: dict[int, dict[Kernel, float]] = {
            bucket: {kernel: ms for kernel, ms in own.items() if kernel != excluded}
            for bucket, own in times.items()
        }
        margin = MARGINS[self.device.type]
        if self.rows is None:
            sources |= self._leave_out_losers(choices, margin)
        # any batch size may come: the larger ones are not left to a format made for few rows
        fixed = {self.packed_for_unpack} if self.can_release and self.rows is None else set()
        kept = worthwhile(choices, self.base, margin, frozenset(fixed))
        chosen = {
            bucket: fastest(own, self.base, kept, margin) for bucket, own in choices.items() if own
        }
        return self.plan(chosen, ", ".join(sources), times)

    def _leave_out_losers(
        self, choices: dict[int, dict[Kernel, float]], margin: float
    ) -> dict[str, None]:
        """Take out of a bucket what wins at its largest batch and loses at its smallest."""
        doubts = uncertain(choices, self.base, margin)
        if not doubts:
            return {}
        wanted = {
            smallest_batch(bucket): kernels | {self.base, Kernel.DENSE}
            for bucket, kernels in doubts.items()
        }
        times, sources = self._times(wanted)
        for bucket, kernels in doubts.items():
            own = times.get(smallest_batch(bucket), {})
            for kernel in kernels:
                if not own.get(kernel, math.inf) < own.get(self.base, 0.0) * (1.0 + margin):
                    del choices[bucket][kernel]
        return sources

    def _times(
        self, wanted: Mapping[int, frozenset[Kernel]]
    ) -> tuple[dict[int, dict[Kernel, float]], dict[str, None]]:
        """Rows of x -> kernel -> milliseconds, and where they come from."""
        key = plan_cache.TimesKey.of(
            self.device, self.out_features, self.in_features, self.sparsity, self.dtype,
            cuda_graphs=self.cuda_graphs, pattern=self.pattern,
        )  # fmt: skip
        with plan_cache.lock:  # also: two measurements at a time would disturb each other
            times, found = plan_cache.find(key, wanted)
            sources = dict.fromkeys(found)  # in order, each once
            missing = {rows: own for rows, own in wanted.items() if rows not in times}
            if self.rows is not None:
                for rows, own in self._without_unpack(key, missing, sources).items():
                    times[rows] = own
                    del missing[rows]
            if missing:
                if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    sources["not measured: the stream is being captured"] = None
                else:
                    fresh = self._measure(missing)
                    sources["measured" if fresh else "not measured: out of memory"] = None
                    plan_cache.keep(key, fresh)
                    times |= fresh
        return times, sources

    def _without_unpack(
        self,
        key: plan_cache.TimesKey,
        wanted: Mapping[int, frozenset[Kernel]],
        sources: dict[str, None],
    ) -> dict[int, dict[Kernel, float]]:
        """Known times of the rows at which ``UNPACK`` cannot win, so that its time is not needed.

        It is the dense product after expanding the weight: what beats dense beats it too.
        """
        others = {rows: own - {Kernel.UNPACK} for rows, own in wanted.items()}
        times, found = plan_cache.find(key, others)
        won = {}
        for rows, own in times.items():
            sparse = [ms for kernel, ms in own.items() if kernel not in WITHOUT_FORMAT]
            limit = own.get(Kernel.DENSE, 0.0) * (1.0 - MARGINS[self.device.type])
            if sparse and min(sparse) < limit:
                won[rows] = own
        if won:
            sources.update(dict.fromkeys(found))
        return won

    def _measure(self, wanted: Mapping[int, frozenset[Kernel]]) -> dict[int, dict[Kernel, float]]:
        try:
            return kernel_times.measure_kernels(
                self.device, self.out_features, self.in_features,
                plan_cache.rounded(self.sparsity), self.dtype, wanted,
                cuda_graphs=self.cuda_graphs, pattern=self.pattern,
                unpacked_from=self.packed_for_unpack,
            )  # fmt: skip
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning(
                "%dx%d on %s: no memory to measure the sparse kernels, it stays %s",
                self.out_features, self.in_features, self.device, self.base.name,
            )  # fmt: skip
            return {}


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)  # the CPU allocator raises a plain RuntimeError
    return "not enough memory" in text or "can't allocate memory" in text
