"""Undo the packing of ``fold_commit`` once, when an artifact is loaded.

Before:

    %values = get_attr[target=fc.weight_values]
    %bits = get_attr[target=fc.weight_bits]
    %unpacked = resu_compile.unpack_weight(%values, %bits, [4, 8])
    %y = aten.linear(%x, %unpacked, %fc_bias)

After, so that no call decodes anything:

    %weight = get_attr[target=fc.weight]
    %y = aten.linear(%x, %weight, %fc_bias)

The parameter itself is not made here: ``choose_kernels`` asks for one weight after another, and
keeps what its kernels need.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from resu_compile.kernels.packed_weight import check_packed, unpack_weight_reference
from resu_compile.passes.base import PassReport
from resu_compile.passes.packed_sites import Held


def unpack_weights(
    gm: fx.GraphModule, names: Mapping[str, str], device: torch.device
) -> tuple[Held, PassReport]:
    """Let ``gm`` read parameters in place of packed weights; their values come out of functions.

    Args:
        gm: committed graph; its packed buffers are taken out of it, the parameters are not in it.
        names: name of a values buffer -> name of the parameter that it is packed from.
        device: where the functions make the dense weights.

    Returns:
        Parameter name -> function that makes its dense value; the report, by the same name. A
        function raises an ``ArgumentError`` where a bitmap does not fit its values or its shape.
    """
    start = time.perf_counter()
    report = PassReport("unpack_weights")
    held: Held = {}
    target = torch.ops.resu_compile.unpack_weight.default
    for node in gm.graph.find_nodes(op="call_function", target=target):
        reads, shape = node.args[:2], node.args[2]
        values, bits = (gm.get_buffer(read.target) for read in reads)
        name = names[reads[0].target]
        held[name] = functools.partial(_unpacked, values, bits, tuple(shape), device)
        with gm.graph.inserting_before(node):
            read = gm.graph.create_node("get_attr", name)  # no parameter yet, no warning
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        for old in (node, *reads):
            gm.graph.erase_node(old)
        for old in reads:
            path, _, attribute = old.target.rpartition(".")
            delattr(gm.get_submodule(path), attribute)
        report.rewritten[name] = f"dense, {values.numel()} of {math.prod(shape)} active"
    gm.recompile()
    report.elapsed_ms = (time.perf_counter() - start) * 1e3
    return held, report


def _unpacked(values: Tensor, bits: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    values, bits = values.to(device), bits.to(device)
    check_packed(values, bits, shape)
    return unpack_weight_reference(values, bits, shape)  # the op would check once more
