"""Which products of a graph the sparse operator computes, merged how, and by which kernels.

q = x @ Wq^T,  k = x @ Wk^T,  v = x @ Wv^T   ==>   Product((0, 1, 2), plan of (Nq + Nk + Nv, K))
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from resu_compile.comparison import parse_pattern
from resu_compile.config import CompileConfig
from resu_compile.kernels.packed_linear import PackedLinear, default_format
from resu_compile.kernels.plan import Kernel, batch_bucket
from resu_compile.kernels.sparse_linear import sparse_linear_autocast
from resu_compile.passes.find_weights import WeightSite
from resu_compile.passes.fx_utils import VIEWS, call_name
from resu_compile.passes.merge_linears import find_mergeable
from resu_compile.passes.sparse_matmul import SparseCall, drop_unused
from resu_compile.runtime.controller import Controller
from resu_compile.runtime.dense_release import release
from resu_compile.runtime.packed_cache import Member, packed_of
from resu_compile.runtime.plans import Plan, choose_plan
from resu_compile.state import MaskedWeight


@dataclass(frozen=True)
class Product:
    """A site, or several that share x, that the sparse operator computes.

    Attributes:
        sites: their positions among the sites.
        members: (position of the weight, whether its transpose is packed) of each site.
        plan: which kernel runs when.
        formats: the kernels whose formats are packed.
    """

    sites: tuple[int, ...]
    members: tuple[tuple[int, bool], ...]
    plan: Plan
    formats: frozenset[Kernel]

    def of(self, weights: Mapping[int, MaskedWeight]) -> list[Member]:
        """Its weights, out of those by position."""
        return [(weights[i], transposed) for i, transposed in self.members]

    def packed(self, weights: Mapping[int, MaskedWeight]) -> PackedLinear:
        """Its weights as one, packed as they are now."""
        return packed_of(self.of(weights), self.formats)

    def numel(self, weights: Mapping[int, MaskedWeight]) -> int:
        """Entries of its weights together, active and pruned."""
        return sum(weight.numel for weight, _ in self.of(weights))

    @property
    def source(self) -> Hashable:
        """Names what is packed."""
        return self.members, self.formats

    def call(self, weights: Mapping[int, MaskedWeight]) -> SparseCall:
        """What the graph calls."""
        packed = self.packed(weights)
        return replace(self.outline(weights), layout=packed.layout, tensors=len(packed.tensors()))

    def outline(self, weights: Mapping[int, MaskedWeight]) -> SparseCall:
        """``call`` without packed tensors: of a graph that is only looked at."""
        members = self.of(weights)
        weight, transposed = members[0]
        single = len(self.sites) == 1 and not weight.is_released
        return SparseCall(
            self.sites,
            self.source,
            (0,),
            0,
            tuple(rows_of(member) for member in members),
            weight.shape[0 if transposed else 1],
            tuple(self.plan.kernels),
            keeps_dense=single and Kernel.DENSE in self.plan.kernels,
        )


def rows_of(member: Member) -> int:
    """Output features of a weight."""
    weight, transposed = member
    return weight.shape[1] if transposed else weight.shape[0]


def signature_of(packed: PackedLinear) -> Hashable:
    """What a compiled graph is specialised for."""
    return packed.layout, tuple([(t.shape, t.dtype) for t in packed.tensors()])


def choose_products(
    gm: fx.GraphModule,
    sites: Sequence[WeightSite],
    weights: Mapping[int, MaskedWeight],
    config: CompileConfig,
) -> Iterator[Product]:
    """The products whose plans ask for more than the dense kernel, merged where that wins.

    Args:
        gm: the captured graph.
        sites: its weight sites.
        weights: position of a placeholder -> the masked weight it is.
        config: compile options.
    """
    plans: dict[int, Plan] = {}
    of_controller: dict[Controller, list[int]] = {}
    for position, site in enumerate(sites):
        weight = weights.get(site.index)
        if weight is not None and site.form is not None:
            plans[position] = sparse_plan(site, weight, config)
            of_controller.setdefault(weight.controller, []).append(position)
    merged: set[int] = set()
    for candidates in of_controller.values():
        for group in find_mergeable(gm, sites, candidates):
            chosen = [sites[position] for position in group]
            owners = [weights[site.index] for site in chosen]
            together = merged_plan(chosen, owners, config)
            if _is_better(together, [plans[i] for i in group], rows_and_dtype(chosen[0])[0]):
                merged.update(group)
                yield _product(group, chosen, owners, together)
    for position, plan in plans.items():
        weight = weights[sites[position].index]
        if position not in merged and (not plan.is_dense or weight.is_released):
            yield _product((position,), [sites[position]], [weight], plan)


def release_unused(
    gm: fx.GraphModule, products: Sequence[Product], weights: Mapping[int, MaskedWeight]
) -> bool:
    """Free the dense storage that a rewritten graph does not read; whether there was any.

    Each product is packed and its dense weights freed before the next: the device needs room for
    what is packed and one dense weight, not for both forms of the model.

    Args:
        gm: the graph with its sparse products, packed or in outline; changed.
        products: those that bring its packed weights.
        weights: position of a placeholder -> the masked weight it is.
    """
    reports = {
        i: weight.controller.released
        for i, weight in weights.items()
        if weight.controller.released is not None and not weight.is_released
    }
    placeholders = gm.graph.find_nodes(op="placeholder")
    readers = {i: ", ".join(sorted(_readers(placeholders[i]))) for i in reports}
    unused = drop_unused(gm, reports)
    freed = False
    # small ones first: packing takes several times the memory of a weight
    for product in sorted(products, key=lambda product: product.numel(weights)):
        packed, start = product.packed(weights), 0
        for (index, transposed), member in zip(product.members, product.of(weights), strict=True):
            report = reports.get(index)
            if report is not None and index in unused and not member[0].is_released:
                release(member[0], report, packed, start, transposed)
                freed = freed or member[0].is_released
            start += rows_of(member)
    for index, report in reports.items():
        if report is not None and index not in unused:
            report.kept[weights[index].name] = f"a graph reads it densely: {readers[index]}"
    return freed


def _readers(node: fx.Node) -> set[str]:
    """Names of the calls that read ``node``, itself or through views."""
    names = set()
    for user in node.users:
        name = call_name(user)
        if name == sparse_linear_autocast.__name__:
            name = "linear, at batch sizes that its plan leaves dense"
        names |= _readers(user) if name in VIEWS else {name}
    return names


# -- plans ---------------------------------------------------------------------------------------
def sparse_plan(site: WeightSite, weight: MaskedWeight, config: CompileConfig) -> Plan:
    """Which kernel computes the product at ``site`` at which batch size."""
    return merged_plan([site], [weight], config)


def merged_plan(
    sites: Sequence[WeightSite], weights: Sequence[MaskedWeight], config: CompileConfig
) -> Plan:
    """The same for one product of several sites that share x, each with its weight."""
    rows, dtype = rows_and_dtype(sites[0])
    shapes = [
        (weight.shape[1], weight.shape[0])
        if site.transposed
        else (weight.shape[0], weight.shape[1])
        for site, weight in zip(sites, weights, strict=True)
    ]
    owner, parameter = weights[0].controller, weights[0].parameter
    entries = sum(weight.numel for weight in weights)
    return choose_plan(
        parameter.device,
        sum(out_features for out_features, _ in shapes),
        shapes[0][1],
        1.0 - sum(weight.nnz for weight in weights) / entries if entries else 0.0,
        dtype or parameter.dtype,
        rows,
        config.sparse_threshold,
        cuda_graphs=uses_cuda_graphs(config),
        release_dense=owner.released is not None,
        pattern=_pattern_along_inputs(sites, weights),
    )


def _pattern_along_inputs(
    sites: Sequence[WeightSite], weights: Sequence[MaskedWeight]
) -> tuple[int, int] | None:
    """(n, m) of the pattern that the masks keep along K; None if there is none."""
    name = weights[0].controller.config.pattern
    if name is None:
        return None
    pattern = parse_pattern(name)
    for site, weight in zip(sites, weights, strict=True):
        mask = weight.mask.t() if site.transposed else weight.mask  # (N, K)
        if mask.shape[1] % pattern.group:
            return None
        kept = mask.reshape(-1, pattern.group).sum(1)
        if int(kept.max()) > pattern.keep:  # the layer counts its inputs along the other dimension
            return None
    return pattern.keep, pattern.group


def _is_better(together: Plan, apart: Sequence[Plan], rows: int | None) -> bool:
    """Whether one product is as fast as several, at the batch size or, if unknown, at all."""
    buckets = range(len(together.kernels)) if rows is None else (batch_bucket(rows),)
    if any(together.kernels[bucket] is Kernel.DENSE for bucket in buckets):
        return False  # the dense weights lie apart
    for bucket in buckets:
        times = [_time_of(plan, bucket) for plan in (together, *apart)]
        if times[0] is not None and None not in times and times[0] > sum(times[1:]):  # type: ignore[arg-type]
            return False
    return True


def _time_of(plan: Plan, bucket: int) -> float | None:
    """Measured milliseconds of the planned kernel."""
    return plan.times_ms.get(bucket, {}).get(plan.kernels[bucket])


def _product(
    positions: tuple[int, ...],
    sites: Sequence[WeightSite],
    weights: Sequence[MaskedWeight],
    plan: Plan,
) -> Product:
    formats = plan.needed
    if not formats and any(weight.is_released for weight in weights):
        formats = frozenset({default_format(weights[0].parameter.device)})
    members = tuple((site.index, site.transposed) for site in sites)
    return Product(tuple(positions), members, plan, formats)


def uses_cuda_graphs(config: CompileConfig) -> bool:
    """Whether mode or options ask Inductor for CUDA graphs."""
    from torch._inductor import list_mode_options

    name = "triton.cudagraphs"
    options: dict[str, Any] = list_mode_options(config.mode) if config.mode else {}
    return bool(config.inductor_options.get(name, options.get(name, False)))


def rows_and_dtype(site: WeightSite) -> tuple[int | None, torch.dtype | None]:
    """Rows of x (None if dynamic) and dtype of the product at ``site``."""
    out = site.node.meta.get("example_value")
    if not isinstance(out, Tensor):
        return None, None
    sizes = list(out.shape)
    del sizes[-2 if site.form == "matmul_left" else -1]
    if not all(isinstance(size, int) for size in sizes):
        return None, out.dtype
    rows = 1
    for size in sizes:
        rows *= size
    return rows, out.dtype
