"""Runs from a file: what it may say, and what comes out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.training import TrainingConfig, plots, read_stats
from resu_compile.training.checkpoint import list_checkpoints
from resu_compile.training.runner import cycle_table, load_run_file, run
from resu_compile.training.tasks import TrainingTask, import_function, make_training_task

pytest.importorskip("safetensors")

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits_resu.yaml"
TINY = {"steps": 20, "cycles": 2, "sparsity": 0.5, "compile": False, "evaluate_every": 4}
MODULE = '''
import torch
from torch import nn
from resu_compile.training.tasks import TrainingTask


class Loose:
    """Not a TrainingTask, but with all that it has."""


def make(width=8, lr=0.1):
    model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 1))
    batches = [torch.ones(4, 8) * i for i in range(3)]
    loss = lambda model, batch: model(batch).square().mean()
    evaluate = lambda model: {"norm": float(model[0].weight.norm())}
    return TrainingTask(model, torch.optim.SGD(model.parameters(), lr=lr), loss, batches, evaluate)


def loose():
    found, task = Loose(), make()
    for name in ("model", "optimizer", "loss_fn", "batches"):
        setattr(found, name, getattr(task, name))
    return found


def nothing():
    return nn.Linear(2, 2)


def no_module():
    found = loose()
    found.model = "net"
    return found


def fails(width=1):
    raise RuntimeError("no data here")


VALUE = 3
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's own in the current directory."""
    (tmp_path / "own_task.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield tmp_path
    sys.modules.pop("own_task", None)


def write(folder, **data):
    path = folder / "run.json"
    path.write_text(json.dumps(data))
    return path


# -- the file --------------------------------------------------------------------------------


def test_reads_a_file(tmp_path):
    out = str(tmp_path / "out")
    path = write(tmp_path, task="digits", output=out, preset="conservative", training={"seed": 3})
    file = load_run_file(path)
    assert file.task == "digits"
    assert file.task_options == {}
    assert file.output == tmp_path / "out"
    assert file.training.sparsity == 0.5  # the preset's
    assert file.training.seed == 3
    assert file.training.stats == f"{out}/stats.jsonl"
    assert file.training.checkpoint.folder == f"{out}/checkpoints"


def test_what_the_call_says_goes_before_the_file(tmp_path):
    path = write(tmp_path, task="digits", output="a", task_options={"device": "cuda"})
    file = load_run_file(path, output=tmp_path / "b", device="cpu")
    assert file.output == tmp_path / "b"
    assert file.training.stats == str(tmp_path / "b" / "stats.jsonl")
    assert file.task_options == {"device": "cpu"}


def test_paths_that_the_file_names_stay(tmp_path):
    training = {"stats": "s.jsonl", "checkpoint": {"folder": "c", "every": 7}}
    found = load_run_file(write(tmp_path, task="digits", training=training)).training
    assert (found.stats, found.checkpoint.folder, found.checkpoint.every) == ("s.jsonl", "c", 7)
    without = write(tmp_path, task="digits", training={"checkpoint": None})
    assert load_run_file(without).training.checkpoint is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "expected a task .*got None"),
        ({"task": 3}, "expected a task .*got 3"),
        ({"task": "digits", "trainning": {}}, "did you mean 'training'"),
        ({"task": "digits", "training": {"step": 1}}, "did you mean 'steps'"),
        ({"task": "digits", "training": [1]}, r"training: expected a mapping .*got \[1\]"),
        ({"task": "digits", "task_options": "x"}, "task_options: expected a mapping"),
        ({"task": "digits", "output": 3}, "expected a folder as output, got 3"),
        ({"task": "digits", "preset": "fast"}, "preset: expected one of aggressive"),
        ({"task": "digits", "preset": "default", "training": {"preset": "default"}}, "twice"),
    ],
)
def test_a_wrong_file(data, message, tmp_path):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        load_run_file(write(tmp_path, **data))


def test_a_file_that_is_no_mapping(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("[1]")
    with pytest.raises(ArgumentTypeError, match="expected a mapping with a task"):
        load_run_file(path)


def test_output_must_be_a_folder(tmp_path):
    path = write(tmp_path, task="digits")
    with pytest.raises(ArgumentError, match="expected a folder, got the file"):
        load_run_file(path, output=path)


# -- the task --------------------------------------------------------------------------------


def make(name, **options):
    return make_training_task(name, options, steps=10, seed=0)


def test_a_function_of_the_users(module):
    task = make("own_task:make", width=5)
    assert isinstance(task, TrainingTask)
    assert task.model[0].out_features == 5
    again = make("own_task:make", width=5)
    assert torch.equal(task.model[0].weight, again.model[0].weight)  # by the seed
    assert str(module) in sys.path


@pytest.mark.usefixtures("module")
def test_an_object_with_the_same_attributes_will_do():
    task = make("own_task:loose")
    assert isinstance(task, TrainingTask)
    assert task.evaluate is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "expected digits or bytes, or 'module:function'"),
        (":make", "expected 'module:function'"),
        ("own_task:", "expected 'module:function'"),
        ("none_such:make", "'none_such' that can be imported .*ModuleNotFoundError"),
        ("own_task:absent", "expected a function 'absent' in .*own_task.py, got nothing"),
        ("own_task:VALUE", "expected a function 'VALUE' in .*got 3"),
        ("own_task:nothing", "got a Linear without model, optimizer, loss_fn, batches"),
        ("own_task:no_module", "expected an nn.Module as model, got a str"),
        ("own_task:fails", "raised RuntimeError: no data here"),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_task_that_cannot_be_made(name, message):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        make(name)


