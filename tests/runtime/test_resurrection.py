import math

import pytest
import torch
from torch import nn, optim

import resu_compile as resu
from resu_compile.errors import ArgumentError
from resu_compile.runtime.optimizer_state import same_shaped_state

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: optim.Adam(p, lr=0.1, foreach=False),
    "adamw": lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True, weight_decay=0.1),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "muon": lambda p: optim.Muon([q for q in p if q.dim() == 2], lr=0.1, weight_decay=0.1),
}
RULES = ["sgd", "momentum", "adam", "selective", "subset", "optimizer"]
MOVES_ALL = ["sgd", "momentum", "adam", "optimizer"]  # the others choose


def pruned_state_is_empty(optimizer, model, rule, mask):
    """0 at the pruned places, but for the means of a rule that found its place there."""
    names = {
        "momentum": ["momentum_buffer"],
        **dict.fromkeys(["adam", "selective", "subset"], ["exp_avg", "exp_avg_sq"]),
    }
    for key, value in same_shaped_state(optimizer, model.weight):
        if key not in names.get(rule, []):
            assert (value[~mask] == 0).all(), key


def sparse(sparsity=0.5, seed=0, **arguments):
    torch.manual_seed(seed)
    return resu.sparsify(nn.Linear(6, 4), sparsity, compile=False, **arguments)


def mask_of(model):
    return resu.controller(model).weights["weight"].mask


def backward(model, seed):
    model.zero_grad()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).to(model.weight.dtype)
    model(x).square().sum().backward()


def train(model, optimizer, steps=3, start=0):
    for step in range(start, start + steps):
        backward(model, step)
        optimizer.step()


# -- who moves ---------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_means_bit_exactly_unmoved(optimizer, rule):
    model = sparse()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    train(model, optimizer)
    mask = mask_of(model)
    weight = model.weight.detach().clone()
    state = {key: value.clone() for key, value in same_shaped_state(optimizer, model.weight)}
    resu.controller(model).resurrect(rule=rule, freeze_active=True).__enter__()
    train(model, optimizer, start=3)
    assert torch.equal(model.weight[mask], weight[mask])
    moved = model.weight[~mask] != 0
    assert moved.all() if rule in MOVES_ALL else moved.any()
    for key, value in same_shaped_state(optimizer, model.weight):
        assert torch.equal(value[mask], state[key][mask]), key
    if rule != "optimizer":
        pruned_state_is_empty(optimizer, model, rule, mask)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_unfrozen_means_that_both_move(optimizer, rule):
    model = sparse()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    mask = mask_of(model)
    weight = model.weight.detach().clone()
    resu.controller(model).resurrect(rule=rule, freeze_active=False).__enter__()
    train(model, optimizer)
    assert (model.weight[mask] != weight[mask]).all()
    moved = model.weight[~mask] != 0
    assert moved.all() if rule in MOVES_ALL else moved.any()
    if rule != "optimizer":
        pruned_state_is_empty(optimizer, model, rule, mask)


@pytest.mark.parametrize("freeze", [True, False])
def test_where_the_gradient_goes(freeze):
    model = sparse()
    mask = mask_of(model)
    resu.controller(model).resurrect(freeze_active=freeze).__enter__()
    backward(model, 0)
    assert (model.weight.grad[~mask] != 0).all()
    assert (model.weight.grad[mask] == 0).all() if freeze else (model.weight.grad[mask] != 0).all()


def test_a_weight_without_pruned_places_is_frozen_as_well():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    resu.sparsify(model, 0.5, overrides={"1": 0.0}, compile=False)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for phase in ("sparse", "resu"):
        if phase == "resu":
            before = model[1].weight.detach().clone()
            resu.controller(model).resurrect(freeze_active=True).__enter__()
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(3, 6)).sum().backward()
            optimizer.step()
    assert torch.equal(model[1].weight, before)


