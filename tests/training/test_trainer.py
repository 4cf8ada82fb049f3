"""The trainer: equal to the plain loop, and told and stopped as it should."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.phase import Phase
from resu_compile.runtime.controller import find_controller
from resu_compile.training import (
    Callback,
    Cycle,
    Densification,
    EarlyStop,
    Pause,
    ProgressBar,
    Stage,
    Trainer,
)
from resu_compile.training.losses import LossWatch
from tests.training.models import (
    adamw,
    assert_same,
    config,
    drive,
    loss_fn,
    make_batches,
    make_model,
    make_trainer,
)

# -- equal to a plain loop ---------------------------------------------------------------------
DENSE = {"steps": 60, "warmup": 0.9, "recovery": 0.01, "cycles": 1}  # 54 dense steps


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_dense_steps_equal_the_plain_loop_bit_for_bit(accumulate, clip_norm):
    batches = make_batches()
    plain = make_model()
    optimizer, used, losses = adamw(plain), 0, []
    for _ in range(54):
        total = 0.0
        for _ in range(accumulate):
            loss = loss_fn(plain, batches[used % 7]) / accumulate
            loss.backward()
            total += loss.detach()
            used += 1
        if clip_norm:
            nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))

    found, seen = {}, []

    class Watch(Callback):
        def on_step(self, trainer, loss):
            seen.append(float(loss))
            if trainer.cycle.step_index == 53:
                found.update({k: v.clone() for k, v in trainer.model.state_dict().items()})

    changes = {**DENSE, "accumulate": accumulate, "clip_norm": clip_norm}
    make_trainer(callbacks=[Watch()], changes=changes).fit(batches)
    assert seen[:54] == losses
    for name, value in plain.state_dict().items():
        assert torch.equal(value, found[name]), name


def test_the_whole_plan_equals_a_loop_with_a_cycle():
    plain = make_model()
    drive(plain, Cycle(plain, config()), make_batches())
    trainer = make_trainer()
    trainer.fit(make_batches())
    assert_same(plain, trainer.model)


def test_clipping_holds_in_every_stage():
    norms = []

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            norms.append(
                float(
                    torch.stack(
                        [p.grad.norm() for g in self.param_groups for p in g["params"]]
                    ).norm()
                )
            )
            return super().step(closure)

    model = make_model()
    make_trainer(model, Watch(model.parameters(), lr=0.01), changes={"clip_norm": 0.05}).fit(
        make_batches()
    )
    assert len(norms) == 40
    assert max(norms) == pytest.approx(0.05, rel=1e-3)


def test_a_scheduler_steps_once_an_optimizer_step():
    model = make_model()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    trainer = make_trainer(model, optimizer, scheduler=scheduler, changes={"accumulate": 2})
    result = trainer.fit(make_batches())
    assert scheduler.last_epoch == 40
    rates = {r["step"]: r["lr"] for r in result.stats if r["event"] == "step"}
    assert rates[5] == pytest.approx(0.01 / 6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_reaches_the_model_and_keeps_the_zeros(dtype):
    model, seen = make_model(), set()

    def watched(model, batch):
        output = model(batch[0])
        seen.add(output.dtype)
        return (output.float() - batch[1]).square().mean()

    trainer = Trainer(
        model,
        adamw(model),
        watched,
        config(autocast=dtype, clip_norm=1.0),
        evaluate=lambda model: {"bits": model(make_batches()[0][0]).dtype.itemsize * 8},
    )
    result = trainer.fit(make_batches())
    assert seen == {getattr(torch, dtype)}
    assert [r["metrics"]["bits"] for r in result.stats if r["event"] == "evaluation"] == [16.0]
    assert trainer._stepper.scaler.is_enabled() is (dtype == "float16")
    assert model[0].weight.dtype == torch.float32
    assert resu.controller(model).sparsity == 0.75
    assert int(model[0].weight.eq(0).sum()) == 96


def test_float16_unscales_before_it_clips():
    """The scale, 65536 at first, must be out of the gradients that are clipped and stepped."""
    moved = []
    for autocast in (None, "float16"):
        model = make_model()
        before = model[0].weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        changes = {"autocast": autocast, "clip_norm": 1e-3}
        trainer = make_trainer(model, optimizer, changes=changes)
        trainer.callbacks.append(_StopAfter(1))
        with pytest.raises(_Stopped):
            trainer.fit(make_batches())
        moved.append(float((model[0].weight.detach() - before).norm()))
    assert moved[0] == pytest.approx(moved[1], rel=0.02)
    assert moved[0] > 0


class _Stopped(Exception):  # noqa: N818
    pass


class _StopAfter(Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_step(self, trainer, loss):  # noqa: ARG002
        if trainer.cycle.step_index + 1 == self.steps:
            raise _Stopped


# -- who is told -------------------------------------------------------------------------------
class Recorder(Callback):
    def __init__(self, log, name=""):
        self.log, self.name = log, name

    def _note(self, what, trainer, *rest):
        self.log.append((self.name + what, trainer.cycle.step_index, *rest))

    def on_start(self, trainer):
        self._note("start", trainer)

    def on_step(self, trainer, loss):
        assert loss.shape == ()
        assert not loss.requires_grad
        self._note("step", trainer, str(trainer.cycle.stage))

    def on_evaluate(self, trainer, metrics):
        self._note("evaluate", trainer, metrics)

    def on_prune(self, trainer, report):
        self._note("prune", trainer, report.strategy)

    def on_commit(self, trainer, report):
        self._note("commit", trainer, report.strategy)

    def on_pause(self, trainer, pause):
        self._note("pause", trainer, pause.reason)

    def on_stop(self, trainer, reason):
        self._note("stop", trainer, reason)

    def on_end(self, trainer, result):
        self._note("end", trainer, result.steps)


def test_callbacks_are_called_in_order():
    log = []
    modes = []

    def evaluate(model):
        modes.append((model.training, torch.is_grad_enabled(), str(resu.controller(model).phase)))
        return {"value": torch.tensor(2.0)}

    trainer = make_trainer(
        callbacks=[Recorder(log, "a "), Recorder(log, "b ")],
        evaluate=evaluate,
        changes={"evaluate_every": 13},
    )
    trainer.model.eval()
    trainer.fit(make_batches())
    assert trainer.model.training
    assert [entry for entry in log if entry[0][0] == "b"] == [
        ("b" + name[1:], *rest) for name, *rest in log if name[0] == "a"
    ]
    first = [(name[2:], *rest) for name, *rest in log if name[0] == "a"]
    assert [entry for entry in first if entry[0] != "step"] == [
        ("start", 0),
        ("prune", 9, "prune"),
        ("evaluate", 12, {"value": 2.0}),  # step 13 is done, and the commit comes next
        ("commit", 13, "amnesty"),
        ("prune", 18, "prune"),
        ("commit", 22, "amnesty"),
        ("evaluate", 25, {"value": 2.0}),
        ("prune", 27, "prune"),
        ("commit", 31, "amnesty"),
        ("evaluate", 38, {"value": 2.0}),
        ("evaluate", 40, {"value": 2.0}),
        ("end", 40, 40),
    ]
    assert [entry[1] for entry in first if entry[0] == "step"] == list(range(40))
    assert [entry[2] for entry in first if entry[0] == "step"][:14] == (
        ["warmup"] * 4 + ["train"] * 5 + ["stabilize"] * 2 + ["resu"] * 2 + ["train"]
    )
    assert modes == [(False, False, p) for p in ("resu", "sparse", "sparse", "sparse")]


def test_densification_pauses_and_ends_plain():
    log, paused = [], []

    def play(model, cycle):
        model.eval()  # as a game would
        paused.append(cycle)

    densify = Densification(start=0.75, pauses=(Pause(1, "play", 9),))
    trainer = make_trainer(
        callbacks=[Recorder(log)],
        on_pause=play,
        changes={"sparsity": 0.0, "densify": densify},
    )
    result = trainer.fit(make_batches())
    assert paused == [1]
    assert ("pause", 22, "play") in log
    assert trainer.model.training
    assert find_controller(trainer.model) is None
    assert [stats.sparsity for stats in result.history] == pytest.approx(
        [0.75, 0.375, 0.0], abs=0.01
    )
    assert [r for r in result.stats if r["event"] == "pause"] == [
        {"event": "pause", "step": 22, "cycle": 1, "reason": "play", "suggested_steps": 9}
    ]
    assert result.stats[-1] == {"event": "end", "step": 40, "sparsity": 0.0, "best": None}


def test_progress_shows_stage_and_steps(capsys):
    make_trainer(progress=True).fit(make_batches())
    shown = capsys.readouterr().err
    assert "40/40" in shown
    assert "recover" in shown
    assert "sparsity 75.0%" in shown


def test_progress_is_off_by_default(capsys):
    trainer = make_trainer()
    trainer.fit(make_batches())
    assert capsys.readouterr() == ("", "")
    assert not any(isinstance(callback, ProgressBar) for callback in trainer.callbacks)


# -- early stop --------------------------------------------------------------------------------
def evaluations(values):
    """An ``evaluate`` that gives ``values`` one after another, then the last one again."""
    rest = list(values)
    return lambda _model: {"loss": rest.pop(0) if len(rest) > 1 else rest[0]}


def test_early_stop_waits_for_the_recovery():
    log = []
    trainer = make_trainer(
        callbacks=[Recorder(log)],
        evaluate=evaluations([1.0]),  # never better
        changes={"evaluate_every": 1, "early_stop": EarlyStop("loss", patience=2)},
    )
    result = trainer.fit(make_batches())
    # the recovery begins after step 31: its first evaluation is the best, two more are no better
    assert result.steps == 34
    assert result.stopped_early
    assert result.best == 1.0
    assert trainer.cycle.stage is Stage.RECOVER
    assert [entry[0] for entry in log[-3:]] == ["evaluate", "stop", "end"]
    assert [r["event"] for r in result.stats[-3:]] == ["evaluation", "stop", "end"]
    assert resu.controller(trainer.model).sparsity == 0.75


@pytest.mark.parametrize(
    ("rule", "values", "steps", "best"),
    [
        (EarlyStop("loss", patience=2), [5, 4, 3, 3, 3, 2], 36, 3),
        (EarlyStop("loss", patience=2, mode="max"), [5, 4, 6, 6, 5, 2], 36, 6),
        (EarlyStop("loss", patience=2, min_delta=0.5), [5, 4.6, 4.4, 4.2, 4, 2], 36, 4.4),
        (EarlyStop("loss", patience=2), [math.nan, 4, 5, math.nan, 1], 35, 4),
        (EarlyStop("loss", patience=9), [5, 6], 40, 5),
        pytest.param(EarlyStop("loss", patience=8), [5, 6], 40, 5, id="at the end anyway"),
    ],
)
def test_early_stop_counts(rule, values, steps, best):
    changes = {"evaluate_every": 1, "early_stop": rule}
    values = [0.0] * 31 + values  # those before the recovery do not count
    result = make_trainer(evaluate=evaluations(values), changes=changes).fit(make_batches())
    assert (result.steps, result.best) == (steps, best)
    assert result.stopped_early is (steps < 40)


def test_early_stop_anywhere_commits_what_is_open():
    rule = EarlyStop("loss", patience=11, recovery_only=False)
    changes = {"evaluate_every": 1, "early_stop": rule}
    trainer = make_trainer(evaluate=evaluations([1.0]), changes=changes)
    result = trainer.fit(make_batches())
    assert result.steps == 12
    assert resu.controller(trainer.model).phase is Phase.SPARSE
    assert [stats.step for stats in result.history] == [12]
    assert [r["event"] for r in result.stats[-3:]] == ["stop", "commit", "end"]


def test_early_stop_needs_its_metric():
    changes = {"evaluate_every": 1, "early_stop": EarlyStop("acc")}
    with pytest.raises(ArgumentError, match="evaluate: expected a function"):
        make_trainer(changes=changes)
    trainer = make_trainer(evaluate=lambda _: {"loss": 1.0}, changes=changes)
    with pytest.raises(ArgumentError, match="expected evaluate.. to return 'acc', got loss"):
        trainer.fit(make_batches())


# -- errors ------------------------------------------------------------------------------------
def test_a_loss_of_nan_names_its_step():
    calls = []

    def bad(model, batch):
        calls.append(None)
        return loss_fn(model, batch) * (math.nan if len(calls) == 14 else 1.0)

    model = make_model()
    trainer = Trainer(model, adamw(model), bad, config(accumulate=2))
    with pytest.raises(ArgumentError, match="NaN or infinity at optimizer step 7;"):
        trainer.fit(make_batches())


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda *_: 1.0, ArgumentTypeError, "expected a scalar tensor, got a float"),
        (lambda m, b: m(b[0]), ArgumentError, r"of shape \(6, 4\); take the mean"),
        (lambda *_: torch.tensor(1), ArgumentError, "got torch.int64"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss, error, message):
    model = make_model()
    with pytest.raises(error, match=message):
        Trainer(model, adamw(model), loss, config()).fit(make_batches())


def test_an_evaluation_that_is_no_mapping_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"evaluate: expected a mapping .* got 0\.5"):
        make_trainer(evaluate=lambda _: 0.5).fit(make_batches())


class Wrapped(nn.Module):
    """Code of its own: what torch.nn brings is not always compiled at the top of a call."""

    def __init__(self):
        super().__init__()
        self.inner = make_model()

    def forward(self, x):
        return self.inner(x)


def test_evaluations_do_not_compile():
    compiled = []
    model = Wrapped()
    trainer = make_trainer(
        model,
        evaluate=lambda model: {"loss": model(make_batches()[0][0]).sum()},
        changes={"evaluate_every": 1},
    )

    def count(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    model.compile(backend=count)
    with torch.compiler.set_stance("default"):
        trainer._evaluate(trainer.cycle.span, 1)
    assert not compiled
    model(make_batches()[0][0])
    assert compiled


def test_a_delayed_watch_names_the_first_bad_step():
    watch = LossWatch(delayed=True)
    watch.check()
    for step, loss in enumerate([1.0, math.inf, 2.0, math.nan], start=1):
        watch.see(torch.tensor(loss), step)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="NaN or infinity at optimizer step 2;"):
            watch.check()


def test_a_progress_bar_without_tqdm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ArgumentError, match=r"pip install resu-compile\[train\]"):
        make_trainer(progress=True).fit(make_batches())


def test_wrong_arguments_are_refused():
    model = make_model()
    with pytest.raises(ArgumentTypeError, match="optimizer: expected a torch.optim.Optimizer"):
        Trainer(model, "adam", loss_fn, config())
    with pytest.raises(ArgumentTypeError, match="loss_fn: expected a function"):
        Trainer(model, adamw(model), None, config())
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adamw(model))
    with pytest.raises(ArgumentTypeError, match="scheduler: expected one that steps without"):
        Trainer(model, adamw(model), loss_fn, config(), scheduler=plateau)
    assert find_controller(model) is None
    with pytest.raises(ArgumentError, match="checkpoint: expected config.checkpoint"):
        Trainer(model, adamw(model), loss_fn, config()).fit([], resume=True)
