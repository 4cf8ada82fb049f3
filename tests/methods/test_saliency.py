"""Saliency: |w| (E[g^2])^(power / 2), in pruning, in commits and over a whole run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resu_compile as resu
from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError
from resu_compile.methods import (
    GradientMethod,
    Resu,
    Saliency,
    get_method,
    is_gradient_method,
    method_names,
)
from resu_compile.phase import Phase
from resu_compile.sparsity import keep_count, topk_mask
from resu_compile.training import Cycle, CycleShares, Trainer, TrainingConfig
from resu_compile.training.data_needs import sees_gradients
from tests.methods.runs import WEIGHTS, drive, make_model, make_run
from tests.training.models import loss_fn, make_batches

NO_GRADIENTS = "whose gradients nobody saw; call controller"


def by_loop(weight, squares, power):
    """The formula, one float64 at a time."""
    pairs = zip(weight.flatten().tolist(), squares.flatten().tolist(), strict=True)
    return [abs(w) * math.sqrt(f) ** power for w, f in pairs]


def train(model, steps=3, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in make_batches(steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return optimizer


def tracked(sparsity=0.0, **settings_):
    model = resu.sparsify(make_model(), sparsity, compile=False, **settings_)
    controller = resu.controller(model)
    controller.track_gradients()
    return model, controller


# -- the formula -------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    power=st.floats(0.0, 1.0),
    seed=st.integers(0, 999),
)
def test_the_score_is_the_formula(shape, power, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    squares = torch.rand(shape, generator=generator, dtype=torch.float64)
    found = Saliency(power).score_with(weight, squares)
    assert found.shape == weight.shape
    assert found.flatten().tolist() == pytest.approx(by_loop(weight, squares, power), rel=1e-12)


def test_power_0_is_the_magnitude_and_power_1_the_root_of_the_fisher_information():
    weight = torch.randn(6, 5, dtype=torch.float64)
    squares = torch.rand(6, 5, dtype=torch.float64)
    squares[0] = 0.0
    assert torch.equal(Saliency(0.0).score_with(weight, squares), weight.abs())
    obd = weight.square() * squares / 2  # what Optimal Brain Damage orders by
    found = Saliency(1.0).score_with(weight, squares)
    for k in range(31):
        assert torch.equal(topk_mask(found, k), topk_mask(obd, k))
    assert (Saliency().score_with(weight, squares)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_scored_in_float32(dtype):
    weight = torch.tensor([1.0, -2.0]).to(dtype)
    squares = torch.tensor([1e-12, 1e-10])  # the root of float16's smallest is 2.4e-4
    found = Saliency(1.0).score_with(weight, squares)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, torch.tensor([1e-6, 2e-5]))


def test_it_is_registered_as_a_method_of_gradients():
    assert "saliency" in method_names()
    assert get_method("saliency") == Saliency(0.5)
    assert isinstance(Saliency(), GradientMethod)
    assert is_gradient_method("saliency")
    assert is_gradient_method(Saliency(1.0))
    assert not any(is_gradient_method(name) for name in ("magnitude", "wanda", "resu", "rigl"))
    assert not is_gradient_method(Resu())


@pytest.mark.parametrize("power", [-0.1, 1.5, math.nan])
def test_a_power_out_of_range(power):
    with pytest.raises(ArgumentError, match="^power: expected"):
        Saliency(power)


# -- pruning -----------------------------------------------------------------------------------
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_layer_by_layer_the_highest_scores_stay(power):
    model, controller = tracked()
    train(model)
    moments = controller.moments
    squares = {n: moments.mean_square(n, torch.device("cpu")).clone() for n in WEIGHTS}
    dense = {name: model.get_parameter(name).detach().clone() for name in WEIGHTS}
    controller.prune(0.75, method=Saliency(power))
    for name in WEIGHTS:
        score = by_loop(dense[name], squares[name], power)
        keep = keep_count(len(score), 0.75)
        best = sorted(range(len(score)), key=lambda i: -score[i])[:keep]
        assert sorted(best) == controller.masks[name].flatten().nonzero().flatten().tolist()


def test_over_all_layers_one_ranking_decides():
    model, controller = tracked()
    train(model)
    scores = [
        score
        for name in WEIGHTS
        for score in by_loop(
            model.get_parameter(name), controller.moments.mean_square(name, "cpu"), 0.5
        )
    ]
    controller.prune(0.75, method="saliency", scope="global")
    kept = torch.cat([controller.masks[name].flatten() for name in WEIGHTS])
    keep = keep_count(len(scores), 0.75)
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:keep]
    assert kept.nonzero().flatten().tolist() == sorted(best)


def test_without_gradients_it_is_refused_and_nothing_changes():
    with pytest.raises(ArgumentError, match=NO_GRADIENTS):
        resu.sparsify(make_model(), 0.5, method="saliency", compile=False)
    model = resu.sparsify(make_model(), 0.5, compile=False)
    controller = resu.controller(model)
    masks = controller.masks
    with pytest.raises(ArgumentError, match=NO_GRADIENTS):
        controller.prune(0.75, method="saliency")
    controller.track_gradients()
    with pytest.raises(ArgumentError, match=r"no optimizer has\s+stepped it"):
        controller.prune(0.75, method="saliency")
    assert all(torch.equal(masks[name], controller.masks[name]) for name in WEIGHTS)


@pytest.mark.parametrize("terms", [{"score": "saliency"}, {"strategy": "reprune"}])
def test_a_commit_without_gradients_is_refused_and_the_phase_goes_on(terms):
    model, controller = tracked()
    train(model)
    controller.prune(0.75, method="saliency")
    controller.resurrect(**terms).__enter__()
    moments = controller.moments
    controller.forget_gradients()
    assert controller.moments is None
    with pytest.raises(ArgumentError, match="track_gradients"):
        controller.commit()
    assert controller.phase is Phase.RESU
    controller.moments = moments
    controller.commit()
    assert controller.phase is Phase.SPARSE


# -- commits -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["quota", "ceiling"])
def test_a_commit_goes_by_it_with_theta_included(kind):
    model, controller = tracked(0.75, method="random")
    optimizer = train(model)
    mask = controller.masks["0.weight"]
    controller.resurrect(score="saliency", kind=kind, budget=0.25).__enter__()
    train(model, 60, optimizer)
    weight = model.get_parameter("0.weight").detach().clone()
    score = torch.tensor(by_loop(weight, controller.moments.mean_square("0.weight", "cpu"), 0.5))
    score = score.view_as(weight)
    report = controller.commit()
    after = controller.masks["0.weight"]
    inside, outside = score[mask].sort().values, score[~mask].sort(descending=True).values
    count = int(0.25 * int(mask.sum()))
    if kind == "ceiling":
        count = sum(bool(outside[j] > inside[j]) for j in range(count))
        assert count > 0
    assert report.weights["0.weight"].resurrected == int((after & ~mask).sum()) == count
    assert sorted(score[after & ~mask].tolist()) == sorted(outside[:count].tolist())
    assert sorted(score[mask & ~after].tolist()) == sorted(inside[:count].tolist())


# -- training ----------------------------------------------------------------------------------
def test_the_default_run_prunes_by_it_and_frees_the_means_at_the_end():
    config = TrainingConfig(steps=300, sparsity=0.75, compile=False)
    assert (config.method, config.scope, sees_gradients(config)) == ("saliency", "global", True)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    cycle = Cycle(model, config).start()
    batches, seen = make_batches(), set()
    while not cycle.done:
        loss_fn(model, batches[cycle.step_index % len(batches)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()
        seen.add(cycle.controller.moments is not None)
        total = sum(weight.nnz for weight in cycle.controller.weights.values())
        sparsity = cycle.controller.config.sparsity
        assert total == keep_count(192, sparsity) or cycle.controller.phase is Phase.RESU
    assert seen == {True}
    assert len(cycle.history) == config.cycles
    cycle.finish()
    controller = resu.controller(model)
    assert controller.moments is None
    assert sum(weight.nnz for weight in controller.weights.values()) == 48
    assert controller.phase is Phase.SPARSE


def test_what_decides_whether_gradients_are_looked_at():
    plain = {"resurrection": ResurrectionConfig(), "method": "magnitude", "compile": False}
    assert not sees_gradients(TrainingConfig(**plain))
    assert sees_gradients(TrainingConfig(**{**plain, "method": Saliency(1.0)}))
    by_commit = {**plain, "resurrection": ResurrectionConfig(score="saliency")}
    assert sees_gradients(TrainingConfig(**by_commit))
    no_commit = CycleShares(train=0.5, stabilize=0.5, resu=0.0)
    assert not sees_gradients(TrainingConfig(**by_commit, cycle=no_commit))


@pytest.mark.parametrize("method", ["resu", Resu(), Resu(Saliency(1.0)), "saliency"])
def test_resu_by_name_tracks_gradients_for_its_criterion(method):
    config = TrainingConfig(
        method=method, steps=100, cycles=3, resurrection=ResurrectionConfig(), compile=False
    )
    assert config.scope == "global"
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    Trainer(model, optimizer, loss_fn, config).fit(make_batches())
    total = sum(weight.nnz for weight in resu.controller(model).weights.values())
    assert total == keep_count(192, 0.7)


def test_one_shot_tracks_gradients_up_to_its_pruning():
    run = make_run("one_shot", options={"criterion": "saliency"})
    drive(run, until=9)
    moments, controller = run.controller.moments, run.controller
    assert moments is not None
    drive(run)
    assert controller.moments is None
    assert controller.sparsity == 0.75
    with pytest.raises(ArgumentError, match=r"no optimizer has\s+stepped it"):
        make_run("one_shot", options={"criterion": "saliency", "at": 0}).start()


def test_settings_that_cannot_be():
    with pytest.raises(ArgumentError, match="^warmup: expected more than 0 with method='saliency'"):
        TrainingConfig(warmup=0.0)
    TrainingConfig(warmup=0.0, method="magnitude")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight.requires_grad_(False)
    with pytest.raises(ArgumentError, match=r"^method: .*1.weight has requires_grad=False"):
        Cycle(model, TrainingConfig(compile=False))
    assert resu.runtime.controller.find_controller(model) is None
    by_magnitude = {"method": "magnitude", "resurrection": ResurrectionConfig()}
    cycle = Cycle(copy.deepcopy(model), TrainingConfig(compile=False, **by_magnitude))
    assert set(cycle.controller.weights) == {"0.weight", "1.weight"}
    cycle = Cycle(model, TrainingConfig(compile=False, exclude="1.*"))
    assert set(cycle.controller.weights) == {"0.weight"}


def test_scope_follows_the_criterion():
    assert TrainingConfig(method="magnitude").scope == "layer"
    assert TrainingConfig(scope="layer").scope == "layer"
    assert TrainingConfig(distribution="erk").scope == "layer"
    pattern = TrainingConfig(pattern="2:4", sparsity=0.5, schedule="constant")
    assert pattern.scope == "layer"
