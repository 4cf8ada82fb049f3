from __future__ import annotations

import errno
import json
import logging
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from resu_compile.errors import ArgumentError, MachineError
from resu_compile.experiments import compiled_code, run_experiment, runner
from resu_compile.experiments.cells import build_cells
from resu_compile.experiments.compiled_code import CompiledCode
from resu_compile.experiments.records import ResultsFile, append_record, locked, read_records
from resu_compile.experiments.run_cell import cell_folder
from resu_compile.experiments.settings import training_config
from resu_compile.methods import TrainingMethod
from resu_compile.training.sparse_training import SparseTraining
from tests.experiments.linear_task import make

HERE = "tests.experiments.test_robustness"
SEARCH = {"start": [0.0, 0.2], "stop": [0.5, 0.9]}


def make_falling(*, steps, seed):
    """The learning rate falls linearly over ``steps``."""
    task = make(steps=steps, seed=seed)
    falling = LambdaLR(task.optimizer, lambda step: max(1.0 - step / steps, 0.0))
    return replace(task, scheduler=falling)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.second(self.first(x).relu())


def make_net(*, steps, seed):
    """A class of one's own, of which Dynamo shares graphs; of nn.Sequential it does not."""
    task = make(steps=steps, seed=seed)
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return replace(task, model=model, optimizer=optimizer)


def make_other_metric(*, steps, seed):
    return replace(make(steps=steps, seed=seed), metric="accuracy")


@dataclass(frozen=True)
class HalfWay(TrainingMethod):
    """Prune once, at a share of the steps."""

    at: float = 0.5

    def settled(self, run):
        return round(self.at * run.steps)

    def after_step(self, run):
        if run.step == self.settled(run):
            run.prune()


# -- compiled code ---------------------------------------------------------------------------
def test_cells_share_what_was_compiled(make_config):
    config = make_config(
        methods=["dense", "gmp", {"name": "resu", "training": {"cycles": 2}}],
        task={"name": f"{HERE}:make_net"},
        training={"compile": True},
    )
    before = compiled_code.counters["stats"]["unique_graphs"]
    assert run_experiment(config).failed == ()
    assert compiled_code.counters["stats"]["unique_graphs"] == before + 1


def test_code_that_is_not_shared_does_not_pile_up(monkeypatch):
    resets = []
    captured = {"unique_graphs": 0}
    monkeypatch.setattr(compiled_code, "counters", {"stats": captured})
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(len(seen)))
    code, seen = CompiledCode(), []
    for key, graphs in [("a", 1), ("a", 0), ("a", 1), ("a", 1), ("b", 1), ("b", 0), ("b", 0)]:
        with code.of(key):
            seen.append(key)
            captured["unique_graphs"] += graphs
    assert resets == [0, 3, 4]  # a new key, a cell after one that shared nothing, a new key


# -- failures of the machine ---------------------------------------------------------------------
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access", 700),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=["memory", "gpu", "disk"],
)
def test_a_failure_of_the_machine_is_no_result(make_config, monkeypatch, error):
    config = make_config(methods=["gmp"])

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_cell", fail)
        with pytest.raises(MachineError, match="nothing is recorded of this cell"):
            run_experiment(config)
    assert read_records(config.results) == []
    assert run_experiment(config).made == 2


# -- tasks and methods of one's own --------------------------------------------------------------
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"options": {"widht": 3}}, "unexpected keyword argument 'widht'"),
        ({"name": f"{HERE}:make_other_metric"}, "expected its metric 'accuracy' in what evaluate"),
        ({"name": f"{HERE}:no_such"}, "expected a function 'no_such'"),
        ({"name": "digitz"}, "expected one of bytes"),
    ],
)
def test_mistakes_in_a_task_show_before_it_trains(make_config, task, message):
    config = make_config(task=task)
    with pytest.raises(ArgumentError, match=message):
        run_experiment(config)
    assert read_records(config.results) == []


def test_a_method_of_ones_own(make_config):
    config = make_config(
        methods=[{"name": f"{HERE}:HalfWay", "label": "half", "search": {"at": [0.2, 0.8]}}],
        tuning={"trials": 3},
    )
    assert run_experiment(config).failed == ()
    records = read_records(config.results)
    assert {r["method"] for r in records} == {"half"}
    assert {r["reached_sparsity"] for r in records} == {0.75}
    with pytest.raises(ArgumentError, match="unexpected keyword argument 'when'"):
        make_config(methods=[{"name": f"{HERE}:HalfWay", "options": {"when": 0.5}}])


