"""Commit of a RESU phase: which places are active afterwards.

amnesty   a tournament inside each weight (runtime/tournament.py), with the weight's own count
open      all places compete by the pruning method, of the pruned ones the best few
          (runtime/open_contest.py)
reprune   all places compete by the pruning method
merge     all places stay

Under an N:M pattern all of them keep it: amnesty and open are a tournament of exchanges inside the
groups (runtime/group_tournament.py), and merge, which cannot keep all, keeps the N best of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resu_compile.comparison import RowLayout, parse_pattern
from resu_compile.config import ResurrectionConfig, SparsityConfig
from resu_compile.errors import ArgumentError
from resu_compile.kernels.mask_bits import unpack_mask
from resu_compile.methods.saliency import Saliency
from resu_compile.patterns import committed_layout
from resu_compile.runtime.allocation import fixed_counts, new_masks
from resu_compile.runtime.gradient_moments import gradient_score
from resu_compile.runtime.gradient_score import LastGradients
from resu_compile.runtime.group_tournament import pattern_tournament
from resu_compile.runtime.open_contest import open_masks
from resu_compile.runtime.tournament import amnesty_mask, ceiling_mask

if TYPE_CHECKING:
    from resu_compile.runtime.controller import Controller
    from resu_compile.state import MaskedWeight

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
            not needed; or a weight does not tell how the pattern of the masks lies in it.
    """
    weights = controller.weights
    if terms.strategy != "reprune" and controller.config.pattern is not None:
        return _pattern_masks(controller, terms, calibration)
    if terms.strategy == "merge":
        if calibration is not None:
            raise ArgumentError("calibration: expected None with strategy='merge', which keeps all")
        return {name: torch.ones_like(weight.mask) for name, weight in weights.items()}
    chosen = controller.config if pruning is None else pruning
    if terms.strategy == "open":
        if calibration is not None:
            raise ArgumentError(
                "calibration: expected None with strategy='open', which goes by the scores of the "
                "pruning method"
            )
        return open_masks(controller, chosen, terms.budget)
    if terms.strategy == "reprune":
        return new_masks(
            controller.named_weights(),
            chosen,
            controller.generator,
            calibration=calibration,
            model=controller.model,
            moments=controller.moments,
        )
    counts = {name: weight.nnz for name, weight in weights.items()}
    if pruning is not None:
        counts = kept_counts(controller, pruning)
    score = score_function(controller, terms.score, calibration)
    masks = {}
    for name, weight in weights.items():
        merit = _merit(score, name, weight.parameter.detach(), terms)
        merit, n_resurrected = _contest(controller, weight, merit, terms.budget * counts[name])
        if terms.kind == "ceiling":
            masks[name] = ceiling_mask(
                merit, weight.mask, counts[name], n_resurrected, terms.margin
            )
        else:
            masks[name] = amnesty_mask(merit, weight.mask, counts[name], n_resurrected)
    return masks


def _contest(
    controller: Controller, weight: MaskedWeight, merit: Tensor, budget: float
) -> tuple[Tensor, int]:
    """Who scores what, on the device of the masks, and how many may come back at the most.

    Where only chosen places hold theta, all others come last, and no more than these come back.
    """
    merit = merit.to(weight.bits.device, torch.promote_types(merit.dtype, torch.float32))
    running = controller.resurrection
    if running is None or running.config.places is None:
        return merit, int(budget)
    held = running.held(weight)
    places = weight.mask if held is None else unpack_mask(held, weight.shape)
    last = -0.25 * torch.finfo(merit.dtype).max  # finite, and so are its differences
    chosen = int(places.sum()) - weight.nnz
    return torch.where(places, merit, last), min(int(budget), chosen)


def _pattern_masks(
    controller: Controller, terms: ResurrectionConfig, calibration: Any
) -> dict[str, Tensor]:
    """Masks of ``"amnesty"`` and ``"merge"`` that keep the pattern of the present ones."""
    assert controller.config.pattern is not None
    pattern = parse_pattern(controller.config.pattern)
    layouts = pattern_layouts(controller)
    if terms.strategy in ("merge", "open"):  # all may come back that score higher than who is there
        most = 1.0 if terms.strategy == "merge" else terms.budget
        terms = replace(terms, kind="ceiling", margin=0.0, budget=most)
    score = score_function(controller, terms.score, calibration)
    masks = {}
    for name, weight in controller.weights.items():
        merit = _merit(score, name, weight.parameter.detach(), terms)
        n_keep = weight.numel // pattern.group * pattern.keep
        merit, most = _contest(controller, weight, merit, terms.budget * n_keep)
        masks[name] = pattern_tournament(
            merit,
            weight.mask,
            layouts[name],
            pattern,
            most,
            ceiling=terms.kind == "ceiling",
            margin=terms.margin,
        )
    return masks


def pattern_layouts(controller: Controller) -> dict[str, RowLayout]:
    """How the groups of the pattern lie in each masked weight; {} without a pattern.

    Raises:
        ArgumentError: neither the layer of a weight nor its mask tells.
    """
    if controller.config.pattern is None:
        return {}
    pattern = parse_pattern(controller.config.pattern)
    return {
        named.name: committed_layout(named, controller.weights[named.name].mask, pattern)
        for named in controller.named_weights()
    }


def takes_score(config: SparsityConfig, strategy: str) -> bool:
    """True if a commit by ``strategy`` looks at scores of its own, not at those of a method."""
    return strategy == "amnesty" or (strategy in ("merge", "open") and config.pattern is not None)


def kept_counts(controller: Controller, pruning: SparsityConfig) -> dict[str, int]:
    """How many entries of each weight pruning by ``pruning`` would keep now."""
    named = controller.named_weights()
    counts = fixed_counts(named, pruning)
    if len(counts) < len(named):  # one threshold over all weights: their scores decide
        masks = new_masks(named, pruning, controller.generator, moments=controller.moments)
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


def _growth(controller: Controller, _calibration: Any) -> Score:
    """|W| of the active, |g| of the pruned: the two scores of RigL, in a tournament with a quota.

    Source: Evci et al. 2020, https://arxiv.org/abs/1911.11134
    """
    if controller.config.pattern is not None:
        raise ArgumentError(
            "score: expected another one than 'growth' under a pattern, in whose groups active and "
            f"pruned meet, got pattern={controller.config.pattern!r}; choose 'magnitude'"
        )
    running = controller.resurrection
    remembered = (running and running.gradients) or LastGradients()

    def score(name: str, value: Tensor) -> Tensor:
        weight = controller.weights[name]
        wide = torch.promote_types(value.dtype, torch.float32)
        grad = remembered.magnitude(name, weight.parameter).to(wide)
        return torch.where(weight.mask, value.abs().to(wide), grad)

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


def _saliency(controller: Controller, _calibration: Any) -> Score:
    """|W| (E[g^2])^(1/4): what the pruning method of that name goes by, theta included."""
    return partial(gradient_score, Saliency(), controller.moments, argument="score")


SCORES: dict[str, Callable[[Controller, Any], Score]] = {
    "magnitude": _magnitude,
    "gradient": _gradient,
    "growth": _growth,
    "saliency": _saliency,
    "wanda": _wanda,
}
