"""The regression suite: every group of every benchmark, as ratios against its reference.

    python -m benchmarks.suite                     # run, print a table          (make bench)
    python -m benchmarks.suite --json PATH         # and write it as JSON
    python -m benchmarks.suite --save              # keep as this device's baseline (bench-save)
    python -m benchmarks.suite --compare           # against that baseline       (bench-compare)
    python -m benchmarks.suite --smoke             # smallest forms: does it run (bench-smoke)
    python -m benchmarks.suite -k 'M=16' ...       # groups whose name has the pattern

``--compare`` ends with 1 where a ratio fell by more than 10 % in two runs of its group, and with 2
where this device has no baseline. ``--save -k`` replaces only the ratios that it measured.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from tabulate import tabulate

from benchmarks import baseline, harness
from benchmarks.environment import describe, environment
from benchmarks.group_table import Measure, ratios_of, run, to_result
from benchmarks.harness import Group, case_name, say, times

FOLDER = Path(__file__).parent
COMMAND = "python -m benchmarks.suite"
TITLE = "Ratios against the fastest reference of each group"

PASSED, FELL, NO_BASELINE = 0, 1, 2
SAVED_RUNS = 3  # of which a baseline is the median
PATIENCE = 5  # of the second measurement of what fell

# Programs that measure more than ratios, and with what arguments they take seconds.
SMALLEST_ARGUMENTS = {
    "bench_decode": ("--tiny",),
    "bench_dispatch": ("--sweep", "2"),
    "bench_loading": ("--tiny",),
    "bench_pruning": ("--tiny",),
}


# -- which groups ----------------------------------------------------------------------------
def module_names(folder: Path = FOLDER) -> list[str]:
    """Every benchmark file of ``folder``, without its ending."""
    return sorted(path.stem for path in folder.glob("bench_*.py"))


def load_module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def all_groups(*, smallest: bool = False) -> list[Group]:
    """The groups of all benchmarks that have some.

    Raises:
        ValueError: two groups have one name.
    """
    groups: list[Group] = []
    for name in module_names():
        module = load_module(name)
        if hasattr(module, "groups"):
            groups += module.groups(smallest=smallest)
    seen: set[str] = set()
    for group in groups:
        if group.name in seen:
            raise ValueError(f"groups: expected names that differ, got {group.name!r} twice")
        seen.add(group.name)
    return groups


def ratio_cases(groups: Iterable[Group]) -> list[str]:
    """Names of the ratios that the groups give."""
    return [
        case_name(group, impl)
        for group in groups
        for impl in group.impls
        if impl not in group.references
    ]


# -- the baseline ----------------------------------------------------------------------------
def save(measured: dict[str, float], *, replace: bool, folder: Path = baseline.FOLDER) -> Path:
    """Store the ratios of this device; without ``replace`` beside those that it has already."""
    finite = {case: ratio for case, ratio in measured.items() if math.isfinite(ratio)}
    for case in sorted(set(measured) - set(finite)):
        say(f"not stored, has no ratio: {case}")
    if not replace:
        try:
            finite = {**baseline.load(environment()["device"], folder).ratios, **finite}
        except baseline.BaselineError as error:
            say(f"stored alone: {error}")
    return baseline.save(baseline.Baseline(environment(), finite), folder)


def compare(
    groups: Sequence[Group],
    *,
    whole: bool,
    measure: Measure = harness.measure,
    again: Measure | None = None,
    folder: Path = baseline.FOLDER,
) -> int:
    """Run the groups and judge them by the stored baseline of this device; returns the exit code.

    Args:
        groups: what to run.
        whole: whether these are all groups, so that a stored case that they lack is a failure.
        measure: takes the times of one group.
        again: the same for a group in which something fell; None for ``measure``.
        folder: where baselines are.
    """
    try:
        stored = baseline.load(environment()["device"], folder)
    except baseline.BaselineError as error:
        print(f"bench-compare: {error}")
        return NO_BASELINE
    for key in ("driver", "cuda", "torch", "triton"):
        before, now = stored.environment.get(key, ""), environment()[key]
        if before != now:
            print(f"note: the baseline was measured with {key} {before}, this is {now}")
    asked = None if whole else ratio_cases(groups)
    measured = ratios_of(run(groups, measure))
    found = baseline.compare(stored.ratios, measured, asked=asked)
    if found.fell:
        fallen = {change.case for change in found.fell}
        doubtful = [group for group in groups if fallen & set(ratio_cases([group]))]
        say(f"{len(fallen)} cases fell; {len(doubtful)} groups once more")
        measured = baseline.best_of(measured, ratios_of(run(doubtful, again or measure)))
        found = baseline.compare(stored.ratios, measured, asked=asked)
    report(found, stored)
    return PASSED if found.passed else FELL


def report(found: baseline.Comparison, stored: baseline.Baseline) -> None:
    """Print what changed, worst first."""
    changes = (*found.fell, *found.kept)
    rows = [
        [c.case, times(c.before), times(c.now), f"{c.share - 1:+.1%}", verdict]
        for c, verdict in zip(
            changes, ["FELL"] * len(found.fell) + [""] * len(found.kept), strict=True
        )
    ]
    print(f"against the baseline of {describe(stored.environment)}")
    print(tabulate(rows, headers=["case", "baseline", "now", "change", ""], disable_numparse=True))
    for case in found.new:
        print(f"not in the baseline: {case}")
    for case in found.missing:
        print(f"MISSING, in the baseline but not measured: {case}")
    if found.passed:
        print(f"passed: {len(found.kept)} ratios within 10 % of the baseline or above")
        return
    print(f"failed: {len(found.fell)} ratios fell by more than 10 %, {len(found.missing)} missing")
    for change in found.fell:
        print(f"  {change.case}: {times(change.before)} -> {times(change.now)}")


# -- does it run -----------------------------------------------------------------------------
def smoke(names: Sequence[str]) -> int:
    """Run each benchmark in its smallest form and check for finite results; the exit code.

    A benchmark has ``groups(smallest=True)`` or its arguments in ``SMALLEST_ARGUMENTS``.
    """
    rows, failed = [], False
    with harness.one_thread():
        for name in names:
            began = time.perf_counter()
            try:
                verdict = _smoke_one(name)
            except Exception as error:  # noqa: BLE001  whatever a benchmark raises, the others run
                verdict, failed = f"FAILED: {type(error).__name__}: {error}", True
            torch._dynamo.reset()
            rows.append([name, f"{time.perf_counter() - began:.1f}", verdict])
            say("  ".join(rows[-1]))
    print(f"smallest forms, {describe(environment())}")
    print(tabulate(rows, headers=["benchmark", "s", ""], disable_numparse=True))
    return FELL if failed else PASSED


def _smoke_one(name: str) -> str:
    module = load_module(name)
    if hasattr(module, "groups"):
        groups = module.groups(smallest=True)
        for group in groups:
            timings = harness.measure(group, smallest=True)
            for impl, ratio in harness.ratios(group, timings).items():
                if not (math.isfinite(ratio) and ratio > 0):
                    raise ValueError(f"{case_name(group, impl)}: expected a ratio, got {ratio}")
        return f"{len(groups)} groups" if groups else "needs a GPU"
    if name not in SMALLEST_ARGUMENTS:
        raise ValueError(f"{name}: expected a function groups or an entry in SMALLEST_ARGUMENTS")
    arguments = SMALLEST_ARGUMENTS[name]
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: ended with {done.returncode}: {done.stderr}")
    if not done.stdout.strip() or "nan" in done.stdout.lower().split():
        raise ValueError(f"{' '.join(arguments)}: expected finite results, got {done.stdout!r}")
    return " ".join(arguments)


# -- command line ----------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--save", action="store_true", help="keep as the baseline of this device")
    what.add_argument("--compare", action="store_true", help="fail where a ratio fell by 10 %%")
    what.add_argument("--smoke", action="store_true", help="only see that everything runs")
    what.add_argument("--list", action="store_true", help="only print the names of the groups")
    parser.add_argument("-k", default="", metavar="PATTERN", help="only groups whose name has it")
    parser.add_argument("--json", metavar="PATH", help="write the result there as well")
    args = parser.parse_args(arguments)
    if args.smoke:
        return smoke([name for name in module_names() if re.search(args.k, name)])
    every = all_groups()
    groups = [group for group in every if re.search(args.k, group.name)]
    if not groups:
        parser.error(f"-k {args.k!r}: expected what fits the name of a group, --list shows them")
    if args.list:
        print("\n".join(group.name for group in groups))
        return PASSED
    whole = len(groups) == len(every)
    if args.compare:
        # longer: a machine that other programs use has its quiet moments, too
        patient = functools.partial(harness.measure, patience=PATIENCE)
        return compare(groups, whole=whole, again=patient)
    records = run(groups)
    command = COMMAND + (f" -k {args.k!r}" if args.k else "")
    result = to_result(records, TITLE, command)
    print(result.text())
    if args.json:
        result.save(args.json)
    if args.save:
        runs = [ratios_of(records), *(ratios_of(run(groups)) for _ in range(SAVED_RUNS - 1))]
        print(f"stored in {save(baseline.median_of(runs), replace=whole)}")
    return PASSED if all(math.isfinite(r) for r in ratios_of(records).values()) else FELL


if __name__ == "__main__":
    sys.exit(main())
