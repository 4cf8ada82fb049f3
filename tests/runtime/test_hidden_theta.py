"""Theta that forward passes do not see: what trains, what the model shows when, and what stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn, optim
from torch.func import functional_call

import resu_compile as resu
from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError
from resu_compile.phase import Phase
from resu_compile.runtime.optimizer_state import same_shaped_state
from tests.integration.test_invariants import FORMS, OPTIMIZERS, Net, build, loss_of
from tests.runtime.places import sparse, step

RULES = ["optimizer", "sgd", "momentum", "adam", "selective", "subset"]


def begin(model, **terms):
    controller = resu.controller(model)
    controller.resurrect(**{"hidden": True, **terms}).__enter__()
    return controller


def theta_of(controller):
    return controller.resurrection.hidden.values()


def check_hidden(controller):
    """Pruned places of the weights are +0, and theta is 0 at the active ones."""
    for name, weight in controller.weights.items():
        assert (weight.parameter.view(torch.int32)[~weight.mask] == 0).all(), name
        assert (theta_of(controller)[name][weight.mask] == 0).all(), name


class ByHand:
    """The straight-through estimator: an optimizer steps W by the gradient at M * W."""

    def __init__(self, model):
        controller = resu.controller(model)
        self.masks, self.model = controller.masks, Net()
        self.model.load_state_dict(model.state_dict())

    def seen(self):
        return {
            name: torch.where(self.masks[name], p, 0.0) if name in self.masks else p
            for name, p in self.model.named_parameters()
        }

    def step(self, optimizer, seed):
        seen = {name: p.detach().requires_grad_() for name, p in self.seen().items()}

        def call(x):
            return functional_call(self.model, seen, x)

        loss_of(call, seed).backward()
        for name, parameter in self.model.named_parameters():
            parameter.grad = seen[name].grad
        optimizer.step()

    def check(self, controller):
        theta = theta_of(controller)
        for name, parameter in controller.model.named_parameters():
            assert torch.equal(parameter, self.seen()[name]), name
        for name, mask in self.masks.items():
            expected = torch.where(mask, 0.0, self.model.get_parameter(name))
            assert torch.equal(theta[name], expected), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_straight_through_estimator(name, form):
    model = sparse()
    plain = ByHand(model)
    optimizer, its = build(name, form, model), build(name, form, plain.model)
    for key, mask in plain.masks.items():  # theta begins without any: Adagrad's has a first value
        for _, value in same_shaped_state(its, plain.model.get_parameter(key)):
            value.masked_fill_(~mask, 0)
    controller = begin(model)
    for seed in range(4):
        step(model, optimizer, seed)
        plain.step(its, seed)
        plain.check(controller)
        check_hidden(controller)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    moved = [n for n, w in controller.weights.items() if id(w.parameter) in trained]
    assert moved
    assert all((theta_of(controller)[n][~controller.masks[n]] != 0).any() for n in moved)
    controller.commit()
    for weight in controller.weights.values():
        assert (weight.parameter[~weight.mask] == 0).all()
        if id(weight.parameter) in trained:
            for key, value in same_shaped_state(optimizer, weight.parameter):
                assert (value[~weight.mask] == 0).all(), key


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_moves_it_and_none_shows_it(rule, freeze):
    model = sparse()
    optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for seed in range(2):
        step(model, optimizer, seed)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    controller = begin(model, rule=rule, freeze_active=freeze)
    for seed in range(3):
        step(model, optimizer, seed)
        check_hidden(controller)
    assert any((value != 0).any() for value in theta_of(controller).values())
    for name, weight in controller.weights.items():
        same = torch.equal(weight.parameter[weight.mask], before[name][weight.mask])
        assert same is freeze


def test_plain_steps_add_up():
    """theta = - lr sum g, g the gradient where the mask is: theta has no part in it."""
    model = sparse()
    controller = begin(model, rule="sgd", lr=0.5, freeze="all")
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    total = {name: torch.zeros(weight.shape) for name, weight in controller.weights.items()}
    for seed in range(3):
        plain = Net()
        plain.load_state_dict(model.state_dict())
        loss_of(plain, seed).backward()
        for name, value in total.items():
            value -= 0.5 * plain.get_parameter(name).grad
        step(model, optimizer, seed)
    for name, value in theta_of(controller).items():
        expected = total[name].masked_fill(controller.masks[name], 0)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_noise_at_the_start_is_hidden_as_well():
    model = sparse()
    x = torch.randn(2, 3, 8)
    before = model(x)
    controller = begin(model, init="normal", eps=0.5)
    assert torch.equal(model(x), before)
    check_hidden(controller)
    for name, theta in theta_of(controller).items():
        assert (theta[~controller.masks[name]] != 0).all()


# -- steps of other shapes ---------------------------------------------------------------------
class Nested(optim.SGD):
    """Its step calls the real one, so that the hooks run twice."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("rule", ["optimizer", "adam"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_nested_step_or_a_closure_moves_it_once(closure, rule):
    optim.SGD(nn.Linear(1, 1).parameters())  # its step has hooks of its own then

    def run(optimizer_class, closure):
        model = sparse()
        optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9)
        controller = begin(model, rule=rule)
        for seed in range(3):
            if closure:
                optimizer.zero_grad()
                optimizer.step(lambda seed=seed: loss_of(model, seed).backward())
            else:
                step(model, optimizer, seed)
                check_hidden(controller)
            optimizer.zero_grad()
        return [*theta_of(controller).values(), *model.parameters()]

    found, expected = run(Nested, closure), run(optim.SGD, False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Fails(optim.SGD):
    """Raises in its third step, after it has moved the weights."""

    calls = 0

    def step(self, closure=None):
        super().step(closure)
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("look", ["forward", "state_dict", "commit", "step"])
def test_a_step_that_raises_loses_no_theta(look):
    model = sparse()
    controller = begin(model)
    optimizer = Fails(model.parameters(), lr=0.1)
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    before = theta_of(controller)

    def broken(*_):
        raise RuntimeError("interrupted")

    handle = optimizer.register_step_post_hook(broken)  # ours has not run yet, or has
    with pytest.raises(RuntimeError):
        step(model, optimizer, 2)
    handle.remove()
    optimizer.calls = 5
    if look == "forward":
        model(torch.randn(2, 3, 8))
    elif look == "state_dict":
        controller.state_dict()
    elif look == "commit":
        controller.commit(strategy="merge")
        for name, theta in before.items():
            assert (model.get_parameter(name)[theta != 0] != 0).all()
        return
    else:
        step(model, optimizer, 3)
    model(torch.randn(2, 3, 8))
    check_hidden(controller)
    assert all(
        (theta_of(controller)[name][value != 0] != 0).all() for name, value in before.items()
    )


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_skips_whole_steps(fused):
    def run(scaled):
        model = sparse()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        controller = begin(model)
        for seed in range(4):
            optimizer.zero_grad()
            if seed == 2 and not scaled:
                continue
            loss = loss_of(model, seed) * (torch.inf if seed == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            check_hidden(controller)
        return [*theta_of(controller).values(), *model.parameters()]

    torch.testing.assert_close(run(True), run(False), rtol=1e-5, atol=1e-6)


def test_it_follows_the_model_to_another_dtype():
    model = sparse()
    controller = begin(model)
    step(model, optim.SGD(model.parameters(), lr=0.1), 0)
    before = theta_of(controller)
    model.double()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in theta_of(controller).items():
        assert value.dtype is torch.float64
        assert torch.equal(value, before[name].double())


def test_loaded_weights_show_no_theta():
    """A checkpoint of a dense model brings its values for the active places alone."""
    model = sparse()
    controller = begin(model)
    step(model, optim.SGD(model.parameters(), lr=0.1), 0)
    before = theta_of(controller)
    dense = Net()
    model.load_state_dict(dense.state_dict())
    model(torch.randn(2, 3, 8))
    check_hidden(controller)
    for name, mask in controller.masks.items():
        assert torch.equal(model.get_parameter(name)[mask], dense.get_parameter(name)[mask])
    assert all(torch.equal(v, before[n]) for n, v in theta_of(controller).items())


def test_compiled_it_trains_the_same():
    def run(compiled):
        torch.manual_seed(0)
        model = resu.sparsify(Net(), 0.6, compile=compiled)
        # not Adam: the bias before the norm has no gradient but for rounding
        controller, optimizer = begin(model), optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for seed in range(3):
            step(model, optimizer, seed)
            check_hidden(controller)
        return [*theta_of(controller).values(), *model.parameters()]

    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-5)


# -- commits -----------------------------------------------------------------------------------
def trained(steps=3, **terms):
    model = sparse()
    controller = begin(model, **terms)
    optimizer = optim.AdamW(model.parameters(), lr=0.05)
    for seed in range(steps):
        step(model, optimizer, seed)
    return model, controller, optimizer


@pytest.mark.parametrize("strategy", ["amnesty", "open", "reprune"])
@pytest.mark.parametrize("sparsity", [None, 0.5, 0.8])
def test_a_resurrection_goes_on_after_a_tournament(strategy, sparsity):
    model, controller, optimizer = trained(strategy=strategy, budget=0.3)
    theta, masks = theta_of(controller), controller.masks
    means = {
        n: optimizer.state[w.parameter]["exp_avg"].clone() for n, w in controller.weights.items()
    }
    report = controller.commit(sparsity=sparsity, go_on=True)
    assert controller.phase is Phase.RESU
    assert report.resurrected > 0 or sparsity == 0.8
    check_hidden(controller)
    for name, weight in controller.weights.items():
        before, after = masks[name], weight.mask
        stay, came, went = ~before & ~after, ~before & after, before & ~after
        now = theta_of(controller)[name]
        assert torch.equal(now[stay], theta[name][stay])
        assert (now[went] == 0).all()
        assert (weight.parameter[came] != 0).all()
        mean = optimizer.state[weight.parameter]["exp_avg"]
        assert torch.equal(mean[stay], means[name][stay])
        assert torch.equal(mean[before & after], means[name][before & after])
        assert (mean[came | went] == 0).all()
    step(model, optimizer, 9)
    check_hidden(controller)
    controller.commit()
    assert controller.phase is Phase.SPARSE
    step(model, optimizer, 10)
    for weight in controller.weights.values():
        for key, value in [
            ("value", weight.parameter),
            *same_shaped_state(optimizer, weight.parameter),
        ]:
            assert (value[~weight.mask] == 0).all(), key


@pytest.mark.parametrize("rule", ["momentum", "adam", "selective", "subset"])
def test_what_a_rule_of_its_own_remembers_stays_with_the_pruned(rule):
    """Beside an optimizer without such state, in tensors of the weight's shape."""
    model = sparse()
    controller = begin(model, rule=rule, strategy="open", budget=0.3, alpha=0.9, lr=0.1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    masks = controller.masks
    for seed in range(3):
        step(model, optimizer, seed)
    assert controller.commit(go_on=True).resurrected > 0
    for name, weight in controller.weights.items():
        theta = controller.resurrection.thetas[name]
        assert theta.buffers
        assert theta.chosen is None
        for value in theta.buffers.values():
            assert (value[weight.mask | masks[name]] == 0).all()
    before = {n: w.parameter.detach().clone() for n, w in controller.weights.items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, 4)  # theta alone moves
    assert all(torch.equal(w.parameter, before[n]) for n, w in controller.weights.items())


def test_packed_moments_are_kept_whole_while_it_goes_on():
    model = sparse()
    optimizer = resu.optim.AdamW(model.parameters(), lr=0.05, state="active")
    step(model, optimizer, 0)
    controller = begin(model, strategy="open", budget=0.2)
    step(model, optimizer, 1)
    controller.commit(go_on=True)
    for weight in controller.weights.values():
        mean = optimizer.state[weight.parameter]["exp_avg"]
        assert mean.shape == weight.parameter.shape
        assert (mean[~weight.mask] != 0).any() or weight.nnz == weight.numel
    step(model, optimizer, 2)
    controller.commit()
    for weight in controller.weights.values():
        assert optimizer.state[weight.parameter]["exp_avg"].shape == (weight.nnz,)


def test_a_commit_that_raises_leaves_it_hidden():
    _model, controller, _ = trained()
    before = theta_of(controller)
    with pytest.raises(ArgumentError, match="^score: expected finite scores"):
        controller.commit(score=lambda _, value: value * torch.nan)
    assert controller.phase is Phase.RESU
    check_hidden(controller)
    assert all(torch.equal(v, before[n]) for n, v in theta_of(controller).items())


def test_merging_brings_all_of_it_back():
    model, controller, _ = trained()
    theta, masks = theta_of(controller), controller.masks
    controller.commit(strategy="merge")
    for name, value in theta.items():
        assert torch.equal(model.get_parameter(name)[~masks[name]], value[~masks[name]])


def test_abandoned_it_is_gone():
    model, controller, optimizer = trained()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    controller.abandon()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    step(model, optimizer, 5)
    for weight in controller.weights.values():
        assert (weight.parameter[~weight.mask] == 0).all()


def test_forward_passes_of_a_commit_lose_no_theta():
    """Calibration runs the model, and so may a score; they see theta, as the commit does."""
    model, controller, _ = trained()
    theta, masks = theta_of(controller), controller.masks
    shown = {n: p.detach() + theta.get(n, 0.0) for n, p in model.named_parameters()}

    def score(name, value):
        model(torch.randn(2, 3, 8))
        assert torch.equal(value, shown[name])
        return value.abs()

    assert controller.commit(0.3, score=score, go_on=True).resurrected > 0
    check_hidden(controller)
    for name, mask in controller.masks.items():
        came, stay = mask & ~masks[name], ~mask & ~masks[name]
        assert torch.equal(model.get_parameter(name)[came], theta[name][came])
        assert torch.equal(theta_of(controller)[name][stay], theta[name][stay])


def test_a_calibrated_method_prunes_again_and_theta_goes_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [torch.randn(6, 8) for _ in range(3)]
    resu.sparsify(model, 0.5, method="wanda", calibration=data, compile=False)
    controller = resu.controller(model)
    controller.resurrect(hidden=True, strategy="reprune", rule="sgd", lr=0.5).__enter__()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for batch in data:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    report = controller.commit(calibration=data, go_on=True)
    assert report.resurrected > 0
    check_hidden(controller)
    assert any((value != 0).any() for value in theta_of(controller).values())
    assert all((w.parameter[w.mask] != 0).all() for w in controller.weights.values())


def test_a_hook_that_runs_the_model_loses_no_step():
    model = sparse()
    controller, optimizer = begin(model), optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: model(torch.randn(2, 3, 8)))
    plain = ByHand(model)
    its = optim.SGD(plain.model.parameters(), lr=0.1)
    for seed in range(3):
        step(model, optimizer, seed)
        plain.step(its, seed)
        check_hidden(controller)
    assert any((value != 0).any() for value in theta_of(controller).values())
    plain.check(controller)


def test_writes_that_nobody_saw_are_found():
    """At the first step, as in the SPARSE phase; forward passes see zeros then."""
    model = sparse()
    controller, optimizer = begin(model), optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer, 0)
    for weight in controller.weights.values():
        weight.parameter.data.add_(0.01)
    for seed in range(1, 40):
        step(model, optimizer, seed)
        for weight in controller.weights.values():
            weight.parameter.data.add_(0.01)
    model(torch.randn(2, 3, 8))
    check_hidden(controller)


