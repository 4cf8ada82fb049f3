import pytest
import torch

import resu_compile as resu
from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError
from resu_compile.methods import Resu
from resu_compile.training import Cycle, CycleShares, SparseTraining, TrainingConfig
from tests.methods.runs import WEIGHTS, drive, loss_of, make_batches, make_model

CYCLES = {"steps": 30, "sparsity": 0.75, "cycles": 3, "compile": False}


def test_it_is_the_cycle():
    run = SparseTraining(make_model(), TrainingConfig(method="resu", **CYCLES))
    drive(run).finish()
    model, batches = make_model(), make_batches()
    cycle = Cycle(model, TrainingConfig(**CYCLES)).start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    while not cycle.done:
        loss_of(model, batches[cycle.step_index % 5]).backward()
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()
    cycle.finish()
    for name, value in model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value)
    assert run.history == cycle.history
    assert len(run.history) == 3
    assert {update.strategy for update in run.updates} == {"prune", "open"}


def test_its_criterion_and_its_settings():
    shares = CycleShares(0.5, 0.5, 0.0)
    config = TrainingConfig(method=Resu(criterion="random"), cycle=shares, **CYCLES | {"steps": 40})
    assert (config.method, config.method_options) == ("resu", {"criterion": "random"})
    run = drive(SparseTraining(make_model(), config))
    assert run.controller.config.method == "random"
    assert all(stats.commit is None for stats in run.history)
    with pytest.raises(ArgumentError, match="^method: unknown method 'magnitud'"):
        Resu(criterion="magnitud")


def test_resurrection_by_the_gradient():
    config = TrainingConfig(
        method="resu",
        resurrection=ResurrectionConfig(score="gradient"),
        budget_start=0.25,
        budget_end=0.25,
        **CYCLES,
    )
    run = drive(SparseTraining(make_model(), config))
    assert sum(stats.commit["weights"]["total"]["resurrected"] for stats in run.history) > 0
    assert all(run.controller.weights[name].nnz > 0 for name in WEIGHTS)


def grown_by_gradient(theta):
    """One RESU phase of one step on a random mask, committed by RigL's scores."""
    model = make_model()
    resu.sparsify(model, 0.75, method="random", compile=False)
    controller = resu.controller(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = controller.masks
    with controller.resurrect(score="growth", budget=0.25, **theta) as phase:
        loss_of(model, make_batches()[0]).backward()
        grads = {name: model.get_parameter(name).grad.clone() for name in WEIGHTS}
        optimizer.step()
    return model, before, grads, phase.report


@pytest.mark.parametrize("theta", [{"lr": 0.0, "rule": "sgd"}, {}], ids=["at zero", "trained"])
def test_rules_of_resu_with_the_growth_of_rigl(theta):
    model, before, grads, report = grown_by_gradient(theta)
    for name in WEIGHTS:
        weight = resu.controller(model).weights[name]
        count = int(before[name].sum())
        grown = int(0.25 * count)
        values = grads[name].abs()[~before[name]].sort(descending=True).values
        assert report.weights[name].resurrected == grown
        assert weight.nnz == count
        new = weight.mask & ~before[name]
        assert grads[name].abs()[new].min() == values[grown - 1]
        assert bool(weight.parameter[new].any()) is (theta == {})


def test_growth_is_for_a_quota():
    with pytest.raises(ArgumentError, match="^score: expected another one than 'growth' unless"):
        ResurrectionConfig(score="growth", kind="ceiling")
    model = make_model()
    resu.sparsify(model, pattern="2:4", compile=False)
    controller = resu.controller(model)
    controller.resurrect().__enter__()
    with pytest.raises(ArgumentError, match="^score: expected another one than 'growth' under a"):
        controller.commit(score="growth")


def test_growth_by_theta_on_the_schedule_of_rigl():
    """Constant sparsity, a quota and short cycles: the smallest go, the largest theta come."""
    config = TrainingConfig(
        method=Resu("magnitude"),
        schedule="constant",
        warmup=0.0,
        cycle=CycleShares(0.0, 0.0, 1.0),
        resurrection=ResurrectionConfig(),
        budget_start=0.3,
        budget_end=0.05,
        **CYCLES,
    )
    run = drive(SparseTraining(make_model(), config))
    churns = [update.churn for update in run.updates if update.strategy == "amnesty"]
    assert churns == pytest.approx([13 / 48, 7 / 48, 1 / 48])  # of 32 and of 16