def test_weights_without_a_mask_train_as_always():
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    resu.controller(model).resurrect(freeze_active=True).__enter__()
    backward(model, 0)
    expected = model.bias.detach() - 0.1 * model.bias.grad
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), expected)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_is_given_back_as_it_was(rule, freeze):
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    resu.controller(model).resurrect(rule=rule, freeze_active=freeze).__enter__()
    backward(model, 0)
    grad = model.weight.grad
    before = grad.clone()
    optimizer.step()
    assert model.weight.grad is grad
    assert torch.equal(grad, before)


def test_without_a_gradient_nothing_moves():
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    resu.controller(model).resurrect(init="normal").__enter__()
    before = model.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight, before)


# -- the rules, against plain arithmetic -------------------------------------------------------
class PlainAdam:
    """Kingma and Ba, one number at a time."""

    def __init__(self, betas, eps):
        self.betas, self.eps, self.step, self.m, self.v = betas, eps, 0, 0.0, 0.0

    def __call__(self, theta, grad, lr):
        b1, b2 = self.betas
        self.step += 1
        self.m = b1 * self.m + (1 - b1) * grad
        self.v = b2 * self.v + (1 - b2) * grad**2
        m = self.m / (1 - b1**self.step)
        v = self.v / (1 - b2**self.step)
        return theta - lr * m / (math.sqrt(v) + self.eps)


class PlainSgd:
    def __init__(self, momentum):
        self.momentum, self.buffer = momentum, 0.0

    def __call__(self, theta, grad, lr):
        self.buffer = self.momentum * self.buffer + grad
        return theta - lr * self.buffer


CASES = {
    "adam": ({"rule": "adam"}, lambda: PlainAdam((0.9, 0.95), 1e-8)),
    "adam betas": (
        {"rule": "adam", "betas": (0.5, 0.9), "adam_eps": 1e-3},
        lambda: PlainAdam((0.5, 0.9), 1e-3),
    ),
    "sgd": ({"rule": "sgd"}, lambda: PlainSgd(0.0)),
    "momentum": ({"rule": "momentum", "momentum": 0.8}, lambda: PlainSgd(0.8)),
}


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_each_rule_equals_plain_float64_step_for_step(case, freeze):
    arguments, plain = CASES[case]
    model = sparse().double()
    optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    mask = mask_of(model)
    places = [tuple(i) for i in (~mask).nonzero().tolist()]
    rules = {place: plain() for place in places}
    resu.controller(model).resurrect(
        lr=0.02, freeze_active=freeze, init="normal", **arguments
    ).__enter__()
    theta = {place: model.weight[place].item() for place in places}
    for step in range(6):
        backward(model, step)
        for place in places:
            theta[place] = rules[place](theta[place], model.weight.grad[place].item(), 0.02)
        optimizer.step()
        for place in places:
            assert model.weight[place].item() == pytest.approx(theta[place], rel=1e-12, abs=1e-14)


def test_unfrozen_active_weights_move_as_if_theta_were_not_the_optimizers():
    model = sparse().double()
    optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    mask = mask_of(model)
    alone = model.weight.detach()[mask].clone().requires_grad_()
    reference = optim.AdamW([alone], lr=0.05, weight_decay=0.1)
    resu.controller(model).resurrect(lr=0.02, freeze_active=False, init="normal").__enter__()
    for step in range(5):
        backward(model, step)
        alone.grad = model.weight.grad[mask]
        optimizer.step()
        reference.step()
        torch.testing.assert_close(model.weight.detach()[mask], alone.detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_rule_trains_all_as_a_plain_model(optimizer):
    model = sparse()
    plain = nn.Linear(6, 4)
    plain.load_state_dict(model.state_dict())
    first, second = (OPTIMIZERS[optimizer](m.parameters()) for m in (model, plain))
    resu.controller(model).resurrect(rule="optimizer").__enter__()
    train(model, first)
    train(plain, second)
    assert torch.equal(model.weight, plain.weight)


def test_maximize_climbs():
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.1, maximize=True)
    resu.controller(model).resurrect(rule="sgd").__enter__()
    backward(model, 0)
    expected = (model.weight + 0.1 * model.weight.grad).detach()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), expected)


