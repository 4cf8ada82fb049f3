"""One selective step on the pruned places of a weight.

    python -m pytest benchmarks/bench_selective_step.py      # a group for each size
    python -m benchmarks.bench_selective_step --table
    python -m benchmarks.bench_selective_step --kernels      # time of each kernel (CUDA)

70 % pruned; half of the pruned places screened, a fifth selected; fp32. The reference is what torch
offers: full-size operations and two ``torch.topk``. Results are checked before they are timed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.group_table import table_main
from benchmarks.harness import CUDA, DEVICE, Entry, Group
from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.mask_bits import pack_mask, unpack_mask
from resu_compile.kernels.radix_select import topk_mask_reference
from resu_compile.kernels.selective_step import (
    Places,
    Rule,
    selective_step_,
    selective_step_cuda,
    selective_step_triton,
    step_module,
)

COMMAND = "python -m benchmarks.bench_selective_step"

SIDES = (2048, 4096) if CUDA else (512, 1024)
SPARSITY, SCREEN, SELECT = 0.7, 0.5, 0.2
FLOOR_BYTES = 28 + 1 / 8  # a weight: read W, g, m, v and a bit, write W, m, v
# averages that stay as they are: under a constant gradient, C would go to 1 everywhere
BETA = 1.0 - 1e-7

Step = Callable[[Places, Rule], None]


def make_places(side: int, seed: int) -> Places:
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(make: Callable[..., Tensor]) -> Tensor:
        return make((side, side), generator=generator, device=DEVICE)

    ema = draw(torch.randn)
    ema_abs = ema.abs() / draw(torch.rand).clamp(min=1e-3)  # C is uniform in [0, 1]
    mask = topk_mask_reference(draw(torch.rand).cpu(), int((1 - SPARSITY) * side * side))
    return Places(draw(torch.randn), draw(torch.randn), ema, ema_abs, pack_mask(mask).to(DEVICE))


def count_pruned(places: Places) -> int:
    numel = places.weight.numel()
    return numel - int((1 - SPARSITY) * numel)


def make_rule(places: Places) -> Rule:
    n_pruned = count_pruned(places)
    k_screen, k_select = int(SCREEN * n_pruned), int(SELECT * n_pruned)
    return Rule(1e-4, BETA, 1e-8, 0.5, k_screen, k_select, False, 0.0)


# -- implementations -------------------------------------------------------------------------
def step_eager(places: Places, rule: Rule) -> None:
    """Full-size PyTorch operations and two ``torch.topk`` with index lists."""
    weight, grad, ema, ema_abs, bits = places
    pruned = ~unpack_mask(bits, weight.shape)
    magnitude = torch.where(pruned, grad.abs(), -1.0).flatten()
    ema.copy_(torch.where(pruned, ema * rule.beta + grad * (1 - rule.beta), ema))
    averaged = ema_abs * rule.beta + grad.abs() * (1 - rule.beta)
    ema_abs.copy_(torch.where(pruned, averaged, ema_abs))
    consistency = ema.abs() / (ema_abs + rule.delta)
    screened = torch.topk(magnitude, rule.k_screen).indices
    kept = (consistency > rule.tau).flatten()[screened]
    ranked = torch.where(kept, magnitude[screened], -1.0)
    best = torch.topk(ranked, rule.k_select)
    chosen = screened[best.indices]
    update = (consistency * grad).flatten()[chosen].mul_(best.values >= 0)
    weight.view(-1).index_add_(0, chosen, update, alpha=-rule.lr)


def step_op(places: Places, rule: Rule) -> None:
    selective_step_(*places, n_pruned=count_pruned(places), **rule._asdict())


def step_cuda(places: Places, rule: Rule) -> None:
    module = step_module(places.weight, places.grad)
    assert module is not None, "expected NVRTC on this device"
    selective_step_cuda(module, places, rule)


STEPS: dict[str, Step] = {"eager": step_eager, "op": step_op}
if CUDA and HAS_TRITON:
    STEPS |= {"triton": selective_step_triton, "cuda c++": step_cuda}


# -- checks ----------------------------------------------------------------------------------
def check_step(step: Step, side: int) -> None:
    """Raise unless the step moves what the eager one moves, by as much."""
    places, expected = make_places(side, 0), make_places(side, 0)
    before = places.weight.clone()
    rule = make_rule(places)._replace(lr=1.0)
    step(places, rule)
    step_eager(expected, rule)
    differing = ((places.weight != before) != (expected.weight != before)).sum()
    # C in full precision against mul and add apart: a place or two within rounding of tau
    assert int(differing) <= 1e-5 * places.weight.numel(), f"{int(differing)} places differ"
    error = (places.weight - expected.weight).norm() / (expected.weight - before).norm()
    assert error < 0.01, f"relative error {error:.2e}"  # the same places, one in 1e5 at most


# -- groups ----------------------------------------------------------------------------------
def build_step(side: int) -> dict[str, Entry]:
    for step in STEPS.values():
        check_step(step, side)
    moved = FLOOR_BYTES * side * side
    return {name: Entry(tuple(calls), moved) for name, calls in step_calls(side).items()}


def step_calls(side: int) -> dict[str, list[Callable[[], object]]]:
    copies = harness.copies_of(side * side * 16)
    sets = [make_places(side, seed) for seed in range(copies)]
    rule = make_rule(sets[0])
    return {
        name: [functools.partial(step, places, rule) for places in sets]
        for name, step in STEPS.items()
    }


def groups(*, smallest: bool = False) -> list[Group]:
    """The groups of the suite; ``smallest``: one small size."""
    return [
        Group(
            f"selective step, {side}x{side}",
            tuple(STEPS),
            ("eager",),
            functools.partial(build_step, side),
        )
        for side in ((128,) if smallest else SIDES)
    ]


@pytest.mark.parametrize(("group", "impl"), harness.each_impl(groups()), ids=harness.show)
def test_selective_step(benchmark, group, impl):
    harness.run_benchmark(benchmark, group, impl)


# -- tables ----------------------------------------------------------------------------------
def print_kernels() -> None:
    """Time of each kernel by the profiler, mean over calls."""
    for side in SIDES:
        calls = step_calls(side)
        for name in ("triton", "cuda c++"):
            run_all(calls[name])
            torch.cuda.synchronize()
            with torch.profiler.profile() as profile:
                for _ in range(3):
                    run_all(calls[name])
                torch.cuda.synchronize()
            total = 3 * len(calls[name])
            spent = [
                (event.key.split("<")[0].split("(")[0][-28:], event.self_device_time_total / total)
                for event in profile.key_averages()
                if event.device_type == torch.autograd.DeviceType.CUDA
            ]
            line = ", ".join(f"{key} {us:.1f}" for key, us in spent)
            print(f"{side} {name}, us a call: {line}")


def run_all(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def main() -> None:
    if "--kernels" in sys.argv:
        if not CUDA:
            raise SystemExit("--kernels: expected an NVIDIA GPU, found none")
        print_kernels()
        return
    title = "Selective step, 70 % pruned, fp32"
    table_main(__doc__.splitlines()[0], title, groups, f"{COMMAND} --table")


if __name__ == "__main__":
    main()
