"""Weights of a graph that are packed for sparse products: their buffers, and the way back.

Before, of two weights that are packed as one and of which no dense copy is left:

    %y = resu_compile.sparse_linear(%x, None, [%packed], [...], None, [8, 8], [...], none)
    %parts = aten.split_with_sizes(%y, [4, 4], -1)

After, with a function for each weight that unpacks it:

    %q = aten.linear(%x, %q_weight)
    %k = aten.linear(%x, %k_weight)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

_aten = torch.ops.aten
PACKED_SITES = "resu_compile_packed_sites"  # in GraphModule.meta: first packed buffer -> weights

Held = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class PackedRecord:
    """One of the weights that are packed as one: what its parameter was."""

    name: str
    transposed: bool
    rows: int
    dtype: torch.dtype


def restore_dense_products(gm: fx.GraphModule) -> Held:
    """Turn the sparse products of an earlier choice into dense ones, in place.

    Returns:
        name -> function that unpacks a weight of which no dense copy is left; its parameter is on
        meta.
    """
    held: Held = {}
    records: Mapping[str, tuple[PackedRecord, ...]] = gm.meta.pop(PACKED_SITES, {})
    done: set[str] = set()
    for node in list(gm.graph.nodes):
        if not _is_sparse(node):
            continue
        buffers = [str(part.target) for part in node.args[2]]
        weights = records[buffers[0]]
        if buffers[0] not in done:
            done.add(buffers[0])
            if node.args[1] is None:
                held |= _release_undone(gm, node, buffers, weights)
            for name in buffers:
                drop_tensor(gm, name)
        _make_dense(gm, node, weights)
    return held


def _is_sparse(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet, "_qualified_op_name", "") == "resu_compile::sparse_linear"


def _release_undone(
    gm: fx.GraphModule, node: fx.Node, buffers: Sequence[str], weights: Sequence[PackedRecord]
) -> Held:
    """Readers of the weights that ``node`` holds packed, and their parameters on meta."""
    from resu_compile.kernels.packed_linear import PackedLinear

    layout, shape = cast("list[int]", node.args[3]), cast("list[int]", node.args[5])
    tensors = [gm.get_buffer(name) for name in buffers]
    packed = PackedLinear.from_tensors(tensors, layout, (shape[0], shape[1]))
    whole = _Unpacked(packed.unpack, [record.rows for record in weights])
    held: Held = {}
    for i, record in enumerate(weights):
        sizes = (shape[1], record.rows) if record.transposed else (record.rows, shape[1])
        set_parameter(gm, record.name, torch.empty(sizes, dtype=record.dtype, device="meta"))
        held[record.name] = functools.partial(whole.take, i, record.transposed)
    return held


class _Unpacked:
    """Weights packed as one; expanded when the first is read, dropped with the last."""

    def __init__(self, unpack: Callable[[], Tensor], rows: list[int]) -> None:
        self._unpack = unpack
        self._rows = rows
        self._parts: dict[int, Tensor] | None = None

    def take(self, position: int, transposed: bool) -> Tensor:
        """The dense value of one weight, as its parameter had it; once."""
        if self._parts is None:
            self._parts = dict(enumerate(self._unpack().split(self._rows)))
        part = self._parts.pop(position)
        return part.t().contiguous() if transposed else part.clone()


def _make_dense(gm: fx.GraphModule, node: fx.Node, weights: Sequence[PackedRecord]) -> None:
    """Dense products in place of a sparse one."""
    graph, (x, _, _, _, bias, *_) = gm.graph, node.args
    parts = None
    if len(weights) == 1:
        places, biases = {0: node}, [bias]
    else:
        (parts,) = node.users
        places = {cast("int", item.args[1]): next(iter(item.users)) for item in parts.users}
        joined = cast("fx.Node | None", bias)
        biases = [None] * len(weights) if joined is None else list(joined.args[0])  # type: ignore[arg-type]
    for i, place in places.items():
        record, weight = weights[i], gm.get_parameter(weights[i].name)
        with graph.inserting_before(place):
            read = graph.get_attr(record.name)
            read.meta["val"] = x.meta["val"].new_empty(weight.shape, dtype=weight.dtype)  # type: ignore[union-attr]
            oriented = turned(gm, read) if record.transposed else read
        place.target, place.args = _aten.linear.default, (x, oriented, biases[i])
    if parts is not None:
        joined = cast("fx.Node | None", node.args[4])
        for old in (*parts.users, parts, node, *(() if joined is None else (joined,))):
            graph.erase_node(old)


def turned(gm: fx.GraphModule, read: fx.Node) -> fx.Node:
    """The transpose of a matrix that ``read`` reads, at the graph's present place."""
    node = gm.graph.call_function(_aten.t.default, (read,))
    node.meta = {**read.meta, "val": read.meta["val"].t()}
    return node


# -- parameters and buffers ------------------------------------------------------------------
def add_buffers(gm: fx.GraphModule, name: str, tensors: Sequence[Tensor]) -> list[str]:
    """Buffers beside the parameter ``name``; their names."""
    owner, attribute = owner_of(gm, name)
    names = []
    for i, tensor in enumerate(tensors):
        free = f"{attribute}_packed_{i}"
        while hasattr(owner, free):
            free += "_"
        owner.register_buffer(free, tensor)
        names.append(name.removesuffix(attribute) + free)
    return names


def set_parameter(gm: fx.GraphModule, name: str, value: Tensor) -> None:
    """Let the parameter ``name`` be ``value``; it stays the same object if it is already."""
    owner, attribute = owner_of(gm, name)
    current = owner._parameters.get(attribute)
    if current is None or current.is_meta or current.data_ptr() != value.data_ptr():
        owner.register_parameter(attribute, nn.Parameter(value, requires_grad=False))


def drop_tensor(gm: fx.GraphModule, name: str) -> None:
    """Take the parameter or buffer ``name`` out of its module, if it is there."""
    owner, attribute = owner_of(gm, name)
    if hasattr(owner, attribute):
        delattr(owner, attribute)


def owner_of(gm: fx.GraphModule, name: str) -> tuple[nn.Module, str]:
    """The module that ``name`` lies in, and the attribute."""
    path, _, attribute = name.rpartition(".")
    return gm.get_submodule(path), attribute
