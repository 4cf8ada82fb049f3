import pytest
import torch

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods import ACDC
from resu_compile.phase import Phase
from tests.methods.runs import WEIGHTS, assert_sparse, drive, make_run

SPARSE, DENSE = Phase.SPARSE, Phase.DENSE


def test_the_phases_of_a_hundred_epochs():
    found = ACDC().switches(100)
    expected = {
        step: SPARSE if index % 2 == 0 else DENSE for index, step in enumerate(range(10, 75, 5))
    }
    assert found == {**expected, 75: DENSE, 85: SPARSE}


def test_phases_that_end_in_a_dense_one_run_into_the_last_dense_one():
    found = ACDC(warmup=2, phase=3, last_dense=2, last_sparse=5).switches(15)
    assert found == {2: SPARSE, 5: DENSE, 10: SPARSE}
    without = ACDC(warmup=0, phase=4, last_dense=0, last_sparse=4).switches(12)
    assert without == {0: SPARSE, 4: DENSE, 8: SPARSE}


def test_phases_and_counts():
    run = make_run("acdc", options={"phase": 2, "reset_optimizer": False}).start()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    phases = []
    while not run.done:
        phases.append(run.controller.phase)
        if phases[-1] is SPARSE:
            assert run.controller.sparsity == 0.75
            assert_sparse(run, optimizer)
        drive(run, optimizer, until=run.step + 1)
    switches = run.method.switches(20)
    expected, now = [], DENSE
    for step in range(20):
        now = switches.get(step, now)
        expected.append(now)
    assert phases == expected
    assert {SPARSE, DENSE} == set(phases[5:])
    run.finish()
    assert_sparse(run, optimizer)


def test_other_weights_may_be_kept_after_a_dense_phase():
    run = make_run("acdc", options={"phase": 4, "warmup": 2, "last_dense": 2, "last_sparse": 4})
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5)
    drive(run, optimizer, until=3)
    first = run.controller.masks
    drive(run, optimizer)
    assert any(bool((run.controller.masks[name] & ~first[name]).any()) for name in WEIGHTS)
    assert run.updates[-1].churn > 0.0


@pytest.mark.parametrize("reset", [True, False])
def test_the_optimizer_may_be_reset(reset):
    run = make_run("acdc", options={"phase": 4, "warmup": 2, "reset_optimizer": reset})
    optimizer = torch.optim.Adam(run.model.parameters())
    drive(run, optimizer, until=5)
    assert float(optimizer.state[run.model[0].bias]["step"]) == 5
    drive(run, optimizer, until=6)
    assert bool(optimizer.state[run.model[0].bias]) is not reset
    drive(run, optimizer)
    assert_sparse(run, optimizer)


def test_an_early_end_leaves_it_sparse():
    run = drive(make_run("acdc"), until=1)
    assert run.controller.phase is DENSE
    run.finish()
    assert (run.controller.phase, run.controller.sparsity) == (SPARSE, 0.75)


def test_phases_that_do_not_fit():
    with pytest.raises(ArgumentError, match="expected to fit into 10 steps"):
        make_run("acdc", steps=10, options={"warmup": 9}).start()
    with pytest.raises(ArgumentError, match="^phase: expected"):
        ACDC(phase=0)
    with pytest.raises(ArgumentTypeError, match="^reset_optimizer: expected a bool"):
        ACDC(reset_optimizer=1)
