"""Rewrite: a matmul by a masked weight -> the sparse product, where it was measured faster.

    def forward(x, w, b):            def forward(x, w, b, w_ptr, w_col, w_val):
        return F.linear(x, w, b) ==>     return sparse_linear(x, w, w_ptr, w_col, w_val, b, buckets)

``buckets`` says for which batch sizes the sparse kernel runs; for all others the op runs the dense
product, so one graph with a dynamic batch never takes the slower path. For inference only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import fx

from resu_compile.kernels.sparse_linear import sparse_linear_autocast
from resu_compile.passes.base import PassReport
from resu_compile.passes.find_weights import WeightSite
from resu_compile.passes.fx_utils import append_placeholder, copy_graph_module


def insert_sparse_matmuls(
    gm: fx.GraphModule, sites: Sequence[WeightSite], buckets: Mapping[int, int]
) -> tuple[fx.GraphModule, list[tuple[int, bool]], PassReport]:
    """A copy of ``gm`` with sparse products at the chosen sites.

    Args:
        gm: a graph as Dynamo captures it; not changed.
        sites: what ``find_weights`` found in ``gm``.
        buckets: position in ``sites`` -> bit mask of the batch buckets that take the sparse kernel;
            sites that are missing or 0 stay dense.

    Returns:
        The new graph module; for each triple of further inputs (ptr, col, val) the position of the
        weight's placeholder and whether its transpose is packed; the report.
    """
    started = time.perf_counter()
    report = PassReport("sparse_matmul")
    result = copy_graph_module(gm)
    twins = dict(zip(gm.graph.nodes, result.graph.nodes, strict=True))
    packed: dict[tuple[int, bool], tuple[fx.Node, ...]] = {}
    for position, site in enumerate(sites):
        chosen = buckets.get(position, 0)
        if site.form is None or not chosen:
            report.skipped[site.node.name] = site.reason or "dense measured faster"
            continue
        key = (site.index, site.transposed)
        if key not in packed:
            packed[key] = tuple(
                append_placeholder(result.graph, f"{site.weight}_{'t_' * key[1]}{part}")
                for part in ("ptr", "col", "val")
            )
        # a later site may take this one's product as its x
        twins[site.node] = _replace(result.graph, site, twins, packed[key], chosen)
        report.rewritten[site.node.name] = f"sparse_linear, buckets {chosen:b}"
    result.graph.lint()
    result.recompile()
    report.elapsed_ms = (time.perf_counter() - started) * 1e3
    return result, list(packed), report


def _replace(
    graph: fx.Graph,
    site: WeightSite,
    twins: Mapping[fx.Node, fx.Node],
    csr: tuple[fx.Node, ...],
    buckets: int,
) -> fx.Node:
    assert site.x is not None
    assert site.matrix is not None
    node, x, weight = twins[site.node], twins[site.x], twins[site.matrix]
    bias = twins[site.bias] if site.bias is not None else None
    with graph.inserting_before(node):
        if site.form == "matmul_right":
            weight = graph.call_method("t", (weight,))
        if site.form == "matmul_left":  # W @ x = (x^T W^T)^T
            x = graph.call_method("transpose", (x, -1, -2))
        product = graph.call_function(sparse_linear_autocast, (x, weight, *csr, bias, buckets))
        if site.form == "matmul_left":
            product = graph.call_method("transpose", (product, -1, -2))
            product = graph.call_method("contiguous", (product,))  # strides as matmul's
    if "example_value" in node.meta:
        product.meta["example_value"] = node.meta["example_value"]
    node.replace_all_uses_with(product)
    graph.erase_node(node)
    return product
