"""Rewrite: a matmul by a masked weight -> the sparse product, where it was measured faster.

    def forward(x, w, b):           def forward(x, w, b, w_packed_0, w_packed_1, w_packed_2):
        y = F.linear(x, w, b)  ==>      return sparse_linear(
        return F.relu(y)                    x, w, [w_packed_0, ...], layout, b, (N, K), plan, "relu"
                                        )

Layers that read one x become one product, which is split again:

    q = F.linear(x, wq)              y = sparse_linear(x, None, [wq_packed_0, ...], ...)
    k = F.linear(x, wk)         ==>  q, k = (part.contiguous() for part in y.split((Nq, Nk), -1))

``plan`` names the kernel for each range of batch sizes, the dense one among them, so one graph with
a dynamic batch never takes the slower path. For inference only.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from resu_compile.errors import ArgumentError
from resu_compile.kernels.plan import Kernel
from resu_compile.kernels.sparse_linear import sparse_linear_autocast
from resu_compile.passes.base import PassReport
from resu_compile.passes.find_weights import WeightSite
from resu_compile.passes.fx_utils import append_placeholder, call_name, copy_graph_module, dims


@dataclass(frozen=True)
class SparseCall:
    """One call of the sparse product.

    Attributes:
        sites: positions of what it replaces: one, or several of one x and of form ``linear``.
        source: names the packed weight; calls with equal sources share their inputs.
        layout: ``PackedLinear.layout`` of the weight.
        tensors: how many tensors it is packed in.
        rows: output features of each site.
        columns: input features.
        plan: the ``Kernel`` of each bucket of row counts.
        keeps_dense: pass the dense weight along; only for a single site.
    """

    sites: tuple[int, ...]
    source: Hashable
    layout: tuple[int, ...]
    tensors: int
    rows: tuple[int, ...]
    columns: int
    plan: tuple[int, ...]
    keeps_dense: bool = True

    def __post_init__(self) -> None:
        """Check that a merged call asks for no dense weight."""
        if len(self.sites) != len(self.rows) or not self.sites:
            raise ArgumentError(
                f"rows: expected one number for each of the sites {self.sites}, got {self.rows}"
            )
        if self.keeps_dense and len(self.sites) > 1:
            raise ArgumentError(
                "keeps_dense: expected False where sites are merged, whose dense weights lie "
                "apart, got True"
            )


def insert_sparse_matmuls(
    gm: fx.GraphModule, sites: Sequence[WeightSite], chosen: Sequence[SparseCall]
) -> tuple[fx.GraphModule, list[Hashable], PassReport]:
    """A copy of ``gm`` with sparse products at the chosen sites.

    An activation that is all that reads a product becomes part of it.

    Args:
        gm: a graph as Dynamo captures it; not changed.
        sites: what ``find_weights`` found in ``gm``.
        chosen: the calls to make; sites of none stay as they are.

    Returns:
        The new graph module; the sources of its further inputs, in order, each bringing its
        tensors; the report.
    """
    started = time.perf_counter()
    report = PassReport("sparse_matmul")
    result = copy_graph_module(gm)
    twins = dict(zip(gm.graph.nodes, result.graph.nodes, strict=True))
    replaced = {position for call in chosen for position in call.sites}
    for position, site in enumerate(sites):
        if position not in replaced:
            report.skipped[site.node.name] = site.reason or "dense measured faster"
    packed: dict[Hashable, list[fx.Node]] = {}
    # in graph order: a later site may take an earlier one's product as its x
    for call in sorted(chosen, key=lambda call: call.sites):
        first = sites[call.sites[0]]
        if call.source not in packed:
            name = f"{first.weight}_{'t_' * first.transposed}packed"
            packed[call.source] = [
                append_placeholder(result.graph, f"{name}_{i}") for i in range(call.tensors)
            ]
        kernels = ", ".join(dict.fromkeys(Kernel(kernel).name for kernel in call.plan))
        if len(call.sites) == 1:
            activation = _replace(result.graph, first, twins, packed[call.source], call)
            by = f"{kernels}, then {activation}" if activation != "none" else kernels
        else:
            _merge(result.graph, [sites[i] for i in call.sites], twins, packed[call.source], call)
            by = f"{kernels}, with {len(call.sites) - 1} of the same input"
        for position in call.sites:
            report.rewritten[sites[position].node.name] = f"sparse_linear by {by}"
    result.graph.lint()
    result.recompile()
    report.elapsed_ms = (time.perf_counter() - started) * 1e3
    return result, list(packed), report


def drop_unused(gm: fx.GraphModule, positions: Iterable[int]) -> set[int]:
    """Erase those of the placeholders at ``positions`` that nothing reads, in place.

    Views of them that nothing reads go first. Returns the positions that are gone.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    gone = set()
    for position in positions:
        node = placeholders[position]
        for user in list(node.users):
            _erase_dead(gm.graph, user)
        if not node.users:
            gm.graph.erase_node(node)
            gone.add(position)
    gm.recompile()
    return gone


