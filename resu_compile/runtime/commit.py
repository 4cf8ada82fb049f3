"""Commit of a RESU phase: which places are active afterwards.

amnesty   a tournament inside each weight (runtime/tournament.py), with the weight's own count
reprune   all places compete by the pruning method
merge     all places stay
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resu_compile.config import ResurrectionConfig, SparsityConfig
from resu_compile.errors import ArgumentError
from resu_compile.runtime.allocation import fixed_counts, new_masks
from resu_compile.runtime.gradient_score import LastGradients
from resu_compile.runtime.tournament import amnesty_mask, ceiling_mask

if TYPE_CHECKING:
    from resu_compile.runtime.controller import Controller

Score = Callable[[str, Tensor], Tensor]


def commit_masks(
    controller: Controller,
    terms: ResurrectionConfig,
    pruning: SparsityConfig | None,
    calibration: Any = None,
) -> Mapping[str, Tensor]:
    """Masks after the commit, from the present values of the weights, theta included.

    Args:
        controller: the controller, in the RESU phase.
        terms: strategy, kind, score, budget and margin are used.
        pruning: decides each weight's count, and the masks of ``"reprune"``; None lets
            ``"amnesty"`` keep each weight's count.
        calibration: inputs that ``score="wanda"`` or a calibrated method measures.

    Returns:
        parameter name -> bool mask, True = active.

    Raises:
        ArgumentError: a score is missing, of another shape, or NaN or infinite; data are missing or
            not needed; or the strategy cannot keep the pattern of the masks.
    """
    weights = controller.weights
    check_pattern_kept(controller.config, terms.strategy)
    if terms.strategy == "merge":
        if calibration is not None:
            raise ArgumentError("calibration: expected None with strategy='merge', which keeps all")
        return {name: torch.ones_like(weight.mask) for name, weight in weights.items()}
    if terms.strategy == "reprune":
        chosen = controller.config if pruning is None else pruning
        return new_masks(
            controller.named_weights(),
            chosen,
            controller.generator,
            calibration=calibration,
            model=controller.model,
        )
    counts = {name: weight.nnz for name, weight in weights.items()}
    if pruning is not None:
        counts = kept_counts(controller, pruning)
    score = score_function(controller, terms.score, calibration)
    masks = {}
    for name, weight in weights.items():
        merit = _merit(score, name, weight.parameter.detach(), terms)
        merit = merit.to(weight.bits.device, torch.promote_types(merit.dtype, torch.float32))
        n_resurrected = int(terms.budget * counts[name])
        if terms.kind == "ceiling":
            masks[name] = ceiling_mask(
                merit, weight.mask, counts[name], n_resurrected, terms.margin
            )
        else:
            masks[name] = amnesty_mask(merit, weight.mask, counts[name], n_resurrected)
    return masks


def check_pattern_kept(config: SparsityConfig, strategy: str) -> None:
    """Raise an ``ArgumentError`` for a strategy whose masks would break an N:M pattern."""
    if config.pattern is not None and strategy != "reprune":
        raise ArgumentError(
            f"strategy: expected 'reprune' under pattern={config.pattern!r}, which lets active and "
            f"resurrected compete inside each group, got {strategy!r}, which does not keep the "
            "pattern; prune(sparsity, pattern=None) gives it up"
        )


def kept_counts(controller: Controller, pruning: SparsityConfig) -> dict[str, int]:
    """How many entries of each weight pruning by ``pruning`` would keep now."""
    named = controller.named_weights()
    counts = fixed_counts(named, pruning)
    if len(counts) < len(named):  # one threshold over all weights: their scores decide
        masks = new_masks(named, pruning, controller.generator)
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
    return counts


def _merit(score: Score, name: str, value: Tensor, terms: ResurrectionConfig) -> Tensor:
    with torch.no_grad():
        merit = score(name, value)
    if not isinstance(merit, Tensor) or merit.shape != value.shape:
        raise ArgumentError(
            f"score: expected a tensor of shape {tuple(value.shape)} for {name}, "
            f"got {tuple(merit.shape) if isinstance(merit, Tensor) else merit!r}"
        )
    if not bool(torch.isfinite(merit).all()):
        raise ArgumentError(
            f"score: expected finite scores for {name}, got NaN or infinity; "
            "abandon() drops theta and keeps the masks"
        )
    if terms.kind == "ceiling" and terms.margin > 0.0 and bool((merit < 0).any()):
        raise ArgumentError(
            f"score: expected scores >= 0 for {name} with kind='ceiling', whose margin is a share "
            f"of the score, got a least one of {float(merit.min()):g}; margin=0.0 takes any"
        )
    return merit


# -- scores ------------------------------------------------------------------------------------
def score_function(controller: Controller, score: str | Score, calibration: Any) -> Score:
    """The function (name, weight) -> score that ``score`` names."""
    if calibration is not None and score != "wanda":
        raise ArgumentError(
            "calibration: expected None unless score='wanda', which is the one that measures "
            f"inputs, got score={score!r}"
        )
    return score if callable(score) else SCORES[score](controller, calibration)


def _magnitude(_controller: Controller, _calibration: Any) -> Score:
    return lambda _name, value: value.abs()


def _gradient(controller: Controller, _calibration: Any) -> Score:
    """|W| |g|, to first order what the loss changes by if the weight goes.

    Source: Molchanov et al. 2017, https://arxiv.org/abs/1611.06440
    """
    running = controller.resurrection
    if running is not None and running.config.freeze_active:
        raise ArgumentError(
            "score: expected another one than 'gradient' after a resurrection with frozen active "
            "weights, which got no gradient to be scored by; choose 'magnitude'"
        )
    remembered = (running and running.gradients) or LastGradients()

    def score(name: str, value: Tensor) -> Tensor:
        wide = torch.promote_types(value.dtype, torch.float32)
        grad = remembered.magnitude(name, controller.weights[name].parameter)
        return value.abs().to(wide) * grad.to(wide)

    return score


def _wanda(controller: Controller, calibration: Any) -> Score:
    """|W_ij| ||X_j||_2. Here weights compete inside their tensor, not inside an output row.

    Source: Sun et al. 2024, https://arxiv.org/abs/2306.11695
    """
    if calibration is None:
        raise ArgumentError(
            "calibration: expected inputs to measure for score='wanda', got None; call "
            "commit(score='wanda', calibration=...) inside the block or in place of it"
        )
    from resu_compile.calibration import input_norms

    norms = input_norms(controller.model, controller.weights, calibration)

    def score(name: str, value: Tensor) -> Tensor:
        magnitude = value.abs().to(torch.promote_types(value.dtype, torch.float32))
        return magnitude * norms[name].to(magnitude.device)  # (1, in_features), say

    return score


SCORES: dict[str, Callable[[Controller, Any], Score]] = {
    "magnitude": _magnitude,
    "gradient": _gradient,
    "wanda": _wanda,
}
