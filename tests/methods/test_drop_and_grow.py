import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods.drop_and_grow import DECAYS, DropAndGrow, drop_and_grow
from tests.methods.runs import WEIGHTS, assert_sparse, drive, make_model, make_run, one_step


# -- one weight ----------------------------------------------------------------------------------
def test_a_table():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    drop = torch.tensor([[0.5, 3.0, 9.0], [1.0, 9.0, 9.0]])  # of the pruned, nobody asks
    grow = torch.tensor([[7.0, 9.0, 1.0], [9.0, 2.0, 8.0]])
    assert drop_and_grow(mask, drop, grow, 1).tolist() == [
        [False, True, False],
        [True, False, True],
    ]
    # the dropped one scores 7 and comes back before the one that scores 2
    assert drop_and_grow(mask, drop, grow, 1, 2).tolist() == [
        [True, True, False],
        [True, False, True],
    ]
    assert torch.equal(drop_and_grow(mask, drop, grow, 0), mask)


def test_ties_fall_to_the_lower_index():
    mask = torch.tensor([True, True, False, False])
    ones = torch.ones(4)
    assert drop_and_grow(mask, ones, ones, 1).tolist() == [True, True, False, False]
    grow = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert drop_and_grow(mask, ones, grow, 1).tolist() == [True, False, True, False]


def reference(mask, drop, grow, n_drop, n_grow):
    """Python lists and sorting."""
    active = [i for i, bit in enumerate(mask) if bit]
    kept = sorted(active, key=lambda i: (-drop[i], i))[: len(active) - n_drop]
    free = [i for i in range(len(mask)) if i not in kept]
    grown = sorted(free, key=lambda i: (-grow[i], i))[:n_grow]
    return [i in kept or i in grown for i in range(len(mask))]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_matches_sorted_lists(data):
    size = data.draw(st.integers(1, 30))
    few = st.lists(st.integers(0, 4).map(float), min_size=size, max_size=size)  # many ties
    mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    drop, grow = data.draw(few), data.draw(few)
    n_drop = data.draw(st.integers(0, sum(mask)))
    n_grow = data.draw(st.integers(0, size - sum(mask) + n_drop))
    found = drop_and_grow(*map(torch.tensor, (mask, drop, grow)), n_drop, n_grow)
    assert found.tolist() == reference(mask, drop, grow, n_drop, n_grow)
    assert int(found.sum()) == sum(mask) - n_drop + n_grow


# -- when and how much ---------------------------------------------------------------------------
def test_decays():
    assert [DECAYS["cosine"](t) for t in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert [DECAYS["linear"](t) for t in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert DECAYS["constant"](0.7) == 1.0


class At:
    """As much of a run as the schedule looks at."""

    steps = 1000
    postponed = False

    def __init__(self, step):
        self.step = step


def test_the_schedule():
    method = DropAndGrow(every=100)
    assert [step for step in range(1001) if method.is_due(At(step))] == list(range(100, 750, 100))
    late = DropAndGrow(every=0.1, start=0.2, stop=500)
    assert [step for step in range(1001) if late.is_due(At(step))] == [300, 400]
    assert method.fraction_now(At(0)) == 0.3
    assert method.fraction_now(At(250)) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    assert method.fraction_now(At(900)) == pytest.approx(0.0)
    ending = DropAndGrow(fraction=0.5, fraction_end=0.1, stop=1.0)
    assert ending.fraction_now(At(1000)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"fraction": 1.5}, ArgumentError, "fraction"),
        ({"fraction_end": 0.4}, ArgumentError, "fraction_end"),
        ({"every": 0}, ArgumentError, "every"),
        ({"every": True}, ArgumentError, "every"),
        ({"stop": 1.5}, ArgumentError, "stop"),
        ({"start": -1}, ArgumentError, "start"),
        ({"decay": "cubic"}, ArgumentError, "decay"),
        ({"drop": "weight"}, ArgumentError, "drop"),
        ({"grow": 4}, ArgumentError, "grow"),
        ({"fraction": "a"}, ArgumentTypeError, "fraction"),
    ],
)
def test_a_wrong_setting_is_named(changes, error, name):
    with pytest.raises(error, match=f"^{name}: expected"):
        DropAndGrow(**changes)


# -- invariants of any pair of criteria ----------------------------------------------------------
@settings(max_examples=12, deadline=None)
@given(
    grow=st.sampled_from(["random", "gradient", "momentum", "adam_momentum", "taylor"]),
    drop=st.sampled_from(["magnitude", "weight_and_gradient", "random"]),
    replaces=st.booleans(),
    sparsity=st.sampled_from([0.3, 0.75, 0.9]),
    distribution=st.sampled_from(["uniform", "er", "erk"]),
)
def test_counts_and_zeros_hold(grow, drop, replaces, sparsity, distribution):
    method = DropAndGrow(every=2, grow=grow, drop=drop, replaces_step=replaces)
    run = make_run(method, steps=9, sparsity=sparsity, distribution=distribution)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.05)
    run.start()
    before = {name: int(mask.sum()) for name, mask in run.controller.masks.items()}
    for _ in range(9):
        one_step(run, optimizer)
        assert {name: int(mask.sum()) for name, mask in run.controller.masks.items()} == before
        assert_sparse(run, optimizer)
    assert [update.step for update in run.updates] == [0, 2, 4, 6]


def test_new_places_start_at_zero_and_the_regrown_keep_value_and_momentum():
    class Back:
        """Everything that was active once comes back first."""

        needs = "gradient"  # so that the update comes before the step

        def score(self, places):
            return places.weight.abs() * (torch.arange(places.weight.numel()) % 2).view(
                places.weight.shape
            )

    method = DropAndGrow(fraction=0.5, every=2, grow=Back(), replaces_step=True, decay="constant")
    run = make_run(method)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    drive(run, optimizer, until=2)
    old = {
        name: weight.parameter.detach().clone() for name, weight in run.controller.weights.items()
    }
    masks = run.controller.masks
    moments = {
        name: optimizer.state[weight.parameter]["momentum_buffer"].clone()
        for name, weight in run.controller.weights.items()
    }
    one_step(run, optimizer)
    regrown = 0
    for name in WEIGHTS:
        weight = run.controller.weights[name]
        new, value = weight.mask, weight.parameter.detach()
        state = optimizer.state[weight.parameter]["momentum_buffer"]
        stayed = masks[name] & new
        count = int(masks[name].sum())
        lowest = old[name].abs()[masks[name]].sort().values[: int(count * 0.5)]
        regrown += sum(float(x) in lowest.tolist() for x in old[name].abs()[stayed])
        assert torch.equal(value[stayed], old[name][stayed])
        assert torch.equal(state[stayed], moments[name][stayed])
        assert not value[~stayed].any()
        assert not state[~stayed].any()
    assert regrown > 0


def test_the_same_seed_gives_the_same_masks_and_another_one_others():
    first, second, other = (
        drive(make_run("set", options={"every": 3}, seed=seed)).controller.masks
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in WEIGHTS)
    assert not all(torch.equal(first[name], other[name]) for name in WEIGHTS)


def test_a_model_with_everything_active_has_nothing_to_grow():
    run = drive(make_run("rigl", make_model(), options={"every": 2}, sparsity=0.0))
    assert run.controller.sparsity == 0.0
    assert run.stats().mean_churn == 0.0
