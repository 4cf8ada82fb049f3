"""The stats file: what a run writes into it, and what is read back."""

from __future__ import annotations

import json
import math

import pytest
import torch

import resu_compile as resu
from resu_compile.errors import ArgumentError
from resu_compile.training import read_stats
from resu_compile.training.stats import StatsWriter, block_density, mask_picture
from tests.training.models import make_batches, make_trainer


def test_the_stats_file_holds_the_run(tmp_path):
    path = tmp_path / "deep" / "stats.jsonl"
    trainer = make_trainer(
        evaluate=lambda _: {"loss": 0.5},
        changes={"stats": str(path), "log_every": 10, "evaluate_every": 20},
    )
    result = trainer.fit(make_batches())
    records = read_stats(path)
    assert records == list(result.stats)
    assert all({"event", "step"} <= set(record) for record in records)
    steps = [r["step"] for r in records]
    assert steps == sorted(steps)
    assert records[0]["config"] == trainer.config.to_dict()
    assert records[0]["versions"]["torch"] == torch.__version__
    events = [(r["event"], r["step"]) for r in records if r["event"] != "step"]
    assert events == [
        ("start", 0),
        *[("prune", 9), ("commit", 13), ("prune", 18), ("evaluation", 20), ("commit", 22)],
        *[("prune", 27), ("commit", 31), ("evaluation", 40), ("end", 40)],
    ]
    logged = {r["step"]: r for r in records if r["event"] == "step"}
    # every tenth step, and the last one of each span
    assert sorted(logged) == [4, 9, 10, 11, 13, 18, 20, 22, 27, 29, 30, 31, 40]
    assert set(logged[30]) == {"event", "step", "cycle", "stage", "phase", "loss", "lr", "sparsity"}
    found = [(logged[n]["cycle"], logged[n]["stage"], logged[n]["phase"]) for n in (4, 9, 10, 30)]
    assert found == [
        (-1, "warmup", "dense"),
        (0, "train", "dense"),
        (0, "stabilize", "sparse"),
        (2, "resu", "resu"),
    ]
    assert [logged[n]["sparsity"] for n in (4, 10, 20, 40)] == [0.0, 0.25, 0.5, 0.75]
    assert all(math.isfinite(r["loss"]) for r in logged.values())
    commit = next(r for r in records if r["event"] == "commit")
    assert commit["report"] == result.history[0].commit
    assert commit["layers"] == {"0.weight": 0.25, "3.weight": 0.25}
    assert commit["mask"]["name"] == "0.weight"
    assert commit["mask"]["shape"] == [16, 8]
    assert torch.tensor(commit["mask"]["density"]).mean() == pytest.approx(0.75)


def test_a_second_run_begins_a_new_file(tmp_path):
    changes = {"stats": str(tmp_path / "stats.jsonl")}
    files = []
    for _ in range(2):
        make_trainer(changes=changes).fit(make_batches())
        files.append((tmp_path / "stats.jsonl").read_text())
    assert files[0] == files[1]  # nothing in it but what the run did


# -- writing and reading -----------------------------------------------------------------------
def test_a_resumed_file_loses_what_came_after(tmp_path):
    path = tmp_path / "stats.jsonl"
    writer = StatsWriter(path)
    writer.begin()
    for step in range(4):
        writer.write("step", step, loss=0.5)
    again = StatsWriter(path)
    again.resume(2)
    again.write("end", 9)
    assert [(r["event"], r["step"]) for r in read_stats(path)] == [
        ("step", 0),
        ("step", 1),
        ("end", 9),
    ]
    assert again.records == read_stats(path)


def test_a_lost_file_is_begun_anew(tmp_path):
    writer = StatsWriter(tmp_path / "new" / "stats.jsonl")
    writer.resume(5)
    writer.write("end", 9)
    assert len(read_stats(writer.path)) == 1


def test_what_json_has_not_becomes_null(tmp_path):
    writer = StatsWriter(tmp_path / "stats.jsonl")
    writer.begin()
    writer.write("evaluation", 1, metrics={"a": math.inf, "b": [math.nan, 1.0]})
    assert read_stats(writer.path)[0]["metrics"] == {"a": None, "b": [None, 1.0]}


def test_a_half_written_last_line_is_left_out_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "stats.jsonl"
    good = json.dumps({"event": "end", "step": 1})
    path.write_text(good + "\n" + good[:9])
    assert read_stats(path) == [{"event": "end", "step": 1}]
    path.write_text(good[:9] + "\n" + good + "\n")
    with pytest.raises(ArgumentError, match="a JSON object in line 1"):
        read_stats(path)
    path.write_text("3\n")
    with pytest.raises(ArgumentError, match="a JSON object in line 1"):
        read_stats(path)


# -- masks -------------------------------------------------------------------------------------
def test_block_densities_by_hand():
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    found = block_density(mask, blocks=2)  # rows 2 + 1, columns 3 + 2
    assert found.tolist() == [[0.5, 0.25], [0.0, 1.0]]
    assert block_density(mask).tolist() == mask.double().tolist()


def test_large_masks_are_at_most_64_blocks_wide():
    mask = torch.rand(200, 130) < 0.3
    found = block_density(mask)
    assert found.shape == (64, 64)
    assert found[0, 0] == mask[:4, :3].double().mean()


def test_densities_are_rounded():
    model = torch.nn.Linear(130, 200)
    resu.sparsify(model, sparsity=0.5, compile=False)
    mask = resu.controller(model).masks["weight"]
    found = torch.tensor(mask_picture(resu.controller(model))["density"], dtype=torch.float64)
    assert len(str(found[0, 0].item())) <= 6
    torch.testing.assert_close(found, block_density(mask), rtol=0, atol=5.1e-5)


def test_a_mask_of_more_dimensions_is_shown_flat():
    model = torch.nn.Conv2d(2, 3, 3)
    resu.sparsify(model, sparsity=0.5, compile=False)
    found = mask_picture(resu.controller(model))
    assert found["shape"] == [3, 2, 3, 3]
    assert found["density"] == model.weight.ne(0).double().reshape(3, 18).tolist()