# -- fairness ------------------------------------------------------------------------------------
def test_dense_is_dense_whatever_the_others_do():
    for training in ({"overrides": {"0.weight": 0.5}}, {"pattern": "2:4"}, {"cycles": 3}):
        config = training_config(
            "dense", steps=20, sparsity=0.75, seed=0, training={**training, "compile": False}
        )
        run = SparseTraining(make(steps=20, seed=0).model, config).start()
        assert run.controller.sparsity == 0.0


@pytest.mark.parametrize(("method", "last"), [("gmp", 30), ("lottery", 10)])
def test_the_learning_rate_ends_with_the_run(make_config, method, last):
    """Three levels of a lottery ticket have a whole schedule each."""
    options = {"rate": 0.5} if method == "lottery" else {}
    config = make_config(
        methods=[{"name": method, "options": options}],
        task={"name": f"{HERE}:make_falling"},
        training={"compile": False, "log_every": 1},
        seeds=[0],
    )
    run_experiment(config)
    (cell,) = build_cells(config)
    lines = (cell_folder(config, cell) / "stats.jsonl").read_text().splitlines()
    rates = [r["lr"] for r in map(json.loads, lines) if r["event"] == "step"]
    assert len(rates) == 30
    falls = [0.01 * (1.0 - step / last) for step in range(last)]
    assert rates == pytest.approx(falls * (30 // last)) or rates == pytest.approx(
        (falls[1:] + [0.0]) * (30 // last)
    )


@pytest.mark.parametrize("strategy", ["random", "grid"])
def test_no_trial_repeats_the_defaults(make_config, strategy):
    """0.75 is the default of ``stop``: without it there are two settings beside the first trial."""
    config = make_config(
        methods=[{"name": "gmp", "search": {"stop": [0.6, 0.75, 0.9]}}],
        tuning={"trials": 8, "strategy": strategy},
    )
    trials = [cell.settings for cell in build_cells(config) if cell.kind == "trial"]
    assert trials[0] == {}
    assert sorted(settings["stop"] for settings in trials[1:]) == [0.6, 0.9]


def test_a_trial_that_succeeds_later_chooses_anew(make_config, monkeypatch, caplog):
    """The runs that were made with the earlier choice are made again."""
    caplog.set_level(logging.CRITICAL)
    config = make_config(methods=[{"name": "gmp", "search": SEARCH}], tuning={"trials": 4})
    trials = [cell for cell in build_cells(config) if cell.kind == "trial"]
    whole = make_config(
        methods=[{"name": "gmp", "search": SEARCH}],
        tuning={"trials": 4},
        output=str(config.output / "whole"),
    )
    run_experiment(whole)
    expected = [r["settings"] for r in read_records(whole.results) if r["kind"] == "run"]
    best = next(cell for cell in trials if cell.settings == expected[0])
    real = runner.run_cell

    def fail_once(cell, *args, **kwargs):
        if cell.key == best.key:
            raise RuntimeError("once")
        return real(cell, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_cell", fail_once)
        assert len(run_experiment(config).failed) == 1
    assert run_experiment(config, retry_failed=True).made == 3  # the trial and both runs
    last = {r["seed"]: r["settings"] for r in read_records(config.results) if r["kind"] == "run"}
    assert list(last.values()) == expected


# -- results -------------------------------------------------------------------------------------
def test_each_line_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    file = ResultsFile(path)
    assert file.read() == []
    append_record(path, {"key": "a"})
    assert [record["key"] for record in file.read()] == ["a"]
    with path.open("ab") as half:
        half.write(b'{"key": "b"')
    assert [record["key"] for record in file.read()] == ["a"]
    append_record(path, {"key": "c"})
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    assert [record["key"] for record in file.read()] == ["a", "c"]
    assert len(parsed) == 1
    path.unlink()
    assert file.read() == []


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    append_record(path, {"key": "a"})
    with path.open("ab") as file:
        file.write(b"\0\0\0\n")
    with pytest.raises(ArgumentError, match="in line 2, got"):
        read_records(path)


def test_runs_that_wait_for_trials_are_not_claimed(make_config, monkeypatch):
    config = make_config(methods=[{"name": "gmp", "search": SEARCH}], tuning={"trials": 2})
    trials = [cell for cell in build_cells(config) if cell.kind == "trial"]
    asked = []

    def watched(path, **options):
        asked.append(path.stem)
        return locked(path, **options)

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "locked", watched)
    monkeypatch.setattr(runner.time, "sleep", stop)
    claims = [config.output / "claims" / f"{cell.key}.lock" for cell in trials]
    with locked(claims[0]), locked(claims[1]), pytest.raises(KeyboardInterrupt):
        run_experiment(config)
    assert asked == [cell.key for cell in trials]
