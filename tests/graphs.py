"""Graphs as Dynamo captures them, without compiling anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn


def captured(
    call: Callable[..., Any], *inputs: Any, dynamic: bool | None = False
) -> fx.GraphModule:
    """The one graph of ``call(*inputs)``, with ``gm.parameters_at``: position -> parameter."""
    graphs = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        gm.parameters_at = {
            i: value for i, value in enumerate(example_inputs) if isinstance(value, nn.Parameter)
        }
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(call, backend=record, fullgraph=True, dynamic=dynamic)(*inputs)
    (gm,) = graphs
    return gm


def calls(gm: fx.GraphModule) -> list[str]:
    """Names of the functions and methods that a graph calls, in order."""
    return [
        str(getattr(node.target, "__name__", node.target))
        for node in gm.graph.nodes
        if node.op in ("call_function", "call_method")
    ]


def text(gm: fx.GraphModule) -> str:
    """The graph's code without its comments, one statement a line."""
    code = gm.print_readable(print_output=False, include_stride=False, include_device=False)
    lines = (line.split("#")[0].rstrip() for line in code.splitlines())
    return "\n".join(line for line in lines if line.strip())
