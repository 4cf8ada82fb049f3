"""Tables of groups: the same columns whatever was measured, and the program around them."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks import harness
from benchmarks.harness import Group, Timing, case_name, say, times
from benchmarks.results import Result

Measure = Callable[[Group], dict[str, Timing]]
Records = list[dict[str, object]]


def run(groups: Sequence[Group], measure: Measure = harness.measure) -> Records:
    """One record for each implementation of each group; a group that fails gives NaN."""
    records: Records = []
    with harness.one_thread():
        for number, group in enumerate(groups, start=1):
            began = time.perf_counter()
            try:
                timings = measure(group)
            except (RuntimeError, AssertionError, ValueError) as error:
                say(f"[{number}/{len(groups)}] {group.name}: FAILED: {error}")
                timings = {impl: Timing(math.nan, math.nan) for impl in group.impls}
            found = harness.ratios(group, timings)
            records += [_record(group, impl, timings[impl], found) for impl in group.impls]
            short = ", ".join(f"{impl} {times(ratio)}" for impl, ratio in found.items())
            took = time.perf_counter() - began
            say(f"[{number}/{len(groups)}] {group.name}: {short} ({took:.1f} s)")
    return records


def _record(
    group: Group, impl: str, timing: Timing, found: Mapping[str, float]
) -> dict[str, object]:
    return {
        "case": case_name(group, impl),
        "group": group.name,
        "impl": impl,
        "us": timing.ms * 1e3,
        "spread": timing.spread,
        "ratio": found.get(impl),
        "bytes": timing.moved_bytes,
    }


def ratios_of(records: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """Case -> ratio, references left out."""
    return {
        str(record["case"]): record["ratio"]
        for record in records
        if isinstance(record["ratio"], float)
    }


def to_result(records: Sequence[Mapping[str, object]], title: str, command: str) -> Result:
    """The table of the records, in their order."""
    rows = []
    last = None
    for record in records:
        group, us, moved = record["group"], float(record["us"]), float(record["bytes"])
        ratio = "reference" if record["ratio"] is None else times(record["ratio"])
        rate = f"{moved / us / 1e3:.0f}" if moved and us == us else ""
        spread = f"{record['spread']:.1%}"
        rows.append(["" if group == last else group, record["impl"], _us(us), spread, rate, ratio])
        last = group
    headers = ("group", "implementation", "us", "spread", "GB/s", "ratio")
    return Result(title, command, headers, rows, records)


def _us(us: float) -> str:
    """Four digits, without an exponent."""
    return f"{us:.4g}" if us < 1e4 else f"{us:.0f}"


def table_main(
    description: str, title: str, groups: Callable[[], Sequence[Group]], command: str
) -> None:
    """A program that prints the table of its groups and writes it.

    Args:
        description: first line of its help.
        title: what the table says.
        groups: makes the groups.
        command: how it was called, for the file.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--table", action="store_true", help="print one table")
    parser.add_argument("--json", metavar="PATH", help="write the table there as well")
    args = parser.parse_args()
    if not args.table:
        parser.error("expected --table")
    found = groups()
    if not found:
        parser.error("expected a CUDA device, found none")
    result = to_result(run(found), title, command)
    print(result.text())
    if args.json:
        result.save(args.json)
