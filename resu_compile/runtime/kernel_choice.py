"""Which kernels there are to choose from, and the rule that chooses by their times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from resu_compile.kernels.csr_linear import has_csr_kernel
from resu_compile.kernels.plan import BUCKET_ROWS, Kernel

MAX_NUMEL = 2**31 - 2**16  # entry numbers are int32

# A kernel must beat another by this share of its time before anything is given up for it: two runs
# of one measurement differ by less (fp32 on a 2-core CPU with other programs running: 5 %).
MARGINS = {"cuda": 0.03, "cpu": 0.05}

ROWS_MOST, TILES_MOST = 8, 64  # rows of x beyond which these kernels run more than once over

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)

WITHOUT_FORMAT = frozenset({Kernel.DENSE, Kernel.UNPACK})


# -- what there is to choose from ------------------------------------------------------------
def formats_of(
    device: torch.device,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    pattern: tuple[int, int] | None = None,
) -> tuple[Kernel, ...]:
    """The sparse kernels that ``device`` has for an (N, K) weight; none if it is empty or huge."""
    if not 0 < out_features * in_features < MAX_NUMEL:
        return ()
    if device.type == "cpu":
        return (Kernel.CSR,) if has_csr_kernel(device, dtype) else ()
    if device.type != "cuda" or dtype not in FLOATS:
        return ()
    if pattern is not None and dtype in HALVES:
        from resu_compile.kernels.semi_linear import is_semi_pattern, is_supported

        if is_semi_pattern(*pattern) and is_supported(out_features, in_features, dtype):
            return (Kernel.ROWS, Kernel.TILES, Kernel.SEMI)
    return (Kernel.ROWS, Kernel.TILES)


def candidates_of(formats: Iterable[Kernel], rows: int, dtype: torch.dtype) -> frozenset[Kernel]:
    """What may run at ``rows`` rows of x: the kernels made for that, and the dense product."""
    most = {Kernel.ROWS: ROWS_MOST, Kernel.TILES: TILES_MOST if dtype in HALVES else 0}
    return frozenset({Kernel.DENSE} | {k for k in formats if rows <= most.get(k, rows)})


# -- the rule --------------------------------------------------------------------------------
def uncertain(
    times: Mapping[int, Mapping[Kernel, float]], base: Kernel, margin: float
) -> dict[int, frozenset[Kernel]]:
    """The kernels that win at the largest batch of a bucket and may lose at its smallest.

    Times grow with the batch, often in steps. What is at its largest batch still faster than
    ``base`` at the largest of the bucket before is faster in between, whatever the steps.

    Args:
        times: bucket -> kernel -> milliseconds at the largest batch of the bucket.
        base: the kernel that is to be beaten.
        margin: share of a time, in [0, 1).
    """
    result = {}
    for bucket, own in times.items():
        if smallest_batch(bucket) == BUCKET_ROWS[bucket]:
            continue
        limit = own.get(base, math.inf) * (1.0 - margin)
        sure = times.get(bucket - 1, {}).get(base, 0.0)
        kernels = frozenset(k for k, ms in own.items() if k != base and sure < ms < limit)
        if kernels:
            result[bucket] = kernels
    return result


def smallest_batch(bucket: int) -> int:
    """Rows of x from which on ``batch_bucket`` gives this bucket."""
    return BUCKET_ROWS[bucket - 1] + 1 if bucket else 1


def fastest(
    times: Mapping[Kernel, float], base: Kernel, formats: frozenset[Kernel], margin: float
) -> Kernel:
    """The fastest of ``formats`` in one bucket, or ``base`` unless it is beaten by the margin."""
    limit = times.get(base, math.inf) * (1.0 - margin)
    return min(
        (kernel for kernel in sorted(times) if kernel in formats and times[kernel] < limit),
        key=times.__getitem__,
        default=base,
    )


def worthwhile(
    times: Mapping[int, Mapping[Kernel, float]],
    base: Kernel,
    margin: float,
    fixed: frozenset[Kernel] = frozenset(),
) -> frozenset[Kernel]:
    """The formats worth packing.

    From all of them, the one that is missed least is left out, as long as no bucket loses more than
    the margin by it.

    Args:
        times: bucket -> kernel -> milliseconds.
        base: the kernel that needs no format of its own.
        margin: share of a time, in [0, 1).
        fixed: formats that are packed in any case.
    """
    formats = frozenset(k for own in times.values() for k in own) - WITHOUT_FORMAT | fixed

    def loss(without: Kernel) -> float:
        """Largest share of its time that any bucket saves by this format; inf: needed."""
        shares = [0.0]
        for own in times.values():
            with_it = own.get(fastest(own, base, formats, margin), math.inf)
            without_it = own.get(fastest(own, base, formats - {without}, margin), math.inf)
            if without_it > with_it:
                shares.append(1.0 - with_it / without_it)
        return max(shares)

    while removable := formats - fixed:
        least = min(sorted(removable, reverse=True), key=loss)
        if loss(least) > margin:
            break
        formats -= {least}
    return formats
