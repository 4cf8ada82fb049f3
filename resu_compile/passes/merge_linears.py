"""Analysis: which linear layers read one input and can be one product (q, k and v; gate and up).

    q = F.linear(x, wq); k = F.linear(x, wk, bk); v = F.linear(x, wv)   ==>   [(0, 1, 2)]

Nothing is rewritten; ``passes/sparse_matmul.py`` does that where the merged product is faster.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

from torch import Tensor, fx

from resu_compile.passes.find_weights import WeightSite
from resu_compile.passes.fx_utils import call_name, writes

# what may change x, or the dtype of a product, between two layers
_BARRIERS = ("enter_autocast", "exit_autocast")


def find_mergeable(
    gm: fx.GraphModule, sites: Sequence[WeightSite], candidates: Collection[int]
) -> list[tuple[int, ...]]:
    """Groups of positions in ``sites``, two or more in each, in graph order.

    Members are of the form ``linear``, of different weights of one dtype and device, with no bias
    or one that is an input of the graph. Between them the graph neither writes to a tensor nor
    enters or leaves autocast.

    Args:
        gm: the graph that ``sites`` were found in.
        sites: what ``find_weights`` found in ``gm``.
        candidates: positions in ``sites`` that may be merged.
    """
    stretch, stretches = 0, {}
    for node in gm.graph.nodes:
        stretches[node] = stretch
        if node.op in ("call_function", "call_method") and _is_barrier(node):
            stretch += 1
    groups: dict[Hashable, list[int]] = {}
    for position in sorted(candidates):
        site = sites[position]
        if site.form != "linear" or site.node not in stretches:
            continue
        if site.bias is not None and site.bias.op != "placeholder":
            continue  # it may be computed between the layers
        group = groups.setdefault(_kind(site, stretches[site.node]), [])
        if all(sites[other].index != site.index for other in group):
            group.append(position)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _is_barrier(node: fx.Node) -> bool:
    return call_name(node) in _BARRIERS or writes(node)


def _kind(site: WeightSite, stretch: int) -> Hashable:
    def of(node: fx.Node | None) -> tuple[object, ...]:
        value = None if node is None else node.meta.get("example_value")
        return (value.dtype, value.device) if isinstance(value, Tensor) else ()

    return site.x, stretch, of(site.node), of(site.matrix)
