import pytest
import torch

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
    assert {update.strategy for update in run.updates} == {"prune", "amnesty"}


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
