"""Undo the packing of ``fold_commit`` once, when an artifact is loaded.

Before:

    %values = get_attr[target=fc.weight_values]
    %bits = get_attr[target=fc.weight_bits]
    %unpacked = resu_compile.unpack_weight(%values, %bits, [4, 8])
    %y = aten.linear(%x, %unpacked, %fc_bias)

After, so that no call decodes anything:

    %weight = get_attr[target=fc.weight]
    %y = aten.linear(%x, %weight, %fc_bias)
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import fx, nn

from resu_compile.kernels.packed_weight import check_packed, unpack_weight_reference
from resu_compile.passes.base import PassReport


def unpack_weights(gm: fx.GraphModule, names: Mapping[str, str]) -> PassReport:
    """Replace each packed weight of ``gm`` by a dense parameter, in place.

    Args:
        gm: committed graph; its packed buffers are deleted.
        names: name of a values buffer -> name of the parameter to make of it.

    Returns:
        The report, by parameter name.

    Raises:
        ArgumentError: a bitmap does not fit its values or its shape.
    """
    start = time.perf_counter()
    report = PassReport("unpack_weights")
    target = torch.ops.resu_compile.unpack_weight.default
    for node in gm.graph.find_nodes(op="call_function", target=target):
        reads, shape = node.args[:2], node.args[2]
        values, bits = (gm.get_buffer(read.target) for read in reads)
        check_packed(values, bits, shape)
        weight = unpack_weight_reference(values, bits, shape)  # the op would check once more
        dense = nn.Parameter(weight, requires_grad=False)
        name = names[reads[0].target]
        path, _, attribute = name.rpartition(".")
        gm.get_submodule(path).register_parameter(attribute, dense)
        with gm.graph.inserting_before(node):
            read = gm.graph.get_attr(name)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        for old in (node, *reads):
            gm.graph.erase_node(old)
        for old in reads:
            path, _, attribute = old.target.rpartition(".")
            delattr(gm.get_submodule(path), attribute)
        report.rewritten[name] = f"dense, {values.numel()} of {dense.numel()} active"
    gm.graph.lint()
    gm.recompile()
    report.elapsed_ms = (time.perf_counter() - start) * 1e3
    return report
