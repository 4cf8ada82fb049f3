"""Pictures of a training run, from its stats file alone.

learning_curve.png: loss, evaluations and sparsity over the steps, the stages shaded;
resurrection.png: how many came back in each cycle, and how much the masks changed;
layers.png: sparsity and churn of each weight after each cycle;
mask.png: the mask of the first weight from the first pruning to the last commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resu_compile.errors import ArgumentError
from resu_compile.training.stats import Record, read_stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLACK, ORANGE, BLUE, GREEN, RED = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00"
STAGES = {
    "warmup": ("#999999", "dense warm-up"),
    "stabilize": (ORANGE, "stabilize"),
    "resu": (RED, "RESU"),
    "recover": (BLUE, "recovery"),
}
RATE = "resurrection rate: of the places that were pruned, these came back"
CHURN = "churn: of the active places, these came back"
JACCARD = "Jaccard: overlap of the active places before and after"
EVER = "Rs: places that were ever active"
LOOK = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
}
MAX_LAYERS = 60
MAX_MASKS = 4
MAX_NUMBERS = 12  # cycles whose numbers have room beside each other
LOG_FROM = 20.0  # a loss that falls by more than this factor is drawn on a logarithmic axis
DPI = 130


def plot_stats(stats_path: str | Path, output_folder: str | Path) -> list[Path]:
    """Draw what the stats file of a run tells, and write it as PNG files.

    A picture whose records are missing (a run without commits has no resurrections) is left out.

    Args:
        stats_path: JSON lines, as ``TrainingConfig.stats`` names them.
        output_folder: made if it is missing; pictures of these names in it are replaced.

    Returns:
        The files written, in the order of the list at the top of this module.

    Raises:
        ArgumentError: matplotlib is not installed, or the file is no stats file or has nothing to
            draw.
    """
    records = read_stats(stats_path)
    for record in records:
        if not isinstance(record.get("event"), str) or not isinstance(record.get("step"), int):
            raise ArgumentError(
                f"{stats_path}: expected records with an event and a step, got {str(record)[:80]!r}"
            )
    drawings = {
        "learning_curve.png": _learning_curve,
        "resurrection.png": _resurrection,
        "layers.png": _layers,
        "mask.png": _mask,
    }
    pyplot = _pyplot()
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with pyplot.rc_context(LOOK):
        for name, draw in drawings.items():
            figure = draw(pyplot, records)
            if figure is None:
                continue
            try:
                figure.savefig(folder / name, dpi=DPI)
            finally:
                pyplot.close(figure)
            written.append(folder / name)
    if not written:
        raise ArgumentError(
            f"{stats_path}: expected steps, evaluations, prunings or commits to draw, found none"
        )
    return written


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError:
        raise ArgumentError(
            "plot: expected matplotlib to be installed for pictures, it is not; "
            "pip install resu-compile[plot]"
        ) from None
    mpl.use("Agg")  # writes files, opens no window
    from matplotlib import pyplot

    return pyplot


# -- learning curve --------------------------------------------------------------------------


def stage_bands(records: Sequence[Record]) -> list[tuple[int, int, str, int]]:
    """Where each stage began and ended: (first step, last step, stage, cycle).

    The trainer writes a step record at the end of each span, so the last record of a stage is its
    end and the next one's beginning.
    """
    bands: list[tuple[int, int, str, int]] = []
    for record in _of(records, "step"):
        step, stage, cycle = record["step"], record["stage"], record["cycle"]
        if bands and bands[-1][2:] == (stage, cycle):
            bands[-1] = (bands[-1][0], step, stage, cycle)
        else:
            bands.append((bands[-1][1] if bands else 0, step, stage, cycle))
    return bands


def _learning_curve(pyplot: Any, records: Sequence[Record]) -> Figure | None:
    steps = [r for r in _of(records, "step") if r.get("loss") is not None]
    evaluations = [r for r in _of(records, "evaluation") if r.get("metrics")]
    if not steps and not evaluations:
        return None
    names = list(dict.fromkeys(name for r in evaluations for name in r["metrics"]))
    alone = [name for name in names if "loss" not in name.lower()]
    panels = 2 + len(alone)
    figure, grid = pyplot.subplots(
        panels,
        1,
        figsize=(8.6, 3.6 + 1.7 * (panels - 1)),
        sharex=True,
        squeeze=False,
        height_ratios=(2.4, *[1.5] * len(alone), 1),
        layout="constrained",
    )
    axes: list[Axes] = list(grid[:, 0])
    top, bottom = axes[0], axes[-1]
    top.plot(
        [r["step"] for r in steps],
        [r["loss"] for r in steps],
        color=BLACK,
        linewidth=1.1,
        alpha=0.75,
        label="training loss",
    )
    for name in names:
        axis = axes[1 + alone.index(name)] if name in alone else top
        _draw_metric(axis, evaluations, name)
    for axis in axes[1:-1]:
        axis.margins(y=0.15)
    _scale_loss(top, [r["loss"] for r in steps])
    top.set_ylabel("loss")
    _draw_sparsity(bottom, records)
    bottom.set_xlabel("optimizer step")
    last = max(r["step"] for r in records)
    bottom.set_xlim(0, max(last, 1))
    for axis in axes:
        _shade(axis, stage_bands(records))
    handles, labels = top.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return _figure(figure)


def _draw_metric(axis: Axes, evaluations: Sequence[Record], name: str) -> None:
    found = [(r["step"], r["metrics"].get(name)) for r in evaluations]
    points = [(step, value) for step, value in found if value is not None]
    if not points:
        return
    axis.plot(
        [step for step, _ in points],
        [value for _, value in points],
        color=BLUE,
        linewidth=1.4,
        marker="o",
        markersize=3.5,
        label=f"evaluation: {name}",
    )
    step, value = points[-1]
    axis.annotate(
        f"{value:.4g}",
        (step, value),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=BLUE,
        annotation_clip=False,
    )
    if "loss" not in name.lower():
        axis.set_ylabel(name)


def _scale_loss(axis: Axes, losses: Sequence[float]) -> None:
    if losses and min(losses) > 0.0 and max(losses) > LOG_FROM * min(losses):
        axis.set_yscale("log")


def _draw_sparsity(axis: Axes, records: Sequence[Record]) -> None:
    """Stairs of the sparsity that held at each step; in the warm-up it is zero."""
    points = [(0, 0.0)]
    for record in records:
        if record["event"] in ("step", "prune", "commit", "end"):
            share = record.get("sparsity")
            if share is not None:
                points.append((record["step"], 100.0 * share))
    axis.plot(
        [step for step, _ in points],
        [share for _, share in points],
        color=BLACK,
        linewidth=1.4,
        drawstyle="steps-post",
    )
    for event, marker, colour in (("prune", "v", ORANGE), ("commit", "^", RED)):
        found = [r for r in _of(records, event) if r.get("sparsity") is not None]
        axis.plot(
            [r["step"] for r in found],
            [100.0 * r["sparsity"] for r in found],
            color=colour,
            marker=marker,
            linestyle="none",
            markersize=5,
            label="pruning" if event == "prune" else "commit",
        )
    axis.set_ylim(-4, 104)
    axis.set_ylabel("pruned in %")
    if any(r["event"] in ("prune", "commit") for r in records):
        axis.legend(loc="lower right", ncols=2, framealpha=0.9)


def _shade(axis: Axes, bands: Sequence[tuple[int, int, str, int]]) -> None:
    labelled: set[str] = set()
    for start, stop, stage, _ in bands:
        if stage not in STAGES:
            continue
        colour, name = STAGES[stage]
        label = "_" if name in labelled else name
        axis.axvspan(start, stop, color=colour, alpha=0.15, linewidth=0, label=label)
        labelled.add(name)


# -- resurrection ----------------------------------------------------------------------------


def resurrection_rate(counts: Record) -> float:
    """Share of the places that were pruned before a commit and are active after it, in [0, 1].

    Args:
        counts: one entry of ``CommitReport.as_dict()["weights"]``.
    """
    pruned_before = counts["total"] - counts["kept"] - counts["lost"]
    return float(counts["resurrected"] / pruned_before) if pruned_before else 0.0


def _resurrection(pyplot: Any, records: Sequence[Record]) -> Figure | None:
    commits = _of(records, "commit")
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
    return _figure(figure)


def _line(
    axis: Axes, x: Sequence[int], y: Sequence[float], colour: str, marker: str, label: str
) -> None:
    axis.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.5, label=label)


def _ticks(cycles: Sequence[int]) -> list[int]:
    every = 1 + (len(cycles) - 1) // 15
    return list(cycles)[::every]


# -- layers ----------------------------------------------------------------------------------


def _layers(pyplot: Any, records: Sequence[Record]) -> Figure | None:
    changes = [r for r in records if r["event"] in ("prune", "commit") and r.get("layers")]
    if not changes:
        return None
    columns = list({r["cycle"]: r for r in changes}.values())  # the last change of each cycle
    everyone = list(columns[-1]["layers"])
    names = everyone[:MAX_LAYERS]
    churn = {r["cycle"]: r["report"]["weights"] for r in _of(records, "commit")}
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
    return _figure(figure)


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


def _mask(pyplot: Any, records: Sequence[Record]) -> Figure | None:
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
    return _figure(figure)


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


# -- records ---------------------------------------------------------------------------------


def _of(records: Sequence[Record], event: str) -> list[Record]:
    return [record for record in records if record["event"] == event]


def _figure(figure: Any) -> Figure:
    found: Figure = figure
    return found
