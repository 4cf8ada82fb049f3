"""Pictures of an experiment: the test metric over sparsity, and over training FLOPs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resu_compile.experiments.table import DENSE_AT, Group
from resu_compile.training.mask_plots import BLACK, RED
from resu_compile.training.plots import DPI, LOOK, _pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osv^D<>Pph*X"


def draw_groups(groups: Sequence[Group], folder: Path, *, highlight: str) -> list[Path]:
    """Two PNG files for each group that has sparse runs.

    Args:
        groups: what is drawn.
        folder: where they go.
        highlight: the method that stands out.
    """
    pyplot = _pyplot()
    written = []
    with pyplot.rc_context(LOOK):
        for group in groups:
            if not group.sparsities:
                continue
            for name, draw in (("sparsity", _over_sparsity), ("flops", _over_flops)):
                figure, axes = pyplot.subplots(figsize=(7.6, 4.8), layout="constrained")
                try:
                    draw(axes, group, _colours(pyplot, group, highlight))
                    _finish(axes, group)
                    path = folder / f"{group.slug}-{name}.png"
                    figure.savefig(path, dpi=DPI)
                finally:
                    pyplot.close(figure)
                written.append(path)
    return written


def _colours(pyplot: Any, group: Group, highlight: str) -> dict[str, Any]:
    palette = pyplot.get_cmap("tab20").colors
    colours = {name: palette[i % len(palette)] for i, name in enumerate(group.methods)}
    return {**colours, highlight: RED}


def _over_sparsity(axes: Axes, group: Group, colours: dict[str, Any]) -> None:
    for index, name in enumerate(group.methods):
        if (name, DENSE_AT) in group.runs:
            found = group.mean(name, DENSE_AT)
            if found is not None:
                axes.axhline(found.mean, color=BLACK, linestyle="--", linewidth=1.0, label=name)
            continue
        points = [(s, group.mean(name, s)) for s in group.sparsities]
        known = [(100.0 * s, interval) for s, interval in points if interval is not None]
        axes.errorbar(
            [s for s, _ in known],
            [interval.mean for _, interval in known],
            [interval.half_width or 0.0 for _, interval in known],
            color=colours[name],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1.3,
            capsize=2,
            label=name,
        )
    axes.set_xlabel("pruned in %")


def _over_flops(axes: Axes, group: Group, colours: dict[str, Any]) -> None:
    for index, name in enumerate(group.methods):
        places = [DENSE_AT] if (name, DENSE_AT) in group.runs else group.sparsities
        points = []
        for sparsity in places:
            found = group.mean(name, sparsity)
            spent = group.values(name, sparsity, "flops", "training")
            if found is not None and spent:
                points.append((statistics.fmean(spent), found.mean))
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=BLACK if places == [DENSE_AT] else colours[name],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=0.8,
            label=name,
        )
    axes.set_xlabel("training FLOPs, relative to dense training of the same length")


def _finish(axes: Axes, group: Group) -> None:
    arrow = "higher" if group.higher_is_better else "lower"
    axes.set_ylabel(f"test {group.metric} ({arrow} is better)")
    axes.set_title(group.title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
