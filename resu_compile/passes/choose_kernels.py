"""Give each matmul by a committed weight the kernels that run fastest on one device.

Before:

    %weight = get_attr[target=fc.weight]
    %y = aten.linear(%x, %weight, %fc_bias)

After, where the plan holds more than dense (of one packed tensor here, N = 4, K = 8):

    %weight = get_attr[target=fc.weight]
    %packed = get_attr[target=fc.weight_packed_0]
    %y = resu_compile.sparse_linear(%x, %weight, [%packed], [...], %fc_bias, [4, 8], [...], none)

After, with ``release_dense=True``, ``None`` instead of ``%weight``, and the parameter is gone.
Weights that then share their ``x`` are packed as one:

    %y = resu_compile.sparse_linear(%x, None, [%packed], [...], None, [12, 8], [...], none)
    %parts = aten.split_with_sizes(%y, [4, 4, 4], -1)

Running the pass again, for another device, revises its choices.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import fx, nn

from resu_compile.passes.base import PassReport
from resu_compile.passes.linear_sites import TRANSPOSES, LinearSite, find_linear_sites
from resu_compile.passes.packed_sites import (
    PACKED_SITES,
    Held,
    PackedRecord,
    add_buffers,
    drop_tensor,
    owner_of,
    restore_dense_products,
    set_parameter,
    turned,
)

if TYPE_CHECKING:
    from resu_compile.runtime.plans import Plan

_aten = torch.ops.aten


def choose_kernels(
    gm: fx.GraphModule,
    sparsities: Mapping[str, float],
    device: torch.device,
    threshold: float | Literal["auto"],
    *,
    release_dense: bool = False,
    held: Held | None = None,
) -> PassReport:
    """Choose the kernels of every matmul by a named weight of ``gm``, in place.

    One weight is dense at a time, if all are released: the device needs room for the packed ones
    and the largest.

    Args:
        gm: ATen graph on ``device``. The packed tensors of a weight become buffers beside it, named
            after it.
        sparsities: parameter name -> share of zeros in [0, 1].
        device: where the graph runs.
        threshold: ``"auto"`` takes the kernels that were measured faster than dense; a number
            forces the sparse ones from that sparsity on, 1.0 turns them off.
        release_dense: keep no dense copy of a weight that is read by sparse products alone.
        held: parameter name -> function that makes its dense value on ``device``, for parameters
            that ``gm`` does not have yet; emptied.

    Returns:
        The report, by weight name.
    """
    start = time.perf_counter()
    report = PassReport("choose_kernels")
    held = {} if held is None else held
    before = {node for node in gm.graph.nodes if not node.users}
    held |= restore_dense_products(gm)
    for read in gm.graph.find_nodes(op="get_attr"):
        if read.target in held:  # a place for what is made later
            value = read.meta["val"]
            empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
            set_parameter(gm, read.target, empty)
    sites = [site for site in find_linear_sites(gm.graph) if site.name in sparsities]
    for group in _groups(sites, merge=release_dense):
        _choose(gm, group, sparsities, device, threshold, release_dense, held, report)
    for name in sorted(sparsities.keys() - {site.name for site in sites}):
        report.skipped[name] = "dense: not used by a plain matmul"
    for name in list(held):
        make = held.pop(name)
        if device.type != "meta":
            set_parameter(gm, name, make())
    _erase_unused(gm.graph, before)
    gm.graph.lint()
    gm.recompile()
    report.elapsed_ms = (time.perf_counter() - start) * 1e3
    return report


# -- which weights go together ---------------------------------------------------------------
def _groups(sites: Sequence[LinearSite], *, merge: bool) -> list[list[list[LinearSite]]]:
    """Weights that are packed as one, each with all of its sites.

    Several weights only with ``merge``: each read by one site, all of the same x and dtype, with a
    bias each or none.
    """
    by_name: dict[str, list[LinearSite]] = {}
    for site in sites:
        by_name.setdefault(site.name, []).append(site)
    groups: dict[object, list[list[LinearSite]]] = {}
    for name, own in by_name.items():
        site = own[0]
        key: object = name
        if merge and len(own) == 1 and _only_reads(site):
            key = (site.x, site.read.meta["val"].dtype, site.bias is None)
        groups.setdefault(key, []).append(own)
    return list(groups.values())


def _only_reads(site: LinearSite) -> bool:
    """Whether nothing but ``site`` reads its weight, and its bias is stored."""
    node = site.read
    if site.bias is not None and site.bias.op != "get_attr":
        return False
    while len(node.users) == 1:
        (user,) = node.users
        if user is site.node:
            return True
        if user.target not in TRANSPOSES:
            return False
        node = user
    return False


def _choose(
    gm: fx.GraphModule,
    group: list[list[LinearSite]],
    sparsities: Mapping[str, float],
    device: torch.device,
    threshold: float | Literal["auto"],
    release_dense: bool,
    held: Held,
    report: PassReport,
) -> None:
    """Rewrite the sites of weights that are packed as one."""
    names = [own[0].name for own in group]
    sites = [site for own in group for site in own]
    shape = (sum(own[0].shape[0] for own in group), sites[0].shape[1])
    pruned = sum(sparsities[own[0].name] * own[0].shape[0] for own in group) / max(shape[0], 1)
    # the parameter may be read elsewhere too: then its dense copy stays
    release = release_dense and all(_read_by(gm, own) for own in group)
    plan = _plan(sites, shape, pruned, device, threshold, release)
    if plan is None or plan.is_dense:
        for name in names:
            report.skipped[name] = (
                "dense: threshold is 1.0"
                if plan is None
                else f"dense: no batch size where sparse is taken on {device} ({plan.source})"
            )
        return  # what is held is made in the end
    from resu_compile.kernels.packed_linear import pack_linear
    from resu_compile.kernels.packed_weight import as_integers

    weights = [
        held.pop(name)() if name in held else gm.get_parameter(name).detach() for name in names
    ]
    if not release:
        for name, weight in zip(names, weights, strict=True):
            set_parameter(gm, name, weight)
    rows = [  # (out, in) each
        weight.t() if own[0].transposed else weight
        for weight, own in zip(weights, group, strict=True)
    ]
    del weights
    whole = rows[0] if len(rows) == 1 else torch.cat(rows)
    del rows
    # by their bits: -0 is kept, so that what is unpacked again is what was packed
    packed = pack_linear(whole, as_integers(whole).ne(0), plan.needed)
    del whole
    if release:
        for name in names:
            drop_tensor(gm, name)
    buffers = add_buffers(gm, names[0], packed.tensors())
    records = dict(gm.meta.get(PACKED_SITES, {}))
    records[buffers[0]] = tuple(
        PackedRecord(own[0].name, own[0].transposed, own[0].shape[0], own[0].read.meta["val"].dtype)
        for own in group
    )
    gm.meta[PACKED_SITES] = records
    arguments = (buffers, packed.layout, shape, [int(kernel) for kernel in plan.kernels])
    if len(group) == 1:
        for site in sites:
            _make_sparse(gm, site, release, arguments)
    else:
        _make_merged(gm, sites, arguments)
    together = f", packed with {', '.join(names)}" if len(names) > 1 else ""
    for name in names:
        report.rewritten[name] = f"sparse_linear on {device}: {describe(plan.kernels)}{together}"


def _read_by(gm: fx.GraphModule, sites: Sequence[LinearSite]) -> bool:
    """Whether ``sites`` are all the readers of their weight, under all of its names."""
    name = sites[0].name
    parameter = gm.get_parameter(name)
    nodes = {site.node for site in sites}
    for read in gm.graph.find_nodes(op="get_attr"):
        if read.target != name and not _is_same(gm, str(read.target), parameter):
            continue
        readers = list(read.users)
        while readers:
            reader = readers.pop()
            if reader.target in TRANSPOSES:
                readers += reader.users
            elif reader not in nodes:
                return False
    return True


def _is_same(gm: fx.GraphModule, name: str, parameter: nn.Parameter) -> bool:
    owner, attribute = owner_of(gm, name)
    return owner._parameters.get(attribute) is parameter


def _plan(
    sites: Sequence[LinearSite],
    shape: tuple[int, int],
    sparsity: float,
    device: torch.device,
    threshold: float | Literal["auto"],
    release: bool,
) -> Plan | None:
    """The plan of one weight; None if the sparse kernels are off."""
    if threshold == 1.0 and not release:  # not even the measuring code is imported
        return None
    from resu_compile.runtime.plans import choose_plan

    rows = {site.rows for site in sites}
    return choose_plan(
        device,
        *shape,
        sparsity,
        sites[0].dtype,
        rows.pop() if len(rows) == 1 else None,
        threshold,
        cuda_graphs=device.type == "cuda",
        release_dense=release,
    )


def describe(kernels: Sequence[int]) -> str:
    """The kernels of a plan in words: ``"ROWS up to 8 rows, TILES up to 64, then UNPACK"``."""
    from resu_compile.kernels.plan import BUCKET_ROWS, Kernel

    last = [i for i in range(len(kernels)) if kernels[i : i + 1] != kernels[i + 1 : i + 2]]
    if len(last) == 1:
        return Kernel(kernels[0]).name
    parts = [f"{Kernel(kernels[i]).name} up to {BUCKET_ROWS[i]}" for i in last[:-1]]
    return f"{', '.join(parts)} rows, then {Kernel(kernels[-1]).name}"


# -- rewriting -------------------------------------------------------------------------------
_Arguments = tuple[list[str], Sequence[int], tuple[int, int], list[int]]


def _arguments(
    gm: fx.GraphModule,
    x: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
    arguments: _Arguments,
) -> tuple[fx.node.Argument, ...]:
    """What the operator is called with; reads of the buffers come to the graph's present place."""
    buffers, layout, shape, plan = arguments
    parts = []
    for name in buffers:
        part, value = gm.graph.get_attr(name), gm.get_buffer(name)
        part.meta["val"] = x.meta["val"].new_empty(value.shape, dtype=value.dtype)
        parts.append(part)
    return (x, weight, parts, list(layout), bias, list(shape), plan, "none")


