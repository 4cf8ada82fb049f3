"""Wanda's masks against plain loops over the rows, and through both doors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resu_compile as resu
from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods import CalibratedMethod, Method, Wanda, get_method, is_calibrated


def reference_rows(weight, square, sparsity, group=None):
    """(out, in) weight and s_j -> mask, one row after the other, one entry after the other."""
    mask = torch.ones_like(weight, dtype=torch.bool)
    step = group[1] if group else weight.shape[1]
    count = group[1] - group[0] if group else int(weight.shape[1] * sparsity)
    for i in range(weight.shape[0]):
        for start in range(0, weight.shape[1], step):
            columns = range(start, start + step)
            ranked = sorted(
                columns,
                key=lambda j: (float(weight[i, j].abs() * square[j].sqrt()), j),
            )
            for j in ranked[:count]:
                mask[i, j] = False
    return mask


def reference_squares(data):
    """s_j as a running mean over calls; a call with a matrix is one sample."""
    square, samples = torch.zeros(data[0].shape[-1]), 0
    for batch in data:
        new = batch.shape[0] if batch.dim() == 3 else 1
        total = batch.flatten(0, -2).float().square().sum(0)
        square = square * (samples / (samples + new)) + total / (samples + new)
        samples += new
    return square


def uneven(*shape, n=3):
    return [torch.randn(shape) * torch.rand(shape[-1]) * 5 for _ in range(n)]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 0.99])
def test_masks_of_a_chain_are_those_of_the_published_rule(sparsity):
    model = nn.Sequential(nn.Linear(13, 17), nn.ReLU(), nn.Linear(17, 6, bias=False))
    data = uneven(2, 5, 13)
    before = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    bias = model[0].bias.detach().clone()
    resu.sparsify(model, sparsity, method=Wanda(blocks=["0", "2"]), calibration=data, compile=False)
    masks = resu.controller(model).masks
    first = reference_rows(before[0], reference_squares(data), sparsity)
    assert torch.equal(masks["0.weight"], first)
    # the second layer sees what the pruned first one gives
    hidden = [torch.relu(nn.functional.linear(x, before[0] * first, bias)) for x in data]
    second = reference_rows(before[1], reference_squares(hidden), sparsity)
    assert torch.equal(masks["2.weight"], second)
    assert torch.equal(model[0].weight.detach(), before[0] * first)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.floats(0, 0.999), st.booleans())
@settings(max_examples=40, deadline=None)
def test_counts_of_each_row_for_all_shapes(n_in, n_out, tokens, sparsity, equal):
    model = nn.Linear(n_in, n_out)
    data = [torch.ones(1, tokens, n_in)] if equal else uneven(1, tokens, n_in, n=1)
    if equal:
        nn.init.ones_(model.weight)
    weight = model.weight.detach().clone()
    resu.sparsify(model, sparsity, method="wanda", calibration=data, compile=False)
    mask = resu.controller(model).masks["weight"]
    assert ((~mask).sum(1) == int(n_in * sparsity)).all()
    assert torch.equal(mask, reference_rows(weight, reference_squares(data), sparsity))


@pytest.mark.parametrize(("pattern", "numbers"), [("2:4", (2, 4)), ("1:3", (1, 3))])
def test_patterns(pattern, numbers):
    model = nn.Linear(12, 7)
    data = uneven(2, 5, 12)
    weight = model.weight.detach().clone()
    resu.sparsify(model, pattern=pattern, method="wanda", calibration=data, compile=False)
    expected = reference_rows(weight, reference_squares(data), None, numbers)
    assert torch.equal(resu.controller(model).masks["weight"], expected)


def test_rows_of_a_transposed_weight_are_its_outputs():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 5))

        def forward(self, x):
            return x @ self.w

    model = Transposed()
    weight, data = model.w.detach().clone(), uneven(2, 5, 8)
    resu.sparsify(model, 0.4, method="wanda", calibration=data, compile=False)
    expected = reference_rows(weight.t(), reference_squares(data), 0.4).t()
    assert torch.equal(resu.controller(model).masks["w"], expected)


def test_overrides_and_erk_set_the_share_of_each_row():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 4))
    data = uneven(4, 10)
    resu.sparsify(model, 0.5, method="wanda", calibration=data, overrides={"1": 0.8}, compile=False)
    masks = resu.controller(model).masks
    assert ((~masks["0.weight"]).sum(1) == 5).all()
    assert ((~masks["1.weight"]).sum(1) == 8).all()
    controller = resu.controller(model)
    controller.set_phase("dense")
    controller.prune(0.5, distribution="erk", overrides={}, calibration=data)
    masks = controller.masks
    # density eps * (n + m) / (n m), eps (20 + 14) = 0.5 * 140
    assert ((~masks["0.weight"]).sum(1) == int(10 * (1 - 70 / 34 * 0.2))).all()
    assert ((~masks["1.weight"]).sum(1) == int(10 * (1 - 70 / 34 * 0.35))).all()


# -- prune -----------------------------------------------------------------------------------------
def test_a_higher_sparsity_only_takes_away_and_a_lower_one_only_gives_back():
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
    data = uneven(2, 3, 12)
    resu.sparsify(model, 0.4, method="wanda", calibration=data, compile=False)
    controller = resu.controller(model)
    masks = [controller.masks]
    for sparsity in (0.7, 0.3):
        controller.prune(sparsity, calibration=data)
        masks.append(controller.masks)
    for name in masks[0]:
        assert not (masks[1][name] & ~masks[0][name]).any()
        assert not (masks[1][name] & ~masks[2][name]).any()
        assert ((~masks[2][name]).sum(1) == int(masks[2][name].shape[1] * 0.3)).all()


def test_in_the_dense_phase_all_compete():
    model = nn.Linear(8, 4)
    data = uneven(2, 3, 8)
    resu.sparsify(model, 0.5, compile=False)
    controller = resu.controller(model)
    controller.set_phase("dense")
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, 8))
    weight = model.weight.detach().clone()
    controller.prune(method="wanda", calibration=data)
    expected = reference_rows(weight, reference_squares(data), 0.5)
    assert torch.equal(controller.masks["weight"], expected)
    assert controller.phase is resu.Phase.SPARSE
    assert torch.equal(model.weight.detach(), weight * expected)


def test_an_error_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    data = uneven(2, 3, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    runs = []

    def fails_late(net):
        runs.append(net)
        if len(runs) == 2:
            raise RuntimeError("no more data")
        net(data[0])

    with pytest.raises(RuntimeError, match="no more data"):
        resu.sparsify(model, method=Wanda(blocks=["0", "1"]), calibration=fails_late, compile=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.training
    resu.sparsify(model, 0.25, compile=False)
    controller = resu.controller(model)
    masks, weights = controller.masks, [p.detach().clone() for p in model.parameters()]
    runs.clear()
    with pytest.raises(RuntimeError, match="no more data"):
        controller.prune(0.5, method=Wanda(blocks=["0", "1"]), calibration=fails_late)
    assert controller.config.method == "magnitude"
    assert all(torch.equal(controller.masks[name], mask) for name, mask in masks.items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


# -- arguments -------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["wanda", "wanda++", "dsnot", Wanda()], ids=str)
def test_a_calibrated_method_needs_data(method):
    model = nn.Linear(4, 4)
    with pytest.raises(ArgumentError, match="^calibration: expected data for method '.*forward_lo"):
        resu.sparsify(model, method=method, compile=False)
    resu.sparsify(model, 0.25, compile=False)
    with pytest.raises(ArgumentError, match="^calibration: expected data for method"):
        resu.controller(model).prune(method=method)


def test_a_plain_method_takes_no_data():
    model, data = nn.Linear(4, 4), [torch.ones(1, 4)]
    with pytest.raises(ArgumentError, match="^calibration: expected None with method 'magnitude'"):
        resu.sparsify(model, calibration=data, compile=False)
    with pytest.raises(ArgumentError, match="^calibration: expected None with from_zeros=True"):
        resu.sparsify(model, method="wanda", calibration=data, from_zeros=True, compile=False)
    resu.sparsify(model, compile=False)
    with pytest.raises(ArgumentError, match="^calibration: expected None with method 'random'"):
        resu.controller(model).prune(method="random", calibration=data)


def test_rows_know_no_global_threshold():
    with pytest.raises(ArgumentError, match="^scope: expected 'layer' with method='wanda'"):
        resu.sparsify(nn.Linear(4, 4), method="wanda", scope="global", calibration=[torch.ones(4)])


def test_the_two_kinds_of_method():
    assert isinstance(get_method("wanda"), CalibratedMethod)
    assert not isinstance(get_method("wanda"), Method)
    assert not isinstance(get_method("magnitude"), CalibratedMethod)
    assert [is_calibrated(name) for name in ("dsnot", "wanda++", "random")] == [True, True, False]


@pytest.mark.parametrize("blocks", [3, [], [1], b"layers"])
def test_blocks_are_names(blocks):
    with pytest.raises(ArgumentTypeError, match="^blocks: expected None, the name"):
        Wanda(blocks=blocks)
