"""One step of both sides of a masked weight: the fused kernel against what else could do it.

    python -m pytest benchmarks/bench_fused_update.py        # one group a shape
    python -m benchmarks.bench_fused_update --table

The reference is torch's fused AdamW on the same weight without a mask: the step to be as fast as.
"fused" steps the active places by AdamW and theta by Adam, "inductor" is its plain meaning under
``torch.compile``, "frozen" moves theta alone, "packed" keeps moments for the active places only.
Reading weight, gradient and two moments and writing all but the gradient is 28 bytes a weight in
float32. 70 % pruned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.group_table import table_main
from benchmarks.harness import CUDA, DEVICE, Entry, Group
from resu_compile.kernels.bit_rank import block_ranks
from resu_compile.kernels.fused_update import (
    STAY,
    Step,
    fused_update,
    fused_update_reference,
    packed_adam,
)
from resu_compile.kernels.mask_bits import pack_mask

SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096)) if CUDA else ((512, 512), (1024, 1024))
SPARSITY = 0.7
STEP_BYTES = 28  # a weight
ADAM = Step("adam", 1e-4, 0.1, 0.9, 0.999, 1e-8, 1 - 0.9**10, 1 - 0.999**10)
THETA = Step("adam", 1e-3, 0.0, 0.9, 0.95, 1e-8, 1 - 0.9**5, 1 - 0.95**5)
REFERENCE = "torch dense"
IMPLS = (REFERENCE, "fused", "frozen", "packed", *(("inductor",) if CUDA else ()))

Shape = tuple[int, int]
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, gradient, first and second mean


@functools.cache
def compiled() -> Callable[..., None]:
    return torch.compile(fused_update_reference, dynamic=False)


def draw(shape: Shape, seed: int) -> Tensors:
    numbers = harness.generator(seed)
    weight, grad, first = (torch.randn(shape, generator=numbers, device=DEVICE) for _ in range(3))
    return weight, grad, first, torch.rand(shape, generator=numbers, device=DEVICE)


def torch_adamw(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: Tensor) -> None:
    torch._fused_adamw_(
        [weight],
        [grad],
        [first],
        [second],
        [],
        [step],
        lr=ADAM.lr,
        beta1=ADAM.beta1,
        beta2=ADAM.beta2,
        weight_decay=ADAM.weight_decay,
        eps=ADAM.eps,
        amsgrad=False,
        maximize=False,
    )


def check_update(shape: Shape, bits: Tensor) -> None:
    """Raise unless the fused step moves weight and state as its plain meaning does."""
    ours, plain = draw(shape, 0), draw(shape, 0)
    fused_update(*ours, bits, ADAM, THETA)
    fused_update_reference(*plain, bits, ADAM, THETA)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def build_update(shape: Shape) -> dict[str, Entry]:
    mask = torch.rand(shape, generator=harness.generator(99), device=DEVICE) >= SPARSITY
    bits, numel = pack_mask(mask), mask.numel()
    ranks = block_ranks(bits, numel, True)
    check_update(shape, bits)
    sets = [draw(shape, seed) for seed in range(harness.copies_of(STEP_BYTES * numel))]
    steps = [torch.full((), 10.0, device=DEVICE) for _ in sets]
    packed = [(w, g, m[mask], v[mask]) for w, g, m, v in sets]

    def entry(call: Callable[..., None], tensors: list[Tensors], *rest: object) -> Entry:
        return Entry(
            tuple(functools.partial(call, *own, *rest) for own in tensors), STEP_BYTES * numel
        )

    calls = [functools.partial(torch_adamw, *own, at) for own, at in zip(sets, steps, strict=True)]
    entries = {
        REFERENCE: Entry(tuple(calls), STEP_BYTES * numel),
        "fused": entry(fused_update, sets, bits, ADAM, THETA),
        "frozen": entry(fused_update, sets, bits, STAY, THETA),
        "packed": entry(packed_adam, packed, bits, ranks, ADAM),
    }
    if "inductor" in IMPLS:
        entries["inductor"] = entry(compiled(), sets, bits, ADAM, THETA)
    return entries


def groups(*, smallest: bool = False) -> list[Group]:
    """The groups of the suite; ``smallest``: one small weight."""
    return [
        Group(
            f"update, {shape[0]}x{shape[1]}",
            IMPLS,
            (REFERENCE,),
            functools.partial(build_update, shape),
        )
        for shape in (((64, 64),) if smallest else SHAPES)
    ]


@pytest.mark.parametrize(("group", "impl"), harness.each_impl(groups()), ids=harness.show)
def test_fused_update(benchmark, group, impl):
    harness.run_benchmark(benchmark, group, impl)


def main() -> None:
    title = "One step of one weight, 70 % pruned, fp32"
    command = "python -m benchmarks.bench_fused_update --table"
    table_main(__doc__.splitlines()[0], title, groups, command)


if __name__ == "__main__":
    main()
