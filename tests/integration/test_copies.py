"""A copied or unpickled model brings its masks, phase and theta along."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn, optim

import resu_compile as resu
from resu_compile.errors import ArgumentError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc2(self.fc1(x).tanh())


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = [copy.deepcopy, by_pickle, by_torch_save, lambda m: by_pickle(copy.deepcopy(m))]


def train(model, optimizer, steps=3):
    losses = []
    for seed in range(steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adamw(model):
    return optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
def test_a_copy_goes_on_like_the_original(phase, way):
    model = resu.sparsify(Net(), 0.6, compile=False)
    controller = resu.controller(model)
    if phase == "resu":
        controller.resurrect(lr=0.1, init="normal", budget=0.3).__enter__()
    else:
        controller.set_phase(phase)
    train(model, adamw(model))
    copied = way(model)
    assert type(copied) is Net
    assert list(copied.state_dict()) == list(model.state_dict())
    assert train(copied, adamw(copied)) == train(model, adamw(model))
    its = resu.controller(copied)
    assert its is not controller
    assert its.model is copied
    assert its.phase == phase
    if phase == "resu":
        its.commit()
        controller.commit()
    for name, mask in controller.masks.items():
        assert torch.equal(mask, its.masks[name])
        assert torch.equal(model.get_parameter(name), copied.get_parameter(name))


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_independent(way):
    model = resu.sparsify(Net(), 0.5, compile=False)
    copied = way(model)
    masks = resu.controller(model).masks
    resu.controller(copied).prune(0.9)
    resu.controller(copied).set_phase("dense")
    assert resu.controller(model).phase == "sparse"
    for name, mask in resu.controller(model).masks.items():
        assert torch.equal(mask, masks[name])
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_a_copy_works_when_the_original_is_gone():
    copied = copy.deepcopy(resu.sparsify(Net(), 0.5, compile=False))
    optimizer = adamw(copied)
    train(copied, optimizer)
    for name, mask in resu.controller(copied).masks.items():
        assert torch.equal(copied.get_parameter(name) != 0, mask)


def test_the_copy_of_a_copy_that_was_never_used():
    model = resu.sparsify(Net(), 0.5, compile=False)
    copied = copy.deepcopy(copy.deepcopy(by_pickle(model)))
    for name, mask in resu.controller(model).masks.items():
        assert torch.equal(resu.controller(copied).masks[name], mask)


def test_a_copy_changed_before_its_first_use_is_masked():
    model = resu.sparsify(Net(), 0.5, compile=False)
    copied = copy.deepcopy(model)
    copied.load_state_dict(Net().state_dict())
    copied(torch.randn(2, 6))
    for name, mask in resu.controller(model).masks.items():
        assert torch.equal(copied.get_parameter(name) != 0, mask)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_can_be_released(way):
    copied = way(resu.sparsify(Net(), 0.5, compile=False))
    resu.controller(copied).release()
    assert not copied._forward_hooks
    train(copied, adamw(copied), 1)
    assert all((p != 0).all() for p in copied.parameters())


def test_predicates_do_not_stand_in_the_way_of_a_pickle():
    model = resu.sparsify(
        Net(), 0.5, targets=lambda name, _p: name == "fc1.weight", exclude=None, compile=False
    )
    copied = by_pickle(model)
    assert list(resu.controller(copied).masks) == ["fc1.weight"]


def test_a_score_function_is_asked_for_again():
    model = resu.sparsify(Net(), 0.5, compile=False)
    resu.controller(model).resurrect(score=lambda _n, w: w.abs()).__enter__()
    copied = by_pickle(model)
    its = resu.controller(copied)
    with pytest.raises(ArgumentError, match="^score: "):
        its.commit()
    its.commit(strategy="merge")


def test_a_layer_renamed_since_is_still_found():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.down = nn.Linear(6, 1, bias=False)
            self.up = nn.Linear(1, 8, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    model = resu.sparsify(Net(), 0.5, compile=False)
    model.fc1 = Adapter(model.fc1)
    copied = copy.deepcopy(model)
    optimizer = adamw(copied)
    train(copied, optimizer)
    mask = resu.controller(model).masks["fc1.weight"]
    assert torch.equal(copied.fc1.base.weight != 0, mask)


def test_a_model_that_holds_a_sparsified_one():
    inner = resu.sparsify(Net(), 0.5, compile=False)
    outer = nn.Sequential(inner, nn.Linear(3, 2))
    copied = copy.deepcopy(outer)
    optimizer = adamw(copied)
    train(copied, optimizer)
    for name, mask in resu.controller(inner).masks.items():
        assert torch.equal(copied[0].get_parameter(name) != 0, mask)
    assert resu.controller(copied[0]).model is copied[0]


def test_tied_weights_stay_tied():
    model = Net()
    model.fc3 = nn.Linear(6, 8)
    model.fc3.weight = model.fc1.weight
    resu.sparsify(model, 0.5, tied="mask_all", compile=False)
    copied = by_torch_save(model)
    assert copied.fc3.weight is copied.fc1.weight
    assert list(resu.controller(copied).masks) == ["fc1.weight", "fc2.weight"]


def test_a_compiled_model_is_copied_as_an_eager_one():
    model = resu.sparsify(Net(), 0.5)
    copied = copy.deepcopy(model)
    assert copied._compiled_call_impl is None
    for name, mask in resu.controller(model).masks.items():
        assert torch.equal(resu.controller(copied).masks[name], mask)


def test_an_optimizer_copied_along():
    model = resu.sparsify(Net(), 0.5, compile=False)
    optimizer = adamw(model)
    train(model, optimizer)
    copied, its_optimizer = copy.deepcopy((model, optimizer))
    assert its_optimizer.param_groups[0]["params"][0] is copied.fc1.weight
    assert train(copied, its_optimizer) == train(model, optimizer)
