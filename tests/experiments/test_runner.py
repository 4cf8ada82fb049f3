from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resu_compile.config import ResurrectionConfig
from resu_compile.experiments import ExperimentConfig, make_task, run_experiment
from resu_compile.experiments.budget import equal_flops, rehearse
from resu_compile.experiments.cells import build_cells
from resu_compile.experiments.environment import source_hash
from resu_compile.experiments.records import read_records
from resu_compile.experiments.runner import describe
from resu_compile.experiments.settings import training_config
from resu_compile.methods import training_method_names
from resu_compile.training import Stage, TrainingConfig, build_plan
from tests.experiments.conftest import TASK

ROOT = Path(__file__).parent.parent.parent
RESU = {"name": "resu", "training": {"cycles": 2}}


def runs_of(config):
    return {
        (r["method"], r["sparsity"], r["seed"], r["length"]): r
        for r in read_records(config.results)
        if r["kind"] == "run"
    }


def start(config_path, **environment):
    command = [sys.executable, "-m", "resu_compile.cli", "experiment", str(config_path)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write(path, output, **changes):
    task = {"name": TASK, "label": "linear", "steps": 30, **changes.pop("task", {})}
    data = {
        "tasks": [task],
        "methods": ["gmp", "rigl"],
        "sparsities": [0.75],
        "seeds": [0, 1],
        "training": {"compile": False},
        "output": str(output),
        **changes,
    }
    path.write_text(json.dumps(data))
    return path


def test_every_method_runs(make_config):
    methods = ["dense", RESU, *(set(training_method_names()) - {"resu"})]
    config = make_config(methods=methods, seeds=[0])
    outcome = run_experiment(config)
    assert outcome.failed == ()
    assert outcome.made == outcome.done == len(methods)
    found = runs_of(config)
    for (method, sparsity, _, _), record in found.items():
        assert record["steps"] == 30
        assert record["reached_sparsity"] == pytest.approx(sparsity, abs=0.01)
        assert set(record["scores"]) == {"validation", "test", "training"}
        assert len({scores["loss"] for scores in record["scores"].values()}) == 3
        assert record["flops"]["training"] == record["flops"]["share_of_dense_step"]
        assert record["environment"]["source"] == source_hash()
        assert record["flops"]["training"] <= 1.0
        assert (record["flops"]["training"] == 1.0) == (method == "dense")
    assert not list(config.output.rglob("checkpoints"))


def test_tasks_run_on_the_device(tmp_path, device):
    pytest.importorskip("sklearn")
    data = {
        "tasks": [
            {"name": "digits_cnn", "steps": 20, "options": {"width": 4}},
            {"name": "bytes", "steps": 20, "options": {"size": "tiny"}},
        ],
        "methods": ["dense", "gmp", "rigl", RESU],
        "sparsities": [0.5],
        "training": {"compile": False},
        "budget": "flops",
        "max_stretch": 1.5,
        "output": str(tmp_path),
    }
    config = ExperimentConfig.from_dict(data)
    outcome = run_experiment(config, device=str(device))
    assert (outcome.done, outcome.failed) == (8, ())
    records = read_records(config.results)
    assert {record["environment"]["device"].partition(":")[0] for record in records} == {
        device.type
    }


def test_a_second_call_has_nothing_to_do(make_config):
    config = make_config()
    assert "4 cells, 0 finished; 120 steps to go" in describe(config)
    assert run_experiment(config).made == 4
    before = config.results.read_bytes()
    assert run_experiment(config).made == 0
    assert config.results.read_bytes() == before
    assert "4 cells, 4 finished; 0 steps to go" in describe(config)
    more = make_config(sparsities=[0.75, 0.5])
    assert run_experiment(more).made == 4


def test_dense_runs_are_those_of_a_plain_loop(make_config):
    config = make_config(methods=["dense"], seeds=[0])
    run_experiment(config)
    task = make_task(TASK, steps=30, seed=0)
    for step in range(30):
        task.loss_fn(task.model, task.batches[step % 4]).backward()
        task.optimizer.step()
        task.optimizer.zero_grad()
    with torch.no_grad():
        expected = task.test(task.model)["loss"]
    assert runs_of(config)["dense", 0.0, 0, 1.0]["scores"]["test"]["loss"] == expected


def test_a_killed_process_loses_nothing(tmp_path, make_config):
    """Killed within the second cell: the first is kept, the second goes on from its checkpoint."""
    pytest.importorskip("safetensors")
    task = {"options": {"die_at": 25, "die_seed": 1}, "checkpoint_every": 10}
    config = make_config(methods=["rigl"], task=task)
    path = write(tmp_path / "x.json", config.output, methods=["rigl"], task=task)
    process = start(path, DIE="1")
    assert process.wait(timeout=120) == -signal.SIGKILL
    first = config.results.read_bytes()
    assert first.count(b"\n") == 1
    assert run_experiment(config).made == 1
    assert config.results.read_bytes().startswith(first)

    whole = make_config(methods=["rigl"], task=task, output=str(tmp_path / "whole"))
    run_experiment(whole)
    for key, expected in runs_of(whole).items():
        found = runs_of(config)[key]
        assert found["resumed"] == (key[2] == 1)
        for name in ("scores", "flops", "ever_share", "updates", "mean_churn", "densities"):
            assert found[name] == expected[name]


@pytest.mark.parametrize("method", ["gmp", "resu"])
def test_killed_between_the_last_step_and_the_result(make_config, monkeypatch, method):
    """The last checkpoint holds all that the result says."""
    pytest.importorskip("safetensors")
    spec = RESU if method == "resu" else method
    config = make_config(methods=[spec], seeds=[0], task={"checkpoint_every": 10})
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the checkpoints stay
    run_experiment(config)
    monkeypatch.undo()
    (expected,) = runs_of(config).values()
    config.results.unlink()
    run_experiment(config)
    (found,) = runs_of(config).values()
    assert found["resumed"] is True
    assert expected["resumed"] is False
    for name in ("scores", "flops", "reached_sparsity", "updates", "mean_churn", "densities"):
        assert found[name] == expected[name]


def test_two_processes_share_the_cells(tmp_path):
    task = {"options": {"meet": str(tmp_path / "meet")}}
    path = write(tmp_path / "x.json", tmp_path / "out", seeds=[0, 1, 2], task=task)
    processes = [start(path), start(path)]
    printed = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    finished = [text.count("test loss") for _, text in printed]
    assert min(finished) >= 1
    assert sum(finished) == 6
    assert all("6 cells done, 0 failed" in text for text, _ in printed)
    keys = [record["key"] for record in read_records(tmp_path / "out" / "results.jsonl")]
    assert len(keys) == len(set(keys)) == 6


def test_tuning_looks_at_validation_alone(make_config):
    config = make_config(
        methods=[{"name": "gmp", "search": {"start": [0.0, 0.2], "stop": [0.5, 0.9]}}],
        tuning={"trials": 4, "seed": 9},
    )
    assert run_experiment(config).made == 6
    records = read_records(config.results)
    trials = [record for record in records if record["kind"] == "trial"]
    assert all(set(record["scores"]) == {"validation"} for record in trials)
    assert {record["seed"] for record in trials} == {9}
    best = min(trials, key=lambda record: record["scores"]["validation"]["loss"])
    for record in runs_of(config).values():
        assert record["settings"] == best["settings"]
        options = record["training"]["method_options"]
        assert options == {k: v for k, v in best["settings"].items() if v != 0.1}


def test_a_failure_is_a_result_and_stops_nothing(make_config, caplog):
    config = make_config(task={"options": {"broken": True}}, methods=["gmp"])
    outcome = run_experiment(config)
    assert (outcome.done, len(outcome.failed)) == (0, 2)
    assert "NaN" in caplog.text or "nan" in caplog.text
    assert [r["status"] for r in read_records(config.results)] == ["failed"] * 2
    assert run_experiment(config).made == 0
    assert run_experiment(config, retry_failed=True).made == 2
    assert "2 cells, 0 finished, 2 failed; 60 steps to go" in describe(config)


# -- equal training FLOPs --------------------------------------------------------------------
def rehearsed(method, steps, sparsity=0.75, **options):
    config = training_config(
        method, steps=steps, sparsity=sparsity, seed=0, options=options, training={"compile": False}
    )
    return rehearse(make_task(TASK, steps=steps, seed=0), config), config


def test_rehearsal_counts_dense_gradients():
    """RigL: every fifth step up to 0.75 has a dense gradient, f_D instead of f_S."""
    share, _ = rehearsed("rigl", 40, every=5, start=0)
    dense = [step for step in range(40) if step % 5 == 0 and 0 < step < 30]
    static, _ = rehearsed("static", 40)
    assert share == pytest.approx(static + len(dense) / 40 * (1 - static) / 3, rel=1e-6)


@pytest.mark.parametrize("method", ["one_shot", "gmp", "rigl", "snfs", "acdc", "resu", "top_kast"])
def test_equal_flops_are_spent(make_config, method):
    spec = RESU if method == "resu" else {"name": method}
    if method in ("gmp", "rigl", "snfs"):
        spec["options"] = {"every": 4}
    config = make_config(methods=[spec], seeds=[0], budget="flops", task={"steps": 60})
    run_experiment(config)
    (record,) = runs_of(config).values()
    assert record["steps"] > 60
    assert record["flops"]["training"] == pytest.approx(1.0, abs=0.03)
    share = record["flops"]["share_of_dense_step"]
    assert record["flops"]["training"] == pytest.approx(share * record["steps"] / 60)


def test_rehearsal_counts_theta_in_a_few_places():
    """Of each RESU stage one step computes dense gradients, and all hold the places of theta."""
    options = {"compile": False, "cycles": 3, "sparsity": 0.75, "schedule": "cubic", "warmup": 0.1}
    theta = ResurrectionConfig(places=0.05, score="saliency", kind="ceiling")
    config = TrainingConfig(steps=60, scope="layer", resurrection=theta, **options)
    plan = build_plan(config)
    found = rehearse(make_task(TASK, steps=60, seed=0), config)
    spent = 0.0
    for span in plan:
        density = 1.0 - span.sparsity
        if span.stage is Stage.RESU:
            density = min((1.0 + config.resurrection.places) * density, 1.0)
            spent += 1.0 - density  # the gradient of its first step
        spent += span.steps * 3 * density
    assert found == pytest.approx(spent / 180, rel=0.002)
    anywhere = rehearse(make_task(TASK, steps=60, seed=0), replace(config, scope="global"))
    # no more than all places of a layer train, however much of it is active
    assert 0.9 * found < anywhere <= 1.001 * found


def test_rehearsal_counts_hidden_theta():
    """Forward passes see none of it; each step of a RESU stage computes dense gradients."""
    config = TrainingConfig(steps=60, compile=False, cycles=3, sparsity=0.75, scope="layer")
    found = rehearse(make_task(TASK, steps=60, seed=0), config)
    spent = 0.0
    for span in build_plan(config):
        density = 1.0 - span.sparsity
        spent += span.steps * (2 * density + (1.0 if span.stage is Stage.RESU else density))
    assert found == pytest.approx(spent / 180, rel=0.002)


def test_steps_are_capped():
    def make(steps):
        _, config = rehearsed("static", steps, 0.75)
        return make_task(TASK, steps=steps, seed=0), config

    found = equal_flops(make, dense_steps=20, max_stretch=2.0)
    assert (found.steps, found.capped) == (40, True)
    free = equal_flops(make, dense_steps=20, max_stretch=5.0)
    assert free.capped is False
    assert free.steps == pytest.approx(20 / rehearsed("static", 20)[0], abs=1)


def test_seeds_take_equal_steps(make_config):
    config = make_config(methods=["snfs"], budget="flops", seeds=[0, 1, 2])
    run_experiment(config)
    assert len({record["steps"] for record in runs_of(config).values()}) == 1
    assert len(build_cells(config)) == 3
