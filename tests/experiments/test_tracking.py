from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from resu_compile.errors import ArgumentError
from resu_compile.experiments import run_experiment
from resu_compile.experiments.tracking import import_wandb


@pytest.fixture
def runs(monkeypatch):
    """A stand-in for Weights & Biases that keeps what it is told."""
    found = []

    def init(**options):
        run = SimpleNamespace(options=options, logged=[], finished=False)
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda: setattr(run, "finished", True)
        found.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return found


def test_wandb(make_config, runs):
    config = make_config(methods=["rigl"], seeds=[3], wandb="project")
    config = make_config(
        methods=[{"name": "rigl", "options": {"every": 10}}], seeds=[3], wandb="project"
    )
    run_experiment(config)
    (run,) = runs
    assert run.options["project"] == "project"
    assert run.options["name"].startswith("linear-rigl-s0.75-x1-seed3")
    assert run.options["config"]["seed"] == 3
    assert run.finished
    steps = [step for step, _ in run.logged]
    assert steps == sorted(steps)
    losses = {step: v["train/loss"] for step, v in run.logged if "train/loss" in v}
    assert list(losses) == [10, 20, 30]
    assert losses[30] < losses[10]
    assert [step for step, v in run.logged if "masks/churn" in v] == [10, 20]
    assert [step for step, v in run.logged if "validation/loss" in v] == [30]


def test_wandb_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ArgumentError, match="pip install wandb"):
        import_wandb()


def test_tensorboard(make_config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(methods=["gmp"], seeds=[0])
    run_experiment(config)
    (folder,) = (config.output / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20, 30]
    assert [event.step for event in events.Scalars("validation/loss")] == [30]
    assert events.Scalars("train/sparsity")[-1].value == pytest.approx(0.75, abs=0.01)


def test_without_tensorboard(make_config, monkeypatch):
    monkeypatch.setattr("resu_compile.experiments.run_cell.has_tensorboard", lambda: False)
    config = make_config(methods=["gmp"], seeds=[0])
    assert run_experiment(config).done == 1
    assert not (config.output / "tensorboard").exists()
