"""Pictures of what commits change: who came back, in which layer, and in which places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resu_compile.training.stats import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLACK, ORANGE, BLUE, GREEN, RED = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00"
RATE = "resurrection rate: of the places that were pruned, these came back"
CHURN = "churn: of the active places, these came back"
JACCARD = "Jaccard: overlap of the active places before and after"
EVER = "Rs: places that were ever active"
MAX_LAYERS = 60
MAX_MASKS = 4
MAX_NUMBERS = 12  # cycles whose numbers have room beside each other


def of_event(records: Sequence[Record], event: str) -> list[Record]:
    """The records of one kind, in order."""
    return [record for record in records if record["event"] == event]


# -- resurrection ----------------------------------------------------------------------------


def resurrection_rate(counts: Record) -> float:
    """Share of the places that were pruned before a commit and are active after it, in [0, 1].

    Args:
        counts: one entry of ``CommitReport.as_dict()["weights"]``.
    """
    pruned_before = counts["total"] - counts["kept"] - counts["lost"]
    return float(counts["resurrected"] / pruned_before) if pruned_before else 0.0


def draw_resurrection(pyplot: Any, records: Sequence[Record]) -> Figure | None:
    """Resurrection rate, churn, Jaccard and Rs over the cycles; None without a commit."""
    commits = of_event(records, "commit")
    if not commits:
        return None
    totals = [r["report"]["weights"]["total"] for r in commits]
    cycles = [r["cycle"] for r in commits]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8.0, 6.4), sharex=True, layout="constrained"
    )
    _line(top, cycles, [100.0 * t["churn"] for t in totals], RED, "o", CHURN)
    _line(top, cycles, [100.0 * resurrection_rate(t) for t in totals], BLUE, "s", RATE)
    highest = max(100.0 * max(t["churn"], resurrection_rate(t)) for t in totals)
    every = 1 + (len(cycles) - 1) // MAX_NUMBERS
    for cycle, counts in list(zip(cycles, totals, strict=True))[::every]:
        height = 100.0 * max(counts["churn"], resurrection_rate(counts))
        top.annotate(
            f"{counts['resurrected']:,}",
            (cycle, height),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    top.set_ylim(0, 1.25 * highest or 1.0)
    top.set_ylabel("share in %")
    top.set_title("What came back at each commit (the numbers count places)", fontsize=11)
    _line(bottom, cycles, [100.0 * t["jaccard"] for t in totals], GREEN, "D", JACCARD)
    known = [
        (cycle, 100.0 * counts["ever_share"])
        for cycle, counts in zip(cycles, totals, strict=True)
        if counts.get("ever_share") is not None
    ]
    if known:
        _line(bottom, [c for c, _ in known], [v for _, v in known], ORANGE, "^", EVER)
    bottom.set_ylim(0, 104)
    bottom.set_ylabel("share in %")
    bottom.set_xlabel("cycle")
    bottom.set_xticks(_ticks(cycles))
    bottom.set_xlim(min(cycles) - 0.4, max(cycles) + 0.4)
    for axis in (top, bottom):
        axis.legend(loc="best", framealpha=0.9, fontsize=9)
    found: Figure = figure
    return found


def _line(
    axis: Axes, x: Sequence[int], y: Sequence[float], colour: str, marker: str, label: str
) -> None:
    axis.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.5, label=label)


def _ticks(cycles: Sequence[int]) -> list[int]:
    every = 1 + (len(cycles) - 1) // 15
    return list(cycles)[::every]


# -- layers ----------------------------------------------------------------------------------


def draw_layers(pyplot: Any, records: Sequence[Record]) -> Figure | None:
    """Sparsity and churn of each weight after each cycle; None without a change of masks."""
    changes = [r for r in records if r["event"] in ("prune", "commit") and r.get("layers")]
    if not changes:
        return None
    columns = list({r["cycle"]: r for r in changes}.values())  # the last change of each cycle
    everyone = list(columns[-1]["layers"])
    names = everyone[:MAX_LAYERS]
    churn = {r["cycle"]: r["report"]["weights"] for r in of_event(records, "commit")}
    sparsity = [[100.0 * r["layers"].get(name, 0.0) for r in columns] for name in names]
    came_back = [
        [100.0 * churn.get(r["cycle"], {}).get(name, {}).get("churn", 0.0) for r in columns]
        for name in names
    ]
    column = 0.9 if len(columns) <= MAX_NUMBERS else 0.3
    labels = 0.08 * max(map(len, names))
    figure, axes = pyplot.subplots(
        1,
        2,
        figsize=(5.4 + column * len(columns) + labels, 1.9 + 0.32 * len(names)),
        sharey=True,
        layout="constrained",
    )
    cycles = [r["cycle"] for r in columns]
    _heat(figure, axes[0], sparsity, cycles, "pruned in %", "Greys", (0.0, 100.0))
    top = max(max(row) for row in came_back)
    _heat(figure, axes[1], came_back, cycles, "churn in %", "Oranges", (0.0, top or 1.0))
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_title("Sparsity", fontsize=11)
    axes[1].set_title("Came back, of the active", fontsize=11)
    if len(names) < len(everyone):
        figure.suptitle(f"The first {len(names)} of {len(everyone)} weights", fontsize=11)
    found: Figure = figure
    return found


def _heat(
    figure: Figure,
    axis: Axes,
    rows: list[list[float]],
    cycles: list[int],
    label: str,
    colours: str,
    limits: tuple[float, float],
) -> None:
    """A table of shares in %, coloured; with the numbers where they have room."""
    image = axis.imshow(rows, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
    axis.grid(visible=False)
    axis.set_xlabel("end of cycle")
    every = 1 + (len(cycles) - 1) // 15
    axis.set_xticks(range(0, len(cycles), every), [str(c) for c in cycles[::every]])
    figure.colorbar(image, ax=axis, label=label)
    if len(cycles) > MAX_NUMBERS:
        return
    middle = 0.5 * (limits[0] + limits[1])
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            colour = "white" if value > middle else "black"
            axis.text(x, y, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)


# -- mask ------------------------------------------------------------------------------------


def draw_mask(pyplot: Any, records: Sequence[Record]) -> Figure | None:
    """The first weight's mask, up to ``MAX_MASKS`` times; None without a change of masks."""
    changes = [r for r in records if r["event"] in ("prune", "commit") and r.get("mask")]
    if not changes:
        return None
    shown = [changes[i] for i in _spread(len(changes), MAX_MASKS)]
    figure, grid = pyplot.subplots(
        1,
        len(shown),
        figsize=(2.9 * len(shown) + 1.4, 4.0),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, record in zip(grid[0], shown, strict=True):
        mask = record["mask"]
        rows, columns = mask["shape"][0], _product(mask["shape"][1:])
        image = axis.imshow(
            [[100.0 * share for share in row] for row in mask["density"]],
            cmap="Greys",
            vmin=0.0,
            vmax=100.0,
            interpolation="nearest",
            extent=(0, columns, rows, 0),
            aspect="auto",
        )
        axis.grid(visible=False)
        done = "pruning" if record["event"] == "prune" else "commit"
        share = 1.0 - record["layers"][mask["name"]]
        title = f"cycle {record['cycle']}, {done}\nstep {record['step']}, {share:.0%} active"
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("input")
    grid[0][0].set_ylabel("output")
    figure.colorbar(image, ax=grid[0].tolist(), label="active in a block, in %", shrink=0.8)
    name, shape = shown[-1]["mask"]["name"], shown[-1]["mask"]["shape"]
    figure.suptitle(f"Mask of {name} ({' x '.join(map(str, shape))})", fontsize=11)
    found: Figure = figure
    return found


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` indices below ``count``, evenly spread, the first and the last included."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
