"""How one overall sparsity is spread over the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The same sparsity for every weight."""
    return dict.fromkeys(shapes, sparsity)


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel: a weight's density is proportional to ``sum(shape) / prod(shape)``.

    Weights whose density would pass 1 become dense and the rest is solved again, so that the
    overall sparsity is the one asked for (up to the rounding of counts).

    Args:
        shapes: weight name -> shape.
        sparsity: overall sparsity, in [0, 1).

    Returns:
        weight name -> sparsity in [0, 1).

    Source: Evci et al. 2020, https://arxiv.org/abs/1911.11134; google-research/rigl,
    rigl/sparse_utils.py.
    """
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    zeros = {name: math.floor(sparsity * numel[name]) for name in shapes}
    raw = {name: sum(shape) / numel[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        free = [name for name in shapes if name not in dense]
        if not free:
            return dict.fromkeys(shapes, 0.0)
        ones = sum(numel[name] - zeros[name] for name in free)
        owed = sum(zeros[name] for name in dense)
        eps = (ones - owed) / sum(raw[name] * numel[name] for name in free)
        over = [name for name in free if eps * raw[name] > 1.0]
        if not over:
            density = {name: max(eps * raw[name], 0.0) for name in free}
            return {name: 1.0 - density[name] if name in density else 0.0 for name in shapes}
        worst = max(raw[name] for name in over)
        dense.update(name for name in over if raw[name] == worst)


DISTRIBUTIONS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {
    "uniform": uniform,
    "erk": erk,
}
