"""One step of both sides of a masked weight: the fused kernel against what else could do it.

    python -m pytest benchmarks/bench_fused_update.py        # one group a shape
    python -m benchmarks.bench_fused_update --table

"torch dense" is torch's fused AdamW on the same weight without a mask: the step to be as fast as.
"fused" steps the active places by AdamW and theta by Adam, "inductor" is its plain meaning under
``torch.compile``, "frozen" moves theta alone, "packed" keeps moments for the active places only.
The byte floor reads weight, gradient and two moments and writes all but the gradient: 28 bytes a
weight in float32. CUDA only.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import pytest
import torch
from tabulate import tabulate

from resu_compile.kernels.bit_rank import block_ranks
from resu_compile.kernels.fused_update import (
    STAY,
    Step,
    fused_update,
    fused_update_reference,
    packed_adam,
)
from resu_compile.kernels.mask_bits import pack_mask

SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096))
SPARSITY = 0.7
ADAM = Step("adam", 1e-4, 0.1, 0.9, 0.999, 1e-8, 1 - 0.9**10, 1 - 0.999**10)
THETA = Step("adam", 1e-3, 0.0, 0.9, 0.95, 1e-8, 1 - 0.9**5, 1 - 0.95**5)
IMPLS = ("torch dense", "fused", "inductor", "frozen", "packed")
COPIES = 4  # together beyond the L2 cache at every shape

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@functools.cache
def compiled() -> Callable[..., None]:
    return torch.compile(fused_update_reference, dynamic=False)


def step_of(impl: str, shape: tuple[int, int]) -> Callable[[], None]:
    """One step of ``COPIES`` weights of ``shape``."""
    torch.manual_seed(0)
    weights, grads, firsts = (
        [torch.randn(shape, device="cuda") for _ in range(COPIES)] for _ in range(3)
    )
    seconds = [torch.rand(shape, device="cuda") for _ in range(COPIES)]
    mask = torch.rand(shape, device="cuda") >= SPARSITY
    bits, numel = pack_mask(mask), mask.numel()
    ranks = block_ranks(bits, numel, True)
    if impl == "torch dense":
        steps = [torch.full((), 10.0, device="cuda") for _ in range(COPIES)]
        return lambda: torch._fused_adamw_(
            weights,
            grads,
            firsts,
            seconds,
            [],
            steps,
            lr=1e-4,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.1,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
    if impl == "packed":
        firsts, seconds = [x[mask] for x in firsts], [x[mask] for x in seconds]

    def run() -> None:
        for tensors in zip(weights, grads, firsts, seconds, strict=True):
            if impl == "fused":
                fused_update(*tensors, bits, ADAM, THETA)
            elif impl == "inductor":
                compiled()(*tensors, bits, ADAM, THETA)
            elif impl == "frozen":
                fused_update(*tensors, bits, STAY, THETA)
            else:
                packed_adam(*tensors, bits, ranks, ADAM)

    return run


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_update(benchmark, impl, shape):
    benchmark.group = f"fused update {shape}"
    step = step_of(impl, shape)
    step()

    def run() -> None:
        step()
        torch.cuda.synchronize()

    benchmark(run)


def print_table() -> None:
    from triton.testing import do_bench_cudagraph

    rows = []
    for shape in SHAPES:
        floor = 28 * shape[0] * shape[1] / 4.27e9  # ms at the copy bandwidth of an H200
        for impl in IMPLS:
            step = step_of(impl, shape)
            step()
            ms = do_bench_cudagraph(step, rep=100, return_mode="median") / COPIES
            rows.append([f"{shape[0]}x{shape[1]}", impl, ms, f"{ms / floor:.2f}"])
    print(f"one step of one weight, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(tabulate(rows, headers=["weight", "step", "ms", "of 28 B at 4.27 TB/s"], floatfmt=".4f"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print one table")
    if not parser.parse_args().table:
        parser.error("expected --table")
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    print_table()


if __name__ == "__main__":
    main()