# -- state -------------------------------------------------------------------------------------
def test_a_saved_phase_goes_on_bit_for_bit():
    model, controller, optimizer = trained()
    saved = copy.deepcopy([model.state_dict(), controller.state_dict(), optimizer.state_dict()])
    other = sparse(seed=1)
    its = optim.AdamW(other.parameters(), lr=0.05)
    other.load_state_dict(saved[0])
    resu.controller(other).load_state_dict(saved[1])
    its.load_state_dict(saved[2])
    for seed in (7, 8):
        step(model, optimizer, seed)
        step(other, its, seed)
    again = resu.controller(other)
    assert all(torch.equal(v, theta_of(again)[n]) for n, v in theta_of(controller).items())
    controller.commit(strategy="reprune")
    again.commit(strategy="reprune")
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loaded_phase_goes_on_before_its_first_step():
    """The state that the optimizer brings along fits the masks after the tournament."""
    model, controller, optimizer = trained(strategy="open", budget=0.3)
    saved = copy.deepcopy([model.state_dict(), controller.state_dict(), optimizer.state_dict()])
    other = sparse(seed=1)
    its = optim.AdamW(other.parameters(), lr=0.05)
    other.load_state_dict(saved[0])
    again = resu.controller(other)
    again.load_state_dict(saved[1])
    its.load_state_dict(saved[2])
    assert controller.commit(go_on=True).resurrected > 0
    again.commit(go_on=True)
    for seed in (7, 8):
        step(model, optimizer, seed)
        step(other, its, seed)
    assert all(torch.equal(v, theta_of(again)[n]) for n, v in theta_of(controller).items())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_other_weights_is_refused():
    _model, controller, _ = trained()
    state = controller.state_dict()
    state["resurrection"]["hidden"]["fc.weight"] = torch.zeros(2, 2)
    with pytest.raises(ArgumentError, match="^state: expected hidden theta .* got fc.weight"):
        controller.load_state_dict(state)


def test_a_copy_of_the_model_has_its_own():
    model, controller, _ = trained()
    twin = copy.deepcopy(model)
    its = resu.controller(twin)
    check_hidden(its)
    step(twin, optim.SGD(twin.parameters(), lr=0.1), 4)
    for name, value in theta_of(controller).items():
        assert (theta_of(its)[name] != value).any()


# -- errors ------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{"storage": "compact"}, {"places": 0.1}])
def test_what_does_not_go_together(options):
    (name,) = options
    with pytest.raises(
        ArgumentError, match=rf"^{name}: expected .* with hidden=True.*hidden=False"
    ):
        ResurrectionConfig(hidden=True, **options)


def test_theta_that_is_seen_cannot_go_on():
    _model, controller, _ = trained(hidden=False)
    with pytest.raises(ArgumentError, match="^go_on: expected False unless theta is hidden"):
        controller.commit(go_on=True)
    with pytest.raises(ArgumentError, match="^overrides: expected None without sparsity"):
        controller.commit(overrides={"fc.weight": 0.5})
    assert controller.phase is Phase.RESU
