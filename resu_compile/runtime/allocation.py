"""New masks for a set of weights: method, scope, distribution and overrides together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from resu_compile.config import SparsityConfig
from resu_compile.distributions import DISTRIBUTIONS
from resu_compile.errors import WeightError
from resu_compile.methods import get_method
from resu_compile.selection import NamedWeight, check_values, matches
from resu_compile.sparsity import global_topk_masks, keep_count, topk_mask


def new_masks(
    weights: Sequence[NamedWeight], config: SparsityConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Masks with exact counts, from the present values of ``weights``.

    Args:
        weights: the weights to prune, all with finite values.
        config: method, scope, distribution, overrides, min_density and sparsity are used.
        generator: the only source of randomness.

    Returns:
        parameter name -> bool mask, True = active.

    Raises:
        WeightError: a weight holds NaN or infinity, is on meta, or a method scored it NaN.
    """
    check_values(weights)
    if config.from_zeros:
        return {weight.name: weight.parameter.detach() != 0 for weight in weights}
    method = get_method(config.method)
    fixed = overridden(weights, config)
    free = [weight for weight in weights if weight.name not in fixed]
    keep = {w.name: keep_count(w.parameter.numel(), fixed[w.name]) for w in weights if w.name in fixed}
    scores = {weight.name: _score(method, weight, generator) for weight in weights}
    floors = {w.name: int(config.min_density * w.parameter.numel()) for w in free}
    masks: dict[str, Tensor] = {}
    if config.scope == "global" and free:
        total = keep_count(sum(w.parameter.numel() for w in free), config.sparsity)
        device = free[0].parameter.device  # one ranking needs one place
        ranked = {w.name: scores[w.name].to(device) for w in free}
        masks = global_topk_masks(ranked, total, floors)
    else:
        shapes = {w.name: tuple(w.parameter.shape) for w in free}
        per_weight = DISTRIBUTIONS[config.distribution](shapes, config.sparsity)
        for weight in free:
            count = keep_count(weight.parameter.numel(), per_weight[weight.name])
            uniform = config.distribution == "uniform"
            keep[weight.name] = count if uniform else max(count, floors[weight.name])
    for name, count in keep.items():
        masks[name] = topk_mask(scores[name], count)
    return {weight.name: masks[weight.name] for weight in weights}


def overridden(weights: Sequence[NamedWeight], config: SparsityConfig) -> Mapping[str, float]:
    """Sparsity of the weights that ``overrides`` names; the last match wins."""
    found = {}
    for weight in weights:
        for pattern, sparsity in config.overrides.items():
            if any(matches(pattern, name) for name in (weight.name, *weight.aliases)):
                found[weight.name] = float(sparsity)
    return found


def _score(method: object, weight: NamedWeight, generator: torch.Generator) -> Tensor:
    with torch.no_grad():
        score: Tensor = method.score(weight.parameter.detach(), generator)  # type: ignore[attr-defined]
    if score.shape != weight.parameter.shape or bool(torch.isnan(score).any()):
        raise WeightError(
            f"{weight.name}: expected finite scores of shape {tuple(weight.parameter.shape)} from "
            f"{type(method).__name__}, got shape {tuple(score.shape)} or NaN"
        )
    return score
