"""DSnoT against a plain loop over rows and entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resu_compile as resu
from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods import DSnoT
from resu_compile.methods.dsnot import exchange
from tests.methods.test_wanda import reference_rows, reference_squares, uneven


def reference(energy, variance, score, mask, movable, cycles, threshold, group=None):
    """The exchange, one row and one entry at a time."""
    mask = mask.clone()
    columns = range(energy.shape[1])
    for i in range(energy.shape[0]):
        growable = {j for j in columns if not mask[i, j] and movable[i, j]}
        prunable = {j for j in columns if mask[i, j]}
        error = sum((energy[i, j] for j in columns if not mask[i, j]), torch.tensor(0.0))
        for _ in range(cycles):
            if abs(error) <= threshold:
                break
            opposite = {j for j in prunable if (energy[i, j] < 0) == (error > 0) and energy[i, j]}
            grow = {
                j
                for j in growable
                if group is None or any(j // group == k // group for k in opposite)
            }
            if not grow or not opposite:
                break
            sign = 1 if error > 0 else -1
            j = max(grow, key=lambda j: float(sign * energy[i, j] / variance[i, j]))
            near = {k for k in opposite if group is None or k // group == j // group}
            k = min(near, key=lambda k: float(score[i, k]))
            mask[i, j], mask[i, k] = True, False
            growable.remove(j)
            prunable.remove(k)
            error = error + (energy[i, k] - energy[i, j])
    return mask


@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([0, 1, 3, 50]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.booleans(),
    st.sampled_from([None, 2, 4]),
    st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_the_exchange_is_that_of_a_plain_loop(rows, blocks, cycles, threshold, part, group, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 4 * blocks)
    energy = torch.randn(shape, generator=generator)
    variance = torch.rand(shape, generator=generator) + 0.1
    score = torch.rand(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) > 0.5
    movable = torch.rand(shape, generator=generator) > 0.3 if part else torch.ones_like(mask)
    options = {"cycles": cycles, "threshold": threshold, "group": group}
    found = exchange(energy, variance, score, mask, movable, **options)
    assert torch.equal(found, reference(energy, variance, score, mask, movable, **options))
    assert torch.equal(found.sum(1), mask.sum(1))
    assert not (found & ~mask & ~movable).any()


def test_one_exchange_by_hand():
    energy = torch.tensor([[3.0, 1.0, -2.0, -1.0, 4.0]])
    score = torch.tensor([[1.0, 1.0, 5.0, 2.0, 9.0]])
    mask = torch.tensor([[False, False, True, True, True]])
    flat, steep = torch.ones(1, 5), torch.tensor([[9.0, 1.0, 1.0, 1.0, 1.0]])
    every = torch.ones_like(mask)
    # err = 4 > 0: grow 3 (largest E), prune -1 (lowest score of the negative ones): err = 0
    found = exchange(energy, flat, score, mask, every, cycles=50, threshold=0.1)
    assert found.tolist() == [[True, False, True, False, True]]
    # with the variance of the first input at 9, 1/1 is ahead of 3/9
    found = exchange(energy, steep, score, mask, every, cycles=1, threshold=0.1)
    assert found.tolist() == [[False, True, True, False, True]]
    assert torch.equal(exchange(energy, flat, score, mask, every, cycles=9, threshold=4.0), mask)


def test_an_input_that_never_changes():
    found = exchange(
        torch.tensor([[2.0, 0.0, -1.0, -1.0]]),
        torch.zeros(1, 4),
        torch.ones(1, 4),
        torch.tensor([[False, False, True, True]]),
        torch.ones(1, 4, dtype=torch.bool),
        cycles=50,
        threshold=0.1,
    )
    assert int(found.sum()) == 2


def parts(weight, data):
    """Energy, variance and Wanda score of a linear layer, from the data at once."""
    flat = torch.cat([x.flatten(0, -2) for x in data])
    samples = sum(len(x) for x in data)
    energy = weight * (flat.sum(0) / samples)
    score = weight.abs() * reference_squares(data).sqrt()
    return energy, flat.var(0, unbiased=False).expand_as(weight), score


@pytest.mark.parametrize("initial", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_layer(initial, pattern):
    model, data = nn.Linear(12, 20), [x + 1 for x in uneven(2, 5, 12)]
    weight = model.weight.detach().clone()
    energy, variance, score = parts(weight, data)
    group = (2, 4) if pattern else None
    ones = torch.ones(12) if initial == "magnitude" else reference_squares(data)
    start = reference_rows(weight, ones, 0.5, group)
    expected = reference(
        energy, variance, score, start, torch.ones_like(start), 50, 0.1, 4 if pattern else None
    )
    sparsity = {"pattern": pattern} if pattern else {"sparsity": 0.5}
    method = DSnoT(initial=initial)
    resu.sparsify(model, method=method, calibration=data, compile=False, **sparsity)
    mask = resu.controller(model).masks["weight"]
    assert torch.equal(mask, expected)
    assert not torch.equal(mask, start)
    assert torch.equal(model.weight.detach(), weight * mask)  # no value changes


def test_the_mean_output_is_nearer_than_before():
    data = [x + 1 for x in uneven(4, 5, 16)]
    errors = []
    for method in ("wanda", "dsnot"):
        torch.manual_seed(2)
        model = nn.Linear(16, 30)
        dense = torch.cat([model(x) for x in data]).mean((0, 1))
        resu.sparsify(model, 0.5, method=method, calibration=data, compile=False)
        errors.append((torch.cat([model(x) for x in data]).mean((0, 1)) - dense).abs().sum())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("skip", ["0", "0.weight", ("*.weight", "nothing"), ["0"]])
def test_what_is_skipped_keeps_its_initial_mask(skip):
    data = [x + 1 for x in uneven(2, 5, 12)]
    masks = []
    for method in (DSnoT(), DSnoT(skip=skip), DSnoT(cycles=0)):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(12, 20))
        resu.sparsify(model, 0.5, method=method, calibration=data, compile=False)
        masks.append(resu.controller(model).masks["0.weight"])
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[1], masks[2])


def test_in_the_sparse_phase_only_active_places_take_part():
    model, data = nn.Linear(12, 20), [x + 1 for x in uneven(2, 5, 12)]
    resu.sparsify(model, 0.3, compile=False)
    controller = resu.controller(model)
    before = controller.masks["weight"]
    controller.prune(0.6, method="dsnot", calibration=data)
    after = controller.masks["weight"]
    assert (after.sum(1) == 12 - int(12 * 0.6)).all()
    rows = before.sum(1) >= after.sum(1)
    assert rows.any()
    assert not (after & ~before)[rows].any()


WRONG = [
    ("initial", "random", ArgumentError),
    ("skip", 3, ArgumentTypeError),
    ("cycles", -1, ArgumentError),
    ("threshold", None, ArgumentTypeError),
    ("blocks", [], ArgumentTypeError),
]


@pytest.mark.parametrize(("field", "value", "error"), WRONG)
def test_wrong_fields_are_named(field, value, error):
    with pytest.raises(error, match=f"^{field}: expected"):
        DSnoT(**{field: value})
