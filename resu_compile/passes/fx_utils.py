"""Pure helpers on graphs as Dynamo captures them."""

from __future__ import annotations

import copy

from torch import fx


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with a graph of its own; attributes and submodules are shared.

    What Dynamo notes beside the graph (the source of each input, which AOTAutograd needs to
    recognise static inputs for CUDA graphs) is carried over.
    """
    result = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    result.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        result._param_name_to_source = gm._param_name_to_source
    old = gm.graph.find_nodes(op="placeholder")
    new = result.graph.find_nodes(op="placeholder")
    for before, after in zip(old, new, strict=True):
        after._dynamo_source = getattr(before, "_dynamo_source", None)  # type: ignore[attr-defined]
    return result


def append_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A further input after all others, at an address that stays the same between calls."""
    from torch._dynamo.source import ConstantSource

    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node._dynamo_source = ConstantSource(source_name=node.name)  # type: ignore[attr-defined]
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "guarded"}
    return node
