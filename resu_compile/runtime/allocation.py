"""New masks for a set of weights: method, scope, distribution and overrides together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from resu_compile.comparison import parse_pattern
from resu_compile.config import SparsityConfig
from resu_compile.distributions import DISTRIBUTIONS
from resu_compile.errors import ArgumentError
from resu_compile.methods import CalibratedMethod, GradientMethod, get_method
from resu_compile.patterns import pattern_masks
from resu_compile.runtime.gradient_moments import GradientMoments, gradient_score
from resu_compile.runtime.packed_masks import PackedMasks
from resu_compile.selection import NamedWeight, check_values, matches
from resu_compile.sparsity import global_topk_masks, keep_count, topk_mask

if TYPE_CHECKING:
    from resu_compile.calibration import Calibration


def new_generator(seed: int) -> torch.Generator:
    """A CPU generator for masks and theta.

    Its stream is not that of ``torch.manual_seed(seed)``, which may have drawn the weights: random
    masks and theta would then be functions of them.
    """
    # 32 bits are what the CPU generator reads
    return torch.Generator().manual_seed((seed ^ 0x9E3779B9) & 0xFFFFFFFF)


def new_masks(
    weights: Sequence[NamedWeight],
    config: SparsityConfig,
    generator: torch.Generator,
    active: Mapping[str, Tensor] | None = None,
    *,
    calibration: Calibration | None = None,
    model: nn.Module | None = None,
    moments: GradientMoments | None = None,
) -> PackedMasks:
    """Masks with exact counts, from the present values of ``weights``.

    A calibrated method also writes into the weights: zeros outside of its masks, and whatever
    values it trains.

    Args:
        weights: the weights to prune, all with finite values.
        config: method, scope, distribution, overrides, min_density, pattern and sparsity are used.
        generator: the only source of randomness.
        active: parameter name -> bool mask of the places that come first, whatever they score; the
            others fill what these leave. None lets all places compete.
        calibration: for a calibrated method: a function ``forward_loop(model)``, or batches.
        model: the root, which calibration runs.
        moments: the gradients that a method of gradients scores by.

    Returns:
        parameter name -> bool mask, True = active; held as bits.

    Raises:
        WeightError: a weight holds NaN or infinity, or is on meta.
        ArgumentError: the method's scores are NaN or of another shape, the data are missing or not
            needed, or the pattern does not fit a weight.
    """
    method = get_method(config.method)
    check_calibration(config, calibration)
    check_values(weights)
    if config.from_zeros:
        return PackedMasks((w.name, w.parameter.detach() != 0) for w in weights)
    if isinstance(method, CalibratedMethod):
        assert calibration is not None
        assert model is not None
        return _calibrated(method, weights, config, generator, active, calibration, model)
    score = partial(score_of, config=config, generator=generator, moments=moments)
    if config.scope == "global" and config.pattern is None:
        return _ranked_together(weights, config, score, active or {})
    # one weight at a time: the scores of all would be a second copy of the model
    return PackedMasks(_ranked_alone(weights, config, score, active or {}))


def _ranked_alone(
    weights: Sequence[NamedWeight],
    config: SparsityConfig,
    score_of: Callable[[NamedWeight], Tensor],
    active: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Name and mask of each weight, whose scores are compared among themselves."""
    pattern = None if config.pattern is None else parse_pattern(config.pattern)
    keep = {} if pattern is not None else fixed_counts(weights, config)
    for weight in weights:
        name = weight.name
        score = score_of(weight)
        first = {name: active[name].to(score.device)} if active else {}
        if pattern is not None:
            yield name, pattern_masks([weight], {name: score}, pattern, first)[name]
        else:
            yield name, topk_mask(score, keep[name], first.get(name))
        del score  # before the next one is made


def _ranked_together(
    weights: Sequence[NamedWeight],
    config: SparsityConfig,
    score_of: Callable[[NamedWeight], Tensor],
    active: Mapping[str, Tensor],
) -> PackedMasks:
    """Masks by one ranking of all scores, but for the weights that ``overrides`` names."""
    scores = {weight.name: score_of(weight) for weight in weights}
    first = {name: active[name].to(scores[name].device) for name in scores} if active else {}
    keep = fixed_counts(weights, config)
    free = [weight for weight in weights if weight.name not in keep]
    masks: dict[str, Tensor] = {}
    if free:
        numel = {weight.name: weight.parameter.numel() for weight in free}
        # no floor above the overall density: the total stays exact
        floor = min(config.min_density, 1.0 - config.sparsity)
        floors = {name: int(floor * count) for name, count in numel.items()}
        device = free[0].parameter.device  # one ranking needs one place
        masks = global_topk_masks(
            {weight.name: scores[weight.name].to(device) for weight in free},
            keep_count(sum(numel.values()), config.sparsity),
            floors,
            {weight.name: first[weight.name].to(device) for weight in free} if first else None,
        )
    for name, count in keep.items():
        masks[name] = topk_mask(scores[name], count, first.get(name))
    return PackedMasks((weight.name, masks[weight.name]) for weight in weights)


