"""Methods against loops in plain PyTorch with all that a loop has beside the method.

AdamW written out, decoupled weight decay, two batches a step, clipping by the norm of all
gradients, convolutions and batch norm; the other tests take SGD and a small perceptron.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from resu_compile.training import SparseTraining, Trainer, TrainingConfig
from tests.methods.runs import assert_sparse

NAMES = ("first.weight", "second.weight", "head.weight")
STEPS, SPARSITY = 24, 0.8
LR, DECAY, BETA1, BETA2, EPS, CLIP = 0.02, 0.1, 0.9, 0.999, 1e-8, 0.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


def make_net() -> Net:
    torch.manual_seed(3)
    return Net()


def make_images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 3, 8, 8, generator=generator), torch.randint(5, (6,), generator=generator))
        for _ in range(7)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


class Loop:
    """AdamW and gradients by hand; each loop below says what its method does with them."""

    def __init__(self, first_masks: dict[str, Tensor]) -> None:
        self.net = make_net()
        self.batches = make_images()
        self.parameters = dict(self.net.named_parameters())
        self.weights = {name: self.parameters[name] for name in NAMES}
        self.masks = {name: mask.clone() for name, mask in first_masks.items()}
        self.mean = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.square = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.count = 0

    def gradients(self, step: int) -> dict[str, Tensor]:
        self.net.zero_grad()
        for index in (2 * step, 2 * step + 1):
            (loss_of(self.net, self.batches[index % 7]) / 2).backward()
        return {name: p.grad.clone() for name, p in self.parameters.items()}

    def update(self, grads: dict[str, Tensor]) -> None:
        self.count += 1
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
        factor = min(1.0, CLIP / (norm + 1e-6))
        for name, parameter in self.parameters.items():
            grad = grads[name] * factor
            mean, square = self.mean[name], self.square[name]
            mean.mul_(BETA1).add_(grad, alpha=1 - BETA1)
            square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
            size = (square / (1 - BETA2**self.count)).sqrt() + EPS
            parameter.data.mul_(1 - LR * DECAY).sub_(LR * mean / (1 - BETA1**self.count) / size)

    def keep_state(self, places: dict[str, Tensor]) -> None:
        for name in NAMES:
            self.mean[name].mul_(places[name])
            self.square[name].mul_(places[name])

    def masked(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: g * self.masks[n] if n in NAMES else g for n, g in grads.items()}

    def largest(self, values: dict[str, Tensor], sparsity: float = SPARSITY) -> dict[str, Tensor]:
        return {n: top(v.abs(), int((1 - sparsity) * v.numel())) for n, v in values.items()}

    def values(self) -> dict[str, Tensor]:
        return {name: weight.data.clone() for name, weight in self.weights.items()}

    def put(self, values: dict[str, Tensor], masks: dict[str, Tensor] | None = None) -> None:
        for name, weight in self.weights.items():
            weight.data = values[name] * (1 if masks is None else masks[name])


def top(score: Tensor, count: int) -> Tensor:
    kept = torch.zeros(score.numel(), dtype=torch.bool)
    kept[score.flatten().argsort(descending=True, stable=True)[:count]] = True
    return kept.view_as(score)


# -- the methods ---------------------------------------------------------------------------------
def plain_sr_ste(loop: Loop) -> None:
    """decay 0.01."""
    for step in range(STEPS):
        full = loop.values()
        masks = loop.largest(full)
        loop.put(full, masks)
        grads = loop.gradients(step)
        for name in NAMES:
            grads[name] += 0.01 * ~masks[name] * full[name]
        loop.put(full)
        loop.update(grads)
    loop.masks = loop.largest(loop.values())
    loop.put(loop.values(), loop.masks)
    loop.keep_state(loop.masks)


def plain_top_kast(loop: Loop) -> None:
    """every 5 steps, penalty 0.01, B twice as large as A."""
    full = loop.values()
    for step in range(STEPS):
        if step % 5 == 0:
            forward = loop.largest(full)
            backward = {n: top(v.abs(), 2 * int(forward[n].sum())) for n, v in full.items()}
            loop.keep_state(backward)
        loop.put(full, forward)
        grads = loop.gradients(step)
        for name, value in full.items():
            density = int(forward[name].sum()) / value.numel()
            penalty = 0.01 * torch.where(forward[name], 1.0, 1 / density) * value
            grads[name] = (grads[name] + penalty) * backward[name]
        loop.put(full)
        loop.update(grads)
        full = {n: torch.where(backward[n], loop.weights[n].data, v) for n, v in full.items()}
    loop.masks = forward
    loop.put(full, forward)
    loop.keep_state(forward)


def plain_acdc(loop: Loop) -> None:
    """Dense to 4, sparse to 7, dense to 10, sparse to 13, dense to 19, sparse to 24."""
    sparse = {*range(4, 7), *range(10, 13), *range(19, 24)}
    for step in range(STEPS):
        if step in sparse and step - 1 not in sparse:
            loop.masks = loop.largest(loop.values())
            loop.put(loop.values(), loop.masks)
            loop.keep_state(loop.masks)
        grads = loop.gradients(step)
        loop.update(loop.masked(grads) if step in sparse else grads)


def plain_gmp(loop: Loop) -> None:
    """Every 3 steps from 3 to 18; resting weights rank with the active."""
    rest = loop.values()
    for step in range(STEPS):
        if 3 < step <= 18 and step % 3 == 0:
            sparsity = SPARSITY - SPARSITY * (1 - (step - 3) / 15) ** 3
            values = loop.values()
            rest = {n: torch.where(loop.masks[n], v, rest[n]) for n, v in values.items()}
            masks = loop.largest(rest, sparsity)
            loop.keep_state({n: loop.masks[n] & masks[n] for n in NAMES})
            loop.masks = masks
            loop.put(rest, masks)
        loop.update(loop.masked(loop.gradients(step)))


def plain_rigl(loop: Loop) -> None:
    """Every 4 steps up to 18, fraction 0.5, in place of the step."""
    loop.put(loop.values(), loop.masks)
    for step in range(STEPS):
        grads = loop.gradients(step)
        if step == 0 or step % 4 or step >= 18:
            loop.update(loop.masked(grads))
            continue
        stay = {}
        for name, mask in loop.masks.items():
            count = int(mask.sum())
            dropped = int(0.25 * (1 + math.cos(math.pi * step / 18)) * count)
            kept = top(loop.weights[name].data.abs().where(mask, -1.0), count - dropped)
            grown = top(grads[name].abs().where(~kept, -1.0), dropped)
            stay[name], loop.masks[name] = mask & (kept | grown), kept | grown
        loop.put(loop.values(), stay)
        loop.keep_state(stay)


LOOPS = {
    "sr_ste": (plain_sr_ste, {"decay": 0.01}),
    "top_kast": (plain_top_kast, {"every": 5, "penalty": 0.01}),
    "acdc": (plain_acdc, {"warmup": 4, "phase": 3, "last_dense": 3, "last_sparse": 5}),
    "gmp": (plain_gmp, {"every": 3, "start": 3, "stop": 18}),
    "rigl": (plain_rigl, {"every": 4, "fraction": 0.5}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_equals_the_plain_loop(name):
    plain, options = LOOPS[name]
    config = TrainingConfig(
        method=name,
        method_options=options,
        steps=STEPS,
        sparsity=SPARSITY,
        distribution="uniform",
        accumulate=2,
        clip_norm=CLIP,
        compile=False,
    )
    loop = Loop(SparseTraining(make_net(), config).start().controller.masks)
    plain(loop)
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    trainer = Trainer(model, optimizer, loss_of, config)
    trainer.fit(make_images())
    for key, value in loop.net.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=2e-6)
    for key, mask in loop.masks.items():
        assert torch.equal(trainer.cycle.controller.masks[key], mask)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            optimizer.state[parameter]["exp_avg"], loop.mean[key], rtol=1e-3, atol=1e-6
        )
    assert_sparse(trainer.cycle, optimizer)
