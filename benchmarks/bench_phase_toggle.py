"""What a call costs beyond the compiled graph: dispatch of the phase, and the toggle itself.

    python -m pytest benchmarks/bench_phase_toggle.py        # a group for each call and count
    python -m benchmarks.bench_phase_toggle --table          # ours beside plain torch.compile

Chains of tiny linear layers, so that nothing but overhead is timed; one thread, products stay
dense. "switched" alternates between SPARSE and DENSE: the groups time the switch and the call after
it, the table only the call.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resu_compile as resu
from benchmarks import harness
from benchmarks.harness import DEVICE, Entry, Group
from benchmarks.results import Result
from resu_compile import Phase

COMMAND = "python -m benchmarks.bench_phase_toggle"

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


# -- groups ----------------------------------------------------------------------------------
def build_calls(count: int, call: str) -> dict[str, Entry]:
    plain, ours = models(count)
    ctl = resu.controller(ours)
    phases = itertools.cycle((Phase.DENSE, Phase.SPARSE))
    ctl.set_phase(Phase.SPARSE)

    def steady() -> None:
        ctl.set_phase(Phase.SPARSE)
        for _ in range(CALLS_PER_REPEAT):
            run(ours, call)

    def switched() -> None:
        for _ in range(CALLS_PER_REPEAT):
            ctl.set_phase(next(phases))
            run(ours, call)

    def inductor() -> None:
        for _ in range(CALLS_PER_REPEAT):
            run(plain, call)

    made = {"inductor": inductor, "resu": steady, "resu switched": switched}
    return {impl: Entry((calls,)) for impl, calls in made.items()}


def groups(*, smallest: bool = False) -> list[Group]:
    """The groups of the suite, of ``CALLS_PER_REPEAT`` calls each; ``smallest``: two weights."""
    return [
        Group(
            f"{CALLS_PER_REPEAT} calls of {count} weights, {call}",
            IMPLS,
            ("inductor",),
            functools.partial(build_calls, count, call),
            graph=False,
        )
        for count in ((2,) if smallest else WEIGHTS[:1])
        for call in (CALLS[:1] if smallest else CALLS)
    ]


@pytest.mark.parametrize(("group", "impl"), harness.each_impl(groups()), ids=harness.show)
def test_phase_toggle(benchmark, group, impl):
    harness.run_benchmark(benchmark, group, impl)


# -- one table -------------------------------------------------------------------------------
def make_table() -> Result:
    rows = []
    with harness.one_thread():
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
            numbers = [f"{us:.1f}" for us in (*best.values(), *extra, middle)]
            rows.append([str(count), call, *numbers])
    title = f"Microseconds of a call, fastest of {REPEATS} x {CALLS_PER_REPEAT}"
    head = ["weights", "call", *IMPLS, "extra", "extra switched", "extra (median)"]
    return Result(title, f"{COMMAND} --table", head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print one table")
    parser.add_argument("--json", metavar="PATH", help="write the table there as well")
    args = parser.parse_args()
    if not args.table:
        parser.error("expected --table")
    result = make_table()
    print(result.text())
    if args.json:
        result.save(args.json)


if __name__ == "__main__":
    main()
