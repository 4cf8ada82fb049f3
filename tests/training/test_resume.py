import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resu_compile.errors import ArgumentError
from resu_compile.training import CheckpointConfig, Trainer, read_stats
from resu_compile.training.checkpoint import list_checkpoints, load_checkpoint
from resu_compile.training.stats import StatsWriter
from tests.training.models import config, loss_fn, make_batches, make_model
from tests.training.test_tree import same

WORKER = Path(__file__).with_name("resume_worker.py")
KILLS = 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_end_as_the_whole_one(tmp_path):
    """Whatever the moment of a kill: the resumed run is the run, to the last bit."""
    done = subprocess.run(
        [sys.executable, WORKER, tmp_path, str(KILLS), "0"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    whole = load_checkpoint(tmp_path / "whole" / "checkpoints")
    stats = read_stats(tmp_path / "whole" / "stats.jsonl")
    killed = [life["killed"] for run in runs for life in run["lives"] if life["killed"] is not None]
    assert len(killed) == KILLS
    stage_of = {r["step"]: r["stage"] for r in stats if r["event"] == "step"}
    assert {stage_of.get(step) for step in killed} >= {"train", "resu"}
    for run in runs:
        folder = tmp_path / run["name"]
        for life in run["lives"]:  # nothing is lost beyond the newest checkpoint
            assert life["began"] in (life["newest"], -1)  # -1: killed before it began
        assert run["lives"][-1]["began"] >= 0
        assert [p.name for p in list_checkpoints(folder / "checkpoints")] == [
            p.name for p in list_checkpoints(tmp_path / "whole" / "checkpoints")
        ]
        for part in ("model", "optimizer", "trainer"):
            assert same(load_checkpoint(folder / "checkpoints")[part], whole[part]), part
        assert read_stats(folder / "stats.jsonl")[1:] == stats[1:]  # the first names the folder


def make_trainer(folder):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    checkpoint = CheckpointConfig(str(folder), every=10)
    return Trainer(model, optimizer, loss_fn, config(checkpoint=checkpoint))


def test_fresh_run_in_the_folder_of_another_is_refused(tmp_path):
    make_trainer(tmp_path).fit(make_batches())
    with pytest.raises(ArgumentError, match=r"step-00000040; pass resume=True"):
        make_trainer(tmp_path).fit(make_batches())


def test_damaged_checkpoint_is_no_obstacle(tmp_path, caplog):
    whole = make_trainer(tmp_path)
    whole.fit(make_batches())
    older, newest = list_checkpoints(tmp_path)
    (newest / "state.json").write_text("")
    resumed = make_trainer(tmp_path)
    resumed.fit(make_batches(), resume=True)
    assert "damaged" in caplog.text
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    assert load_checkpoint(tmp_path)["trainer"]["step"] == 40
    assert [path.name for path in list_checkpoints(tmp_path)] == [older.name, f"{newest.name}-2"]


def test_stats_go_on_after_half_a_line(tmp_path):
    path = tmp_path / "stats.jsonl"
    writer = StatsWriter(path)
    writer.begin()
    for step in range(3):
        writer.write("step", step)
    with path.open("a") as file:
        file.write('{"event": "st')  # killed here
    writer = StatsWriter(path)
    writer.resume(5)  # more than the disk got
    writer.write("step", 3)
    assert [record["step"] for record in read_stats(path)] == [0, 1, 2, 3]
    assert writer.records == read_stats(path)
    writer.resume(2)
    assert [record["step"] for record in read_stats(path)] == [0, 1]
