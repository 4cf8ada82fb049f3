"""Move the devices that a traced graph holds as constants.

Before, moved to ``cuda:0``:

    %arange = aten.arange.default(4, device=cpu)

After:

    %arange = aten.arange.default(4, device=cuda:0)
"""

from __future__ import annotations

import time

import torch
from torch import fx

from resu_compile.passes.base import PassReport


def move_device(gm: fx.GraphModule, device: torch.device) -> PassReport:
    """Let every node of ``gm`` and of its subgraphs work on ``device``, in place.

    Parameters and buffers are not touched; ``gm.to(device)`` moves those.

    Args:
        gm: ATen graph that was traced for one device.
        device: where the graph is to run.

    Returns:
        The report: node name -> the device it had and has.
    """
    start = time.perf_counter()
    report = PassReport("move_device")
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            old = _device_of(node)
            if old is None or old == device:
                continue
            if "device" in node.kwargs:
                node.update_kwarg("device", device)
            else:
                node.update_arg(1, device)
            report.rewritten[node.name] = f"{old} to {device}"
        module.recompile()
    report.elapsed_ms = (time.perf_counter() - start) * 1e3
    return report


def _device_of(node: fx.Node) -> torch.device | None:
    """The device that the node's arguments name, or None."""
    if node.op != "call_function":
        return None
    device = node.kwargs.get("device")
    if node.target is torch.ops.aten.to.device and device is None:
        device = node.args[1]
    return None if device is None else torch.device(str(device))
