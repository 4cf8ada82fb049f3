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
TAB10_RED = 3  # index in matplotlib's palette
DODGE = 0.004  # between two methods, of the range of sparsities


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
                    draw(axes, group, _looks(pyplot, group, highlight))
                    _finish(axes, group)
                    path = folder / f"{group.slug}-{name}.png"
                    figure.savefig(path, dpi=DPI)
                finally:
                    pyplot.close(figure)
                written.append(path)
    return written


def _looks(pyplot: Any, group: Group, highlight: str) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each method; the highlighted one is thick, red and on top."""
    palette = [c for i, c in enumerate(pyplot.get_cmap("tab10").colors) if i != TAB10_RED]
    looks: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(group.methods):
        looks[name] = {
            "color": palette[index % len(palette)],
            "linestyle": "-" if index < len(palette) else "--",
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 4.5,
            "linewidth": 1.2,
            "label": name,
        }
    if highlight in looks:
        looks[highlight] |= {"color": RED, "linestyle": "-", "linewidth": 2.4, "zorder": 5}
    return looks


def _over_sparsity(axes: Axes, group: Group, looks: dict[str, dict[str, Any]]) -> None:
    means = []
    step = DODGE * (max(group.sparsities) - min(group.sparsities) or 0.1)
    for index, name in enumerate(group.methods):
        if (name, DENSE_AT) in group.runs:
            found = group.mean(name, DENSE_AT)
            if found is not None:
                axes.axhline(found.mean, color=BLACK, linestyle=":", linewidth=1.2, label=name)
                means.append(found.mean)
            continue
        points = [(s, group.mean(name, s)) for s in group.sparsities]
        known = [(s, interval) for s, interval in points if interval is not None]
        shift = step * (index - len(group.methods) / 2)  # so that bars stand beside each other
        axes.errorbar(
            [100.0 * (s + shift) for s, _ in known],
            [interval.mean for _, interval in known],
            [interval.half_width or 0.0 for _, interval in known],
            elinewidth=0.8,
            capsize=2,
            **looks[name],
        )
        means += [interval.mean for _, interval in known]
    room = 0.15 * (max(means) - min(means)) or 0.1  # bars of wide intervals may leave the picture
    axes.set_ylim(min(means) - room, max(means) + room)
    axes.set_xticks([100.0 * s for s in group.sparsities])
    axes.set_xlabel("pruned in %")


def _over_flops(axes: Axes, group: Group, looks: dict[str, dict[str, Any]]) -> None:
    for name in group.methods:
        places = [DENSE_AT] if (name, DENSE_AT) in group.runs else group.sparsities
        points = []
        for sparsity in places:
            found = group.mean(name, sparsity)
            spent = group.values(name, sparsity, "flops", "training")
            if found is not None and spent:
                points.append((statistics.fmean(spent), found.mean))
        look = looks[name] | ({"color": BLACK} if places == [DENSE_AT] else {})
        axes.plot([x for x, _ in points], [y for _, y in points], **look)
    axes.set_xlabel("training FLOPs, relative to dense training of the same length")


def _finish(axes: Axes, group: Group) -> None:
    arrow = "higher" if group.higher_is_better else "lower"
    axes.set_ylabel(f"test {group.metric} ({arrow} is better)")
    axes.set_title(group.title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
