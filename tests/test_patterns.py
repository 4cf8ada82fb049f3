"""N:M sparsity through the interface: sparsify, prune, commit, checkpoints."""

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.config import SparsityConfig
from resu_compile.errors import ArgumentError
from resu_compile.methods import is_calibrated


class TwoNumbers(nn.Module):
    """x @ weight with [nx, nf] = [in, out], as in transformers' Conv1D."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x):
        return x @ self.weight


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.w


def net():
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def groups(mask, group=4):
    return mask.reshape(-1, group).sum(1)


def sparse(**arguments):
    model = net()
    resu.sparsify(model, compile=False, **{"pattern": "2:4", **arguments})
    return model, resu.controller(model)


# -- which entries -------------------------------------------------------------------------------
def test_the_largest_of_each_group_stay():
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    resu.sparsify(model, pattern="2:4", compile=False)
    for name, mask in resu.controller(model).masks.items():
        for row, kept in zip(before[name], mask, strict=True):
            for start in range(0, len(row), 4):
                ranked = sorted(range(4), key=lambda i: (-abs(row[start + i]), i))
                expected = [i in ranked[:2] for i in range(4)]
                assert kept[start : start + 4].tolist() == expected


@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "wanda++", "dsnot"])
def test_every_method_of_one_pruning_keeps_the_pattern_and_resurrects(method, pattern):
    keep, group = map(int, pattern.split(":"))
    data = [torch.randn(6, 8) for _ in range(3)] if is_calibrated(method) else None
    model, controller = sparse(method=method, pattern=pattern, calibration=data)
    before = controller.masks
    for strategy in ("amnesty", "merge"):
        with controller.resurrect(strategy=strategy, budget=0.3, init="normal", eps=3.0) as phase:
            pass
        assert phase.report.resurrected == phase.report.lost > 0
        for name, mask in controller.masks.items():
            assert (groups(mask, group) == keep).all()
            assert (controller.weights[name].parameter[~mask] == 0).all()
    assert any(not torch.equal(before[name], mask) for name, mask in controller.masks.items())


def test_random_pruning_keeps_the_pattern():
    _, controller = sparse(method="random", pattern="1:4")
    assert controller.sparsity == 0.75
    assert all((groups(mask) == 1).all() for mask in controller.masks.values())


def test_the_input_dimension_of_each_layer():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(8, 3, 3),
            "transposed": nn.ConvTranspose1d(8, 3, 2),
            "two": TwoNumbers(6, 8),
            "square": TwoNumbers(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
        }
    )
    resu.sparsify(model, pattern="2:4", compile=False)
    masks = resu.controller(model).masks
    assert (groups(masks["conv.weight"].permute(0, 2, 3, 1)) == 2).all()
    assert (groups(masks["transposed.weight"].permute(1, 2, 0)) == 2).all()
    assert (groups(masks["two.weight"].t()) == 2).all()
    assert (groups(masks["square.weight"].t()) == 2).all()
    assert (groups(masks["attention.in_proj_weight"]) == 2).all()


def test_an_unknown_input_dimension_is_named_and_a_calibrated_method_sees_it():
    with pytest.raises(ArgumentError, match="^pattern: .* which dimension of w .*exclude='w'.*wan"):
        resu.sparsify(Bare(), pattern="2:4", compile=False)
    model = Bare()
    resu.sparsify(
        model, pattern="2:4", method="wanda", calibration=[torch.randn(3, 8)], compile=False
    )
    assert (groups(resu.controller(model).masks["w"].t()) == 2).all()


def test_inputs_that_the_group_does_not_divide():
    model = nn.Linear(6, 4)
    with pytest.raises(ArgumentError, match="^pattern: expected inputs divisible by 4 .*weight"):
        resu.sparsify(model, pattern="2:4", compile=False)
    resu.sparsify(model, pattern="1:3", sparsity=2 / 3, compile=False)
    assert (groups(resu.controller(model).masks["weight"], 3) == 1).all()


# -- arguments -----------------------------------------------------------------------------------
WRONG = [
    ({"sparsity": 0.7}, "sparsity: expected None or 0.5"),
    ({"scope": "global"}, "scope: expected 'layer' with pattern"),
    ({"distribution": "erk"}, "distribution: expected 'uniform' with pattern"),
    ({"overrides": {"0": 0.5}}, "overrides: expected {} with pattern"),
    ({"from_zeros": True}, "from_zeros: expected False with pattern"),
    ({"pattern": "4:2"}, "pattern: expected N < M"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda v: str(v)[:20])
def test_what_contradicts_a_pattern_is_named(arguments, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        sparse(**arguments)


def test_the_pattern_decides_the_sparsity():
    assert SparsityConfig(pattern="1:8").sparsity == 0.875
    assert SparsityConfig(0.5, pattern="2:4").sparsity == 0.5
    assert SparsityConfig().sparsity == 0.7


# -- afterwards ----------------------------------------------------------------------------------
def test_prune_takes_and_drops_a_pattern():
    model = net()
    resu.sparsify(model, 0.3, compile=False)
    controller = resu.controller(model)
    before = controller.masks
    controller.prune(pattern="2:4")
    assert controller.config.sparsity == 0.5
    assert all((groups(mask) == 2).all() for mask in controller.masks.values())
    controller.prune(pattern="1:4")
    assert controller.sparsity == 0.75
    with pytest.raises(ArgumentError, match="^sparsity: .* pattern=None takes any sparsity"):
        controller.prune(0.9)
    controller.prune(0.9, pattern=None)
    assert controller.config.pattern is None
    for name, mask in controller.masks.items():
        assert not (mask & ~before[name]).any() or (groups(before[name]) < 2).any()


def test_a_checkpoint_keeps_the_pattern():
    _, controller = sparse(pattern="1:4")
    state = controller.state_dict()
    _, other = sparse(pattern="2:4")
    other.load_state_dict(state)
    assert (other.config.pattern, other.config.sparsity) == ("1:4", 0.75)
    assert all(torch.equal(other.masks[n], mask) for n, mask in controller.masks.items())


def test_a_state_from_before_there_were_patterns_has_none():
    model = net()
    resu.sparsify(model, 0.6, compile=False)
    state = resu.controller(model).state_dict()
    del state["config"]["pattern"]
    _, other = sparse()
    other.load_state_dict(state)
    assert (other.config.pattern, other.config.sparsity) == (None, 0.6)


def test_reprune_is_a_tournament_inside_each_group():
    model, controller = sparse()
    before = controller.masks
    with controller.resurrect(strategy="reprune", init="normal", eps=5.0) as phase:
        values = {
            name: weight.parameter.detach().clone() for name, weight in controller.weights.items()
        }
    assert phase.report.resurrected > 0
    for name, mask in controller.masks.items():
        assert (groups(mask) == 2).all()
        assert not torch.equal(mask, before[name])
        ranked = values[name].abs().reshape(-1, 4)
        kept = mask.reshape(-1, 4)
        assert (
            ranked.masked_fill(~kept, torch.inf).min(1).values
            >= ranked.masked_fill(kept, -1.0).max(1).values
        ).all()


def test_wanda_through_reprune_needs_its_data():
    data = [torch.randn(5, 8)]
    model, controller = sparse(method="wanda", calibration=data)
    controller.resurrect(strategy="reprune", init="normal").__enter__()
    with pytest.raises(ArgumentError, match="^calibration: expected data for method 'wanda'"):
        controller.commit()
    controller.commit(calibration=data)
    assert all((groups(mask) == 2).all() for mask in controller.masks.values())
    assert all((w.parameter[~w.mask] == 0).all() for w in controller.weights.values())
