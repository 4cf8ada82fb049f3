"""Commits under an N:M pattern: groups, budget, values and optimizer state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

import resu_compile as resu
from resu_compile import Phase
from resu_compile.errors import ArgumentError
from resu_compile.runtime.optimizer_state import same_shaped_state


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(12, 16)
        self.conv = nn.Conv2d(4, 8, 3)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        x = self.wide(x).tanh().view(-1, 4, 2, 2)
        x = nn.functional.pad(x, (0, 1, 0, 1))
        return self.out(self.conv(x).tanh().flatten(1))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        return x @ self.w


def grouped(tensor, group=4):
    """Groups of inputs: the last dimension, or the channels of a convolution."""
    return (tensor.movedim(1, -1) if tensor.dim() > 2 else tensor).reshape(-1, group)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}


def train(model, optimizer, steps=3):
    for _ in range(steps):
        model(torch.randn(6, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def sparse(pattern="2:4", **arguments):
    model = resu.sparsify(Net(), pattern=pattern, compile=False, **arguments)
    return model, resu.controller(model)


def begun(model, controller, lr=0.3, **options):
    """A resurrection with some theta, and what was before its commit."""
    controller.resurrect(**options).__enter__()
    optimizer = optim.Adam(model.parameters(), lr=lr)
    train(model, optimizer)
    return optimizer, controller.masks, values(model)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2"])
@pytest.mark.parametrize("strategy", ["amnesty", "merge", "reprune"])
def test_every_strategy_keeps_the_pattern(strategy, pattern):
    model, controller = sparse(pattern)
    keep, group = map(int, pattern.split(":"))
    _, masks, before = begun(model, controller, strategy=strategy)
    report = controller.commit(budget=0.25)
    assert report.resurrected == report.lost > 0
    for name, new in controller.masks.items():
        assert (grouped(new, group).sum(1) == keep).all()
        assert report.weights[name].active == int(new.sum()) == int(masks[name].sum())
        assert torch.equal(values(model)[name], torch.where(new, before[name], 0))


def test_a_quota_is_paid_over_all_groups_of_a_weight():
    model, controller = sparse()
    _, masks, before = begun(model, controller)
    report = controller.commit(budget=0.25)
    for name, new in controller.masks.items():
        score = before[name].abs()
        assert report.weights[name].resurrected == int(0.25 * int(masks[name].sum()))
        gain = (
            grouped(score.masked_fill(masks[name], 0.0)).max(1).values
            - grouped(score.masked_fill(~masks[name], torch.inf)).min(1).values
        )
        served = grouped(new & ~masks[name]).any(1)
        assert gain[served].min() >= gain[~served].max()


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_a_ceiling_holds_in_each_group(margin):
    model, controller = sparse()
    _, masks, before = begun(model, controller)
    report = controller.commit(budget=1.0, kind="ceiling", margin=margin)
    assert report.resurrected > 0
    for name, new in controller.masks.items():
        score = before[name].abs()
        back, lost = new & ~masks[name], masks[name] & ~new
        best = grouped(score.masked_fill(~lost, 0.0)).max(1).values
        worst = grouped(score.masked_fill(~back, torch.inf)).min(1).values
        assert (worst > (1 + margin) * best).all()
        assert (grouped(back).sum(1) == grouped(lost).sum(1)).all()


def test_theta_that_is_zero_earns_nothing_but_a_quota():
    _, controller = sparse()
    with controller.resurrect(kind="ceiling", budget=1.0) as phase:
        pass
    assert (phase.report.resurrected, phase.report.jaccard) == (0, 1.0)
    with controller.resurrect(strategy="merge") as phase:
        pass
    assert (phase.report.resurrected, phase.report.jaccard) == (0, 1.0)


def test_merge_keeps_the_best_of_each_group():
    model, controller = sparse()
    _, _, before = begun(model, controller, strategy="merge")
    controller.commit()
    for name, new in controller.masks.items():
        score, kept = grouped(before[name].abs()), grouped(new)
        weakest = score.masked_fill(~kept, torch.inf).min(1).values
        assert (weakest >= score.masked_fill(kept, -1.0).max(1).values).all()
    begun(model, controller, strategy="merge")
    with pytest.raises(ArgumentError, match="^sparsity: expected None or 0.5 with pattern"):
        controller.commit(sparsity=0.0)
    assert controller.phase is Phase.RESU


@pytest.mark.parametrize("storage", ["inplace", "compact"])
@pytest.mark.parametrize("freeze_active", [False, True])
def test_state_starts_over_but_for_the_survivors(freeze_active, storage):
    model, controller = sparse()
    optimizer = optim.AdamW(model.parameters(), lr=0.3)
    train(model, optimizer)
    masks = controller.masks
    controller.resurrect(rule="adam", freeze_active=freeze_active, storage=storage).__enter__()
    train(model, optimizer)
    before = values(model)
    state = {
        (name, key): value.clone()
        for name, weight in controller.weights.items()
        for key, value in same_shaped_state(optimizer, weight.parameter)
    }
    report = controller.commit(budget=0.5)
    assert report.resurrected > 0
    for name, weight in controller.weights.items():
        survivors = weight.mask & masks[name]
        assert torch.equal(weight.parameter, torch.where(weight.mask, before[name], 0))
        for key, value in same_shaped_state(optimizer, weight.parameter):
            assert torch.equal(value, torch.where(survivors, state[name, key], 0))
            assert (value[survivors] != 0).any()
    train(model, optimizer)
    for weight in controller.weights.values():
        assert (weight.parameter[~weight.mask] == 0).all()
        for _, value in same_shaped_state(optimizer, weight.parameter):
            assert (value[~weight.mask] == 0).all()


@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([(1, 2), (1, 3), (2, 4), (3, 4), (1, 8)]),
    st.floats(0, 1),
    st.sampled_from(["quota", "ceiling"]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_counts_are_exact(rows, n_groups, pattern, budget, kind, equal):
    keep, group = pattern
    model = nn.Linear(n_groups * group, rows)
    resu.sparsify(model, pattern=f"{keep}:{group}", compile=False)
    controller = resu.controller(model)
    (weight,) = controller.weights.values()
    mask = weight.mask
    controller.set_phase("resu")
    with torch.no_grad():
        model.weight.copy_(torch.ones(weight.shape) if equal else torch.randn(weight.shape))
    report = controller.commit(budget=budget, kind=kind)
    n_keep = rows * n_groups * keep
    most = min(int(budget * n_keep), rows * n_groups * min(keep, group - keep))
    assert weight.nnz == report.active == n_keep
    assert report.resurrected == int((weight.mask & ~mask).sum()) == report.lost
    assert report.resurrected == most if kind == "quota" else report.resurrected <= most
    assert equal is False or kind == "quota" or report.resurrected == 0
    assert (weight.mask.reshape(-1, group).sum(1) == keep).all()


def test_the_share_ever_active_and_a_resume():
    model, controller = sparse()
    ever = controller.masks
    _, _, before = begun(model, controller, budget=0.3)
    state = controller.state_dict()
    report = controller.commit()
    other, resumed = sparse()
    resumed.load_state_dict(state)
    with torch.no_grad():
        for name, weight in resumed.weights.items():
            weight.parameter.copy_(before[name])
    resumed.commit()
    for name, mask in controller.masks.items():
        assert torch.equal(mask, resumed.masks[name])
        assert report.weights[name].ever_active == int((ever[name] | mask).sum())


# -- scores ------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", ["amnesty", "merge"])
def test_scores_of_the_commit(strategy):
    model, controller = sparse()
    begun(model, controller, strategy=strategy, score="gradient")
    assert controller.commit().resurrected > 0
    begun(model, controller, strategy=strategy, score="wanda")
    with pytest.raises(ArgumentError, match="^calibration: expected inputs to measure"):
        controller.commit()
    assert controller.commit(calibration=[torch.randn(6, 12)]).resurrected > 0
    assert all((grouped(mask).sum(1) == 2).all() for mask in controller.masks.values())
    begun(model, controller, strategy=strategy, score=lambda _n, w: -w.abs())
    assert controller.commit(budget=0.1).resurrected > 0  # the smallest win, 0 among them


@pytest.mark.parametrize("strategy", ["amnesty", "merge"])
def test_a_score_function_that_a_resume_lost_is_asked_for(strategy):
    model, controller = sparse()
    begun(model, controller, strategy=strategy, score=lambda _name, weight: weight.abs())
    state = controller.state_dict()
    _, resumed = sparse()
    resumed.load_state_dict(state)
    with pytest.raises(ArgumentError, match="^score: expected 'magnitude' or a function"):
        resumed.commit()
    resumed.commit(score="magnitude")


def test_a_layer_that_does_not_tell_its_input_is_read_from_its_mask():
    data = [torch.randn(5, 8)]
    model = resu.sparsify(Bare(), pattern="2:4", method="wanda", calibration=data, compile=False)
    controller = resu.controller(model)
    with controller.resurrect(init="normal", eps=5.0, budget=0.5) as phase:
        pass
    assert phase.report.resurrected == 12
    assert (controller.masks["w"].t().reshape(-1, 4).sum(1) == 2).all()


def test_a_mask_that_fits_in_two_ways_is_an_error_before_the_phase():
    model = resu.sparsify(Bare(), 0.5, compile=False)
    controller = resu.controller(model)
    checkered = (torch.arange(8)[:, None] + torch.arange(6)) % 2 == 0
    state = controller.state_dict()
    state["config"] = {**state["config"], "pattern": "1:2"}
    controller.load_state_dict(state)
    controller._apply({"w": checkered}, "prune")
    for begin in (controller.resurrect().__enter__, lambda: controller.set_phase("resu")):
        with pytest.raises(ArgumentError, match="^strategy: expected 'reprune' for w of shape"):
            begin()
        assert controller.phase is Phase.SPARSE
