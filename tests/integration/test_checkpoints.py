"""Training that is saved and resumed goes on as if nothing had happened, bit for bit."""

import io

import pytest
import torch
from torch import nn, optim

import resu_compile as resu


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 5, 3)
        self.norm = nn.BatchNorm1d(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, tokens):
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2)))
        return self.fc(x.mean(2).tanh())


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


def sparse(seed=0, sparsity=0.6, **arguments):
    torch.manual_seed(seed)
    model = resu.sparsify(Net(), sparsity, compile=False, **arguments)
    return model, resu.controller(model)


def train(model, optimizer, steps):
    losses = []
    for seed in steps:
        tokens = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        loss = model(tokens).square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def saved(*parts):
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(first, second):
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def same_state(first, second):
    for (index, a), b in zip(
        first.state_dict()["state"].items(), second.state_dict()["state"].values(), strict=True
    ):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])), (index, key)


# -- resuming ----------------------------------------------------------------------------------
PHASES = {
    "dense": None,
    "sparse": None,
    "adam frozen": {"rule": "adam", "freeze_active": True},
    "adam": {"rule": "adam", "init": "normal"},
    "sgd frozen": {"rule": "sgd", "momentum": 0.9, "freeze_active": True},
    "sgd": {"rule": "sgd", "momentum": 0.9, "lr": 0.1},
    "optimizer frozen": {"rule": "optimizer", "freeze_active": True},
    "optimizer": {"rule": "optimizer", "init": "uniform"},
}


@pytest.mark.parametrize("order", ["model first", "controller first"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("phase", PHASES)
def test_resuming_in_the_middle_of_a_phase_is_bit_exact(phase, name, order):
    model, controller = sparse()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(2))
    if PHASES[phase] is None:
        controller.set_phase(phase)
    else:
        controller.resurrect(budget=0.3, **PHASES[phase]).__enter__()
    train(model, optimizer, range(2, 5))
    state = saved(model, optimizer, controller)

    # another model, with other values, other masks and another sparsity
    other, its_controller = sparse(seed=1, sparsity=0.9, method="random")
    its_optimizer = OPTIMIZERS[name](other.parameters())
    if order == "model first":
        other.load_state_dict(state[0])
        its_controller.load_state_dict(state[2])
    else:
        its_controller.load_state_dict(state[2])
        other.load_state_dict(state[0])
    its_optimizer.load_state_dict(state[1])
    assert its_controller.phase == controller.phase

    def go_on(m, o, c):
        losses = train(m, o, range(5, 8))
        if c.phase == "resu":
            c.commit()
        elif c.phase == "dense":
            c.set_phase("sparse")
        else:
            c.prune(0.8)
        losses += train(m, o, range(8, 10))
        with c.resurrect(init="normal"):  # draws from the controller's generator
            losses += train(m, o, range(10, 12))
        return losses + train(m, o, range(12, 14))

    assert go_on(model, optimizer, controller) == go_on(other, its_optimizer, its_controller)
    same(model, other)
    same_state(optimizer, its_optimizer)
    for weight, mask in controller.masks.items():
        assert torch.equal(mask, its_controller.masks[weight])


def test_going_back_to_a_state_of_ones_own_is_bit_exact():
    model, controller = sparse()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    controller.resurrect(rule="adam").__enter__()
    train(model, optimizer, range(2))
    state = saved(model, optimizer, controller)
    expected = train(model, optimizer, range(2, 5))
    controller.commit(budget=0.5)
    train(model, optimizer, range(5, 7))
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    controller.load_state_dict(state[2])
    assert train(model, optimizer, range(2, 5)) == expected


# -- the model's own state ---------------------------------------------------------------------
def test_keys_are_the_originals_and_load_both_ways():
    model, controller = sparse()
    plain = Net()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert plain.load_state_dict(model.state_dict(), strict=True).missing_keys == []
    same(model, plain)

    dense = Net().state_dict()
    assert model.load_state_dict(dense, strict=True).unexpected_keys == []
    model(torch.zeros(2, 6, dtype=torch.long))
    for name, mask in controller.masks.items():
        expected = dense[name].where(mask, torch.zeros(()))
        assert torch.equal(model.get_parameter(name), expected)


def test_a_dense_checkpoint_is_masked_by_the_next_step_at_the_latest():
    model, controller = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.load_state_dict(Net().state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, mask in controller.masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()
        assert (optimizer.state[model.get_parameter(name)]["momentum_buffer"][~mask] == 0).all()


@pytest.mark.parametrize("assign", [False, True])
def test_a_sparse_checkpoint_is_adopted_from_its_zeros(assign):
    model, controller = sparse()
    plain = Net()
    plain.load_state_dict(saved(model)[0], assign=assign)
    resu.sparsify(plain, from_zeros=True, compile=False)
    for name, mask in controller.masks.items():
        assert torch.equal(mask, resu.controller(plain).masks[name])
    same(model, plain)


# -- moving and rebuilding ---------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masks_survive_a_change_of_dtype(dtype):
    model, controller = sparse()
    masks = controller.masks
    model.to(dtype)
    optimizer = optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    train(model, optimizer, range(3))
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert weight.dtype is dtype
        assert torch.equal(weight != 0, mask)
        assert torch.equal(controller.masks[name], mask)


def test_meta_and_back_keeps_the_masks():
    model, controller = sparse()
    masks, state = controller.masks, saved(model)[0]
    model.to("meta")
    model(torch.zeros(2, 6, dtype=torch.long, device="meta"))
    model.to_empty(device="cpu")
    model.load_state_dict(Net().state_dict())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, range(3))
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    model.load_state_dict(state)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_a_meta_model_takes_masks_once_it_has_values():
    model, _ = sparse()
    state = saved(model, resu.controller(model))
    with torch.device("meta"):
        other = Net()
    other.to_empty(device="cpu")
    other.load_state_dict(state[0])
    resu.sparsify(other, from_zeros=True, compile=False)
    resu.controller(other).load_state_dict(state[1])
    same(model, other)


@pytest.mark.parametrize("overwrite", [False, True])
def test_parameters_that_conversion_replaces_are_followed(overwrite):
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        model, controller = sparse()
        masks = controller.masks
        model.double()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        train(model, optimizer, range(2))
        for name, mask in masks.items():
            assert torch.equal(model.get_parameter(name) != 0, mask)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
