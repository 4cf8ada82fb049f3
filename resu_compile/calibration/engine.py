"""Block by block: gather, prune, go on with the outputs of the pruned block.

    for each block:
        run the data through the model; only products with weights of this block are looked at
        masks of its weights; zeros into the weights

What comes later therefore sees the outputs of what was pruned before. The memory in use is that of
the statistics of one block. Blocks that follow one another run alone, on stored inputs (replay.py),
with the same result: the memory is then also that of the inputs of one block for all batches.
Weights are put back if anything fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from resu_compile.calibration.block import Block, PruneRequest, Run
from resu_compile.calibration.blocks import BlockSpec, find_blocks
from resu_compile.calibration.context import Journal, calibrating
from resu_compile.calibration.data import Batches, Calibration, Loop, as_loop
from resu_compile.calibration.observer import Observer
from resu_compile.calibration.replay import Replay, find_chain
from resu_compile.errors import ArgumentError
from resu_compile.methods.registry import CalibratedMethod
from resu_compile.runtime.packed_masks import PackedMasks
from resu_compile.selection import NamedWeight
from resu_compile.state import MaskedWeight


def calibrated_masks(
    model: nn.Module,
    weights: Sequence[NamedWeight],
    method: CalibratedMethod,
    calibration: Calibration,
    request: PruneRequest,
) -> PackedMasks:
    """Masks of a method that looks at the inputs of weights.

    The weights are left with zeros outside of their masks, and with the values that the method
    gave them.

    Args:
        model: the root, eager or compiled in place; it runs eagerly here.
        weights: the weights to prune.
        method: the method.
        calibration: a function ``forward_loop(model)``, or batches.
        request: how much, and where.

    Returns:
        parameter name -> bool mask, True = active; held as bits.

    Raises:
        ArgumentError: wrong data, wrong blocks, or a weight that the data do not reach.

    On an error all weights are as they were.
    """
    loop = as_loop(calibration)
    specs = find_blocks(model, weights, method.blocks)
    journal = Journal()
    masks = PackedMasks()
    try:
        with calibrating(model):
            for spec, run in _runs(specs, model, loop):
                block = Block(spec, request, run, journal)
                for name, mask in _pruned(method, block, journal).items():
                    masks.add(name, mask)
    except BaseException:
        journal.restore()
        raise
    return masks.only(weight.name for weight in weights)


def _pruned(method: CalibratedMethod, block: Block, journal: Journal) -> dict[str, Tensor]:
    """The checked masks of a block, whose weights are zeroed outside of them."""
    found = method.prune(block)
    for name, parameter in block.weights.items():
        mask = found.get(name)
        if mask is None or mask.dtype != torch.bool or mask.shape != parameter.shape:
            got = "none" if mask is None else f"{mask.dtype} of shape {tuple(mask.shape)}"
            raise ArgumentError(
                f"method: expected a bool mask of shape {tuple(parameter.shape)} from "
                f"{type(method).__name__} for {name}, got {got}"
            )
        journal.prune(parameter, mask)
    return {name: found[name] for name in block.weights}


def _runs(
    specs: Sequence[BlockSpec], model: nn.Module, loop: Loop
) -> Iterator[tuple[BlockSpec, Run]]:
    """Each part with the function that runs the data through it; pruned before the next is asked.

    Args:
        specs: the parts, in order.
        model: the root.
        loop: runs the model on the data.
    """
    modules = [spec.module for spec in specs if spec.module is not model]
    replay: Replay | None = None
    tried = False

    def through() -> None:
        loop(model)

    for spec in specs:
        if spec.module is model or len(modules) < 2 or not isinstance(loop, Batches):
            if spec.weights:
                yield spec, through
            continue
        if not tried:
            tried = True
            chain = find_chain(modules, model, loop.batches[0])
            if chain is not None:
                replay = Replay(modules, model, loop, chain)
                replay = replay if replay.fits else None
        elif replay is not None:
            replay.advance(spec.module)
        if spec.weights:
            yield spec, through if replay is None else replay.run


def input_norms(
    model: nn.Module,
    weights: Mapping[str, MaskedWeight] | Sequence[str],
    calibration: Calibration,
) -> dict[str, Tensor]:
    """sqrt(s_j) of the inputs of weights, all gathered in one run of the data.

    Args:
        model: the root.
        weights: masked weights by name, or names of parameters.
        calibration: a function ``forward_loop(model)``, or batches.

    Returns:
        parameter name -> float32 tensor that broadcasts to the weight: (1, in_features) for
        a weight (out_features, in_features), (in_features, 1) for one multiplied from the right.

    Raises:
        ArgumentError: the data do not reach a weight, or no parameter has such a name.
    """
    if isinstance(weights, Mapping):
        parameters = {name: weight.parameter for name, weight in weights.items()}
    else:
        known = dict(model.named_parameters(remove_duplicate=False))
        unknown = [name for name in weights if name not in known]
        if unknown:
            raise ArgumentError(
                f"weights: expected names of parameters, got {', '.join(map(repr, unknown))}"
            )
        parameters = {name: known[name] for name in weights}
    loop = as_loop(calibration)
    observer = Observer(parameters)
    with calibrating(model), observer.counting(model):
        loop(model)
    return {name: found.norm for name, found in observer.statistics().items()}
