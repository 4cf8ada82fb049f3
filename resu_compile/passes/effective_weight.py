"""Rewrite: every masked weight -> the phase's effective weight, with its gradient routed.

    def forward(x, w):                    def forward(x, w, w_bits):
        x = x.relu()              ==>         x = x.relu()
        return F.linear(x, w)                 w_eff = resu_compile.effective_weight(w, w_bits, True)
                                              return F.linear(x, w_eff)

The packed mask becomes an input of the graph: a commit changes its bytes and compiles nothing.
A weight that the graph returns or writes to is left alone: eager code masks its gradient.

In the joint graph, where the backward stands beside the forward, the op has done its work:

    w_eff = effective_weight(w, bits, True)         y = linear(x, w)
    y = linear(x, w_eff)                     ==>    ...
    ...                                             dw = route_gradient(dw_eff, bits, True)
    dw = route_gradient(dw_eff, bits, True)
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import fx

from resu_compile.passes.base import PassReport
from resu_compile.passes.fx_utils import (
    append_placeholder,
    changed_in_place,
    copy_graph_module,
    returned,
)
from resu_compile.phase import Routing


def route_gradients(
    gm: fx.GraphModule, routings: Mapping[int, Routing]
) -> tuple[fx.GraphModule, list[int], PassReport]:
    """A copy of ``gm`` whose masked weights pass through ``effective_weight``.

    Args:
        gm: a graph as Dynamo captures it; not changed.
        routings: position of a placeholder -> where its gradient goes.

    Returns:
        The new graph module; the positions of the weights whose packed masks it takes as further
        inputs, in that order; the report.
    """
    started = time.perf_counter()
    report = PassReport("effective_weight")
    result = copy_graph_module(gm)
    placeholders = result.graph.find_nodes(op="placeholder")
    escaping = {
        **dict.fromkeys(returned(result.graph), "the graph returns it"),
        **dict.fromkeys(changed_in_place(result.graph), "the graph writes to it"),
    }
    taken = []
    for index, routing in routings.items():
        weight = placeholders[index]
        if routing is Routing.ALL:
            report.skipped[weight.name] = "gradient reaches every place"
            continue
        if not weight.users:
            report.skipped[weight.name] = "not used in this graph"
            continue
        if index in escaping:  # what was read through effective_weight would be another tensor
            report.skipped[weight.name] = f"{escaping[index]}; its gradient is masked outside"
            continue
        bits = append_placeholder(result.graph, f"{weight.name}_bits")
        with result.graph.inserting_before(_place(result.graph, weight)):
            effective = result.graph.call_function(
                torch.ops.resu_compile.effective_weight.default,
                (weight, bits, routing.keeps_active),
            )
        if "example_value" in weight.meta:
            effective.meta["example_value"] = weight.meta["example_value"]
        for user in list(weight.users):
            if user is not effective:
                user.replace_input_with(weight, effective)
        taken.append(index)
        report.rewritten[weight.name] = f"effective_weight({routing})"
    result.graph.lint()
    result.recompile()
    report.elapsed_ms = (time.perf_counter() - started) * 1e3
    return result, taken, report


def _place(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """The node before which the effective weight comes: its first user, or a region before it.

    Autograd takes the backward pass in the reverse order of the forward. At the top of the graph
    all gradients would be routed at its end.
    """
    for node in graph.nodes:
        if node in weight.users or _starts_region(node):
            return node  # type: ignore[no-any-return]
    raise AssertionError(f"{weight.name} has no users")


def _starts_region(node: fx.Node) -> bool:
    """Whether gradients, or what a tensor means, may be others from here on."""
    name = str(getattr(node.target, "__name__", node.target))
    return name in ("_set_grad_enabled", "_enter_inference_mode") or "increment_nesting" in name


def use_weights_themselves(graph: fx.Graph) -> None:
    """Put each weight in place of its ``effective_weight`` in a joint graph, which is changed."""
    effective_weight = torch.ops.resu_compile.effective_weight.default
    for node in graph.find_nodes(op="call_function", target=effective_weight):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
