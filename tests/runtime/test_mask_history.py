import copy
import io
import pickle

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.errors import ArgumentError


def sparse(sparsity=0.5):
    model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3))  # 45 and 15: no whole bytes
    resu.sparsify(model, sparsity, compile=False)
    return model, resu.controller(model)


def ever(controller):
    return {
        name: controller.history.ever_active(weight) for name, weight in controller.weights.items()
    }


def grow_and_shrink(controller):
    """To 30 % of other places than before; the OR of the masks."""
    before = controller.masks
    controller.set_phase("resu")
    with torch.no_grad():
        for weight in controller.weights.values():
            weight.parameter.copy_(torch.randn(weight.shape))
    controller.commit(budget=0.7, sparsity=0.7)
    return {name: before[name] | mask for name, mask in controller.masks.items()}


def test_it_costs_nothing_before_the_first_change():
    model, controller = sparse()
    assert controller.state_dict()["history"] == {}
    assert ever(controller) == {name: w.nnz for name, w in controller.weights.items()}
    controller.set_phase("dense")
    controller.set_phase("sparse")
    assert controller.state_dict()["history"] == {}


def test_it_is_the_or_of_all_masks():
    model, controller = sparse()
    masks = grow_and_shrink(controller)
    assert ever(controller) == {name: int(mask.sum()) for name, mask in masks.items()}
    bits = controller.state_dict()["history"]
    assert {name: len(value) for name, value in bits.items()} == {"0.weight": 6, "1.weight": 2}
    report = controller.prune(0.9)
    assert report.weights["0.weight"].ever_active == int(masks["0.weight"].sum())
    assert controller.prune(0.0).ever_share == 1.0


def test_state_round_trips():
    model, controller = sparse()
    grow_and_shrink(controller)
    buffer = io.BytesIO()
    torch.save(controller.state_dict(), buffer)
    buffer.seek(0)
    _, other = sparse(0.2)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert ever(other) == ever(controller)
    assert ever(controller) != {name: w.nnz for name, w in controller.weights.items()}


def test_a_state_without_history_starts_at_its_masks():
    model, controller = sparse()
    grow_and_shrink(controller)
    state = controller.state_dict()
    del state["history"]
    controller.load_state_dict(state)
    assert ever(controller) == {name: w.nnz for name, w in controller.weights.items()}


@pytest.mark.parametrize(
    ("history", "text"),
    [
        ({"0.weight": torch.zeros(5, dtype=torch.uint8)}, "6 bytes of history for 0.weight, got"),
        ({"0.weight": torch.zeros(6)}, "6 bytes of history for 0.weight, got"),
        (
            {"2.weight": torch.zeros(6, dtype=torch.uint8)},
            "history of masked weights, got 2.weight",
        ),
    ],
)
def test_a_history_that_does_not_fit_changes_nothing(history, text):
    model, controller = sparse()
    grow_and_shrink(controller)
    before = ever(controller)
    with pytest.raises(ArgumentError, match=f"^state: expected .*{text}"):
        controller.load_state_dict({**controller.state_dict(), "history": history})
    assert ever(controller) == before


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_take_it_along(duplicate):
    model, controller = sparse()
    grow_and_shrink(controller)
    twin = duplicate(model)
    other = resu.controller(twin)
    assert ever(other) == ever(controller)
    before = ever(controller)
    other.prune(0.0)
    assert ever(controller) == before
