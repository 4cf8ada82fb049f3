"""Rewrite: the value of a released weight -> the weight, which sparse products then replace.

    def forward(x, w):                      def forward(x, w):
        v = released_value(w)        ==>        return F.linear(x, w)
        return F.linear(x, v)

Graphs of other backends keep the op and unpack the weight (runtime/released.py).
"""

from __future__ import annotations

import torch
from torch import fx

from resu_compile.runtime import released as _operator  # noqa: F401  registers the op


def use_released_weights_themselves(gm: fx.GraphModule) -> None:
    """Take the op out of ``gm`` and of the graphs that it calls, in place."""
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        nodes = [node for node in module.graph.nodes if _is_value(node)]
        for node in nodes:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        if nodes:
            module.recompile()


def _is_value(node: fx.Node) -> bool:
    op = torch.ops.resu_compile.released_value
    return node.op == "call_function" and node.target in (op, op.default)
