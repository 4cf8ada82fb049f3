"""Wanda++: Wanda with gradients of each block, and a few steps that repair the block's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resu_compile.errors import check_integer, check_number
from resu_compile.methods.registry import check_blocks, register_method

if TYPE_CHECKING:
    from resu_compile.calibration.block import Block, Call


@register_method("wanda++")
@dataclass(frozen=True)
class WandaPlus:
    """Prune by regional gradient and input norm; then train each block towards its dense output.

        S_ij = (alpha * G_ij + sqrt(s_j)) * |W_ij|         s_j as in Wanda
        G    = sqrt(mean over n of g_n^2)                  g_n = d ||block(X_n)||_2 / d W

    G and s_j are taken once, of the dense block. Then ``rounds`` times: prune by S, and one RMSprop
    step for each of ``samples`` calls on ||block_pruned(X) - block_dense(X)||^2, its mean over the
    entries. At last, prune by S. Rows, ties and patterns are those of Wanda. Only the weights that
    are pruned are trained, the pruned places among them, in float32; the kept values therefore
    differ from those before.

    X_n is one batch of calibration data as the block gets it; with batches of one it is one sample,
    as published. The calls of a round are drawn by the controller's generator, as many as make up
    ``samples``.

    Attributes:
        alpha: weight of the gradient, >= 0.
        rounds: how often pruning and training alternate; 0 prunes by S and trains nothing.
        samples: samples that each round trains on, >= 1.
        lr: learning rate of RMSprop, >= 0.
        blocks: as in ``Wanda``.

    Source: Yang et al. 2025, https://arxiv.org/abs/2503.04992
    """

    alpha: float = 100.0
    rounds: int = 5
    samples: int = 32
    lr: float = 3e-7
    blocks: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        check_number(self.alpha, name="alpha", minimum=0.0, expected="a number >= 0")
        check_integer(self.rounds, name="rounds")
        check_integer(self.samples, name="samples", minimum=1)
        check_number(self.lr, name="lr", minimum=0.0, expected="a number >= 0")
        object.__setattr__(self, "blocks", check_blocks(self.blocks))

    def prune(self, block: Block) -> dict[str, Tensor]:
        """Masks of the weights of ``block``; its weights get the trained values."""
        statistics = block.statistics()
        layouts = {name: found.layout for name, found in statistics.items()}
        calls = block.calls()
        gradients = regional_gradients(block, calls)
        merit = {
            name: self.alpha * gradients[name] + found.norm for name, found in statistics.items()
        }
        values = {name: weight.detach().float().clone() for name, weight in block.weights.items()}
        optimizer = torch.optim.RMSprop(list(values.values()), lr=self.lr)
        for _ in range(self.rounds):
            masks = block.lowest_masks(_scores(values, merit), layouts)
            for name, value in values.items():
                value.masked_fill_(~masks[name], 0.0)
            for call in self._draw(calls, block.request.generator):
                _step(block, call, values, optimizer)
        if self.rounds:
            block.set_values(values)
        return block.lowest_masks(_scores(values, merit), layouts)

    def _draw(self, calls: Sequence[Call], generator: torch.Generator) -> list[Call]:
        """Calls in random order, as many as make up ``samples``, or all."""
        drawn: list[Call] = []
        for index in torch.randperm(len(calls), generator=generator).tolist():
            if sum(call.samples for call in drawn) >= self.samples:
                break
            drawn.append(calls[index])
        return drawn


def regional_gradients(block: Block, calls: Sequence[Call]) -> dict[str, Tensor]:
    """Parameter name -> G, float32: root of the mean squared gradient of the output's norm."""
    sums = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in block.weights.items()}
    for call in calls:
        values = {name: w.detach().requires_grad_() for name, w in block.weights.items()}
        with torch.enable_grad():
            loss = torch.linalg.vector_norm(block.forward(call, values).float())
            found = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
        for name, gradient in zip(values, found, strict=True):
            if gradient is not None:  # an expert that this call did not use
                sums[name] += gradient.float().square()
    return {name: (total / len(calls)).sqrt() for name, total in sums.items()}


def _scores(values: Mapping[str, Tensor], merit: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().abs() * merit[name] for name, value in values.items()}


def _step(
    block: Block, call: Call, values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """One step towards the output of the dense block, whose weights still are in the module."""
    target = block.forward(call)
    with torch.enable_grad():
        trained = {
            name: value.requires_grad_().to(block.weights[name].dtype)
            for name, value in values.items()
        }
        loss = (block.forward(call, trained).float() - target.float()).square().mean()
        leaves = list(values.values())
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
    for value, gradient in zip(leaves, found, strict=True):
        value.requires_grad_(False)
        value.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
