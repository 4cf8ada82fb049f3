"""Pictures of a stats file that is written by hand."""

from __future__ import annotations

import json
import sys

import pytest

from resu_compile.errors import ArgumentError
from resu_compile.training.mask_plots import resurrection_rate
from resu_compile.training.plots import plot_stats, stage_bands

pytest.importorskip("matplotlib")

PICTURES = ["learning_curve.png", "resurrection.png", "layers.png", "mask.png"]


def counts(total=100, kept=28, resurrected=2, lost=2, **more):
    active = kept + resurrected
    return {
        "total": total,
        "active": active,
        "kept": kept,
        "resurrected": resurrected,
        "lost": lost,
        "sparsity": 1.0 - active / total,
        "churn": resurrected / active,
        "jaccard": kept / (active + lost),
        **more,
    }


def step(n, stage, cycle, **more):
    record = {"event": "step", "step": n, "cycle": cycle, "stage": stage, "phase": "sparse"}
    return {**record, "loss": 1.0 / n, "lr": 0.1, "sparsity": 0.7, **more}


def change(event, n, cycle, names=("first.weight", "second.weight"), **more):
    weights = {name: counts(**more) for name in (*names, "total")}
    return {
        "event": event,
        "step": n,
        "cycle": cycle,
        "report": {"strategy": "amnesty", "weights": weights},
        "sparsity": 0.7,
        "layers": dict.fromkeys(names, 0.7),
        "mask": {"name": names[0], "shape": [10, 10], "density": [[0.5, 0.1], [0.3, 0.3]]},
    }


def run(cycles=2):
    records = [{"event": "start", "step": 0, "config": {}, "versions": {}}, step(5, "warmup", -1)]
    n = 5
    for cycle in range(cycles):
        records += [step(n + 5, "train", cycle), change("prune", n + 5, cycle)]
        records += [step(n + 6, "stabilize", cycle), step(n + 8, "resu", cycle)]
        records += [step(n + 10, "resu", cycle), change("commit", n + 10, cycle, ever_share=0.4)]
        metrics = {"accuracy": 0.9, "loss": 0.2}
        records += [{"event": "evaluation", "step": n + 10, "cycle": cycle, "metrics": metrics}]
        n += 10
    records += [step(n + 5, "recover", -1), {"event": "end", "step": n + 5, "sparsity": 0.7}]
    return records


def write(folder, records):
    path = folder / "stats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ink(path):
    """Share of the picture's points that are not white."""
    from matplotlib import image

    return float((image.imread(path)[..., :3].min(-1) < 0.99).mean())


def test_all_pictures(tmp_path):
    from matplotlib import pyplot

    open_before = pyplot.get_fignums()
    written = plot_stats(write(tmp_path, run()), tmp_path / "new" / "plots")
    assert [path.name for path in written] == PICTURES
    for path in written:
        assert path.parent == tmp_path / "new" / "plots"
        assert ink(path) > 0.02
    assert pyplot.get_fignums() == open_before  # no figure stays open


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        (("commit",), ["learning_curve.png", "layers.png", "mask.png"]),
        (("commit", "prune"), ["learning_curve.png"]),
        (("step", "evaluation"), PICTURES[1:]),
    ],
)
def test_draws_what_there_is(left_out, expected, tmp_path):
    records = [record for record in run() if record["event"] not in left_out]
    assert [p.name for p in plot_stats(write(tmp_path, records), tmp_path)] == expected


def test_many_cycles_and_weights(tmp_path):
    names = tuple(f"blocks.{index}.attention.weight" for index in range(70))
    records = [change("commit", 10 * c, c, names=names) for c in range(40)]
    written = plot_stats(write(tmp_path, records), tmp_path)
    assert [path.name for path in written] == PICTURES[1:]


def test_a_commit_that_brought_nothing_back(tmp_path):
    records = [change("commit", 10, 0, kept=30, resurrected=0, lost=0)]
    assert len(plot_stats(write(tmp_path, records), tmp_path)) == 3


def test_a_loss_that_was_nan_leaves_a_gap(tmp_path):
    records = [step(1, "train", 0), step(2, "train", 0, loss=None), step(3, "train", 0)]
    assert [p.name for p in plot_stats(write(tmp_path, records), tmp_path)] == PICTURES[:1]


def test_bands_follow_the_stages():
    assert stage_bands(run()) == [
        (0, 5, "warmup", -1),
        (5, 10, "train", 0),
        (10, 11, "stabilize", 0),
        (11, 15, "resu", 0),
        (15, 20, "train", 1),
        (20, 21, "stabilize", 1),
        (21, 25, "resu", 1),
        (25, 30, "recover", -1),
    ]


def test_resurrection_rate():
    # 100 places, 30 active before: 7 of the 70 pruned came back
    assert resurrection_rate(counts(kept=20, resurrected=7, lost=10)) == pytest.approx(0.1)
    assert resurrection_rate(counts(kept=100, resurrected=0, lost=0)) == 0.0


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "found none"),
        ([{"event": "start", "step": 0}], "found none"),
        ([{"loss": 1.0}], "expected records with an event and a step"),
    ],
)
def test_nothing_to_draw(records, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        plot_stats(write(tmp_path, records), tmp_path)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ArgumentError, match=r"pip install resu-compile\[plot\]"):
        plot_stats(write(tmp_path, run()), tmp_path)