def fixed_counts(weights: Sequence[NamedWeight], config: SparsityConfig) -> dict[str, int]:
    """How many entries each weight keeps, for the weights whose number no score decides.

    These are the weights that ``overrides`` names, and with ``scope="layer"`` all others too.
    """
    fixed = overridden(weights, config)
    numel = {weight.name: weight.parameter.numel() for weight in weights}
    keep = {name: keep_count(numel[name], sparsity) for name, sparsity in fixed.items()}
    free = [weight for weight in weights if weight.name not in fixed]
    if config.scope == "layer" and free:
        floor = min(config.min_density, 1.0 - config.sparsity)
        shapes = {weight.name: tuple(weight.parameter.shape) for weight in free}
        for name, sparsity in DISTRIBUTIONS[config.distribution](shapes, config.sparsity).items():
            count = keep_count(numel[name], sparsity)
            least = 0 if config.distribution == "uniform" else int(floor * numel[name])
            keep[name] = max(count, least)
    return keep


def check_calibration(config: SparsityConfig, calibration: object) -> None:
    """Raise an ``ArgumentError`` if data are missing, or given to what does not use them."""
    method = get_method(config.method)
    name = config.method if isinstance(config.method, str) else type(method).__name__
    needed = isinstance(method, CalibratedMethod) and not config.from_zeros
    if needed and calibration is None:
        raise ArgumentError(
            f"calibration: expected data for method {name!r}, got None; give batches or a function "
            "forward_loop(model) to sparsify(..., calibration=...) or "
            "controller(model).prune(..., calibration=...), or choose a method that needs none"
        )
    if calibration is not None and not needed:
        what = "from_zeros=True" if config.from_zeros else f"method {name!r}"
        raise ArgumentError(f"calibration: expected None with {what}, which looks at no data")


def weight_sparsities(weights: Sequence[NamedWeight], config: SparsityConfig) -> dict[str, float]:
    """Sparsity of each weight with ``scope="layer"``: overrides, distribution, least density."""
    fixed = overridden(weights, config)
    shapes = {w.name: tuple(w.parameter.shape) for w in weights if w.name not in fixed}
    spread = DISTRIBUTIONS[config.distribution](shapes, config.sparsity) if shapes else {}
    if config.distribution != "uniform":
        most = 1.0 - min(config.min_density, 1.0 - config.sparsity)
        spread = {name: min(sparsity, most) for name, sparsity in spread.items()}
    return {**spread, **fixed}


def _calibrated(
    method: CalibratedMethod,
    weights: Sequence[NamedWeight],
    config: SparsityConfig,
    generator: torch.Generator,
    active: Mapping[str, Tensor] | None,
    calibration: Calibration,
    model: nn.Module,
) -> PackedMasks:
    from resu_compile.calibration.block import PruneRequest
    from resu_compile.calibration.engine import calibrated_masks

    request = PruneRequest(
        weight_sparsities(weights, config),
        None if config.pattern is None else parse_pattern(config.pattern),
        {} if active is None else active,
        generator,
    )
    return calibrated_masks(model, weights, method, calibration, request)


def overridden(weights: Sequence[NamedWeight], config: SparsityConfig) -> Mapping[str, float]:
    """Sparsity of the weights that ``overrides`` names; the last match wins."""
    found = {}
    for weight in weights:
        for pattern, sparsity in config.overrides.items():
            if any(matches(pattern, name) for name in weight.names):
                found[weight.name] = float(sparsity)
    return found


def score_of(
    weight: NamedWeight,
    config: SparsityConfig,
    generator: torch.Generator,
    moments: GradientMoments | None,
) -> Tensor:
    """Score of each entry of ``weight`` by the method of ``config``, which is not calibrated.

    Raises:
        ArgumentError: the scores are NaN or of another shape.
    """
    method, value = get_method(config.method), weight.parameter.detach()
    assert not isinstance(method, CalibratedMethod)
    with torch.no_grad():
        if isinstance(method, GradientMethod):
            score = gradient_score(method, moments, weight.name, value, argument="method")
        else:
            score = method.score(value, generator)
    if score.shape != weight.parameter.shape or bool(torch.isnan(score).any()):
        raise ArgumentError(
            f"method: expected scores of shape {tuple(weight.parameter.shape)} without NaN from "
            f"{type(method).__name__} for {weight.name}, got shape {tuple(score.shape)} or NaN"
        )
    return score if score.is_floating_point() else score.float()
