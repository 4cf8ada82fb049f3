"""The picture of the demo: held-out quality and sparsity over the steps of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resu_compile.demo.schedule import Plan
from resu_compile.demo.tasks import Task
from resu_compile.demo.training import Run
from resu_compile.phase import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = {"dense": "#000000", "one_shot": "#E69F00", "gradual": "#56B4E9", "resu": "#D55E00"}
STYLES = {"dense": "--", "one_shot": "-", "gradual": "-", "resu": "-"}


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
    percent = task.metric == "accuracy"
    for run in runs:
        key = run.method.key
        steps = [step for step, _ in run.curve]
        values = [score.metric * (100.0 if percent else 1.0) for _, score in run.curve]
        label = f"{run.method.label}: {format_metric(task, run.score.metric)}"
        style = {"color": COLOURS[key], "linestyle": STYLES[key], "linewidth": 1.6}
        top.plot(steps, values, label=label, **style)  # type: ignore[arg-type]
        edges, heights = _stairs(run.method.plan)
        bottom.plot(edges, heights, drawstyle="steps-post", **style)  # type: ignore[arg-type]
    for run in runs:
        if run.method.key == "resu":
            _shade(top, run.method.plan)
            _shade(bottom, run.method.plan)
    finals = [score.metric * (100.0 if percent else 1.0) for run in runs for _, score in run.curve]
    _zoom(top, finals, higher_is_better=task.higher_is_better)
    top.set_title(task.title)
    unit = "accuracy in %" if percent else task.metric
    top.set_ylabel(f"held-out {unit} ({'higher' if task.higher_is_better else 'lower'} is better)")
    top.legend(loc="lower right" if task.higher_is_better else "upper right", framealpha=0.95)
    bottom.set_ylabel("pruned in %")
    bottom.set_xlabel("step")
    bottom.set_xlim(0, task.training.steps)
    bottom.set_ylim(-3, 100)
    for axis in (top, bottom):
        axis.grid(alpha=0.25, linewidth=0.6)


def _stairs(plan: Plan) -> tuple[list[int], list[float]]:
    edges = [span.start for span in plan] + [plan[-1].stop]
    heights = [100.0 * span.sparsity for span in plan]
    return edges, [*heights, heights[-1]]


def _shade(axis: Axes, plan: Plan) -> None:
    """Grey for the dense warm-up, the colour of RESU for its phases."""
    labelled: set[str] = set()
    for span in plan:
        if span.phase is Phase.SPARSE:
            continue
        resu = span.phase is Phase.RESU
        name = "RESU phases" if resu else "dense warm-up of RESU"
        colour = COLOURS["resu"] if resu else "#999999"
        label = "_" if name in labelled else name
        axis.axvspan(span.start, span.stop, color=colour, alpha=0.16, linewidth=0, label=label)
        labelled.add(name)


def _zoom(axis: Axes, values: Sequence[float], *, higher_is_better: bool) -> None:
    """Leave the first steps out of the frame: the methods differ in the rest."""
    ordered = sorted(values, reverse=higher_is_better)
    best, typical = ordered[0], ordered[int(0.85 * (len(ordered) - 1))]
    margin = 0.08 * abs(typical - best) or 0.01
    low, high = sorted((best, typical))
    axis.set_ylim(low - margin, high + margin)


def format_metric(task: Task, value: float) -> str:
    """``value`` as tables and legends show it."""
    return f"{value:.2%}" if task.metric == "accuracy" else f"{value:.3f} {task.metric}"
