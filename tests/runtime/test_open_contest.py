"""The contest of all places by the pruning method: who comes back, and how large."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resu_compile as resu
from resu_compile.errors import ArgumentError
from resu_compile.methods import Magnitude
from resu_compile.sparsity import keep_count


def build(seed, sparsity, scope, *, hidden=True, sizes=((5, 6), (4, 5), (3, 4))):
    """A model in a resurrection, with theta of many sizes."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(i, o, bias=False) for o, i in sizes))
    resu.sparsify(model, sparsity, scope=scope, min_density=0.0, compile=False)
    controller = resu.controller(model)
    controller.resurrect(hidden=hidden, strategy="open").__enter__()
    values = {n: torch.randn(w.shape).exp() - 1.0 for n, w in controller.weights.items()}
    for name, weight in controller.weights.items():
        values[name] = values[name].masked_fill(weight.mask, 0)
        with torch.no_grad():
            if hidden:
                controller.resurrection.hidden._aside[name].value.copy_(values[name])
            else:
                weight.parameter.add_(values[name])
    return model, controller, values


def by_sorting(places, count):
    """Indices of the ``count`` largest of (size, place), ties to the earlier place."""
    return {place for _, place in sorted(places, key=lambda pair: (-pair[0], pair[1]))[:count]}


def expected(groups, budget, sparsity):
    """Active places afterwards and the lowest score of each contest, one number at a time.

    Each group is a list of (score, place, was active).
    """
    kept, lowest = set(), []
    for group in groups:
        count = keep_count(len(group), sparsity)
        pruned = [(score, place) for score, place, active in group if not active]
        newcomers = by_sorting(pruned, int(budget * count))
        first = [(s, p) for s, p, active in group if active or p in newcomers]
        found = by_sorting(first, count)
        rest = [(s, p) for s, p, _ in group if p not in {q for _, q in first}]
        found |= by_sorting(rest, count - len(found))
        kept |= found
        lowest.append(min((s for s, p, _ in group if p in found), default=0.0))
    return kept, lowest


@settings(max_examples=60)
@given(
    seed=st.integers(0, 99),
    sparsity=st.sampled_from([0.2, 0.5, 0.75, 0.9]),
    after=st.sampled_from([None, 0.4, 0.8]),
    budget=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    scope=st.sampled_from(["layer", "global"]),
)
def test_it_is_a_sorted_list(seed, sparsity, after, budget, scope):
    _, controller, theta = build(seed, sparsity, scope)
    weights = controller.weights
    shown = {n: w.parameter.detach() + theta[n] for n, w in weights.items()}
    rows = [
        [
            (score, (number, index), active)
            for index, (score, active) in enumerate(
                zip(shown[n].abs().flatten().tolist(), w.mask.flatten().tolist(), strict=True)
            )
        ]
        for number, (n, w) in enumerate(weights.items())
    ]
    groups = [sum(rows, [])] if scope == "global" else rows
    final = sparsity if after is None else after
    kept, lowest = expected(groups, budget, final)
    before = controller.masks
    controller.commit(budget=budget, sparsity=final)
    for number, (name, weight) in enumerate(weights.items()):
        found = {(number, i) for i in weight.mask.flatten().nonzero().flatten().tolist()}
        assert found == {place for place in kept if place[0] == number}
        limit = lowest[0] if scope == "global" else lowest[number]
        value, came = weight.parameter.detach(), weight.mask & ~before[name]
        torch.testing.assert_close(value[came].abs(), shown[name][came].abs().clamp(max=limit))
        assert torch.equal(value[came].sign(), shown[name][came].sign())
        stayed = weight.mask & before[name]
        assert torch.equal(value[stayed], shown[name][stayed])


def test_theta_that_was_seen_comes_back_as_it_is():
    _, controller, theta = build(3, 0.6, "global", hidden=False)
    before = controller.masks
    controller.commit(budget=1.0)
    back = {n: w.mask & ~before[n] for n, w in controller.weights.items()}
    assert sum(int(b.sum()) for b in back.values()) > 2
    for name, weight in controller.weights.items():
        assert torch.equal(weight.parameter[back[name]], theta[name][back[name]])


def test_the_budget_is_of_all_layers_together():
    """All newcomers may come from one layer."""
    _, controller, theta = build(0, 0.5, "global")
    for name, value in theta.items():
        size = 100.0 if name == "1.weight" else 0.0
        controller.resurrection.hidden._aside[name].value.copy_(value.sign() * size)
    report = controller.commit(budget=0.2)
    kept = keep_count(sum(w.numel for w in controller.weights.values()), 0.5)
    back = {name: row.resurrected for name, row in report.weights.items()}
    assert back == {"0.weight": 0, "1.weight": int(0.2 * kept), "2.weight": 0}