_HARMLESS = frozenset({"t", "T", "mT", "transpose", "swapaxes", "permute", "contiguous", "to"})


def _erase_dead(graph: fx.Graph, node: fx.Node) -> None:
    if node.op == "output" or call_name(node) not in _HARMLESS:
        return
    for user in list(node.users):
        _erase_dead(graph, user)
    if not node.users:
        graph.erase_node(node)


# -- one call ----------------------------------------------------------------------------------
def _replace(
    graph: fx.Graph,
    site: WeightSite,
    twins: dict[fx.Node, fx.Node],
    packed: list[fx.Node],
    call: SparseCall,
) -> str:
    """Put the product in place of ``site``; returns the activation that went along."""
    assert site.x is not None
    assert site.matrix is not None
    node, x = twins[site.node], twins[site.x]
    bias = twins[site.bias] if site.bias is not None else None
    activation, activated = "none", None
    if site.form != "matmul_left":
        activation, activated = _activation_of(site.node)
    with graph.inserting_before(node):
        weight = twins[site.matrix] if call.keeps_dense else None
        if weight is not None and site.form == "matmul_right":
            weight = graph.call_method("t", (weight,))
        if site.form == "matmul_left":  # W @ x = (x^T W^T)^T
            x = graph.call_method("transpose", (x, -1, -2))
        product = graph.call_function(
            sparse_linear_autocast, _arguments(x, weight, packed, bias, call, activation)
        )
        if site.form == "matmul_left":
            product = graph.call_method("transpose", (product, -1, -2))
            product = graph.call_method("contiguous", (product,))  # strides as matmul's
    _stand_in(graph, site.node, product, twins)
    if activated is not None:
        _stand_in(graph, activated, product, twins)
    return activation


def _merge(
    graph: fx.Graph,
    sites: Sequence[WeightSite],
    twins: dict[fx.Node, fx.Node],
    packed: list[fx.Node],
    call: SparseCall,
) -> None:
    """Put one product in place of ``sites``, and its parts where each of them was read."""
    first = sites[0]
    assert first.x is not None
    with graph.inserting_before(twins[first.node]):
        bias = _joined_bias(graph, sites, twins, call.rows)
        product = graph.call_function(
            sparse_linear_autocast,
            _arguments(twins[first.x], None, packed, bias, call, "none"),
        )
        split = graph.call_method("split", (product, list(call.rows), -1))
        # contiguous, as the layers' own results: what follows may rely on it
        parts = [
            graph.call_method("contiguous", (graph.call_function(operator.getitem, (split, i)),))
            for i in range(len(sites))
        ]
    for site, part in zip(sites, parts, strict=True):
        _stand_in(graph, site.node, part, twins)


def _arguments(
    x: fx.Node,
    weight: fx.Node | None,
    packed: list[fx.Node],
    bias: fx.Node | None,
    call: SparseCall,
    activation: str,
) -> tuple[Any, ...]:
    shape, plan = [sum(call.rows), call.columns], [int(kernel) for kernel in call.plan]
    return x, weight, packed, list(call.layout), bias, shape, plan, activation


def _joined_bias(
    graph: fx.Graph, sites: Sequence[WeightSite], twins: dict[fx.Node, fx.Node], rows: Sequence[int]
) -> fx.Node | None:
    given = [site.bias for site in sites if site.bias is not None]
    if not given:
        return None
    like = twins[given[0]]
    parts = [
        twins[site.bias]
        if site.bias is not None
        else graph.call_method("new_zeros", (like, [count]))
        for site, count in zip(sites, rows, strict=True)
    ]
    return graph.call_function(torch.cat, (parts,))


def _stand_in(
    graph: fx.Graph, original: fx.Node, product: fx.Node, twins: dict[fx.Node, fx.Node]
) -> None:
    """Let ``product`` be read wherever the twin of ``original`` was."""
    node = twins[original]
    if "example_value" in node.meta:
        product.meta["example_value"] = node.meta["example_value"]
    node.replace_all_uses_with(product)
    graph.erase_node(node)
    twins[original] = product


# -- activations -------------------------------------------------------------------------------
def _activation_of(product: fx.Node) -> tuple[str, fx.Node | None]:
    """The activation that is the only reader of ``product``, and its node."""
    if len(product.users) != 1:
        return "none", None
    (node,) = product.users
    name = call_name(node) if node.op in ("call_function", "call_method") else ""
    known = {"relu": ("inplace",), "silu": ("inplace",), "gelu": ("approximate",)}.get(name)
    if known is None or node.all_input_nodes != [product] or dims(node) < 0:
        return "none", None
    before, after = product.meta.get("example_value"), node.meta["example_value"]
    if not isinstance(before, Tensor) or before.dtype != after.dtype:
        return "none", None
    values = dict(zip(("input", *known), node.args, strict=False)) | dict(node.kwargs)
    if set(values) - {"input", "self", *known}:
        return "none", None
    if name == "gelu" and values.get("approximate", "none") != "none":
        return ("gelu_tanh", node) if values["approximate"] == "tanh" else ("none", None)
    return name, node