@pytest.mark.usefixtures("module")
def test_an_option_that_the_function_does_not_take():
    with pytest.raises(ArgumentError, match="TypeError.*unexpected keyword argument 'depth'"):
        make("own_task:make", depth=3)


def test_a_module_that_does_not_compile(module):
    (module / "broken_task.py").write_text("def make(:\n")
    with pytest.raises(ArgumentError, match="'broken_task' that can be imported .*SyntaxError"):
        import_function("broken_task:make")


def test_options_of_the_built_in_tasks(monkeypatch):
    pytest.importorskip("sklearn")
    with pytest.raises(ArgumentError, match="unknown option of task 'digits' 'width'"):
        make("digits", width=3)
    with pytest.raises(ArgumentError, match="task_options.size: expected one of large, small"):
        make("digits", size="huge")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="take 'cpu'"):
        make("digits", device="cuda")


def test_the_learning_rate_of_a_built_in_task_falls_over_the_run():
    pytest.importorskip("sklearn")
    task = make("digits")
    rates = []
    for _ in range(10):
        rates.append(task.optimizer.param_groups[0]["lr"])
        task.optimizer.step()
        task.scheduler.step()
    assert max(rates) == rates[0] == pytest.approx(2e-3)
    assert rates[-1] == pytest.approx(2e-3 * 0.1, rel=0.5)


# -- the run ---------------------------------------------------------------------------------


def test_a_run_of_the_users_own(module):
    path = write(module, task="own_task:make", task_options={"width": 4}, training=TINY)
    outcome = run(load_run_file(path, output=module / "out"))
    assert outcome.result.steps == 20
    assert read_stats(outcome.stats)[-1]["event"] == "end"
    lines = outcome.table.splitlines()
    header = ["cycle", "step", "pruned", "resurrected", "churn", "Jaccard", "norm"]
    assert lines[0].split() == header
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "end"]
    assert list_checkpoints(module / "out" / "checkpoints")
    assert {p.name for p in outcome.pictures} >= {"learning_curve.png"}


def test_resume_ends_where_an_unbroken_run_ends(module, monkeypatch):
    """A second call finds the first one's checkpoint; a fresh start over it is refused."""
    monkeypatch.setattr(plots, "plot_stats", lambda *_: [])  # takes longer than the runs
    training = {**TINY, "checkpoint": {"every": 8, "keep": 5}}
    path = write(module, task="own_task:make", training=training)
    whole = run(load_run_file(path, output=module / "whole"))
    run(load_run_file(path, output=module / "broken"))
    for late in list_checkpoints(module / "broken" / "checkpoints")[1:]:
        for file in late.iterdir():
            file.unlink()
        late.rmdir()
    file = load_run_file(path, output=module / "broken")
    with pytest.raises(ArgumentError, match="expected no checkpoints of an earlier run, found 1"):
        run(file)
    resumed = run(file, resume=True)
    assert resumed.table == whole.table
    assert resumed.result.history == whole.result.history


def test_the_example(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("yaml")
    outcome = run(load_run_file(EXAMPLE, output=tmp_path))
    assert isinstance(load_run_file(EXAMPLE).training, TrainingConfig)
    assert outcome.result.steps == 600
    assert sum(c.commit["weights"]["total"]["resurrected"] for c in outcome.result.history) > 0
    assert outcome.result.history[-1].sparsity == pytest.approx(0.9, abs=1e-3)
    last = [r for r in outcome.result.stats if r["event"] == "evaluation"][-1]
    assert last["metrics"]["accuracy"] > 0.85
    assert len(outcome.pictures) == 4


def test_table_without_evaluations_or_commits():
    from resu_compile.training import CycleStats

    history = [CycleStats(cycle=0, step=10, sparsity=0.5, budget=0.1, prune=None, commit=None)]
    lines = cycle_table(history, []).splitlines()
    assert lines[-1].split() == ["0", "10", "50.00%", "-", "-", "-"]
