"""Run a model once and keep the graphs that Dynamo captures, with the weight sites in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from resu_compile.passes.find_weights import WeightSite, find_weights


@dataclass(frozen=True)
class CapturedGraph:
    """One graph, the parameters among its inputs, and its weight sites."""

    gm: fx.GraphModule
    parameters: dict[int, nn.Parameter]
    sites: list[WeightSite]


def capture(model: nn.Module, *inputs: Any, **kwargs: Any) -> list[CapturedGraph]:
    """The graphs of one call of ``model``; the call itself runs eagerly and without gradients.

    Args:
        model: the module; its mode, parameters and buffers' contents are kept.
        *inputs: positional inputs of the call.
        **kwargs: keyword inputs of the call.
    """
    graphs: list[CapturedGraph] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        parameters = {i: p for i, p in enumerate(example_inputs) if isinstance(p, nn.Parameter)}
        sites, _ = find_weights(gm, list(parameters))
        graphs.append(CapturedGraph(gm, parameters, sites))
        return gm.forward

    def call(*args: Any, **kw: Any) -> Any:
        return model.forward(*args, **kw)

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad():
            torch.compile(call, backend=record)(*inputs, **kwargs)
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():  # batch norm counts every call
                buffer.copy_(buffers[name])
    return graphs


def captured_parameters(graphs: Sequence[CapturedGraph]) -> dict[int, str | None]:
    """``id(parameter)`` -> op that multiplies by it, None if no captured graph does."""
    found: dict[int, str | None] = {}
    for graph in graphs:
        for parameter in graph.parameters.values():
            found.setdefault(id(parameter), None)
        for site in graph.sites:
            found[id(graph.parameters[site.index])] = site.op
    return found
