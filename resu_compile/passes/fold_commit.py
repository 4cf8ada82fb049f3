"""Commit a graph for export: masks folded into the weights, weights packed, training ops gone.

Before, a masked parameter with its training op (an eagerly traced graph has none):

    %fc_weight = get_attr[target=fc.weight]
    %w_eff = resu_compile.effective_weight(%fc_weight, %bits, True)
    %y = aten.linear(%x, %w_eff, %fc_bias)

After, with ``pack=True``:

    %values = get_attr[target=fc.weight_values]
    %bits = get_attr[target=fc.weight_bits]
    %unpacked = resu_compile.unpack_weight(%values, %bits, [4, 8])
    %y = aten.linear(%x, %unpacked, %fc_bias)

After, with ``pack=False``, where ``fc.weight`` now holds exact zeros at pruned places:

    %fc_weight = get_attr[target=fc.weight]
    %y = aten.linear(%x, %fc_weight, %fc_bias)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, fx, nn

from resu_compile.errors import ArgumentError, WeightError
from resu_compile.kernels.packed_weight import pack_weight, packed_size_bytes
from resu_compile.passes.base import PassReport

_NAMESPACE = "resu_compile"
PACKED = "resu_compile_packed"  # in GraphModule.meta: weight name -> names of its values and bits


def fold_commit(
    gm: fx.GraphModule,
    masks: Mapping[str, Tensor],
    *,
    pack: bool = True,
    values: Mapping[str, Callable[[], Tensor]] | None = None,
) -> tuple[fx.GraphModule, PassReport]:
    """The committed graph of ``gm``; ``gm`` and its tensors stay as they are.

    Names that are tied to one parameter share one packed weight, stored under the name in
    ``masks``. A parameter without a mask is taken over as it is.

    Args:
        gm: graph whose parameters are ``get_attr`` nodes, as ``ExportedProgram.module()`` gives.
        masks: parameter name -> bool mask of the parameter's shape, True = active. Of tied names
            one is enough.
        pack: replace each masked weight by its packed form (kernels/packed_weight.py) wherever
            that is smaller; otherwise keep it dense, with zeros at the pruned places.
        values: parameter name -> function that gives its dense value, of masked parameters whose
            own storage holds none; asked for one after the other.

    Returns:
        The new module, with the names of the packed tensors in ``meta[PACKED]``, and the report:
        what was packed; what stayed dense, or was not found in the
        graph, and why.

    Raises:
        WeightError: a mask does not have the shape of its parameter.
        ArgumentError: the graph holds an operator of this package that has no committed form.
    """
    start = time.perf_counter()
    report = PassReport("fold_commit")
    graph = _copy_graph(gm.graph)
    _drop_training_ops(graph)
    for node in graph.find_nodes(op="get_attr"):  # tied names that nothing reads, mask bits
        if not node.users:
            graph.erase_node(node)
    out = fx.GraphModule(gm, graph)
    reads = _parameter_reads(out)
    packed: dict[str, tuple[str, str]] = {}
    values = {} if values is None else values
    for name, mask in masks.items():
        weight = _parameter(gm, name)
        nodes = [] if weight is None else reads.pop(id(weight), [])
        if weight is None or not nodes:
            report.skipped[name] = "no node of the graph reads it"
            continue
        if mask.shape != weight.shape:
            raise WeightError(
                f"{name}: expected a mask of shape {tuple(weight.shape)} like the parameter, "
                f"got {tuple(mask.shape)}"
            )
        if name in values:
            weight = nn.Parameter(values[name](), weight.requires_grad)
        mask = mask.to(weight.device)
        nnz, dense_bytes = int(mask.count_nonzero()), weight.numel() * weight.itemsize
        packed_bytes = packed_size_bytes(weight.numel(), nnz, weight.itemsize)
        if pack and packed_bytes < dense_bytes:
            packed[name] = _pack(out, name, weight, mask, nodes)
            report.rewritten[name] = (
                f"packed, {nnz} of {weight.numel()} active, {packed_bytes} of {dense_bytes} bytes"
            )
            continue
        _keep_dense(out, name, weight, mask, nodes)
        report.skipped[name] = (
            f"dense: packed form of {packed_bytes} bytes is not smaller than {dense_bytes} bytes"
            if pack
            else f"dense was asked for, {nnz} of {weight.numel()} active"
        )
    out.meta[PACKED] = packed
    out.graph.lint()
    out.recompile()
    report.elapsed_ms = (time.perf_counter() - start) * 1e3
    return out, report


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    """As ``deepcopy``, but the codegen is shared: copying its tree specs warns on torch 2.13."""
    out = fx.Graph()
    copied = out.graph_copy(graph, {}, return_output_node=True)
    result, old = cast("tuple[fx.node.Argument, fx.Node]", copied)
    out.output(result).meta = dict(old.meta)
    out.set_codegen(graph._codegen)
    return out


# -- training ops ----------------------------------------------------------------------------
def _drop_training_ops(graph: fx.Graph) -> None:
    """Replace every operator of this package that exists for training by its plain meaning."""
    for node in list(graph.nodes):
        op = _own_op(node)
        if op == "effective_weight":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif op == "sparse_linear":
            x, weight, bias = node.args[0], node.args[1], node.args[4]
            if weight is None:
                raise ArgumentError(
                    f"fold_commit: expected dense weights, but those of node {node.name!r} are "
                    "packed; export the model, not its compiled graph"
                )
            node.target = torch.ops.aten.linear.default
            node.args = (x, weight, bias)
        elif op not in (None, "unpack_weight"):
            raise ArgumentError(
                f"fold_commit: expected a forward graph, got operator {_NAMESPACE}::{op} at node "
                f"{node.name!r}, which has no committed form; export the model, not its compiled "
                "training graph"
            )


def _own_op(node: fx.Node) -> str | None:
    """Name of this package's operator that ``node`` calls, or None."""
    if node.op != "call_function":
        return None
    packet = getattr(node.target, "overloadpacket", node.target)
    namespace, _, name = str(getattr(packet, "_qualified_op_name", "")).partition("::")
    return name if namespace == _NAMESPACE else None


