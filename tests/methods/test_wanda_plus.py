"""Wanda++ against autograd on the plain module, one sample after the other."""

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods import WandaPlus
from tests.methods.test_wanda import uneven


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6)

    def forward(self, x, scale=1.0):
        return (x + scale * self.down(torch.relu(self.up(x))),)


class Net(nn.Module):
    def __init__(self, n=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(n))

    def forward(self, x):
        for block in self.blocks:
            (x,) = block(x, scale=0.5)
        return x


def reference_scores(block, inputs, alpha):
    """(alpha sqrt(mean g^2) + sqrt(s_j)) |W| of both weights of a block."""
    squares = {name: torch.zeros_like(p) for name, p in block.named_parameters()}
    columns = {"up.weight": torch.zeros(6), "down.weight": torch.zeros(9)}
    samples = 0
    for x in inputs:
        block.zero_grad()
        block(x, scale=0.5)[0].norm().backward()
        for name, parameter in block.named_parameters():
            squares[name] += parameter.grad**2
        hidden = torch.relu(block.up(x)).detach()
        columns["up.weight"] += x.flatten(0, 1).square().sum(0)
        columns["down.weight"] += hidden.flatten(0, 1).square().sum(0)
        samples += len(x)
    block.zero_grad()
    return {
        name: (alpha * (squares[name] / len(inputs)).sqrt() + (columns[name] / samples).sqrt())
        * block.get_parameter(name).detach().abs()
        for name in columns
    }


def keeps_the_highest(mask, score, sparsity):
    """True if each row of ``mask`` lost its lowest scores, up to rounding of equal ones."""
    count = int(score.shape[1] * sparsity)
    assert ((~mask).sum(1) == count).all()
    kept = score.masked_fill(~mask, torch.inf).min(1).values
    return bool((kept >= score.masked_fill(mask, -1.0).max(1).values * (1 - 1e-5)).all())


@pytest.mark.parametrize("alpha", [0.0, 1.0, 100.0])
def test_masks_without_training_follow_the_score(alpha):
    net, data = Net(1), uneven(1, 4, 6, n=5)
    scores = reference_scores(net.blocks[0], data, alpha)
    resu.sparsify(
        net, 0.5, method=WandaPlus(alpha=alpha, rounds=0), calibration=data, compile=False
    )
    masks = resu.controller(net).masks
    for name, score in scores.items():
        assert keeps_the_highest(masks[f"blocks.0.{name}"], score, 0.5)


def test_the_gradient_counts():
    net, data = Net(1), uneven(1, 4, 6, n=5)
    other = Net(1)
    other.load_state_dict(net.state_dict())
    resu.sparsify(net, 0.5, method=WandaPlus(rounds=0), calibration=data, compile=False)
    resu.sparsify(other, 0.5, method="wanda", calibration=data, compile=False)
    assert any(
        not torch.equal(mask, resu.controller(other).masks[name])
        for name, mask in resu.controller(net).masks.items()
    )


def test_without_training_no_value_changes():
    net, data = Net(), uneven(1, 4, 6)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    resu.sparsify(net, 0.5, method=WandaPlus(rounds=0), calibration=data, compile=False)
    for name, mask in resu.controller(net).masks.items():
        assert torch.equal(net.get_parameter(name).detach(), before[name] * mask)


