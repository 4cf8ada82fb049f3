"""What a call costs beyond the compiled graph: dispatch of the phase, and the toggle itself.

    python -m pytest benchmarks/bench_phase_toggle.py        # a group for each call and count
    python -m benchmarks.bench_phase_toggle --table          # ours beside plain torch.compile

Chains of tiny linear layers, so that nothing but overhead is timed; one thread, products stay
dense. "switched" alternates between SPARSE and DENSE and times the call after the switch.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import platform
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from tabulate import tabulate
from torch import Tensor, nn

import resu_compile as resu
from resu_compile import Phase

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
WEIGHTS = (10, 50)
CALLS = ("inference", "forward", "forward + backward")
IMPLS = ("inductor", "resu", "resu switched")
WIDTH, ROWS = 16, 4
REPEATS, CALLS_PER_REPEAT = 25, 40


class Chain(nn.Module):
    """``count`` linear layers, one after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@functools.cache
def models(count: int) -> tuple[Chain, Chain]:
    """A plain compiled model and the same sparsified, both warm in every call and phase."""
    torch.manual_seed(0)
    plain = Chain(count).to(DEVICE)
    ours = resu.sparsify(copy.deepcopy(plain), 0.7, sparse_threshold=1.0)
    plain.compile()
    for call in CALLS:
        for _ in range(3):
            run(plain, call)
            for phase in (Phase.DENSE, Phase.SPARSE):
                resu.controller(ours).set_phase(phase)
                run(ours, call)
    return plain, ours


def run(model: nn.Module, call: str) -> None:
    x = torch.ones(ROWS, WIDTH, device=DEVICE)
    if call == "inference":
        with torch.no_grad():
            model(x)
    elif call == "forward":
        model(x)
    else:
        model(x).sum().backward()


def microseconds(make: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """Mean time of ``make``; ``before`` each is not counted."""
    total = 0.0
    for _ in range(CALLS_PER_REPEAT):
        if before is not None:
            before()
        started = time.perf_counter()
        make()
        total += time.perf_counter() - started
    return total / CALLS_PER_REPEAT * 1e6


def timers(count: int, call: str) -> dict[str, Callable[[], float]]:
    plain, ours = models(count)
    ctl = resu.controller(ours)
    phases = itertools.cycle((Phase.DENSE, Phase.SPARSE))

    def steady() -> float:
        ctl.set_phase(Phase.SPARSE)
        run(ours, call)
        return microseconds(lambda: run(ours, call))

    def switched() -> float:
        return microseconds(lambda: run(ours, call), lambda: ctl.set_phase(next(phases)))

    return {
        "inductor": lambda: microseconds(lambda: run(plain, call)),
        "resu": steady,
        "resu switched": switched,
    }


# -- pytest-benchmark ------------------------------------------------------------------------
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("count", WEIGHTS, ids=lambda n: f"{n} weights")
def test_phase_toggle(benchmark, count, call, impl):
    benchmark.group = f"call of {count} weights, {call}"
    plain, ours = models(count)
    model = plain if impl == "inductor" else ours
    ctl = resu.controller(ours)
    ctl.set_phase(Phase.SPARSE)
    if impl == "resu switched":
        phases = itertools.cycle((Phase.DENSE, Phase.SPARSE))
        benchmark.pedantic(
            run, (model, call), setup=lambda: ctl.set_phase(next(phases)), rounds=REPEATS
        )
    else:
        benchmark(run, model, call)


# -- one table -------------------------------------------------------------------------------
def print_table() -> None:
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for count, call in itertools.product(WEIGHTS, CALLS):
        named = timers(count, call)
        samples: dict[str, list[float]] = {impl: [] for impl in IMPLS}
        for _ in range(REPEATS):  # in turns: a drift of the clocks meets all alike
            for impl in IMPLS:
                samples[impl].append(named[impl]())
        # the fastest: other programs on the same cores only ever add time
        best = {impl: min(own) for impl, own in samples.items()}
        extra = [best[impl] - best["inductor"] for impl in IMPLS[1:]]
        middle = statistics.median(samples["resu"]) - statistics.median(samples["inductor"])
        rows.append([count, call, *best.values(), *extra, middle])
    torch.set_num_threads(threads)
    where = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU, 1 thread"
    print(f"microseconds of a call, fastest of {REPEATS} x {CALLS_PER_REPEAT}; {where}, ", end="")
    print(f"torch {torch.__version__}")
    head = ["weights", "call", *IMPLS, "extra", "extra switched", "extra (median)"]
    print(tabulate(rows, headers=head, floatfmt=".1f"))
    print(f"took {time.perf_counter() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print one table")
    if not parser.parse_args().table:
        parser.error("expected --table")
    print_table()


if __name__ == "__main__":
    main()
