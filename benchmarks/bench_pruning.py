"""Seconds to make the masks of all layers of a Llama-2-7B-shaped model, ours and by sorting.

    python -m benchmarks.bench_pruning
    python -m benchmarks.bench_pruning --tiny                 # small shapes, on any machine

magnitude: 70 % of each weight go; the share of each weight that stays is exact
    ours        sparsity.topk_mask: radix histograms on CUDA
    topk        torch.topk of all scores, unsorted, and a scatter
    sort        torch.sort of all scores, and the mask of the positions behind the cut
    kthvalue    torch.kthvalue of all scores, then a comparison (ties may keep too few); on CUDA one
                block of threads goes through all of them, so it is left out there

wanda: |w| times the norm of the inputs, 70 % of each row go
    ours        comparison.row_mask: a row in registers, bit by bit, on CUDA
    kthvalue    torch.kthvalue of each row
    topk        torch.topk of each row, unsorted, and a scatter
    sort        a stable torch.sort of each row, as the published code does, and a scatter

Best of several runs, scores included; "selection" starts from scores that are there. Ours goes over
all layers, the others over one, times the number of layers.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import Result, command_of
from resu_compile.comparison import RowLayout, row_mask
from resu_compile.sparsity import keep_count, topk_mask

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SPARSITY = 0.7
# https://huggingface.co/meta-llama/Llama-2-7b-hf: q, k, v, o; gate, up; down
LAYER = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)
TINY = ((64, 64), (160, 64), (64, 160))


# -- magnitude -------------------------------------------------------------------------------
def _ours(score: Tensor) -> Tensor:
    return topk_mask(score, keep_count(score.numel(), SPARSITY))


def _kthvalue(score: Tensor) -> Tensor:
    flat = score.flatten()
    cut = flat.numel() - keep_count(flat.numel(), SPARSITY)
    return score > torch.kthvalue(flat, cut).values


def _topk(score: Tensor) -> Tensor:
    flat = score.flatten()
    kept = torch.topk(flat, keep_count(flat.numel(), SPARSITY), sorted=False).indices
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=score.device)
    return mask.scatter_(0, kept, True).view(score.shape)


def _sort(score: Tensor) -> Tensor:
    order = torch.sort(score.flatten(), stable=True).indices
    mask = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
    mask[order[: score.numel() - keep_count(score.numel(), SPARSITY)]] = False
    return mask.view(score.shape)


# -- wanda -----------------------------------------------------------------------------------
def _rows_ours(score: Tensor) -> Tensor:
    return row_mask(score, RowLayout(tuple(score.shape), (1,)), SPARSITY)


def _rows_kthvalue(score: Tensor) -> Tensor:
    count = int(score.shape[1] * SPARSITY)
    return score > torch.kthvalue(score, count, dim=1, keepdim=True).values


def _rows_topk(score: Tensor) -> Tensor:
    count = int(score.shape[1] * SPARSITY)
    lowest = torch.topk(score, count, dim=1, largest=False, sorted=False).indices
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, lowest, False)


def _rows_sort(score: Tensor) -> Tensor:
    count = int(score.shape[1] * SPARSITY)
    order = torch.sort(score, dim=1, stable=True).indices
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order[:, :count], False)


MAGNITUDE = {"ours": _ours, "topk": _topk, "sort": _sort}
if not CUDA:
    MAGNITUDE["kthvalue"] = _kthvalue
WANDA = {
    "ours": _rows_ours,
    "kthvalue": _rows_kthvalue,
    "topk": _rows_topk,
    "sort": _rows_sort,
}


# -- timing ----------------------------------------------------------------------------------
def seconds(run: Callable[[], object], repeats: int) -> float:
    """Best of ``repeats`` runs after one that is not timed."""
    best = float("inf")
    for repeat in range(repeats + 1):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if CUDA:
            torch.cuda.synchronize()
        if repeat:
            best = min(best, time.perf_counter() - start)
    return best


def _magnitudes(weight: Tensor, _: Tensor) -> Tensor:
    return weight.abs()


def _products(weight: Tensor, norm: Tensor) -> Tensor:
    return weight.abs() * norm  # fp32


def _selected(
    select: Callable[[Tensor], Tensor], score: Callable[..., Tensor], pair: tuple[Tensor, Tensor]
) -> Tensor:
    return select(score(*pair))


def _each(run: Callable[[Any], object], inputs: Sequence[Any], times: int) -> Callable[[], None]:
    """Runs ``run`` on each of ``inputs``, as many times."""

    def all_of_them() -> None:
        for _ in range(times):
            for value in inputs:
                run(value)

    return all_of_them


def measure(
    shapes: Sequence[tuple[int, int]],
    layers: int,
    repeats: int,
    dtype: torch.dtype,
    command: str,
) -> Result:
    """Time every way over ``layers`` layers of weights of ``shapes``."""
    weights = [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes]
    norms = [torch.rand(1, shape[1], device=DEVICE) + 0.5 for shape in shapes]

    rows, records = [], []
    for method, score_of, ways in (
        ("magnitude", _magnitudes, MAGNITUDE),
        ("wanda", _products, WANDA),
    ):
        pairs = list(zip(weights, norms, strict=True))
        scores = [score_of(*pair) for pair in pairs]
        kept = [int(ways["ours"](score).sum()) for score in scores]
        ours = 0.0
        for name, select in ways.items():
            # kthvalue drops all that equal the threshold; the others keep as many as ours
            got = [int(select(score).sum()) for score in scores]
            if name != "kthvalue" and got != kept:
                raise SystemExit(f"{method}, {name}: keeps {got}, ours {kept}")
            both = functools.partial(_selected, select, score_of)
            timed = layers if name == "ours" else 1
            whole = seconds(_each(both, pairs, timed), repeats) * layers / timed
            part = seconds(_each(select, scores, timed), repeats) * layers / timed
            ours = ours or whole
            rows.append((method, name, f"{whole:.3f}", f"{part:.3f}", f"{whole / ours:.1f}x"))
            records.append(
                {"method": method, "way": name, "seconds": whole, "selection_seconds": part}
            )
            print(*rows[-1], flush=True)
    count = layers * sum(n * k for n, k in shapes)
    title = (
        f"Masks of {layers} layers, {count / 1e9:.2f}e9 weights, {SPARSITY:.0%} pruned, "
        f"{str(dtype).removeprefix('torch.')}"
    )
    headers = ("method", "way", "seconds", "selection", "to ours")
    return Result(title, command, headers, rows, records)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small shapes and one run")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    shapes, dtype = (LAYER, torch.bfloat16) if CUDA and not args.tiny else (TINY, torch.float32)
    if args.tiny:
        args.layers, args.repeats = 2, 1
    command = command_of("bench_pruning", argv)
    result = measure(shapes, args.layers, args.repeats, dtype, command)
    print(result.text())
    if args.json:
        result.save(args.json)


if __name__ == "__main__":
    main()