def test_training_is_that_of_a_plain_loop():
    """One call, so that no draw decides: prune, RMSprop on the squared error, prune again."""
    torch.manual_seed(1)
    net, data = Net(1), uneven(1, 4, 6, n=1)
    dense = Block()
    dense.load_state_dict(net.blocks[0].state_dict())
    method = WandaPlus(rounds=3, lr=1e-2)
    merit = {
        name: score / dense.get_parameter(name).detach().abs()
        for name, score in reference_scores(dense, data, method.alpha).items()
    }
    student = Block()
    student.load_state_dict(dense.state_dict())
    weights = {name: student.get_parameter(name) for name in merit}
    optimizer = torch.optim.RMSprop(weights.values(), lr=method.lr)

    def pruned():
        masks = {}
        for name, weight in weights.items():
            score = merit[name] * weight.detach().abs()
            order = torch.sort(score, dim=1, stable=True).indices
            masks[name] = torch.ones_like(score, dtype=torch.bool)
            masks[name].scatter_(1, order[:, : score.shape[1] // 2], False)
            weight.data[~masks[name]] = 0.0
        return masks

    for _ in range(method.rounds):
        pruned()
        target = dense(data[0], scale=0.5)[0].detach()
        optimizer.zero_grad()
        (student(data[0], scale=0.5)[0] - target).square().mean().backward()
        optimizer.step()
    masks = pruned()
    untouched = net.blocks[0].up.bias.detach().clone()
    resu.sparsify(net, 0.5, method=method, calibration=data, compile=False)
    found = resu.controller(net).masks
    for name, mask in masks.items():
        assert torch.equal(found[f"blocks.0.{name}"], mask)
        torch.testing.assert_close(net.blocks[0].get_parameter(name), weights[name])
    assert torch.equal(net.blocks[0].up.bias.detach(), untouched)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_training_brings_the_block_nearer_to_its_dense_output():
    data = uneven(1, 4, 6, n=8)
    errors = []
    for rounds in (0, 5):
        torch.manual_seed(3)
        net = Net(1)
        with torch.no_grad():
            dense = [net(x) for x in data]
        method = WandaPlus(rounds=rounds, lr=1e-3)
        resu.sparsify(net, 0.5, method=method, calibration=data, compile=False)
        with torch.no_grad():
            errors.append(
                sum((net(x) - y).square().sum() for x, y in zip(data, dense, strict=True))
            )
    assert errors[1] < 0.9 * errors[0]


def test_the_same_seed_draws_the_same_and_batches_make_up_the_samples():
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        net, data = Net(), uneven(2, 4, 6, n=6)
        method = WandaPlus(rounds=2, samples=4, lr=1e-2)
        resu.sparsify(net, 0.5, method=method, calibration=data, seed=seed, compile=False)
        results.append(net.blocks[1].up.weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    calls = [type("Call", (), {"samples": 2})() for _ in range(6)]
    drawn = method._draw(calls, torch.Generator().manual_seed(0))
    assert len(drawn) == len({id(call) for call in drawn}) == 2


def test_half_precision_is_trained_in_float32():
    net, data = Net(1).bfloat16(), [x.bfloat16() for x in uneven(1, 4, 6)]
    resu.sparsify(net, 0.5, method=WandaPlus(lr=1e-2), calibration=data, compile=False)
    weight = net.blocks[0].up.weight
    assert weight.dtype == torch.bfloat16
    assert torch.isfinite(weight).all()


def test_patterns_and_a_controller_at_work():
    net, data = Net(), uneven(1, 4, 6)
    resu.sparsify(net, 0.2, compile=False)
    controller = resu.controller(net)
    before = controller.masks
    targets = controller.prune(0.5, method=WandaPlus(lr=1e-3), calibration=data)
    assert targets.resurrected == 0
    assert not any((mask & ~before[name]).any() for name, mask in controller.masks.items())
    net = Net()
    resu.sparsify(net, pattern="1:3", method="wanda++", calibration=data, compile=False)
    for mask in resu.controller(net).masks.values():
        assert (mask.reshape(-1, 3).sum(1) == 1).all()


WRONG = [
    ("alpha", -1, ArgumentError),
    ("rounds", 1.5, ArgumentTypeError),
    ("samples", 0, ArgumentError),
    ("lr", "fast", ArgumentTypeError),
    ("blocks", 3, ArgumentTypeError),
]


@pytest.mark.parametrize(("field", "value", "error"), WRONG)
def test_wrong_fields_are_named(field, value, error):
    with pytest.raises(error, match=f"^{field}: expected"):
        WandaPlus(**{field: value})
