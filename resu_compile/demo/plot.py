"""The picture of the demo: held-out quality and sparsity over the steps of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resu_compile.demo.tasks import Score, Task
from resu_compile.demo.training import Run
from resu_compile.training.plan import Plan, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers too.
STYLES = {
    "dense": {"color": "#000000", "linestyle": "--"},
    "one_shot": {"color": "#E69F00", "linestyle": "-"},
    "gradual": {"color": "#56B4E9", "linestyle": "-"},
    "resu": {"color": "#D55E00", "linestyle": "-"},
}


def plot_runs(results: Sequence[tuple[Task, Sequence[Run]]], path: Path) -> None:
    """Draw one column a task and write it to ``path`` as PNG.

    Args:
        results: each task with its runs.
        path: file to write; replaced if it exists.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            2,
            len(results),
            figsize=(6.4 * len(results), 6.0),
            sharex="col",
            squeeze=False,
            height_ratios=(3, 1),
            layout="constrained",
        )
        for column, (task, runs) in enumerate(results):
            _draw_task(axes[0, column], axes[1, column], task, runs)
        figure.suptitle("The same steps, batches and initial weights for every method", fontsize=11)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_task(top: Axes, bottom: Axes, task: Task, runs: Sequence[Run]) -> None:
    later = []
    for run in runs:
        steps = [step for step, _ in run.curve]
        values = [_height(task, score) for _, score in run.curve]
        label = f"{run.method.label}: {format_metric(task, run.score.metric)}"
        style = STYLES[run.method.key]
        top.plot(steps, values, label=label, linewidth=1.6, **style)  # type: ignore[arg-type]
        edges, heights = _stairs(run.method.plan, task.training.steps)
        bottom.plot(edges, heights, drawstyle="steps-post", linewidth=1.6, **style)  # type: ignore[arg-type]
        if run.method.key == "resu":
            _shade(top, run.method.plan)
            _shade(bottom, run.method.plan)
        # the methods differ visibly from here on
        later += [h for step, h in zip(steps, values, strict=True) if step >= 0.5 * steps[-1]]
    _zoom(top, later)
    top.set_title(task.title)
    unit = "loss in nats" if task.metric == "accuracy" else task.metric
    top.set_ylabel(f"held-out {unit} (lower is better)")
    top.legend(loc="lower left", framealpha=0.95)
    bottom.set_ylabel("pruned in %")
    bottom.set_xlabel("step")
    bottom.set_xlim(0, task.training.steps)
    bottom.set_ylim(-3, 100)
    for axis in (top, bottom):
        axis.grid(alpha=0.25, linewidth=0.6)


def _height(task: Task, score: Score) -> float:
    """What the curve shows: the loss says more than an accuracy of a few hundred images."""
    return score.loss if task.metric == "accuracy" else score.metric


def _stairs(plan: Plan, steps: int) -> tuple[list[int], list[float]]:
    edges = [span.start for span in plan] or [0]
    heights = [100.0 * span.sparsity for span in plan] or [0.0]
    return [*edges, steps], [*heights, heights[-1]]


def _shade(axis: Axes, plan: Plan) -> None:
    """Grey for the dense warm-up, the colour of RESU for its phases."""
    labelled: set[str] = set()
    for span in plan:
        if span.stage not in (Stage.WARMUP, Stage.RESU):
            continue
        resu = span.stage is Stage.RESU
        name = "RESU phases" if resu else "dense warm-up of RESU"
        colour = STYLES["resu"]["color"] if resu else "#999999"
        label = "_" if name in labelled else name
        axis.axvspan(span.start, span.stop, color=colour, alpha=0.16, linewidth=0, label=label)
        labelled.add(name)


def _zoom(axis: Axes, heights: Sequence[float]) -> None:
    """Frame all but the highest tenth: how far a curve shoots up matters less than its end."""
    ordered = sorted(heights)
    low, high = ordered[0], ordered[int(0.9 * (len(ordered) - 1))]
    margin = 0.1 * (high - low) or 0.01
    axis.set_ylim(low - margin, high + 2 * margin)


def format_metric(task: Task, value: float) -> str:
    """``value`` as tables and legends show it."""
    return f"{value:.2%}" if task.metric == "accuracy" else f"{value:.3f} {task.metric}"
