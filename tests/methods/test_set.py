import torch

from resu_compile.methods.drop_and_grow import drop_and_grow
from tests.methods.runs import WEIGHTS, assert_sparse, drive, make_run, one_step


def test_drops_the_smallest_and_grows_at_random_after_the_step():
    run = make_run("set", options={"fraction": 0.5, "every": 3})
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    drive(run, optimizer, until=2)
    before = run.controller.masks
    draws = torch.Generator()
    draws.set_state(run.generator.get_state())
    values = {}
    remask = run.remask

    def watched(masks, strategy):
        values.update({n: w.parameter.detach().clone() for n, w in run.controller.weights.items()})
        return remask(masks, strategy)

    run.remask = watched
    one_step(run, optimizer)
    for name in WEIGHTS:
        value = values[name]
        drawn = torch.rand(value.shape, generator=draws)
        n_drop = int(0.5 * int(before[name].sum()))
        expected = drop_and_grow(before[name], value.abs(), drawn, n_drop)
        assert torch.equal(run.controller.masks[name], expected)
    assert_sparse(run, optimizer)


def test_no_gradient_is_dense_and_every_step_is_taken():
    run = make_run("set", options={"every": 2}).start()
    optimizer = torch.optim.Adam(run.model.parameters())
    while not run.done:
        assert not run.controller.dense_gradients
        one_step(run, optimizer)
    assert float(optimizer.state[run.model[0].bias]["step"]) == 20
    assert [update.step for update in run.updates] == [0, 2, 4, 6, 8, 10, 12, 14]


def test_with_another_growth_score_it_grows_by_gradient():
    run = make_run("set", options={"every": 4, "grow": "gradient", "fraction": 0.5})
    drive(run, until=4)
    assert run.controller.dense_gradients
    drive(run, until=5)
    assert run.updates[-1].step == 4
    assert run.updates[-1].churn > 0.0
