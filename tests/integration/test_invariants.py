"""Pruned weights and their optimizer state are exactly 0, whatever an unmodified loop does.

Every loop runs twice: on a sparsified model, and on a plain model that is masked by hand after each
step. Both must end in the same bits.
"""

import copy
import math

import pytest
import torch
from torch import nn, optim

import resu_compile as resu


class Net(nn.Module):
    """A convolution, a matrix and a row, with a norm and biases that have no mask."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(24, 5)
        self.row = nn.Linear(5, 1)

    def forward(self, x):
        return self.row(self.fc(self.norm(self.conv(x)).flatten(1)).tanh())


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 8, generator=generator), torch.randn(4, 1, generator=generator)


def loss_of(model, seed):
    x, y = batch(seed)
    return (model(x) - y).square().mean()


def matrices(parameters):
    return [p for p in parameters if p.dim() == 2]


OPTIMIZERS = {
    "SGD": (optim.SGD, {"lr": 0.1}),
    "SGD momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "SGD nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "SGD maximize": (optim.SGD, {"lr": 0.01, "momentum": 0.9, "maximize": True}),
    "Adam": (optim.Adam, {"lr": 0.05}),
    "Adam amsgrad": (optim.Adam, {"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}),
    "AdamW": (optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "AdamW with masks": (resu.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "SGD with masks": (resu.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "RMSprop": (optim.RMSprop, {"lr": 0.05, "weight_decay": 0.1}),
    "RMSprop all": (optim.RMSprop, {"lr": 0.05, "momentum": 0.9, "centered": True}),
    "Adafactor": (optim.Adafactor, {"lr": 0.05, "weight_decay": 0.1}),
    "Adagrad": (optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "Adadelta": (optim.Adadelta, {"weight_decay": 0.1}),
    "Adamax": (optim.Adamax, {"weight_decay": 0.1}),
    "NAdam": (optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": (optim.RAdam, {"weight_decay": 0.1}),
    "ASGD": (optim.ASGD, {"weight_decay": 0.1}),
    "Rprop": (optim.Rprop, {}),
    "Muon": (optim.Muon, {"weight_decay": 0.1}),
}
FORMS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def build(name, form, model):
    """The optimizer, or a skip where PyTorch does not offer this form on the CPU."""
    optimizer_class, arguments = OPTIMIZERS[name]
    parameters = model.parameters()
    if name == "Muon":
        parameters = matrices(parameters)
        if form != "loop":
            pytest.skip("Muon has one form")
        return optimizer_class(parameters, **arguments)
    try:
        return optimizer_class(parameters, **arguments, **FORMS[form])
    except (TypeError, RuntimeError) as error:
        pytest.skip(f"{name} has no {form} form: {error}")


class ByHand:
    """The reference: masks applied by hand before and after each step of a plain model."""

    def __init__(self, model, masks):
        self.masks = {model.get_parameter(name): mask for name, mask in masks.items()}

    def gradients(self):
        for parameter, mask in self.masks.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~mask, 0)

    @torch.no_grad()
    def after(self, optimizer):
        for parameter, mask in self.masks.items():
            parameter.masked_fill_(~mask, 0)
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(~mask, 0)


def check_zeros(model, optimizer):
    for name, weight in resu.controller(model).weights.items():
        hole = ~weight.mask
        parameter = weight.parameter
        assert (parameter.view(torch.int32)[hole] == 0).all(), f"{name} is not +0"
        assert (parameter[~hole] != 0).all(), name
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                assert (value[hole] == 0).all(), f"{key} of {name} is not 0"


def pair(sparsity=0.6):
    """A sparsified model, and a plain one with the same values and masks by hand."""
    model = resu.sparsify(Net(), sparsity, compile=False)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    return model, plain, ByHand(plain, resu.controller(model).masks)


def same(model, plain):
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


# -- the ways to write a training step ---------------------------------------------------------
def plain_step(model, optimizer, seed, by_hand):
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    by_hand()
    optimizer.step()


def zeroed_in_place(model, optimizer, seed, by_hand):
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, seed).backward()
    by_hand()
    optimizer.step()


def accumulated(model, optimizer, seed, by_hand):
    optimizer.zero_grad()
    for part in range(3):
        (loss_of(model, 10 * seed + part) / 3).backward()
    by_hand()
    optimizer.step()


def clipped(model, optimizer, seed, by_hand):
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    by_hand()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm > 0.1
    torch.testing.assert_close(expected, torch.tensor(0.1), rtol=1e-4, atol=0)
    optimizer.step()
    return norm


def noisy(model, optimizer, seed, by_hand):
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad.add_(torch.randn(parameter.shape, generator=generator))
    by_hand()
    optimizer.step()


def assigned(model, optimizer, seed, by_hand):
    grads = torch.autograd.grad(loss_of(model, seed), list(model.parameters()))
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad + 0.1
    by_hand()
    optimizer.step()


def with_closure(model, optimizer, seed, by_hand):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        by_hand()
        return loss

    return optimizer.step(closure)


def eval_and_reload(model, optimizer, seed, by_hand):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        loss_of(model.eval(), seed)
    model.train()
    plain_step(model, optimizer, seed, by_hand)


LOOPS = [
    plain_step,
    zeroed_in_place,
    accumulated,
    clipped,
    noisy,
    assigned,
    with_closure,
    eval_and_reload,
]


def run_both(loop, make_optimizer, steps=4):
    model, plain, hand = pair()
    ours, reference = make_optimizer(model), make_optimizer(plain)
    for seed in range(steps):
        first = loop(model, ours, seed, lambda: None)
        check_zeros(model, ours)
        second = loop(plain, reference, seed, hand.gradients)
        hand.after(reference)
        if isinstance(first, torch.Tensor):
            assert torch.equal(first, second)
        same(model, plain)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name, form):
    run_both(plain_step, lambda model: build(name, form, model))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", ["SGD nesterov", "AdamW", "Adafactor", "Rprop"])
@pytest.mark.parametrize("form", ["loop", "foreach", "fused"])
def test_every_loop(name, form, loop):
    run_both(loop, lambda model: build(name, form, model))


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW"])
def test_grad_scaler_with_skipped_steps(name, form, unscale):
    def make(model):
        return build(name, form, model)

    scalers = {}

    def loop(model, optimizer, seed, by_hand):
        scaler = scalers.setdefault(id(model), torch.amp.GradScaler("cpu", init_scale=256.0))
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        overflow = seed in (1, 2)
        scaler.scale(loss_of(model, seed) * (math.inf if overflow else 1)).backward()
        by_hand()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))

    run_both(loop, make, steps=5)
    assert all(scaler.get_scale() == 64.0 for scaler in scalers.values())


def test_autocast():
    def loop(model, optimizer, seed, by_hand):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, seed)
        optimizer.zero_grad()
        loss.backward()
        by_hand()
        optimizer.step()

    run_both(loop, lambda model: optim.AdamW(model.parameters(), weight_decay=0.1))


def test_an_optimizer_from_before_sparsify_with_a_state():
    model = Net()
    optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for seed in range(3):
        plain_step(model, optimizer, seed, lambda: None)
    plain = copy.deepcopy(model)
    reference = optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resu.sparsify(model, 0.6, compile=False)
    hand = ByHand(plain, resu.controller(model).masks)
    hand.after(reference)
    for seed in range(3, 6):
        plain_step(model, optimizer, seed, lambda: None)
        check_zeros(model, optimizer)
        plain_step(plain, reference, seed, hand.gradients)
        hand.after(reference)
    same(model, plain)


def test_several_optimizers_and_parameter_groups():
    def groups(parameters):
        parameters = list(parameters)
        return [
            {"params": matrices(parameters), "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0, "lr": 0.2},
        ]

    model, plain, hand = pair()
    pairs = [
        (optim.AdamW(groups(m.parameters())), optim.SGD(m.conv.parameters(), 0.1, momentum=0.9))
        for m in (model, plain)
    ]
    for seed in range(4):
        for m, optimizers in zip((model, plain), pairs, strict=True):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(m, seed).backward()
            if m is plain:
                hand.gradients()
            for optimizer in optimizers:
                optimizer.step()
                if m is plain:
                    hand.after(optimizer)
    for optimizer in pairs[0]:
        check_zeros(model, optimizer)
    same(model, plain)


def test_a_scheduler_changes_nothing():
    def loop(model, optimizer, seed, by_hand):
        if seed == 0:
            optimizer.scheduler = optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        plain_step(model, optimizer, seed, by_hand)
        optimizer.scheduler.step()

    run_both(loop, lambda model: optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def test_the_total_norm_is_that_of_the_masked_gradients():
    model = resu.sparsify(Net(), 0.6, compile=False)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    for m in (model, plain):
        loss_of(m, 0).backward()
    dense = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    ByHand(plain, resu.controller(model).masks).gradients()
    masked = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    assert dense > masked
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e9) == masked


def test_hooks_on_accumulation_see_masked_gradients():
    """DistributedDataParallel hooks the accumulation nodes: what it reduces is masked."""
    model = Net()
    seen = {}
    nodes = []
    for name, parameter in model.named_parameters():
        node = parameter.view_as(parameter).grad_fn.next_functions[0][0]
        node.register_hook(lambda *_, name=name, p=parameter: seen.update({name: p.grad.clone()}))
        nodes.append(node)
    resu.sparsify(model, 0.6, compile=False)
    loss_of(model, 0).backward()
    assert set(seen) == {name for name, _ in model.named_parameters()}
    for name, mask in resu.controller(model).masks.items():
        assert (seen[name][~mask] == 0).all()
        assert (seen[name][mask] != 0).any()


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_distributed_data_parallel(bucket_view, outside):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def own_gradients(_state, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    # one rank without threads of its own: two ranks are in test_data_parallel.py
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        model, plain, hand = pair()
        if outside:  # sparsify what DDP has wrapped
            net = Net()
            net.load_state_dict(plain.state_dict())
            wrapped = DistributedDataParallel(net, gradient_as_bucket_view=bucket_view)
            model = resu.sparsify(wrapped, 0.6, compile=False)
        else:
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
        wrapped.register_comm_hook(None, own_gradients)
        ours, reference = (
            optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1) for m in (wrapped, plain)
        )
        for seed in range(3):
            plain_step(wrapped, ours, seed, lambda: None)
            plain_step(plain, reference, seed, hand.gradients)
            hand.after(reference)
            check_zeros(model, ours)
        same(wrapped, plain)
    finally:
        dist.destroy_process_group()


def test_a_frozen_parameter_can_be_pruned():
    model = Net()
    model.fc.weight.requires_grad_(False)
    resu.sparsify(model, 0.6, compile=False)
    mask = resu.controller(model).masks["fc.weight"]
    before = model.fc.weight.clone()
    assert (before[~mask] == 0).all()
    optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    plain_step(model, optimizer, 0, lambda: None)
    assert torch.equal(model.fc.weight, before)
    model.fc.weight.requires_grad_(True)
    for seed in range(3):
        plain_step(model, optimizer, seed, lambda: None)
        check_zeros(model, optimizer)


def test_tied_weights_are_masked_once():
    class TiedNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    model = resu.sparsify(TiedNet(), 0.5, tied="mask_all", compile=False)
    (weight,) = resu.controller(model).weights.values()
    assert weight.nnz == 18
    optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        check_zeros(model, optimizer)
    assert model.a.weight is model.b.weight
    assert list(model.state_dict()) == list(TiedNet().state_dict())


def test_weight_norm_parametrizations_stay_sparse():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 2))
    resu.sparsify(model, 0.5, exclude="*original0", compile=False)
    name = "0.parametrizations.weight.original1"
    mask = resu.controller(model).masks[name]
    optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    assert (model[0].weight[~mask] == 0).all()


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
@pytest.mark.parametrize("name", ["SGD nesterov", "AdamW"])
def test_another_compiler_ends_in_the_same_weights(name, phase):
    def run(compiled):
        torch.manual_seed(0)
        model = resu.sparsify(Net(), 0.6, compile=False)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        controller = resu.controller(model)
        optimizer = build(name, "loop", model)
        if phase == "resu":
            controller.resurrect(lr=0.01, freeze_active=True).__enter__()
        else:
            controller.set_phase(phase)
        for seed in range(3):
            plain_step(call, optimizer, seed, lambda: None)
        return model

    same(run(True), run(False))
