"""Masks: choosing the largest scores, of a weight or of each row, and moving what is pruned.

    python -m pytest benchmarks/bench_masks.py               # a group for each question and size
    python -m benchmarks.bench_masks --table

70 % pruned, fp32. The references are what torch offers: ``torch.topk`` and a scatter of its indices
for a selection, a product with the mask for zeroing, two for taking out. Results are checked before
they are timed.
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
from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.mask_bits import pack_mask, take_pruned_, zero_where_
from resu_compile.kernels.radix_select import (
    topk_mask,
    topk_mask_cuda,
    topk_mask_triton,
    topk_module,
)
from resu_compile.kernels.row_select import row_select

SIDES = (2048, 4096) if CUDA else (512, 1024)
SPARSITY = 0.7
SELECT_BYTES = 4 + 1  # an entry: read a score, write a bool
ZERO_BYTES = 4 + 4 + 1 / 8  # an entry: read and write a weight, read a bit
TAKE_BYTES = 4 + 4 + 4 + 1 / 8  # and write what is taken

Select = Callable[[Tensor, int], Tensor]


# -- implementations -------------------------------------------------------------------------
def mask_topk(score: Tensor, k: int) -> Tensor:
    """As many library lines as it takes: ``torch.topk`` and a scatter of its indices."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    return mask.index_fill_(0, torch.topk(score.flatten(), k).indices, True).view(score.shape)


def mask_triton(score: Tensor, k: int) -> Tensor:
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    topk_mask_triton(score, k, mask)
    return mask


def mask_cuda(score: Tensor, k: int) -> Tensor:
    module = topk_module(score)
    assert module is not None, "expected NVRTC on this device"
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    topk_mask_cuda(module, score, k, mask)
    return mask


def rows_topk(score: Tensor, k: int) -> Tensor:
    """``torch.topk`` of each row, and a scatter."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, torch.topk(score, k, dim=1).indices, True)


def rows_op(score: Tensor, k: int) -> Tensor:
    return row_select(score, k, highest=True)


WHOLE: dict[str, Select] = {"torch.topk": mask_topk, "op": topk_mask}
if CUDA and HAS_TRITON:
    WHOLE |= {"triton": mask_triton, "cuda c++": mask_cuda}
ROWS: dict[str, Select] = {"torch.topk": rows_topk, "op": rows_op}


# -- groups ----------------------------------------------------------------------------------
def draw_score(side: int, seed: int) -> Tensor:
    return torch.randn(side, side, generator=harness.generator(seed), device=DEVICE)


def check_whole(mask: Tensor, score: Tensor, k: int) -> None:
    assert int(mask.sum()) == k
    assert score[mask].min() >= score[~mask].max()


def check_rows(mask: Tensor, score: Tensor, k: int) -> None:
    assert bool((mask.sum(1) == k).all())
    least = score.masked_fill(~mask, float("inf")).amin(1)
    assert bool((least >= score.masked_fill(mask, -float("inf")).amax(1)).all())


def build_select(
    side: int,
    impls: dict[str, Select],
    check: Callable[[Tensor, Tensor, int], None],
    k: int,
) -> dict[str, Entry]:
    scores = [draw_score(side, seed) for seed in range(harness.copies_of(side * side * 4))]
    for select in impls.values():
        check(select(scores[0], k), scores[0], k)
    moved = SELECT_BYTES * side * side
    return {
        impl: Entry(tuple(functools.partial(select, score, k) for score in scores), moved)
        for impl, select in impls.items()
    }


def build_zero(side: int) -> dict[str, Entry]:
    weights = [draw_score(side, seed) for seed in range(harness.copies_of(side * side * 4))]
    mask = draw_score(side, 1000) > 0
    bits = pack_mask(mask)
    ours = weights[0].clone()
    zero_where_(ours, bits, True)
    assert torch.equal(ours, torch.where(mask, weights[0], 0.0))
    moved = ZERO_BYTES * side * side
    return {
        "multiply": Entry(tuple(functools.partial(w.mul_, mask) for w in weights), moved),
        "op": Entry(tuple(functools.partial(zero_where_, w, bits, True) for w in weights), moved),
    }


def take_by_torch(x: Tensor, mask: Tensor, out: Tensor) -> None:
    """A product for what is taken, and one for what is left."""
    torch.mul(x, ~mask, out=out)
    x.mul_(mask)


def build_take(side: int) -> dict[str, Entry]:
    weights = [draw_score(side, seed) for seed in range(harness.copies_of(2 * side * side * 4))]
    mask = draw_score(side, 1000) > 0
    bits = pack_mask(mask)
    outs = [torch.empty_like(weight) for weight in weights]
    ours, taken = weights[0].clone(), outs[0]
    take_pruned_(ours, bits, taken)
    assert torch.equal(taken, torch.where(mask, 0.0, weights[0]))
    assert torch.equal(ours, torch.where(mask, weights[0], 0.0))
    moved = TAKE_BYTES * side * side
    pairs = list(zip(weights, outs, strict=True))
    plain = tuple(functools.partial(take_by_torch, w, mask, out) for w, out in pairs)
    op = tuple(functools.partial(take_pruned_, w, bits, out) for w, out in pairs)
    return {"torch": Entry(plain, moved), "op": Entry(op, moved)}


def groups(*, smallest: bool = False) -> list[Group]:
    """The groups of the suite; ``smallest``: one small size."""
    found = []
    for side in (128,) if smallest else SIDES:
        k_all, k_row = int((1 - SPARSITY) * side * side), int((1 - SPARSITY) * side)
        whole = functools.partial(build_select, side, WHOLE, check_whole, k_all)
        rows = functools.partial(build_select, side, ROWS, check_rows, k_row)
        zero, take = functools.partial(build_zero, side), functools.partial(build_take, side)
        size = f"{side}x{side}"
        found += [
            Group(f"top-k mask, {size}", tuple(WHOLE), ("torch.topk",), whole),
            Group(f"top-k of each row, {size}", tuple(ROWS), ("torch.topk",), rows),
            Group(f"zero the pruned, {size}", ("multiply", "op"), ("multiply",), zero),
            Group(f"take the pruned, {size}", ("torch", "op"), ("torch",), take),
        ]
    return found


@pytest.mark.parametrize(("group", "impl"), harness.each_impl(groups()), ids=harness.show)
def test_masks(benchmark, group, impl):
    harness.run_benchmark(benchmark, group, impl)


def main() -> None:
    title = "Masks of 70 % sparsity, fp32"
    table_main(__doc__.splitlines()[0], title, groups, "python -m benchmarks.bench_masks --table")


if __name__ == "__main__":
    main()
