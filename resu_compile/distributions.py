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
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    return _in_proportion(shapes, sparsity, raw)


def er(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Erdos-Renyi: a weight's density is proportional to ``(n_in + n_out) / (n_in n_out)``.

    The two are the first two dimensions of a weight, so that the size of a kernel has no part in
    it; for a matrix this is ``erk``. For stacked matrices ``[experts, out, in]`` take ``erk``.

    Args:
        shapes: weight name -> shape.
        sparsity: overall sparsity, in [0, 1).

    Returns:
        weight name -> sparsity in [0, 1).

    Source: Mocanu et al. 2018, https://arxiv.org/abs/1707.04780; the form with an exact overall
    sparsity is that of google-research/rigl, rigl/sparse_utils.py.
    """
    raw = {name: sum(shape[:2]) / math.prod(shape[:2]) for name, shape in shapes.items()}
    return _in_proportion(shapes, sparsity, raw)


def _in_proportion(shapes: Shapes, sparsity: float, raw: Mapping[str, float]) -> dict[str, float]:
    """Sparsities whose densities are ``eps * raw``, where that is at most 1; else 0."""
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    zeros = {name: math.floor(sparsity * numel[name]) for name in shapes}
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
    "er": er,
    "erk": erk,
}
