"""A small net and its steps; resurrections that let a few of its places hold theta."""

from __future__ import annotations

import torch

import resu_compile as resu
from resu_compile.kernels.mask_bits import unpack_mask
from resu_compile.runtime.optimizer_state import same_shaped_state
from tests.integration.test_invariants import Net, loss_of

RULES = ["optimizer", "sgd", "momentum", "adam"]


def sparse(sparsity=0.6, seed=0, **arguments):
    torch.manual_seed(seed)
    return resu.sparsify(Net(), sparsity, compile=False, **arguments)


def begin(model, **terms):
    controller = resu.controller(model)
    controller.resurrect(**{"places": 0.3, **terms}).__enter__()
    return controller


def step(model, optimizer, seed):
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    optimizer.step()


def by_sorting(grad, mask, places):
    """The places that theta gets, one number at a time."""
    sizes, active = grad.abs().flatten().tolist(), mask.flatten().tolist()
    pruned = [i for i, kept in enumerate(active) if not kept]
    count = min(int(places * (len(active) - len(pruned))), len(pruned))
    best = sorted(pruned, key=lambda i: (-sizes[i], i))[:count]
    return torch.tensor([i in best for i in range(len(active))], dtype=torch.bool).view_as(mask)


def chosen_of(controller):
    """bool mask of the places of theta, of each weight."""
    running = controller.resurrection
    assert set(running.chosen) == set(controller.weights)
    return {
        name: unpack_mask(bits, controller.weights[name].shape)
        for name, bits in running.chosen.items()
    }


def check(model, optimizer, chosen, *, gradients=True):
    """What is neither active nor chosen is 0: value, gradient and optimizer state."""
    for name, weight in resu.controller(model).weights.items():
        parameter = weight.parameter
        idle = ~weight.mask & ~chosen[name]
        assert idle.any()
        tensors = {"value": parameter.detach(), **dict(same_shaped_state(optimizer, parameter))}
        if gradients:
            tensors["gradient"] = parameter.grad
        for key, value in tensors.items():
            assert (value[idle] == 0).all(), f"{key} of {name}"


def dense_gradients(model, seed):
    """Gradients of a plain model with these values."""
    plain = Net()
    plain.load_state_dict(model.state_dict())
    loss_of(plain, seed).backward()
    return {name: parameter.grad for name, parameter in plain.named_parameters()}
