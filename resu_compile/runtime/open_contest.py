"""The open contest: all places of all weights compete by the pruning method.

    newcomers   the best pruned places, budget times the kept places of them
    masks       the best of the active and the newcomers, as many as the sparsity keeps
    entry       |theta| <- |theta| min(1, lowest score that is kept / score of theta)

Weights that are ranked by one threshold (``scope="global"``) are one contest; else each is its own.
The budget bounds how much the network changes at once. The entry, for theta that forward passes
have not seen, bounds how far: gradients straight through a mask do not know when theta is large
enough, so that it may have gone far beyond what the network needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resu_compile.config import SparsityConfig
from resu_compile.errors import ArgumentError
from resu_compile.methods import is_calibrated
from resu_compile.runtime.allocation import fixed_counts, new_masks, score_of
from resu_compile.selection import NamedWeight
from resu_compile.sparsity import keep_count, only_at, topk_mask

if TYPE_CHECKING:
    from resu_compile.runtime.controller import Controller


def open_masks(
    controller: Controller, config: SparsityConfig, budget: float
) -> Mapping[str, Tensor]:
    """Masks after the contest.

    Args:
        controller: its weights show theta.
        config: method, scope, sparsity and all that decides the counts.
        budget: the most that come back, as a share of the places that are kept, in [0, 1].

    Returns:
        parameter name -> bool mask, True = active.

    Raises:
        ArgumentError: the method is calibrated, so that places have no score.
    """
    if is_calibrated(config.method):
        raise ArgumentError(
            f"strategy: expected another one than 'open' with method={config.method!r}, which "
            "measures masks and gives no scores; 'reprune' prunes by it again"
        )
    named = controller.named_weights()
    eligible: dict[str, Tensor] = {}
    for group, n_kept in _contests(named, config):
        scores = _scores(controller, group, config)
        _check_scores(controller, scores, config)
        active = {name: controller.weights[name].mask.to(s.device) for name, s in scores.items()}
        device = group[0].parameter.device  # one ranking needs one place
        pruned = [only_at(s, ~active[name]).to(device).flatten() for name, s in scores.items()]
        n_pruned = sum(int((~mask).sum()) for mask in active.values())
        best = topk_mask(torch.cat(pruned), min(int(budget * n_kept), n_pruned))
        parts = best.split([score.numel() for score in scores.values()])
        for (name, mask), part in zip(active.items(), parts, strict=True):
            eligible[name] = mask | part.view(mask.shape).to(mask.device)
    return new_masks(named, config, controller.generator, eligible, moments=controller.moments)


def limit_entry(
    controller: Controller, config: SparsityConfig, masks: Mapping[str, Tensor]
) -> None:
    """Let what comes back start with no higher score than the lowest one above 0 that is kept.

    Scores are taken to be proportional to the size of a weight. Those of ``"random"`` are not, and
    a calibrated method, which a pattern allows, has none: nothing is limited then.

    Args:
        controller: its weights show theta, which is changed; its masks are those before.
        config: of the contest.
        masks: parameter name -> bool mask after the contest.
    """
    if config.method == "random" or is_calibrated(config.method):
        return
    for group, _ in _contests(controller.named_weights(), config):
        scores = _scores(controller, group, config)
        kept = [score[masks[name].to(score.device) & (score > 0)] for name, score in scores.items()]
        lowest = min((float(score.min()) for score in kept if score.numel()), default=torch.inf)
        for weight in group:
            score, parameter = scores[weight.name], weight.parameter
            before = controller.weights[weight.name].mask
            entering = (masks[weight.name].to(before.device) & ~before).to(parameter.device)
            share = (lowest / score.clamp(min=torch.finfo(score.dtype).tiny)).clamp(max=1.0)
            with torch.no_grad():
                limited = parameter * share.to(parameter.dtype)
                parameter.copy_(torch.where(entering, limited, parameter))


def _scores(
    controller: Controller, group: Sequence[NamedWeight], config: SparsityConfig
) -> dict[str, Tensor]:
    generator, moments = controller.generator, controller.moments
    return {weight.name: score_of(weight, config, generator, moments) for weight in group}


def _check_scores(
    controller: Controller, scores: Mapping[str, Tensor], config: SparsityConfig
) -> None:
    running = controller.resurrection
    if running is None or running.hidden is None:
        return
    for name, score in scores.items():
        if bool((score < 0).any()):
            raise ArgumentError(
                f"method: expected scores >= 0 of {config.method!r} with strategy='open' and "
                "hidden theta, which enters in proportion to its score, got a least one of "
                f"{float(score.min()):g} for {name}; strategy='reprune' takes any"
            )


def _contests(
    weights: Sequence[NamedWeight], config: SparsityConfig
) -> Iterator[tuple[list[NamedWeight], int]]:
    """The weights whose places compete with one another, and how many places they keep."""
    alone = fixed_counts(weights, config)
    together = [weight for weight in weights if weight.name not in alone]
    if together:
        yield together, keep_count(sum(w.parameter.numel() for w in together), config.sparsity)
    for weight in weights:
        if weight.name in alone:
            yield [weight], alone[weight.name]