# -- parameters ------------------------------------------------------------------------------
def _parameter(gm: fx.GraphModule, name: str) -> nn.Parameter | None:
    try:
        return gm.get_parameter(name)
    except AttributeError:
        return None


def _parameter_reads(gm: fx.GraphModule) -> dict[int, list[fx.Node]]:
    """Identity of a parameter -> the ``get_attr`` nodes that read it, under whichever tied name."""
    reads: dict[int, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        parameter = _parameter(gm, str(node.target))
        if parameter is not None:
            reads.setdefault(id(parameter), []).append(node)
    return reads


def _pack(
    gm: fx.GraphModule, name: str, weight: nn.Parameter, mask: Tensor, nodes: list[fx.Node]
) -> tuple[str, str]:
    """Read ``weight`` from two buffers beside it instead of from its ``get_attr`` nodes."""
    values, bits = pack_weight(weight, mask)
    read = nodes[0]
    with gm.graph.inserting_before(read):
        parts = []
        for suffix, part in (("values", values), ("bits", bits)):
            node = gm.graph.get_attr(_add_buffer(gm, f"{name}_{suffix}", part))
            node.meta = {k: v for k, v in read.meta.items() if k != "val"}
            if "val" in read.meta:
                node.meta["val"] = read.meta["val"].new_empty(part.shape, dtype=part.dtype)
            parts.append(node)
        unpacked = gm.graph.call_function(
            torch.ops.resu_compile.unpack_weight.default, (*parts, list(weight.shape))
        )
    unpacked.meta = dict(read.meta)
    if "val" in read.meta:
        unpacked.meta["val"] = read.meta["val"].new_empty(weight.shape)  # row-major, unlike a view
    for node in nodes:
        node.replace_all_uses_with(unpacked)
        gm.graph.erase_node(node)
        _delete(gm, str(node.target))
    return str(parts[0].target), str(parts[1].target)


def _keep_dense(
    gm: fx.GraphModule, name: str, weight: nn.Parameter, mask: Tensor, nodes: list[fx.Node]
) -> None:
    """Read ``weight``, zero at pruned places, under ``name`` in every one of its nodes."""
    if (weight.detach().ne(0) > mask).any():  # a copy: the caller's weight stays
        weight = nn.Parameter(torch.where(mask, weight.detach(), 0), weight.requires_grad)
    for node in nodes:
        _delete(gm, str(node.target))
        node.target = name
    owner, attribute = _owner(gm, name)
    owner.register_parameter(attribute, weight)


def _add_buffer(gm: fx.GraphModule, name: str, value: Tensor) -> str:
    """Register ``value`` under ``name``, or the next free name; the name that it got."""
    owner, attribute = _owner(gm, name)
    free = attribute
    while hasattr(owner, free):
        free += "_"
    owner.register_buffer(free, value)
    return name + free.removeprefix(attribute)


def _owner(gm: fx.GraphModule, name: str) -> tuple[nn.Module, str]:
    """The module that ``name`` lies in, made if need be, and the attribute."""
    path, _, attribute = name.rpartition(".")
    owner: nn.Module = gm
    for part in path.split(".") if path else ():
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    return owner, attribute


def _delete(gm: fx.GraphModule, name: str) -> None:
    owner, attribute = _owner(gm, name)
    if attribute in owner._parameters:  # two nodes may read one name
        delattr(owner, attribute)
