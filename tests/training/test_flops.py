"""FLOPs against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.errors import ArgumentError
from resu_compile.training import count_flops
from resu_compile.training.flops import StepCosts, inference_share
from tests.methods.runs import drive, loss_of, make_batches, make_model, make_run


def test_matrices_by_hand():
    model = make_model()
    resu.sparsify(model, 0.75, targets="0.weight", compile=False)
    found = count_flops(model, torch.randn(6, 8))
    assert found.weights == {"0.weight": 2 * 6 * 8 * 16}
    assert found.other == 2 * 6 * 16 * 4
    assert found.dense == 2 * 6 * (8 * 16 + 16 * 4)
    assert model.training


class Mixed(nn.Module):
    """A convolution, a weight that is used twice, and a product of activations."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        x = self.conv(x).flatten(1, 2)  # (1, 32, 8)
        x = self.mix(self.mix(x))
        return x @ x.mT


def test_convolutions_shared_weights_and_attention():
    model = resu.sparsify(Mixed(), 0.5, compile=False)
    found = count_flops(model, torch.randn(1, 3, 8, 8))
    assert found.weights["conv.weight"] == 2 * 8 * 8 * 4 * 3 * 9
    assert found.weights["mix.weight"] == 2 * (2 * 32 * 8 * 8)
    assert found.other == 2 * 32 * 8 * 32


def test_fused_layers_are_the_products_that_they_are():
    """Batch 2, length 5, width 8, 2 heads of 4; and an LSTM of 3 steps."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    resu.sparsify(layer, 0.5, compile=False)
    found = count_flops(layer, torch.randn(2, 5, 8))
    assert found.weights == {
        "self_attn.in_proj_weight": 2 * 10 * 8 * 24,
        "self_attn.out_proj.weight": 2 * 10 * 8 * 8,
        "linear1.weight": 2 * 10 * 8 * 16,
        "linear2.weight": 2 * 10 * 16 * 8,
    }
    assert found.other == 2 * (2 * 2 * 2 * 5 * 5 * 4)  # q k^T and its product with v
    assert torch.backends.mha.get_fastpath_enabled()
    memory = resu.sparsify(nn.LSTM(4, 6), 0.5, compile=False)
    products = count_flops(memory, torch.randn(3, 2, 4)).weights
    assert products == {
        "weight_ih_l0": 2 * 3 * 2 * 4 * 24,
        "weight_hh_l0": 2 * 3 * 2 * 6 * 24,
    }


def test_a_compiled_model_is_counted_eagerly_and_stays_in_its_mode():
    model = make_model().eval()
    resu.sparsify(model, 0.5)
    found = count_flops(model, torch.randn(2, 8))
    assert sum(found.weights.values()) == 2 * 2 * (8 * 16 + 16 * 4)
    assert not model.training


def test_a_plain_model_has_nothing_to_count():
    with pytest.raises(ArgumentError, match="^model: expected one with a controller"):
        count_flops(make_model(), torch.randn(2, 8))


def test_rigl_costs_what_its_table_says():
    """(3 f_S dT + 2 f_S + f_D) / (dT + 1), of dT sparse steps and one dense gradient."""
    run = make_run("rigl", steps=8, options={"every": 4, "stop": 1.0}, distribution="uniform")
    drive(run)
    flops = count_flops(run.model, make_batches()[0][0])
    f_s, f_d = 0.25, 1.0
    expected = (7 * 3 * f_s + 2 * f_s + f_d) / (8 * 3 * f_d)
    assert run.stats(flops).training_flops == pytest.approx(expected)
    assert run.stats().training_flops == pytest.approx(expected)  # all weights see the same rows
    assert run.stats(flops).inference_flops == pytest.approx(0.25)


def test_dense_phases_and_dense_gradients():
    """SNFS: 2 f_S + f_D up to its stop; one-shot: 3 f_D up to the pruning."""
    snfs = drive(make_run("snfs", options={"every": 5, "stop": 10}))
    expected = (10 * (2 * 0.25 + 1) + 10 * 3 * 0.25) / 60
    counts = {name: weight.nnz for name, weight in snfs.controller.weights.items()}
    assert sum(counts.values()) == 48
    one_shot = drive(make_run("one_shot"))
    assert one_shot.stats().training_flops == pytest.approx((10 * 3 + 10 * 3 * 0.25) / 60)
    # until its first update at step 5 SNFS has the same density everywhere
    short = drive(make_run("snfs", options={"every": 5, "stop": 10}), until=5)
    assert short.stats().training_flops == pytest.approx(0.5)
    assert snfs.stats().training_flops == pytest.approx(expected, abs=0.05)


def test_what_stays_dense_counts():
    run = make_run("static", targets="0.weight", distribution="uniform")
    drive(run)
    flops = count_flops(run.model, make_batches()[0][0])
    expected = (0.25 * 128 + 64) / (128 + 64)
    assert run.stats(flops).training_flops == pytest.approx(expected)
    assert inference_share(run.controller, flops) == pytest.approx(expected)


@pytest.mark.parametrize("freeze", [True, False])
def test_theta_in_a_few_places_is_sparse_but_for_the_step_that_chooses(freeze):
    """Density (1 + places) d in each product, and one dense gradient a phase."""
    model = resu.sparsify(make_model(), 0.75, compile=False)
    controller = resu.controller(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    costs, steps, density = StepCosts(), 5, 0.25 * 1.2
    controller.resurrect(places=0.2, freeze_active=freeze).__enter__()
    for _ in range(steps):
        costs.prepare(controller)
        costs.prepare(controller)  # what has not changed is not counted twice
        loss_of(model, make_batches()[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        costs.count()
    spent = (2 * density + 1) + (steps - 1) * 3 * density
    assert costs.training_share() == pytest.approx(spent / (3 * steps))
    controller.commit()
    costs.prepare(controller)
    costs.count()
    assert costs.training_share() == pytest.approx((spent + 3 * 0.25) / (3 * steps + 3))


def test_no_more_places_than_there_are():
    model = resu.sparsify(make_model(), 0.25, compile=False)
    controller = resu.controller(model)
    controller.resurrect(places=10.0).__enter__()
    costs = StepCosts()
    costs.prepare(controller)
    costs.count()
    assert costs.training_share() == 1.0


def test_theta_in_all_places_is_dense():
    model = resu.sparsify(make_model(), 0.75, compile=False)
    controller = resu.controller(model)
    controller.resurrect().__enter__()
    costs = StepCosts()
    costs.prepare(controller)
    costs.count()
    assert costs.training_share() == 1.0


def test_nothing_yet():
    assert StepCosts().training_share() == 0.0
    assert make_run("static").start().stats().training_flops == 0.0
