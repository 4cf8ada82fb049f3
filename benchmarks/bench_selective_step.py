"""One selective step on the pruned places of a weight, and the exact top-k mask by itself.

    python -m pytest benchmarks/bench_selective_step.py      # a group for each shape
    python -m benchmarks.bench_selective_step --table        # beside the floor by bytes
    python -m benchmarks.bench_selective_step --kernels      # time of each kernel (CUDA)

70 % pruned; half of the pruned places screened, a fifth selected. On CUDA: fp32, over copies that
together are twice L2; "graph" is the time on the device in a CUDA graph, "call" that of calls that
Python launches one after the other. Results are checked before they are timed.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
from collections.abc import Callable

import pytest
import torch
from tabulate import tabulate
from torch import Tensor

from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.mask_bits import pack_mask, unpack_mask
from resu_compile.kernels.radix_select import (
    topk_mask,
    topk_mask_cuda,
    topk_mask_reference,
    topk_mask_triton,
    topk_module,
)
from resu_compile.kernels.selective_step import (
    Places,
    Rule,
    selective_step_,
    selective_step_cuda,
    selective_step_triton,
    step_module,
)
from resu_compile.runtime.stopwatch import (
    capture_calls,
    copies_beyond_l2,
    device_ms,
    interleaved_ms,
    wall_ms,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIDES = (2048, 4096) if CUDA else (512, 1024)
SPARSITY, SCREEN, SELECT = 0.7, 0.5, 0.2
FLOOR_BYTES = 28 + 1 / 8  # a weight: read W, g, m, v and a bit, write W, m, v
MASK_FLOOR_BYTES = 4 + 1  # read a score, write a bool
REPEATS, BUDGET_S = 15, 1.0
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


STEPS: dict[str, Step] = {"eager": step_eager, "op": step_op}
MASKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "kthvalue": topk_mask_reference,
    "torch.topk": mask_topk,
    "op": topk_mask,
}
if CUDA and HAS_TRITON:
    STEPS |= {"triton": selective_step_triton, "cuda c++": step_cuda}
    MASKS |= {"triton": mask_triton, "cuda c++": mask_cuda}


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


def check_mask(make: Callable[[Tensor, int], Tensor], score: Tensor, k: int) -> None:
    mask = make(score, k)
    assert int(mask.sum()) == k
    assert score[mask].min() >= score[~mask].max()


# -- timing ----------------------------------------------------------------------------------
def copies(side: int, bytes_each: float) -> int:
    if not CUDA:
        return 1
    l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return copies_beyond_l2(int(side * side * bytes_each), l2_bytes)


def times_ms(calls: dict[str, list[Callable[[], object]]]) -> dict[str, tuple[float, float]]:
    """For each name: milliseconds of one call in a CUDA graph (NaN on the CPU), and launched."""
    clock = device_ms if CUDA else wall_ms
    runs: list[Callable[[], object]] = []
    for own in calls.values():
        runs.append(functools.partial(_all, own))
        if CUDA:
            runs.append(capture_calls(own).replay)
    medians = [statistics.median(x) for x in interleaved_ms(tuple(runs), clock, BUDGET_S, REPEATS)]
    per = 2 if CUDA else 1
    return {
        name: (
            medians[per * i + 1] / len(own) if CUDA else float("nan"),
            medians[per * i] / len(own),
        )
        for i, (name, own) in enumerate(calls.items())
    }


def _all(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def copy_bytes_per_ms() -> float:
    """Bytes read and written by a large copy in a millisecond, the ceiling of the device."""
    source = torch.randn(2**28 if CUDA else 2**24, device=DEVICE)
    target = torch.empty_like(source)
    clock = device_ms if CUDA else wall_ms
    (samples,) = interleaved_ms((lambda: target.copy_(source),), clock, BUDGET_S, REPEATS)
    return 2 * source.nbytes / min(samples)


def step_calls(side: int) -> dict[str, list[Callable[[], object]]]:
    sets = [make_places(side, seed) for seed in range(copies(side, 16))]
    rule = make_rule(sets[0])
    return {
        name: [functools.partial(step, places, rule) for places in sets]
        for name, step in STEPS.items()
    }


def mask_calls(side: int) -> dict[str, list[Callable[[], object]]]:
    scores = [make_places(side, seed).weight for seed in range(copies(side, 4))]
    k = int((1 - SPARSITY) * side * side)
    return {
        name: [functools.partial(make, score, k) for score in scores]
        for name, make in MASKS.items()
    }


# -- pytest-benchmark ------------------------------------------------------------------------
def run_benchmark(benchmark, calls: list[Callable[[], object]]) -> None:
    """Time all calls, on CUDA in a graph."""
    run = functools.partial(_all, calls)
    if CUDA:
        graph = capture_calls(calls)

        def run() -> None:
            graph.replay()
            torch.cuda.synchronize()

    benchmark(run)
    benchmark.extra_info["calls"] = len(calls)


@pytest.mark.parametrize("impl", STEPS)
@pytest.mark.parametrize("side", SIDES)
def test_selective_step(benchmark, side, impl):
    benchmark.group = f"selective step {side}x{side}"
    check_step(STEPS[impl], side)
    run_benchmark(benchmark, step_calls(side)[impl])


@pytest.mark.parametrize("impl", MASKS)
@pytest.mark.parametrize("side", SIDES)
def test_topk_mask(benchmark, side, impl):
    benchmark.group = f"top-k mask {side}x{side}"
    check_mask(MASKS[impl], make_places(side, 0).weight, int((1 - SPARSITY) * side * side))
    run_benchmark(benchmark, mask_calls(side)[impl])


# -- tables ----------------------------------------------------------------------------------
def print_table() -> None:
    where = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU"
    rate = copy_bytes_per_ms()
    print(f"{where}, torch {torch.__version__}, copy {rate / 1e9:.2f} TB/s, fp32")
    rows = []
    for side in SIDES:
        for what, floor_bytes, calls in (
            ("step", FLOOR_BYTES, step_calls(side)),
            ("mask", MASK_FLOOR_BYTES, mask_calls(side)),
        ):
            for name in calls:
                if what == "step":
                    check_step(STEPS[name], side)
                else:
                    score = make_places(side, 0).weight
                    check_mask(MASKS[name], score, int((1 - SPARSITY) * side * side))
            floor = side * side * floor_bytes / rate
            for name, (graph, call) in times_ms(calls).items():
                best = graph if CUDA else call
                rows.append([f"{what} {side}x{side}", name, graph, call, floor, best / floor])
    head = ["", "implementation", "graph ms", "call ms", "floor ms", "of floor"]
    print(tabulate(rows, headers=head, floatfmt=("", "", ".4f", ".4f", ".4f", ".2f")))


def print_kernels() -> None:
    """Time of each kernel by the profiler, mean over calls."""
    for side in SIDES:
        for what, calls in (("step", step_calls(side)), ("mask", mask_calls(side))):
            for name in ("triton", "cuda c++"):
                _all(calls[name])
                torch.cuda.synchronize()
                with torch.profiler.profile() as profile:
                    for _ in range(3):
                        _all(calls[name])
                    torch.cuda.synchronize()
                total = 3 * len(calls[name])
                spent = [
                    (
                        event.key.split("<")[0].split("(")[0][-28:],
                        event.self_device_time_total / total,
                    )
                    for event in profile.key_averages()
                    if event.device_type == torch.autograd.DeviceType.CUDA
                ]
                line = ", ".join(f"{key} {us:.1f}" for key, us in spent)
                print(f"{what} {side} {name}, us a call: {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print one table")
    parser.add_argument("--kernels", action="store_true", help="print times of the kernels")
    args = parser.parse_args()
    if not (args.table or args.kernels):
        parser.error("expected --table or --kernels")
    if args.kernels:
        print_kernels()
    if args.table:
        print_table()


if __name__ == "__main__":
    main()