@pytest.mark.parametrize("budget", [0.0, 0.25, 1.0])
def test_a_pattern_is_kept(budget):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    resu.sparsify(model, pattern="2:4", compile=False)
    controller = resu.controller(model)
    controller.resurrect(hidden=True, strategy="open").__enter__()
    for name, aside in controller.resurrection.hidden._aside.items():
        aside.value.fill_(100.0).masked_fill_(controller.masks[name], 0)
    report = controller.commit(budget=budget)
    for name, weight in controller.weights.items():
        assert (weight.mask.view(-1, 4).sum(1) == 2).all()
        assert report.weights[name].resurrected == int(budget * weight.nnz)


def test_scores_have_to_be_sizes():
    class Below(Magnitude):
        def score(self, weight, generator):
            return super().score(weight, generator) - 1.0

    torch.manual_seed(0)
    model = resu.sparsify(nn.Linear(6, 5), 0.5, method=Below(), compile=False)
    controller = resu.controller(model)
    controller.resurrect(hidden=True, strategy="open").__enter__()
    before = model.weight.detach().clone()
    with pytest.raises(ArgumentError, match="^method: expected scores >= 0 of .*'reprune'"):
        controller.commit()
    assert torch.equal(model.weight, before)
    controller.commit(strategy="reprune")


def test_random_scores_limit_nobody():
    """They are drawn, and say nothing of sizes."""
    torch.manual_seed(0)
    model = resu.sparsify(nn.Linear(16, 16), 0.5, method="random", compile=False)
    controller = resu.controller(model)
    controller.resurrect(hidden=True, strategy="open").__enter__()
    before = controller.masks["weight"]
    (aside,) = controller.resurrection.hidden._aside.values()
    aside.value.fill_(9.0).masked_fill_(before, 0)
    controller.commit(1.0)
    came = controller.masks["weight"] & ~before
    assert came.any()
    assert (model.weight[came] == 9.0).all()


def test_a_kept_zero_limits_nobody():
    """Places that fill a falling sparsity may hold 0."""
    _model, controller, theta = build(1, 0.9, "global")
    for name, value in theta.items():
        value[:2] = 0.0
        controller.resurrection.hidden._aside[name].value.copy_(value)
    before = controller.masks
    controller.commit(sparsity=0.0, go_on=True)
    for name, weight in controller.weights.items():
        came = ~before[name] & (theta[name] != 0)
        assert (weight.parameter[came] != 0).all()


def test_contests_and_limits_are_of_the_new_settings():
    """A weight that is named now is a contest of its own, and limits nobody else."""
    _model, controller, theta = build(2, 0.6, "global")
    controller.weights["2.weight"].parameter.data.mul_(1e-6)
    before = controller.masks
    controller.commit(1.0, sparsity=0.5, overrides={"2.weight": 0.5}, go_on=True)
    came = controller.weights["0.weight"].mask & ~before["0.weight"]
    assert came.any()
    kept = controller.weights["0.weight"].parameter[controller.weights["0.weight"].mask]
    assert controller.weights["0.weight"].parameter[came].abs().min() >= kept.abs().min()
    assert controller.weights["0.weight"].parameter[came].abs().max() > 1e-4
    with pytest.raises(ArgumentError, match="^overrides: "):
        controller.commit(sparsity=0.5, overrides={"nobody": 0.5})
    assert "nobody" not in controller.config.overrides


def test_under_a_pattern_a_calibrated_method_goes_by_the_score():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 8)), [torch.randn(4, 16)]
    resu.sparsify(model, method="wanda", pattern="2:4", calibration=data, compile=False)
    controller = resu.controller(model)
    controller.resurrect(hidden=True, strategy="open").__enter__()
    (aside,) = controller.resurrection.hidden._aside.values()
    aside.value.fill_(9.0).masked_fill_(controller.masks["0.weight"], 0)
    assert controller.commit(0.25).resurrected == 16
    assert (controller.masks["0.weight"].view(-1, 4).sum(1) == 2).all()


def test_it_looks_at_no_data():
    _model, controller, _ = build(0, 0.5, "layer")
    with pytest.raises(ArgumentError, match="^calibration: expected None with strategy='open'"):
        controller.commit(calibration=[torch.randn(2, 6)])


def test_a_calibrated_method_has_no_scores():
    model = nn.Sequential(nn.Linear(8, 8))
    resu.sparsify(model, 0.5, method="wanda", calibration=[torch.randn(4, 8)], compile=False)
    controller = resu.controller(model)
    controller.resurrect(hidden=True, strategy="open").__enter__()
    with pytest.raises(ArgumentError, match="^strategy: expected another one than 'open' with"):
        controller.commit()
