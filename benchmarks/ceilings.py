"""What this device can do at most, measured: reading memory, copying it, multiplying matrices.

    python -m benchmarks.ceilings

Shares of these ceilings say more than shares of a data sheet, which no program reaches.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass

import torch

from benchmarks.environment import describe, environment
from benchmarks.harness import (
    CUDA,
    DEVICE,
    LINEAR_DTYPE,
    Entry,
    Group,
    generator,
    measure,
)
from resu_compile.kernels._triton import HAS_TRITON, jit, tl

READ_BYTES = 2**32 if CUDA else 2**27  # well beyond every cache
SIDE = 8192 if CUDA else 1024  # of the matrices
BLOCKS = (4096, 16384)  # float32 numbers in one step of a program: all are on their way at once
PROGRAMS_PER_SM = 8


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device.

    Attributes:
        read: bytes a second of a kernel that only reads.
        copy: bytes a second of a large copy, those read and those written together.
        flop: operations a second of a large dense matrix product in ``LINEAR_DTYPE``.
    """

    read: float
    copy: float
    flop: float

    def __post_init__(self) -> None:
        for name, rate in asdict(self).items():
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"{name}: expected a rate above 0, got {rate}")


@jit
def _read_kernel(x_ptr, out_ptr, blocks, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)  # 4 GiB and more: offsets pass 2**31
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    lane = tl.arange(0, BLOCK)
    for block in range(pid, blocks, tl.num_programs(0)):
        acc += tl.load(x_ptr + block * BLOCK + lane, eviction_policy="evict_first")
    tl.store(out_ptr + pid, tl.sum(acc, axis=0))


def read_triton(x: torch.Tensor, out: torch.Tensor, block: int) -> None:
    """Read all of ``x`` (float32, a multiple of ``block``); sums of programs go to ``out``."""
    _read_kernel[(out.numel(),)](x, out, x.numel() // block, BLOCK=block, num_warps=8)


@functools.cache
def ceilings() -> Ceilings:
    """Rates of this device, measured now (about a second)."""
    x = torch.randn(READ_BYTES // 4, generator=generator(0), device=DEVICE)
    y = torch.empty_like(x)

    def build() -> dict[str, Entry]:
        entries = {
            "sum": Entry((lambda: torch.sum(x),), x.nbytes),
            "copy": Entry((lambda: y.copy_(x),), 2 * x.nbytes),
        }
        for name, (block, programs) in reads.items():
            out = torch.empty(programs, device=DEVICE)
            read_triton(x, out, block)
            torch.testing.assert_close(out.double().sum(), x.double().sum(), rtol=0, atol=100)
            entries[name] = Entry((functools.partial(read_triton, x, out, block),), x.nbytes)
        return entries

    reads: dict[str, tuple[int, int]] = {}
    if CUDA and HAS_TRITON:
        resident = PROGRAMS_PER_SM * torch.cuda.get_device_properties(0).multi_processor_count
        for block in BLOCKS:  # by few programs that stay, and by one program a step
            reads[f"read {block}, stay"] = (block, resident)
            reads[f"read {block}"] = (block, x.numel() // block)
    impls = ("sum", "copy", *reads)
    ms = {k: t.ms for k, t in measure(Group("memory", impls, ("copy",), build)).items()}
    read_ms = min(own for name, own in ms.items() if name != "copy")
    return Ceilings(x.nbytes / read_ms * 1e3, 2 * x.nbytes / ms["copy"] * 1e3, _flop_rate())


def _flop_rate() -> float:
    a, b = (
        torch.randn(SIDE, SIDE, generator=generator(i), device=DEVICE).to(LINEAR_DTYPE)
        for i in (0, 1)
    )

    def build() -> dict[str, Entry]:
        return {"mm": Entry((lambda: a @ b,)), "mm t": Entry((lambda: a @ b.t(),))}

    found = measure(Group("matrix product", ("mm", "mm t"), ("mm",), build))
    return 2.0 * SIDE**3 / min(t.ms for t in found.values()) * 1e3


def main() -> None:
    found = ceilings()
    print(describe(environment()))
    print(f"read {found.read / 1e12:.3f} TB/s, copy {found.copy / 1e12:.3f} TB/s, ", end="")
    print(f"{str(LINEAR_DTYPE).removeprefix('torch.')} {found.flop / 1e12:.1f} TFLOP/s")


if __name__ == "__main__":
    main()
