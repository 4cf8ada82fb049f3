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
from resu_compile.training.mask_plots import (
    BLACK,
    BLUE,
    ORANGE,
    RED,
    draw_layers,
    draw_mask,
    draw_resurrection,
    of_event,
)
from resu_compile.training.stats import Record, read_stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES = {
    "warmup": ("#999999", "dense warm-up"),
    "stabilize": (ORANGE, "stabilize"),
    "resu": (RED, "RESU"),
    "recover": (BLUE, "recovery"),
}
LOOK = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
}
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
        "resurrection.png": draw_resurrection,
        "layers.png": draw_layers,
        "mask.png": draw_mask,
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
    for record in of_event(records, "step"):
        step, stage, cycle = record["step"], record["stage"], record["cycle"]
        if bands and bands[-1][2:] == (stage, cycle):
            bands[-1] = (bands[-1][0], step, stage, cycle)
        else:
            bands.append((bands[-1][1] if bands else 0, step, stage, cycle))
    return bands


def _learning_curve(pyplot: Any, records: Sequence[Record]) -> Figure | None:
    steps = [r for r in of_event(records, "step") if r.get("loss") is not None]
    evaluations = [r for r in of_event(records, "evaluation") if r.get("metrics")]
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
    found: Figure = figure
    return found


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
        found = [r for r in of_event(records, event) if r.get("sparsity") is not None]
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
