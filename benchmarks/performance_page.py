"""Tables of docs/performance.md, made from the result files: no number there is typed by hand.

    python -m benchmarks.performance_page                    # write the tables anew
    python -m benchmarks.performance_page --check            # 1 where the page is not up to date

A table stands between two comments, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, and comes
from ``benchmarks/results/NAME.json``. ``NAME:losing`` gives the products of that result in which
dense is faster, ``NAME:only=top-k_mask`` those rows of a result of the suite whose group begins so.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.group_table import to_result
from benchmarks.plot_performance import cells_of, fastest
from benchmarks.results import Result, load

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = Path(__file__).parent / "results"

REGION = re.compile(r"<!-- begin (?P<name>\S+) -->\n.*?<!-- end (?P=name) -->", re.DOTALL)
OPENING = re.compile(r"<!-- begin (\S+) -->")


class PageError(ValueError):
    """A page whose regions cannot be filled."""


# -- what a region may show ------------------------------------------------------------------
def losing(result: Result) -> str:
    """Products in which dense is faster than every sparse kernel, by weight and sparsity."""
    lost: dict[tuple[str, float], list[str]] = {}
    measured = [cell for cell in fastest(cells_of(result)) if cell["sparsity"]]
    for cell in measured:
        if cell["speedup"] < 1:
            shown = f"M={cell['M']} ({cell['speedup']:.2f}x)"
            lost.setdefault((cell["name"], cell["sparsity"]), []).append(shown)
    if not lost:
        return f"Dense is faster in none of the {len(measured)} products measured."
    count = sum(len(own) for own in lost.values())
    lines = [f"- {name}, {s:.0%}: {', '.join(own)}" for (name, s), own in lost.items()]
    head = f"Dense is faster than the best sparse kernel in {count} of {len(measured)} products:"
    return "\n".join([head, "", *lines])


def only(result: Result, prefix: str) -> str:
    """Groups of a result of the suite whose names begin with ``prefix``; _ stands for a space.

    Raises:
        PageError: there are none.
    """
    prefix = prefix.replace("_", " ")
    records = [r for r in result.records if str(r.get("group", "")).startswith(prefix)]
    if not records:
        raise PageError(f"{result.title}: expected groups that begin with {prefix!r}, found none")
    command = f"python -m benchmarks.suite -k {prefix!r}"
    return replace(
        to_result(records, result.title, command), environment=result.environment
    ).markdown()


ONLY = "only="
VIEWS: dict[str, Callable[[Result], str]] = {"": Result.markdown, "losing": losing}


# -- the page --------------------------------------------------------------------------------
def names_of(text: str) -> list[str]:
    """Names of the regions of a page, in order."""
    return OPENING.findall(text)


def fill(text: str, folder: Path = RESULTS) -> str:
    """``text`` with every region made anew from the results in ``folder``.

    Raises:
        PageError: a region is not closed, has no result, or asks for an unknown view.
    """
    return fill_regions(text, partial(render, folder=folder))


def fill_regions(text: str, make: Callable[[str], str]) -> str:
    """``text`` with every region made anew.

    Args:
        text: of a page.
        make: name of a region -> what stands in it.

    Raises:
        PageError: a region is not closed.
    """

    def region(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- begin {name} -->\n{make(name)}\n<!-- end {name} -->"

    closed = [match["name"] for match in REGION.finditer(text)]
    if names_of(text) != closed:
        open_ones = [name for name in names_of(text) if name not in closed]
        raise PageError(f"page: expected an end for each region, got none for {open_ones}")
    return REGION.sub(region, text)


def render(name: str, folder: Path = RESULTS) -> str:
    """What stands in the region ``name``."""
    file, _, view = name.partition(":")
    path = folder / f"{file}.json"
    if not path.exists():
        stored = sorted(found.stem for found in folder.glob("*.json"))
        raise PageError(f"{name}: expected {path}; results stored: {', '.join(stored) or 'none'}")
    result = load(path)
    if view.startswith(ONLY):
        return only(result, view.removeprefix(ONLY))
    if view not in VIEWS:
        raise PageError(f"{name}: expected a view of {[*VIEWS, ONLY]}, got {view!r}")
    return VIEWS[view](result)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, 1 if not up to date")
    args = parser.parse_args(arguments)
    text = PAGE.read_text(encoding="utf-8")
    filled = fill(text)
    if args.check:
        if filled != text:
            print(f"{PAGE}: not up to date; `python -m benchmarks.performance_page` writes it")
        return int(filled != text)
    PAGE.write_text(filled, encoding="utf-8")
    print(f"{PAGE}: {len(names_of(text))} regions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
