"""Plots of a result of bench_sparse_linear: speed-up over sparsity, and the roofline.

    python -m benchmarks.plot_performance RESULT.json OUT_DIR

Writes ``speedup_<device>.svg``, one panel a weight, one line a batch size, and
``roofline_<device>.svg``, each kernel's best products against the measured ceilings. Needs
matplotlib (``pip install resu-compile[plot]``).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.environment import describe, slug
from benchmarks.results import Result, ResultError, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

MARKERS = {"rows": "o", "tiles": "s", "csr": "^"}
DENSE_MARKER = "x"


def cells_of(result: Result) -> list[Record]:
    """The measured products of a result.

    Raises:
        ResultError: it has none, so it is no result of bench_sparse_linear.
    """
    cells = [record for record in result.records if "speedup" in record]
    if not cells:
        raise ResultError(f"{result.title}: expected records with a speedup, found none")
    return cells


def ceilings_of(result: Result) -> dict[str, float]:
    """Measured rates: read and copy in bytes a second, flop in operations a second."""
    for record in result.records:
        if "ceilings" in record:
            return {key: float(rate) for key, rate in dict(record["ceilings"]).items()}
    raise ResultError(f"{result.title}: expected a record of ceilings, found none")


def fastest(cells: Sequence[Record]) -> list[Record]:
    """The fastest kernel of each weight, sparsity and batch size."""
    best: dict[tuple[Any, ...], Record] = {}
    for cell in cells:
        key = (cell["name"], cell["sparsity"], cell["M"])
        if key not in best or cell["us"] < best[key]["us"]:
            best[key] = cell
    return list(best.values())


def byte_limit(cells: Sequence[Record], sparsity: float) -> float:
    """Speed-up of a bitmap and the kept values over the dense weight, if bytes were all."""
    dense = next(cell for cell in cells if cell["sparsity"] == 0)
    itemsize = dense["bytes"] / (dense["N"] * dense["K"])
    return itemsize / (itemsize * (1 - sparsity) + 1 / 8)


# -- speed-up over sparsity ------------------------------------------------------------------
def plot_speedup(result: Result) -> Figure:
    """One panel a weight: speed-up of the fastest sparse kernel, a line for each batch size."""
    import matplotlib.pyplot as plt

    cells = fastest(cells_of(result))
    names = list(dict.fromkeys(cell["name"] for cell in cells))
    columns = min(2, len(names))
    lines = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(4.6 * columns, 3.2 * lines),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for ax, name in zip(axes.flat, names, strict=False):
        draw_panel(ax, [cell for cell in cells if cell["name"] == name])
        shape = next(f"{cell['N']}x{cell['K']}" for cell in cells if cell["name"] == name)
        ax.set_title(f"{name} {shape}", fontsize=9)
    for ax in list(axes.flat)[len(names) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("pruned")
    for ax in axes[:, 0]:
        ax.set_ylabel("speed-up over dense")
    label_markers(axes.flat[0], cells)
    axes.flat[0].legend(fontsize=7, ncols=2, loc="upper left")
    figure.suptitle(caption(result), fontsize=8)
    figure.tight_layout()
    return figure


def draw_panel(ax: Axes, cells: Sequence[Record]) -> None:
    import matplotlib.pyplot as plt

    batch = sorted({cell["M"] for cell in cells})
    colors = plt.get_cmap("viridis")
    sparsities = sorted({cell["sparsity"] for cell in cells if cell["sparsity"]})
    for i, rows in enumerate(batch):
        own = sorted(
            (c for c in cells if c["M"] == rows and c["sparsity"]), key=lambda c: c["sparsity"]
        )
        x, y = [c["sparsity"] for c in own], [c["speedup"] for c in own]
        color = colors(i / max(len(batch) - 1, 1) * 0.9)
        ax.plot(x, y, color=color, label=f"M={rows}", linewidth=1.2)
        for cell in own:
            marker = MARKERS.get(cell["kernel"], ".")
            ax.plot(cell["sparsity"], cell["speedup"], marker, color=color, markersize=4)
    limits = [byte_limit(cells, s) for s in sparsities]
    ax.plot(sparsities, limits, "--", color="gray", linewidth=1, label="bytes alone")
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    ax.set_xticks(sparsities, [f"{s:.0%}" for s in sparsities])
    ax.grid(visible=True, linewidth=0.3)


# -- roofline --------------------------------------------------------------------------------
def plot_roofline(result: Result) -> Figure:
    """Operations a second of each product over its operations a byte, under the ceilings.

    Only kept weights count as operations, only stored bytes as bytes: what the kernel does, not
    what it saves.
    """
    import matplotlib.pyplot as plt

    cells, top = fastest(cells_of(result)), ceilings_of(result)
    figure, ax = plt.subplots(figsize=(6.4, 4.2))
    sparsities = sorted({cell["sparsity"] for cell in cells})
    colors = plt.get_cmap("plasma")
    points = [(intensity(cell), cell) for cell in cells]
    for i, s in enumerate(sparsities):
        color = "black" if not s else colors(i / len(sparsities) * 0.9)
        for kernel in dict.fromkeys(c["kernel"] for c in cells if c["sparsity"] == s):
            own = [(x, c) for x, c in points if c["sparsity"] == s and c["kernel"] == kernel]
            marker = MARKERS.get(kernel, DENSE_MARKER)
            x, y = [x for x, _ in own], [c["flop_per_s"] / 1e12 for _, c in own]
            ax.plot(x, y, marker, color=color, markersize=4, linestyle="none")
        ax.plot([], [], "o", color=color, markersize=4, label=f"{s:.0%} pruned" if s else "dense")
    low, high = min(x for x, _ in points) / 1.5, max(x for x, _ in points) * 3
    ridge = top["flop"] / top["read"]
    xs = sorted({low, *([ridge] if low < ridge < high else []), high})
    roof = [min(top["read"] * x, top["flop"]) / 1e12 for x in xs]
    label = f"{top['read'] / 1e12:.2f} TB/s, {top['flop'] / 1e12:.0f} TFLOP/s"
    ax.plot(xs, roof, color="gray", linewidth=1.2, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("operations a byte of stored weight")
    ax.set_ylabel("TFLOP/s on kept weights")
    ax.grid(visible=True, which="both", linewidth=0.2)
    label_markers(ax, cells)
    ax.legend(fontsize=7, loc="lower right")
    figure.suptitle(caption(result), fontsize=8)
    figure.tight_layout()
    return figure


def label_markers(ax: Axes, cells: Sequence[Record]) -> None:
    """Entries of the legend for the kernels that are drawn."""
    shown = {cell["kernel"] for cell in cells}
    for kernel in (k for k in MARKERS if k in shown):
        ax.plot([], [], MARKERS[kernel], color="gray", markersize=4, label=kernel)


def intensity(cell: Record) -> float:
    """Operations on kept weights for each byte of stored weight."""
    kept = cell["N"] * cell["K"] * (1 - cell["sparsity"])
    return float(2.0 * cell["M"] * kept / cell["bytes"])


def caption(result: Result) -> str:
    return describe(result.environment)


# -- command line ----------------------------------------------------------------------------
def save_plots(result: Result, folder: Path) -> list[Path]:
    """Both plots as SVG files in ``folder``; returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    # the same input gives the same bytes: no date, no random ids
    mpl.rcParams.update({"svg.hashsalt": "resu_compile", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    name = slug(result.environment["device"])
    files = []
    for what, draw in (("speedup", plot_speedup), ("roofline", plot_roofline)):
        figure = draw(result)
        path = folder / f"{what}_{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        files.append(path)
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="JSON of bench_sparse_linear --table")
    parser.add_argument("folder", type=Path, help="where the plots go")
    args = parser.parse_args(arguments)
    for path in save_plots(load(args.result), args.folder):
        print(path)


if __name__ == "__main__":
    main()
