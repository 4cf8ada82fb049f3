import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resu_compile.training import read_stats
from resu_compile.training.checkpoint import list_checkpoints, load_checkpoint
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
