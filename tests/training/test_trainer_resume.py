"""A trainer that was saved and goes on is, bit for bit, the one that never stopped."""

from __future__ import annotations

import shutil

import pytest
import torch

from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError
from resu_compile.training import (
    CheckpointConfig,
    Densification,
    EarlyStop,
    read_stats,
)
from tests.training.models import adamw, assert_same, make_batches, make_model, make_trainer


class _Stopped(Exception):  # noqa: N818
    pass


def build(dtype=None, **changes):
    """A run that uses every kind of state: dropout, shuffling, momentum, a schedule, Adam theta."""
    model = make_model(dropout=0.2)
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    theta = ResurrectionConfig(lr=0.05, rule="adam", init="normal")
    settings = {
        "resurrection": theta,
        "accumulate": 2,
        "autocast": dtype,
        "evaluate_every": 5,
        "early_stop": EarlyStop("loss", patience=20),
        **changes,
    }
    evaluate = lambda model: {"loss": float(model[0].weight.detach().double().sum())}  # noqa: E731
    return make_trainer(model, optimizer, scheduler=scheduler, evaluate=evaluate, changes=settings)


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(make_batches(11), batch_size=None, shuffle=True)


def _copy(tree):
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_copy(value) for value in tree)
    return tree


def run_until(trainer, steps, batches):
    """Train ``steps`` steps, borders included, and return the whole state."""
    trainer.model.train()
    done = {}
    go_on = trainer._step

    def step():
        if trainer.cycle.step_index == steps:
            done["state"] = _copy(
                {
                    "model": trainer.model.state_dict(),
                    "optimizer": trainer.optimizer.state_dict(),
                    "trainer": trainer.state_dict(),
                }
            )
            raise _Stopped
        go_on()

    trainer._step = step
    with pytest.raises(_Stopped):
        trainer.fit(batches)
    return done["state"]


def check_resume(stop, dtype=None, **changes):
    torch.manual_seed(5)
    whole = build(dtype, **changes)
    torch.manual_seed(5)
    expected = whole.fit(loader())
    torch.manual_seed(5)
    first = build(dtype, **changes)
    torch.manual_seed(5)
    state = run_until(first, stop, loader())
    torch.manual_seed(6)
    second = build(dtype, **changes)
    second.load(state)
    torch.manual_seed(7)
    result = second.fit(loader())
    assert_same(whole.model, second.model)
    assert result.history == expected.history
    assert result.best == expected.best
    assert result.steps == 40
    assert second._stepper.scaler.state_dict() == whole._stepper.scaler.state_dict()
    before = sum(r["step"] <= stop for r in expected.stats)
    assert state["trainer"]["stats_lines"] == before
    assert list(result.stats) == list(expected.stats)[before:]


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(2, id="warmup"),
        pytest.param(6, id="train"),
        pytest.param(10, id="stabilize"),
        pytest.param(12, id="resu"),
        pytest.param(13, id="after commit"),
        pytest.param(22, id="epoch border"),
        pytest.param(35, id="recover"),
    ],
)
def test_a_resumed_run_is_the_same_run(stop):
    check_resume(stop)


def test_a_resumed_run_in_float16_is_the_same_run():
    check_resume(12, "float16")


@pytest.mark.parametrize("storage", ["inplace", "compact"])
@pytest.mark.parametrize("rule", ["selective", "subset", "momentum", "sgd"])
def test_a_resumed_resu_phase_is_the_same_by_every_rule(rule, storage):
    theta = ResurrectionConfig(lr=0.05, rule=rule, storage=storage, init="normal")
    check_resume(12, resurrection=theta)


def test_a_resumed_densification_is_the_same_run():
    check_resume(21, sparsity=0.0, densify=Densification(start=0.6))
    check_resume(37, sparsity=0.0, densify=Densification(start=0.6))


def test_checkpoints_are_written_kept_and_found(tmp_path):
    folder = tmp_path / "run"
    changes = {
        "checkpoint": CheckpointConfig(str(folder), every=16, keep=2),
        "stats": str(tmp_path / "stats.jsonl"),
    }
    torch.manual_seed(5)
    whole = build(**changes)
    torch.manual_seed(5)
    whole.fit(loader(), resume=True)  # nothing there: begins
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000032", "step-00000040"]
    expected = read_stats(tmp_path / "stats.jsonl")

    again = build(**changes)
    result = again.fit(loader(), resume=True)  # finished already
    assert result.steps == 40
    assert_same(whole.model, again.model)

    shutil.rmtree(folder / "step-00000040")
    resumed = build(**changes)
    result = resumed.fit(loader(), resume=True)
    assert_same(whole.model, resumed.model)
    assert read_stats(tmp_path / "stats.jsonl") == expected == list(result.stats)


def test_a_run_that_was_stopped_early_stays_stopped(tmp_path):
    changes = {
        "checkpoint": CheckpointConfig(str(tmp_path), every=16),
        "evaluate_every": 1,
        "early_stop": EarlyStop("loss", patience=2),
    }
    evaluate = lambda _model: {"loss": 1.0}  # noqa: E731
    first = make_trainer(evaluate=evaluate, changes=changes).fit(make_batches())
    assert (first.steps, first.stopped_early) == (34, True)
    assert (tmp_path / "step-00000034").is_dir()
    again = make_trainer(evaluate=evaluate, changes=changes).fit(make_batches(), resume=True)
    assert (again.steps, again.stopped_early, again.best) == (34, True, 1.0)


def test_state_refuses_what_does_not_fit():
    trainer = build()
    state = trainer.state_dict()
    with pytest.raises(ArgumentError, match="state: expected version"):
        trainer.load_state_dict({**state, "version": 0})
    with pytest.raises(ArgumentError, match=r"state: expected what Trainer\.state_dict"):
        trainer.load_state_dict({"model": {}})
    with pytest.raises(ArgumentError, match="scheduler: expected one, as in the saved run"):
        make_trainer().load_state_dict(state)