def _make_sparse(
    gm: fx.GraphModule, site: LinearSite, release: bool, arguments: _Arguments
) -> None:
    with gm.graph.inserting_before(site.node):
        weight = None
        if not release:
            weight = turned(gm, site.read) if site.transposed else site.read
        args = _arguments(gm, site.x, weight, site.bias, arguments)
    # in place: the product may be the x of another site
    site.node.target, site.node.args, site.node.kwargs = _sparse_linear(), args, {}


def _make_merged(gm: fx.GraphModule, sites: Sequence[LinearSite], arguments: _Arguments) -> None:
    """One product before the first site, and its columns in the place of each."""
    graph, sizes = gm.graph, [site.shape[0] for site in sites]
    example = sites[0].node.meta["val"]
    with graph.inserting_before(sites[0].node):
        bias = None
        if sites[0].bias is not None:
            # parameters and buffers: reading them earlier gives the same
            biases = [graph.node_copy(site.bias) for site in sites if site.bias is not None]
            bias = graph.call_function(_aten.cat.default, (biases,))
            bias.meta["val"] = torch.cat([node.meta["val"] for node in biases])
        args = _arguments(gm, sites[0].x, None, bias, arguments)
        product = graph.call_function(_sparse_linear(), args)
        product.meta["val"] = example.new_empty((*example.shape[:-1], sum(sizes)))
        parts = graph.call_function(_aten.split_with_sizes.default, (product, sizes, -1))
        parts.meta["val"] = list(product.meta["val"].split(sizes, -1))
        for i, site in enumerate(sites):
            part = graph.call_function(operator.getitem, (parts, i))
            part.meta["val"] = parts.meta["val"][i]
            # dense in memory, as the product was; with one row of x nothing is copied
            site.node.target, site.node.args, site.node.kwargs = (
                _aten.contiguous.default,
                (part,),
                {},
            )


def _sparse_linear() -> torch._ops.OpOverload:
    from resu_compile.kernels import sparse_linear  # noqa: F401  # registers the operator

    op: torch._ops.OpOverload = torch.ops.resu_compile.sparse_linear.default
    return op


def _erase_unused(graph: fx.Graph, keep: set[fx.Node]) -> None:
    """Erase reads and transposes that nothing uses any more; what nothing used before stays."""
    for node in reversed(graph.nodes):
        stale = node.op == "get_attr" or node.target in TRANSPOSES
        if stale and not node.users and node not in keep:
            graph.erase_node(node)
