import pytest
import torch

from resu_compile.methods.criteria import ByMagnitude
from tests.methods.runs import (
    WEIGHTS,
    assert_sparse,
    drive,
    loss_of,
    make_batches,
    make_model,
    make_run,
)


def scores(model):
    loss_of(model, make_batches()[0]).backward()
    return {
        name: (model.get_parameter(name) * model.get_parameter(name).grad).abs().detach()
        for name in WEIGHTS
    }


def test_keeps_the_highest_of_all_layers():
    model = make_model()
    expected = scores(model)
    flat = torch.cat([expected[name].flatten() for name in WEIGHTS])
    threshold = flat.sort(descending=True).values[len(flat) // 4 - 1]
    run = make_run("snip", min_density=0.0).start()
    drive(run, until=1)
    for name in WEIGHTS:
        assert torch.equal(run.controller.masks[name], expected[name] >= threshold)
        kept = torch.where(run.controller.masks[name], model.get_parameter(name), 0.0)
        assert torch.equal(run.model.get_parameter(name), kept)  # no step has moved it
    assert torch.equal(run.model[0].bias, model[0].bias)


def test_inside_each_layer():
    expected = scores(make_model())
    run = drive(make_run("snip", scope="layer"), until=1)
    for name in WEIGHTS:
        count = expected[name].numel() // 4
        threshold = expected[name].flatten().sort(descending=True).values[count - 1]
        assert torch.equal(run.controller.masks[name], expected[name] >= threshold)


def test_no_layer_dies():
    model = make_model()
    model[2].weight.data *= 1e-6
    options = {"criterion": "magnitude"}
    run = drive(make_run("snip", model, options=options, min_density=0.125), until=1)
    assert run.controller.weights["2.weight"].nnz == 8
    assert run.controller.sparsity == 0.75


def test_the_masks_stay_and_pruned_weights_too():
    run = make_run("snip").start()
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.05)
    drive(run, optimizer, until=1)
    masks = run.controller.masks
    drive(run, optimizer)
    assert all(torch.equal(masks[name], run.controller.masks[name]) for name in WEIGHTS)
    assert_sparse(run, optimizer)
    assert float(optimizer.state[run.model[0].bias]["step"]) == 19
    assert run.controller.config.method == "magnitude"
    assert run.stats().ever_share == 0.25


@pytest.mark.parametrize("criterion", ["gradient", ByMagnitude()])
def test_with_another_criterion(criterion):
    run = drive(make_run("snip", options={"criterion": criterion}), until=1)
    assert run.controller.sparsity == 0.75