# -- the learning rate -------------------------------------------------------------------------
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_none_follows_the_scheduler(tensor_lr):
    model = sparse()
    mask = mask_of(model)
    lr = torch.tensor(0.5) if tensor_lr else 0.5
    optimizer = optim.SGD(model.parameters(), lr=lr)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    resu.controller(model).resurrect(rule="sgd").__enter__()
    for step, lr in enumerate([0.5, 0.05, 0.005]):
        before = model.weight.detach().clone()
        backward(model, step)
        expected = before - lr * model.weight.grad
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(model.weight.detach()[~mask], expected[~mask])


def test_each_parameter_group_has_its_own():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    resu.sparsify(model, 0.5, compile=False)
    optimizer = optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[1].parameters(), "lr": 1.0}]
    )
    controller = resu.controller(model)
    controller.resurrect(rule="adam").__enter__()
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert (model[0].weight[~controller.masks["0.weight"]] == 0).all()
    assert (model[1].weight[~controller.masks["1.weight"]] != 0).any()


def test_an_optimizer_without_lr_needs_a_number():
    class Nameless(optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, _closure=None):
            pass

    model = sparse()
    optimizer = Nameless(model.parameters())
    controller = resu.controller(model)
    controller.resurrect(rule="adam").__enter__()
    backward(model, 0)
    with pytest.raises(
        ArgumentError, match=r"^lr: expected a number, because Nameless has no 'lr'"
    ):
        optimizer.step()
    controller.abandon()
    controller.resurrect(lr=0.1).__enter__()
    backward(model, 0)
    optimizer.step()
    assert (model.weight[~mask_of(model)] != 0).all()


# -- the first theta ---------------------------------------------------------------------------
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("init", ["normal", "uniform"])
@pytest.mark.parametrize("eps", [0.1, 0.7])
def test_init_has_the_spread_it_says(init, eps, sparsity):
    model = resu.sparsify(nn.Linear(300, 200), sparsity, compile=False)
    mask = mask_of(model)
    sigma = model.weight[mask].std(unbiased=False).item()
    before = model.weight.detach().clone()
    resu.controller(model).resurrect(init=init, eps=eps).__enter__()
    theta = model.weight.detach()[~mask]
    assert torch.equal(model.weight[mask], before[mask])
    expected = eps * sigma if init == "normal" else eps * sigma / math.sqrt(3)
    assert theta.mean().item() == pytest.approx(0, abs=4 * expected / math.sqrt(len(theta)))
    assert theta.std().item() == pytest.approx(expected, rel=0.03)
    if init == "uniform":
        assert theta.abs().max().item() <= eps * sigma * (1 + 1e-6)
        assert theta.abs().max().item() > 0.99 * eps * sigma


def test_init_zero_changes_nothing():
    model = sparse()
    before = model.weight.detach().clone()
    resu.controller(model).resurrect(init="zero").__enter__()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_init_depends_on_the_controllers_seed_alone(init):
    def theta(seed):
        model = sparse(seed=3)
        controller = resu.controller(model)
        controller.generator.manual_seed(seed)
        torch.rand(seed)
        controller.resurrect(init=init).__enter__()
        return model.weight.detach()

    assert torch.equal(theta(1), theta(1))
    assert not torch.equal(theta(1), theta(2))


@pytest.mark.parametrize("sparsity", [0.0, 0.97])
@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_init_of_a_weight_with_no_or_all_places_pruned(init, sparsity):
    model = sparse(sparsity)
    before = model.weight.detach().clone()
    with resu.controller(model).resurrect(init=init):
        assert torch.isfinite(model.weight).all()
    assert torch.equal(model.weight, before)


