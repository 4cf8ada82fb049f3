"""Settings that fit no run are named before it trains; the ends and the resumes of runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods import MEST, RigL
from resu_compile.training import (
    EarlyStop,
    SparseTraining,
    Trainer,
    TrainingConfig,
    count_flops,
)
from tests.methods.runs import WEIGHTS, drive, loss_of, make_batches, make_model, make_run


# -- the config ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "rgl"}, ArgumentError, "^method: unknown method 'rgl'.*magnitude.*rigl"),
        ({"method": RigL}, ArgumentError, r"^method: .*the class RigL; RigL\(\) makes an object"),
        ({"method": "rigl", "method_options": {3: 4}}, ArgumentTypeError, "^method_options: "),
        (
            {"method": "rigl", "method_options": {"replaces_step": 1}},
            ArgumentTypeError,
            "^replaces_step: expected a bool",
        ),
        ({"method": "gmp", "pattern": "2:4", "sparsity": None}, ArgumentError, "^pattern: "),
    ],
)
def test_a_wrong_setting_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        TrainingConfig(**changes)


@pytest.mark.parametrize("changes", [{"stages": 3}, {"ranges": "ab"}])
def test_what_is_no_sequence(changes):
    with pytest.raises(ArgumentTypeError, match=f"^{next(iter(changes))}: expected a sequence"):
        MEST(**changes)


def test_a_criterion_whose_needs_are_unknown():
    class Misspelt:
        needs = "grad"

        def score(self, places):
            return places.weight

    with pytest.raises(ArgumentError, match="^grow.needs: expected one of gradient.*got 'grad'"):
        RigL(grow=Misspelt())


def test_the_pattern_gives_the_sparsity():
    config = TrainingConfig(method="sr_ste", pattern="1:4", sparsity=None)
    assert config.sparsity == 0.75


# -- the run -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gmp", {"start": 0.9, "stop": 0.1}, "^start, stop: expected start <= stop <= 20"),
        ("gmp", {"start": 500, "stop": 900}, "^start, stop: expected start <= stop <= 20"),
        ("gmp", {"initial": 0.8}, "^initial: expected at most 0.75"),
        ("soft_shrinkage", {"stop": 21}, "^start, stop: expected start <= stop <= 20"),
        ("one_shot", {"at": 21}, "^at: expected at most 20 steps"),
    ],
)
def test_what_does_not_fit_into_the_run(name, options, message):
    """It would be pruned at the very end, after the last evaluation."""
    run = make_run(name, options=options)
    for _ in range(2):  # it does not go on dense either
        with pytest.raises(ArgumentError, match=message):
            run.start()


def test_calibration_is_asked_for_before_the_first_step():
    data = [torch.randn(4, 8)]
    wanda = TrainingConfig(method="one_shot", method_options={"criterion": "wanda"}, compile=False)
    with pytest.raises(ArgumentError, match="^calibration: expected data for method 'one_shot'"):
        SparseTraining(make_model(), wanda)
    with pytest.raises(ArgumentTypeError, match="^calibration: expected batches that can be iter"):
        SparseTraining(make_model(), wanda, calibration=iter(data))
    with pytest.raises(ArgumentError, match="^calibration: expected None with method 'rigl'"):
        SparseTraining(make_model(), TrainingConfig(method="rigl"), calibration=data)
    cycles = TrainingConfig(
        method="resu",
        method_options={"criterion": "wanda"},
        resurrection=ResurrectionConfig(strategy="reprune"),
        compile=False,
    )
    with pytest.raises(ArgumentError, match="^calibration: expected data for method 'wanda'"):
        SparseTraining(make_model(), cycles)


def test_a_calibrated_criterion_prunes_once():
    config = TrainingConfig(
        method="one_shot",
        method_options={"criterion": "wanda", "at": 2},
        steps=4,
        sparsity=0.75,
        compile=False,
    )
    run = SparseTraining(make_model(), config, calibration=[torch.randn(16, 8)])
    drive(run)
    assert [weight.nnz for weight in run.controller.weights.values()] == [32, 16]


@pytest.mark.parametrize("name", ["sr_ste", "top_kast"])
def test_an_early_stop_that_would_never_come(name):
    config = TrainingConfig(
        method=name, compile=False, evaluate_every=5, early_stop=EarlyStop("loss")
    )
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="^early_stop.recovery_only: expected False with meth"):
        Trainer(model, optimizer, loss_of, config, evaluate=lambda _: {"loss": 0.0})


def test_what_an_early_stop_prunes_is_in_the_last_record():
    config = TrainingConfig(
        method="gmp",
        method_options={"every": 2},
        steps=20,
        sparsity=0.75,
        compile=False,
        evaluate_every=2,
        early_stop=EarlyStop("loss", patience=1, recovery_only=False),
    )
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, loss_of, config, evaluate=lambda _: {"loss": 1.0})
    result = trainer.fit(make_batches())
    assert result.stopped_early
    end = result.stats[-1]
    assert end["sparsity"] == resu.controller(model).sparsity == 0.75
    assert end["method"]["sparsity"] == 0.75


# -- what was there before -----------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gmp", "lottery", "one_shot"])
def test_masks_of_an_earlier_run_are_not_those_of_the_dense_phase(name):
    model = make_model()
    resu.sparsify(model, 0.9, compile=False)
    run = make_run(name, model, options={"rate": 0.5} if name == "lottery" else {}).start()
    assert run.controller.sparsity == 0.0
    drive(run).finish()
    assert run.controller.sparsity == 0.75
    assert run.stats().ever_share == 1.0


def test_a_run_goes_back_to_an_earlier_state():
    """GMP keeps values aside from its first pruning on; those of later steps have no part."""
    run = make_run("gmp", options={"every": 2, "start": 4})
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    drive(run, optimizer, until=2)
    model = {name: value.clone() for name, value in run.model.state_dict().items()}
    controller, state = run.controller.state_dict(), run.state_dict()
    ends = []
    for until in (9, 20):
        drive(run, optimizer, until=until)
        ends.append(run.updates[-1].step)
        if until == 9:
            assert run.master is not None
            run.model.load_state_dict(model)
            run.controller.load_state_dict(controller)
            run.load_state_dict(state)
            assert run.master is None
    straight = drive(make_run("gmp", options={"every": 2, "start": 4}), optimizer=None)
    assert ends == [8, straight.updates[-1].step]
    assert run.updates[-1].sparsity == straight.updates[-1].sparsity


# -- FLOPs ---------------------------------------------------------------------------------------
def test_counting_leaves_each_module_in_its_mode():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    model[1].eval()  # a norm that is frozen in fine-tuning
    resu.sparsify(model, 0.5, compile=False)
    before = model[1].running_mean.clone()
    count_flops(model, torch.randn(6, 8))
    assert [module.training for module in model] == [True, False, True]
    assert model.training
    assert torch.equal(model[1].running_mean, before)


def test_rewinding_takes_the_buffers_back_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    run = make_run("lottery", model, options={"rate": 0.5}, steps=12).start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    drive(run, optimizer, until=4)
    for name, value in model.state_dict().items():
        wanted = start[name]
        if name in run.controller.weights:
            wanted = wanted * run.controller.weights[name].mask
        assert torch.equal(value, wanted), name
    assert not optimizer.state
    assert list(run.controller.weights) == [WEIGHTS[0], "2.weight"]


def test_masks_that_will_never_change_are_told_of(caplog):
    """The default of every 100 steps in a run of 20."""
    make_run("rigl").start()
    assert "rigl: no update in 20 steps with every=100" in caplog.text
    caplog.clear()
    make_run("rigl", options={"every": 5}).start()
    make_run("mest", options={"every": 100}).start()  # where its ranges end
    assert not caplog.records
