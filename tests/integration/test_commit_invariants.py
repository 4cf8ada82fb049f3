"""After any change of masks: survivors keep every bit, the optimizer's state of others is 0."""

from __future__ import annotations

import pytest
import torch
from torch import optim

import resu_compile as resu
from tests.integration.test_invariants import OPTIMIZERS, Net, matrices, plain_step

ALL = {
    **OPTIMIZERS,
    "AdamW packed": (resu.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1, "state": "active"}),
}
RULES = [
    ("optimizer", "inplace"),
    ("adam", "inplace"),
    ("selective", "inplace"),
    ("adam", "compact"),
]
COMMITS = {
    "quota": {"budget": 0.3},
    "ceiling": {"budget": 0.3, "kind": "ceiling", "margin": 0.1},
    "sparser": {"budget": 0.2, "sparsity": 0.75},
    "reprune": {"strategy": "reprune"},
    "merge": {"strategy": "merge"},
}


def build(name):
    torch.manual_seed(0)
    model = resu.sparsify(Net(), 0.6, compile=False)
    kind, arguments = ALL[name]
    parameters = matrices(model.parameters()) if kind is optim.Muon else model.parameters()
    return model, kind(parameters, **arguments)


def train(model, optimizer, seeds):
    for seed in seeds:
        plain_step(model, optimizer, seed, lambda: None)


def state_of(optimizer, weight):
    """Name -> state of the weight's shape; packed moments at their places, 0 elsewhere."""
    found = {}
    for name, value in optimizer.state.get(weight.parameter, {}).items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.shape == weight.shape:
            found[name] = value.clone()
        elif name.startswith("exp_avg") and value.shape == (weight.nnz,):
            found[name] = torch.zeros(weight.shape).masked_scatter_(weight.mask, value)
    return found


def check_change(model, optimizer, change, *, all_survive=False):
    controller = resu.controller(model)
    before = {
        name: (weight.mask, state_of(optimizer, weight), weight.parameter.detach().clone())
        for name, weight in controller.weights.items()
    }
    change(controller)
    for name, weight in controller.weights.items():
        old_mask, state, value = before[name]
        survivors = weight.mask if all_survive else weight.mask & old_mask
        assert torch.equal(weight.parameter.detach(), torch.where(weight.mask, value, 0.0)), name
        now = state_of(optimizer, weight)
        assert set(now) == set(state), name
        for key, entry in state.items():
            assert torch.equal(now[key], torch.where(survivors, entry, 0.0)), f"{key} of {name}"


@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize(("rule", "storage"), RULES)
@pytest.mark.parametrize("name", ALL)
def test_a_commit(name, rule, storage, commit):
    model, optimizer = build(name)
    train(model, optimizer, range(2))
    resu.controller(model).resurrect(rule=rule, storage=storage).__enter__()
    train(model, optimizer, range(2, 4))
    check_change(model, optimizer, lambda controller: controller.commit(**COMMITS[commit]))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_pruning(name, dense):
    model, optimizer = build(name)
    train(model, optimizer, range(2))
    if dense:
        resu.controller(model).set_phase("dense")
        train(model, optimizer, range(2, 4))
    check_change(model, optimizer, lambda controller: controller.prune(0.8), all_survive=dense)