# -- loss scaling ------------------------------------------------------------------------------
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_changes_nothing_but_the_skips(fused, rule, freeze, unscale):
    def run(scaled):
        model = sparse()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        resu.controller(model).resurrect(rule=rule, freeze_active=freeze).__enter__()
        for step in range(4):
            overflow = step == 2
            if overflow and not scaled:
                continue
            optimizer.zero_grad()
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().sum() * (math.inf if overflow else 1.0)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            before = model.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            if overflow:
                assert torch.equal(model.weight, before)
        return model.weight.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-5, atol=1e-6)


# -- steps of other shapes ---------------------------------------------------------------------
class Nested(optim.SGD):
    """Its step calls the real one, so that the hooks run twice."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_nested_step_or_a_closure_moves_theta_once(rule, freeze, with_closure):
    optim.SGD(nn.Linear(1, 1).parameters())  # its step has hooks of its own then

    def run(optimizer_class, closure):
        model = sparse()
        optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9)
        resu.controller(model).resurrect(rule=rule, freeze_active=freeze).__enter__()
        for step in range(3):
            if closure:
                optimizer.step(lambda step=step: backward(model, step))
            else:
                backward(model, step)
                optimizer.step()
        return model.weight.detach()

    assert torch.equal(run(Nested, with_closure), run(optim.SGD, False))


class Fails(optim.SGD):
    """Raises in its third step."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("out of memory")
        return super().step(closure)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("look", ["forward", "state_dict", "commit"])
def test_a_step_that_raises_loses_no_theta(rule, freeze, look):
    model = sparse()
    controller = resu.controller(model)
    mask = mask_of(model)
    optimizer = Fails(model.parameters(), lr=0.1)
    controller.resurrect(rule=rule, freeze_active=freeze).__enter__()
    train(model, optimizer, 2)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model, optimizer, 1, start=2)
    if look == "forward":
        optimizer.zero_grad()
        model(torch.randn(2, 6))
        assert model.weight.grad is None
    elif look == "state_dict":
        controller.state_dict()
    else:
        controller.commit(strategy="merge")
    assert torch.equal(model.weight[mask], before[mask])
    moved = model.weight.detach()[~mask] != before[~mask]
    assert moved.any() == (rule != "optimizer")
    if rule in MOVES_ALL:
        assert moved.all() == (rule != "optimizer")


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_raised_and_is_tried_again(rule, freeze):
    def run(optimizer_class):
        model = sparse()
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        resu.controller(model).resurrect(rule=rule, freeze_active=freeze).__enter__()
        for step in range(4):
            backward(model, step)
            try:
                optimizer.step()
            except RuntimeError:
                optimizer.step()
        model(torch.randn(2, 6))
        return model.weight.detach()

    assert torch.equal(run(Fails), run(optim.SGD))


def test_two_optimizers_each_move_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    resu.sparsify(model, 0.5, compile=False)
    controller = resu.controller(model)
    optimizers = [optim.Adam(layer.parameters(), lr=0.1) for layer in model]
    controller.resurrect().__enter__()
    model(torch.randn(3, 4)).sum().backward()
    optimizers[1].step()
    assert (model[0].weight[~controller.masks["0.weight"]] == 0).all()
    assert (model[1].weight[~controller.masks["1.weight"]] != 0).all()
    optimizers[0].step()
    assert (model[0].weight[~controller.masks["0.weight"]] != 0).all()


def test_momentum_from_before_sparsify_does_not_reach_theta():
    model = nn.Linear(6, 4)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    resu.sparsify(model, 0.5, compile=False)
    mask = mask_of(model)
    resu.controller(model).resurrect(rule="optimizer").__enter__()
    backward(model, 9)
    expected = -0.1 * model.weight.grad[~mask]
    optimizer.step()
    torch.testing.assert_close(model.weight.detach()[~mask], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_of_dtype_within_the_phase(dtype):
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    resu.controller(model).resurrect(lr=0.1).__enter__()
    train(model, optimizer, 1)
    model.to(dtype)
    train(model, optimizer, 1, start=1)
    assert model.weight.dtype is dtype
    assert torch.isfinite(model.weight).all()
