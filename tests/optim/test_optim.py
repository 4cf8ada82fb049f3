"""The optimizers that know masks: torch's own steps, packed moments, changes of the mask."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn, optim

import resu_compile as resu
from resu_compile.errors import ArgumentError

# Adam divides by roots near 0, so that roundings of kernels on CUDA grow: 4e-6 in 10 steps of 0.05
CLOSE = {"rtol": 1e-3, "atol": 1e-5} if torch.cuda.is_available() else {"rtol": 1e-5, "atol": 1e-6}

PAIRS = {
    "adamw": (resu.optim.AdamW, optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "adamw fused": (resu.optim.AdamW, optim.AdamW, {"lr": 0.05, "fused": True}),
    "adamw amsgrad": (resu.optim.AdamW, optim.AdamW, {"lr": 0.05, "amsgrad": True}),
    "adamw maximize": (resu.optim.AdamW, optim.AdamW, {"lr": 0.05, "maximize": True}),
    "sgd": (resu.optim.SGD, optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "sgd nesterov": (
        resu.optim.SGD,
        optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "sgd dampened": (resu.optim.SGD, optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
}


def make(sparsity=None, device="cpu"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)).to(device)
    if sparsity is not None:
        resu.sparsify(model, sparsity, compile=False)
    return model


def train(model, optimizer, steps, start=0):
    device = next(model.parameters()).device
    for seed in range(start, start + steps):
        optimizer.zero_grad()
        x = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)).to(device)
        model(x).square().sum().backward()
        optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("sparsity", [None, 0.6], ids=["plain model", "sparse phase"])
def test_where_nothing_else_is_asked_it_is_torchs_own(pair, sparsity, device):
    ours, theirs, options = PAIRS[pair]
    results = []
    for kind in (ours, theirs):
        model = make(sparsity, device)
        train(model, kind(model.parameters(), **options), 10)
        results.append(weights(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("pair", [name for name in PAIRS if "amsgrad" not in name])
def test_active_weights_take_torchs_step_beside_theta(pair, device):
    """Frozen or not is theta's affair: the step of the active places is the optimizer's own."""
    ours, theirs, options = PAIRS[pair]
    results = []
    for kind in (ours, theirs):
        model = make(0.6, device)
        optimizer = kind(model.parameters(), **options)
        train(model, optimizer, 3)
        resu.controller(model).resurrect(rule="adam", lr=0.01).__enter__()
        train(model, optimizer, 10, start=3)
        results.append(weights(model))
    torch.testing.assert_close(*results, **CLOSE)


# -- packed moments ------------------------------------------------------------------------------
def state_numel(optimizer):
    return sum(value.numel() for state in optimizer.state.values() for value in state.values())


def packed(model, **options):
    return resu.optim.AdamW(model.parameters(), lr=0.05, state="active", **options)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["default", "fused"])
def test_packed_moments_make_the_same_steps(options, device):
    full, small = make(0.6, device), make(0.6, device)
    optimizer = packed(small, **options)
    train(full, optim.AdamW(full.parameters(), lr=0.05, **options), 8)
    train(small, optimizer, 8)
    torch.testing.assert_close(weights(small), weights(full), **CLOSE)
    for name, weight in resu.controller(small).weights.items():
        state = optimizer.state[weight.parameter]
        assert state["exp_avg"].shape == (weight.nnz,), name
        assert state["exp_avg_sq"].shape == (weight.nnz,), name
        assert (weight.parameter[~weight.mask] == 0).all()


def test_packed_moments_follow_every_phase_and_mask(device):
    """Dense, sparse, pruned again, resurrected, committed: as with full moments at each step."""
    models, optimizers = [make(0.3, device), make(0.3, device)], []
    optimizers.append(optim.AdamW(models[0].parameters(), lr=0.05))
    optimizers.append(packed(models[1]))

    def both(action, start):
        for model, optimizer in zip(models, optimizers, strict=True):
            action(resu.controller(model))
            train(model, optimizer, 3, start)
        torch.testing.assert_close(weights(models[1]), weights(models[0]), **CLOSE)

    both(lambda _: None, 0)
    both(lambda controller: controller.prune(0.6), 3)
    both(lambda controller: controller.set_phase("dense"), 6)
    both(lambda controller: controller.set_phase("sparse"), 9)
    both(lambda controller: controller.resurrect().__enter__(), 12)
    both(lambda controller: controller.commit(budget=0.2), 15)
    both(lambda controller: controller.resurrect(lr=0.01, freeze_active=True).__enter__(), 18)
    both(lambda controller: controller.commit(budget=0.2), 21)
    for weight in resu.controller(models[1]).weights.values():
        assert optimizers[1].state[weight.parameter]["exp_avg"].shape == (weight.nnz,)


def test_a_change_of_the_mask_keeps_the_moments_of_survivors(device):
    model = make(0.5, device)
    optimizer = packed(model)
    train(model, optimizer, 3)
    weight = resu.controller(model).weights["0.weight"]
    old = weight.mask
    before = torch.zeros(weight.shape, device=device)
    before[old] = optimizer.state[weight.parameter]["exp_avg"]
    resu.controller(model).prune(0.7)
    new = weight.mask
    after = torch.zeros(weight.shape, device=device)
    after[new] = optimizer.state[weight.parameter]["exp_avg"]
    assert torch.equal(after, torch.where(new & old, before, torch.zeros_like(before)))


def test_packed_moments_are_smaller(device):
    small, full = make(0.7, device), make(0.7, device)
    optimizers = [packed(small), optim.AdamW(full.parameters(), lr=0.05)]
    for model, optimizer in zip((small, full), optimizers, strict=True):
        train(model, optimizer, 1)
    masked = 9 * 8 + 8 * 4
    saved = state_numel(optimizers[1]) - state_numel(optimizers[0])
    kept = sum(weight.nnz for weight in resu.controller(small).weights.values())
    assert saved == 2 * (masked - kept)


def test_packed_moments_are_saved_and_loaded(device):
    model = make(0.6, device)
    optimizer = packed(model)
    train(model, optimizer, 4)
    saved = copy.deepcopy(
        (model.state_dict(), resu.controller(model).state_dict(), optimizer.state_dict())
    )
    train(model, optimizer, 4, start=4)

    other = make(0.6, device)
    resumed = packed(other)
    other.load_state_dict(saved[0])
    resu.controller(other).load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    train(other, resumed, 4, start=4)
    assert torch.equal(weights(other), weights(model))


def test_a_released_model_gets_full_moments_back(device):
    model = make(0.6, device)
    optimizer = packed(model)
    train(model, optimizer, 2)
    resu.controller(model).release()
    train(model, optimizer, 2, start=2)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == model[0].weight.shape


def test_arguments_are_checked():
    parameters = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(ArgumentError, match="state: expected one of active, full"):
        resu.optim.AdamW(parameters, state="some")
    with pytest.raises(ArgumentError, match="state: expected 'full' with amsgrad=True"):
        resu.optim.AdamW(parameters, state="active", amsgrad=True)
    with pytest.raises(ValueError, match="learning rate"):
        resu.optim.AdamW(parameters, lr=-1.0)


def test_a_scheduler_and_deepcopy_work():
    model = make(0.6)
    optimizer = resu.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    resu.controller(model).resurrect(rule="adam").__enter__()
    train(model, optimizer, 2)
    scheduler.step()
    train(model, copy.deepcopy(optimizer), 0)
    train(model, optimizer, 2)
    assert optimizer.param_groups[0]["lr"] == 0.05
